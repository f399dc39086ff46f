"""A space that is small enough to go through all of its 512 archs."""

from timm_mixpath import BlockSpec, SearchSpace

TINY = SearchSpace(
    name='tiny_for_tests',
    blocks=(BlockSpec(8, kernel_sizes=(3, 5, 7)), BlockSpec(8, 2, (3, 6), (3, 5)), BlockSpec(16, 1, (2, 4), (3, 5))),
    stem_chs=8,
    num_features=16,
    max_paths=2,
    input_size=(3, 8, 8),
)
