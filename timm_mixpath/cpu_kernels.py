"""Import this to compute gradients of large depthwise convolutions on a CPU with this package's kernel.

It does what `timm-mixpath train --cpu-kernels` does for scripts that take modules to import:
`python train.py --device-modules timm_mixpath.hook timm_mixpath.cpu_kernels ...`. See `models.cpu_kernels`.
"""

from .models.cpu_kernels import cpu_kernel_calls, use_cpu_kernels

__all__ = ['cpu_kernel_calls', 'use_cpu_kernels']

use_cpu_kernels()
