"""The space around a network of timm: what each of its blocks could be instead."""

from dataclasses import dataclass, replace

from .arch import Arch
from .space import BlockSpace, BlockSpec

__all__ = ['BackboneSpace']


@dataclass(frozen=True)
class BackboneSpace(BlockSpace):
    """The search space around a backbone, a network of timm; `timm_mixpath.backbone_space` makes it.

    Every block with a depthwise convolution chooses an expansion and, per channel group, 1 to `max_paths` kernels; a
    residual one may be skipped. What else there is stays the backbone's own.

    Attributes:
        name: Name of the backbone in timm, without a tag.
        blocks: The choice blocks in order.
        backbone_arch: The arch that is the backbone itself, the default.
        block_names: Names of the choice blocks' modules, such as `'blocks.1.0'`.
        max_paths: m of the paper, the largest number of paths that may be active in a channel group of a block.
        input_size: Default input as (channels, height, width), in pixels.
        num_classes: Default number of classes.
        description: One line for listings.

    Raises:
        ValueError: `max_paths` is out of range, there is no block, or the backbone's arch is not in the space.
    """

    name: str
    blocks: tuple[BlockSpec, ...]
    backbone_arch: Arch
    block_names: tuple[str, ...]
    max_paths: int = 2
    input_size: tuple[int, int, int] = (3, 224, 224)
    num_classes: int = 1000
    description: str = ''

    def __post_init__(self) -> None:
        self._check_blocks()
        object.__setattr__(self, 'backbone_arch', self.arch(self.backbone_arch))

    @property
    def default_arch(self) -> Arch:
        """The arch of the backbone itself."""
        return self.backbone_arch

    def without_more(self) -> 'BackboneSpace':
        """Return the part in which nothing is more than in the backbone: one kernel per group, up to its block's."""
        blocks = []
        for spec, choice in zip(self.blocks, self.backbone_arch.blocks):
            largest = max(max(group) for group in choice.groups)
            blocks.append(replace(spec, kernel_sizes=[k for k in spec.kernel_sizes if k <= largest]))
        return replace(self, blocks=tuple(blocks), max_paths=1)
