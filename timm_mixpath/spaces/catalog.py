"""The search spaces by name: S1, S2, S3, nano, the benchmarks, and those that users add."""

from functools import partial

from .nasbench import NB101Space, NB201Space
from .space import BlockSpec, SearchSpace, Space

__all__ = ['add_space', 'get_space', 'list_spaces']


def _s1() -> SearchSpace:
    # The released code's CIFAR space, facts only: channels, strides and choices.
    channels = (48, 48, 96, 96, 96, 192, 192, 192, 256, 256, 320, 320)
    return SearchSpace(
        name='s1',
        blocks=tuple(BlockSpec(c, stride=2 if i in (2, 5) else 1) for i, c in enumerate(channels)),
        stem_chs=32,
        num_features=1280,
        max_paths=4,
        description='S1 of MixPath for CIFAR: 12 blocks, kernels 3 5 7 9, expansions 3 6',
    )


def _nano() -> SearchSpace:
    # Half the resolution of S1 from the stem on: on a CPU the weight gradients of large depthwise kernels are what a
    # training step costs, and they grow with the area.
    channels = (24, 24, 48, 48, 48, 96, 96, 96)
    return SearchSpace(
        name='nano',
        blocks=tuple(
            BlockSpec(c, stride=2 if i in (2, 5) else 1, kernel_sizes=(3, 5, 7)) for i, c in enumerate(channels)
        ),
        stem_chs=24,
        stem_stride=2,
        num_features=384,
        max_paths=2,
        description='The design of S1 made for 2 CPU cores (not in the paper): 8 blocks, kernels 3 5 7, expansions 3 6',
    )


def _on_mixnet_m(name: str, num_groups: int, max_paths: int, description: str) -> SearchSpace:
    # timm's mixnet_m with its depthwise kernels left open; one row per stage: its first block, then the others
    block = partial(_mixnet_block, num_groups)
    blocks = (
        block(32, 2, 6, (2, 2)), block(32, 1, 3, (2, 2)),
        block(40, 2, 6, (1, 1), 0.5), *[block(40, 1, 6, (2, 2), 0.5)] * 3,
        block(80, 2, 6, (1, 1), 0.25), *[block(80, 1, 6, (2, 2), 0.25)] * 3,
        block(120, 1, 6, (1, 1), 0.5), *[block(120, 1, 3, (2, 2), 0.5)] * 3,
        block(200, 2, 6, (1, 1), 0.5), *[block(200, 1, 6, (1, 2), 0.5)] * 3,
    )  # fmt: skip
    return SearchSpace(
        name=name,
        blocks=blocks,
        stem_chs=24,
        stem_stride=2,
        ds_chs=24,
        num_features=1536,
        max_paths=max_paths,
        act_layer='relu',
        fix_group_fanout=True,
        input_size=(3, 224, 224),
        num_classes=1000,
        description=description,
    )


def _mixnet_block(
    num_groups: int,
    out_chs: int,
    stride: int,
    expand_ratio: int,
    pointwise_groups: tuple[int, int],
    se_ratio: float = 0.0,
) -> BlockSpec:
    return BlockSpec(
        out_chs,
        stride,
        expand_ratios=(expand_ratio,),
        num_groups=num_groups,
        exp_groups=pointwise_groups[0],
        pwl_groups=pointwise_groups[1],
        se_ratio=se_ratio,
        act_layer='swish' if se_ratio else None,
    )


def _s2() -> SearchSpace:
    return _on_mixnet_m(
        's2',
        num_groups=1,
        max_paths=2,
        description='S2 for ImageNet, reconstructed: 18 blocks of mixnet_m, up to m kernels of 3 5 7 9 summed',
    )


def _s3() -> SearchSpace:
    return _on_mixnet_m(
        's3',
        num_groups=4,
        max_paths=1,
        description='S3 for ImageNet, reconstructed: 18 blocks of mixnet_m, up to m kernels of 3 5 7 9 in 4 groups',
    )


_spaces: dict[str, Space] = {space.name: space for space in (_s1(), _s2(), _s3(), _nano(), NB201Space(), NB101Space())}


def add_space(space: SearchSpace) -> None:
    """Make a space known to `get_space`; `timm_mixpath.register_space` calls it and registers the models too."""
    known = _spaces.get(space.name)
    if known is not None and known != space:
        raise ValueError(f'a different space named {space.name!r} exists already, choose another name')
    _spaces[space.name] = space


def get_space(name: str, m: int | None = None) -> Space:
    """Return a search space by name.

    Args:
        name: One of `list_spaces()`.
        m: Largest number of active paths per block, the space's own default if None.

    Raises:
        ValueError: Unknown name, or m out of range.
    """
    if name not in _spaces:
        raise ValueError(f'unknown search space {name!r}, known are {", ".join(list_spaces())}')
    return _spaces[name].with_max_paths(m)


def list_spaces() -> list[str]:
    """Return the names of all search spaces, sorted."""
    return sorted(_spaces)
