"""Archs of the discovered models.

The paper draws the genotypes of MixPath-A, -B and -c in figures only. These are reconstructions: found by this
package's own search, inside the budgets that were published. `recipes/genotypes/` tells how each was found.
"""

__all__ = ['MIXPATH_A', 'MIXPATH_B', 'MIXPATH_C', 'MIXPATH_LITE0', 'MIXPATH_NANO']


# S3, m = 1
MIXPATH_A = (
    'k5.5.3.7_e6,k5.3.9.3_e3,'
    'k3.3.5.3_e6,k7.3.5.9_e6,k7.5.3.9_e6,k7.3.3.5_e6,'
    'k5.7.9.3_e6,k7.9.7.9_e6,k3.5.5.3_e6,k7.5.5.3_e6,'
    'k7.3.3.5_e6,k5.7.5.3_e3,k9.3.3.3_e3,k5.5.3.3_e3,'
    'k9.9.7.9_e6,k5.7.3.3_e6,k3.9.3.3_e6,k9.5.9.5_e6'
)

# S2, m = 2
MIXPATH_B = (
    'k5+7_e6,k5+7_e3,'
    'k3_e6,k3_e6,k3_e6,k5_e6,'
    'k7+9_e6,k3+7_e6,k5_e6,k3_e6,'
    'k3_e6,k3_e3,k3+5_e3,k9_e3,'
    'k3+9_e6,k3+7_e6,k3_e6,k5+7_e6'
)

# S1
MIXPATH_C = 'k7_e3,k3+5+7_e6,k3+5+7+9_e3,k3_e6,k3+5+7+9_e3,k3+9_e3,k3+5+7+9_e3,k9_e3,k3+5+7+9_e6,k5_e6,k9_e6,k3+9_e3'

# Around tf_efficientnet_lite0, m = 2; not in the paper
MIXPATH_LITE0 = 'k3_e1,k3_e4.5,k3_e6,k5_e6,k5_e6,k3_e6,k3_e3,k3_e6,k5_e4.5,k5_e6,k5+7_e6,k5_e6,k5_e6,k3_e6,k5_e6,k3_e6'

# nano, m = 2; not in the paper. Found by the search in recipes/README.md
MIXPATH_NANO = 'k3+7_e6,k3_e3,k3+7_e6,k3+7_e3,k3+7_e3,k3+7_e6,k3+5_e3,k3+5_e3'
