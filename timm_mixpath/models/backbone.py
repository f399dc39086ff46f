"""Any network of timm that is made of depthwise-separable blocks, as a search space around its own weights.

`mixpath_supernet` is a supernet that begins as a copy of its backbone, `mixpath` a network of one arch. Both are the
network that timm builds, with some of its blocks exchanged (see `backbone_blocks`), so stem, head, features and
parameter names are timm's. Starting a supernet from a pretrained network is this package's own, not the paper's.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.layers import make_divisible
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    load_state_dict,
    register_model,
)
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from ..spaces.arch import Arch, BlockChoice
from ..spaces.backbone import BackboneSpace
from ..spaces.genotypes import MIXPATH_LITE0
from ..spaces.space import BlockSpec
from ..utils.errors import RunError, UsageError, concise
from ..utils.hub_client import WEIGHTS_NAME, hub_errors
from ..utils.modes import without_memory
from ..utils.numbers import as_int
from .backbone_blocks import SEARCHED_BLOCKS, BackboneChoice, BlockSite, fixed_block
from .layers import run_out_of_place
from .pretrained import (
    SOURCE_KEYS,
    add_weights,
    build_model,
    check_state_dict,
    config_beside,
    preprocessing_beside,
    readable,
)
from .supernet import BlockSupernet, Supernet

__all__ = [
    'DEFAULT_BACKBONE',
    'BackboneNet',
    'BackboneSupernet',
    'backbone_space',
    'check_backbone',
    'check_weights',
    'describe_origin',
    'difference',
    'inherited',
    'is_backbones',
    'list_backbones',
    'plain_network',
]


DEFAULT_BACKBONE = 'mobilenetv3_large_100'

# Kernels that every block may choose from, beside its own
_KERNEL_SIZES = (3, 5, 7)

_EXPANSIONS = (0.5, 0.75, 1.0)

# Networks of a fixed arch: their backbone and the arch
_DISCOVERED = {'mixpath_lite0': ('tf_efficientnet_lite0', MIXPATH_LITE0)}


class BackboneNet(nn.Module):
    """A network of timm with blocks of an arch in the place of its own, as a mixin in front of the network's class.

    Args:
        network: The network as timm built it. It is used up: its modules are those of the new one.
        space: Space around the backbone, of which the arch is.
        arch: Text or `Arch`, the backbone's own if None. Blocks of the arch inherit from those of `network`.

    Attributes:
        space: The space.
        arch: The arch.

    Raises:
        ValueError: The space does not hold the arch.
    """

    def __init__(self, network: nn.Module, space: BackboneSpace, arch: Arch | str | None = None) -> None:
        nn.Module.__init__(self)  # not the network's own, which would build another
        self.__dict__.update(network.__dict__)
        self.space = space
        self.arch = space.arch(arch) if arch is not None else space.default_arch
        for name in space.block_names:
            self.set_submodule(name, self.inherit(name, self.get_submodule(name)))
        run_out_of_place(self)

    def inherit(self, name: str, block: nn.Module) -> nn.Module:
        """Make the block of a name anew, with the weights that it inherits from a block of the backbone."""
        return fixed_block(block, self.arch.blocks[self.space.block_names.index(name)])

    def get_choice_blocks(self) -> dict[str, nn.Module]:
        """Return the blocks that an arch describes, in its order, by module name."""
        return _choice_blocks(self)


class BackboneSupernet(BlockSupernet):
    """A supernet around a network of timm, as a mixin in front of the network's class. See `Supernet`.

    Args:
        network: The network as timm built it. It is used up: its modules are those of the supernet.
        space: Space around the backbone.
        network_kwargs: Arguments with which timm built the network.
        arch: The arch that eval mode runs at first, the backbone's own if None.
        sum_norm: What normalises a sum of paths: `'sbn'`, Shadow Batch Normalization, or `'bn'`, one batch norm for all
            numbers of paths.
        seed: Seed of the sampled sequence.
        sampling: How archs are drawn, see `timm_mixpath.sample`.
        share_widths: Narrower expansions of a block use the weights of its widest one, those of their own channels;
            otherwise each has weights of its own.

    Raises:
        ValueError: The space does not hold the arch, or a name is unknown.
    """

    _supernet_args: ClassVar[tuple[str, ...]] = (
        *Supernet._supernet_args,
        'sum_norm',
        'kernel_sizes',
        'more_kernel_sizes',
        'expansions',
        'skip',
        'share_widths',
    )
    _sum_args = ()
    subnet_name = 'mixpath'

    def __init__(
        self,
        network: nn.Module,
        space: BackboneSpace,
        network_kwargs: dict[str, Any],
        arch: Arch | str | None = None,
        sum_norm: str = 'sbn',
        seed: int = 0,
        sampling: str = 'paths',
        share_widths: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        if sum_norm not in ('sbn', 'bn'):
            raise ValueError(f'unknown sum_norm {sum_norm!r}, known are sbn, bn')
        self.__dict__.update(network.__dict__)
        self.space = space
        self._active_arch = space.arch(arch) if arch is not None else space.default_arch
        self.sum_norm = sum_norm if any(spec.num_groups == 1 for spec in space.blocks) else 'bn'
        self.share_widths = share_widths
        self._network_kwargs = network_kwargs
        self._subnet_args = {'backbone': space.name}
        for name in space.block_names:
            self.set_submodule(name, self.inherit(name, self.get_submodule(name)))
        run_out_of_place(self)
        self._init_sampling(seed, sampling, next(self.parameters()).device)

    def inherit(self, name: str, block: nn.Module) -> nn.Module:
        """Make the choice block of a name anew, with the weights that it inherits from a block of the backbone."""
        num_shadows = self.space.max_paths if self.sum_norm == 'sbn' else None
        spec = self.space.blocks[self.space.block_names.index(name)]
        return BackboneChoice(block, spec, num_shadows, self.share_widths)

    def get_choice_blocks(self) -> dict[str, nn.Module]:
        """Return the blocks that an arch describes, in its order, by module name."""
        return _choice_blocks(self)

    def subnet_cls(self, space: BackboneSpace, arch: Arch, **kwargs: Any) -> BackboneNet:
        """Build the network of an arch."""
        return _build_net(space, arch, **kwargs)

    def make_empty(self, num_classes: int) -> 'BackboneSupernet':
        """Make a supernet of the same space without memory for weights, where each path has all that it takes.

        Args:
            num_classes: Number of classes.
        """
        kwargs = self.subnet_kwargs(num_classes)
        with without_memory():
            network = _build_network(self.space.name, **kwargs)
            return type(self)(network, self.space, kwargs, sum_norm='bn', share_widths=False).eval()


class EfficientNetMixPath(BackboneNet, EfficientNet):
    """See `BackboneNet`."""


class EfficientNetMixPathSupernet(BackboneSupernet, EfficientNet):
    """See `BackboneSupernet`."""


class MobileNetV3MixPath(BackboneNet, MobileNetV3):
    """See `BackboneNet`."""


class MobileNetV3MixPathSupernet(BackboneSupernet, MobileNetV3):
    """See `BackboneSupernet`."""


_NETS: dict[type[nn.Module], type[BackboneNet]] = {
    EfficientNet: EfficientNetMixPath,
    MobileNetV3: MobileNetV3MixPath,
}

_SUPERNETS: dict[type[nn.Module], type[BackboneSupernet]] = {
    EfficientNet: EfficientNetMixPathSupernet,
    MobileNetV3: MobileNetV3MixPathSupernet,
}

# Where timm has networks of these classes
_MODULES = ('efficientnet', 'hardcorenas', 'mobilenetv3')


def _choice_blocks(model: nn.Module) -> dict[str, nn.Module]:
    places = {name: tuple(map(int, name.split('.')[1:])) for name in model.space.block_names}
    # features_only may have taken the last stages
    return {name: model.blocks[i][j] for name, (i, j) in places.items() if i < len(model.blocks)}


def list_backbones(filter: str = '', pretrained: bool = False) -> list[str]:
    """Return the names of timm that can be the backbone of `mixpath_supernet` and `mixpath`.

    Every name that passes the filter is built once, without memory for its weights.

    Args:
        filter: Wildcard as in `timm.list_models`, for example `'mobilenet*'`.
        pretrained: Only those with pretrained weights, with the tag of the weights.

    Returns:
        Names in the order of `timm.list_models`.
    """
    names = timm.list_models(filter, module=list(_MODULES), pretrained=pretrained)
    return [name for name in names if _problem(name.partition('.')[0]) is None]


def backbone_space(
    backbone: str,
    kernel_sizes: Sequence[int] | None = None,
    expansions: Sequence[float] = _EXPANSIONS,
    skip: bool = True,
    m: int | None = None,
    more_kernel_sizes: Sequence[int] = _KERNEL_SIZES,
) -> BackboneSpace:
    """Make the search space around a backbone.

    Args:
        backbone: Name in timm, see `list_backbones`.
        kernel_sizes: Kernels that every block may choose from; `more_kernel_sizes` and the block's own if None.
        expansions: Expansions that every block may choose from, in shares of its own, which is among them. Blocks
            without an expansion keep what they have, and so do those that deal their channels out to several pointwise
            convolutions (some of mixnet).
        skip: Residual blocks may be left out.
        m: Largest number of paths that are summed, 2 if None.
        more_kernel_sizes: Kernels beside the block's own where `kernel_sizes` is None.

    Raises:
        UsageError: The name can't be a backbone, or a value is out of range; the message says why.
    """
    check_backbone(backbone)
    name = backbone.partition('.')[0]
    if not isinstance(skip, bool):
        raise UsageError(f'skip={skip!r} must be True or False')
    expansions = tuple(expansions) if isinstance(expansions, Iterable) else (expansions,)
    if not all(isinstance(share, int | float) and 0 < share <= 1 for share in expansions) or 1 not in expansions:
        raise UsageError(
            f'expansions={expansions} must be shares of the pretrained expansion, above 0 up to 1, and 1 itself '
            'has to be among them'
        )
    if kernel_sizes is not None:
        kernel_sizes = _as_kernel_sizes(kernel_sizes, 'kernel_sizes')
    more_kernel_sizes = _as_kernel_sizes(more_kernel_sizes, 'more_kernel_sizes')
    network = plain_network(name)
    specs: list[BlockSpec] = []
    choices: list[BlockChoice] = []
    block_names: list[str] = []
    for block_name, block, site in _sites(network):
        own_kernels, own_expansion = site.kernel_sizes(block), site.expand_ratio(block)
        if kernel_sizes is None:
            kernels = tuple(sorted({*more_kernel_sizes, *own_kernels}))
        else:
            kernels = kernel_sizes
            if missing := sorted(set(own_kernels) - set(kernels)):
                raise UsageError(
                    f'kernel_sizes={kernels} lack the {missing[0]} that {block_name} of {name} was trained with; '
                    'add it, or leave kernel_sizes out'
                )
        specs.append(
            BlockSpec(
                out_chs=_out_channels(block, site),
                stride=_stride(block),
                expand_ratios=_expand_ratios(block, site, expansions),
                kernel_sizes=kernels,
                num_groups=len(own_kernels),
                can_skip=skip and block.has_skip,
            )
        )
        choices.append(BlockChoice(tuple((k,) for k in own_kernels), own_expansion))
        block_names.append(block_name)
    cfg = get_pretrained_cfg(backbone) or get_pretrained_cfg(name)
    try:
        space = BackboneSpace(
            name,
            tuple(specs),
            Arch.from_blocks(choices),
            tuple(block_names),
            max_paths=1,
            input_size=tuple(cfg.input_size),
            num_classes=cfg.num_classes,
            description=f'Around the {len(specs)} depthwise-separable blocks of {name}',
        )
        return space.with_max_paths(min(2, space.max_paths_limit) if m is None else m)
    except ValueError as e:
        raise UsageError(str(e)) from None


def _as_kernel_sizes(value: Any, option: str) -> tuple[int, ...]:
    sizes = tuple(map(as_int, value)) if isinstance(value, Iterable) else (value,)
    if not all(type(size) is int for size in sizes):
        raise UsageError(f'{option}={value!r} must be odd numbers, such as 3,5,7')
    return sizes


def check_backbone(backbone: str) -> None:
    """Check that a name can be a backbone.

    Raises:
        UsageError: It can not; the message says why.
    """
    if not isinstance(backbone, str) or not re.fullmatch(r'[\w.-]+', backbone):
        raise UsageError(
            f'backbone={backbone!r} must be the name of a network in timm; weights from elsewhere come in with '
            'timm_mixpath.warm_start(supernet, model)'
        )
    name, dot, tag = backbone.partition('.')
    if problem := _problem(name):
        raise UsageError(f'{name!r} can not be a backbone: {problem}')
    tags = [full.partition('.')[2] for full in timm.list_models(f'{name}.*', pretrained=True)]
    if dot and tag not in tags:
        known = f'there are {", ".join(tags)}' if tags else 'timm has none'
        raise UsageError(f'{name} has no weights with the tag {tag!r}, {known}')


@cache
def _problem(name: str) -> str | None:
    """Why a name can't be a backbone, None if it can."""
    if not is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(module=list(_MODULES)), 1)
        hint = f', did you mean {near[0]!r}?' if near else ';'
        return f'timm has no such model{hint} timm_mixpath.list_backbones() names those that can be one'
    if name.startswith('mixpath'):
        return 'it is a network of this package'
    try:
        network = plain_network(name)
    except Exception as e:  # whatever a model of somebody else raises on the meta device
        return f'it can not be built without memory for its weights ({concise(e)})'
    if type(network) not in _SUPERNETS:
        return (
            f'timm builds it as {type(network).__name__}, and only networks of its classes '
            f'{" and ".join(cls.__name__ for cls in _SUPERNETS)} can be searched'
        )
    if next(_sites(network), None) is None:
        reasons = {type(block): site for _, block, site in _all_sites(network)}
        nearest = next((reason for kind, reason in reasons.items() if kind in SEARCHED_BLOCKS), None)
        return f'none of its blocks can be searched: {nearest or next(iter(reasons.values()))}'
    return None


@cache
def plain_network(name: str) -> nn.Module:
    """Return a network as timm builds it, on the meta device; only to look at."""
    with without_memory():
        return timm.create_model(name)


def _all_sites(network: nn.Module) -> Iterator[tuple[str, nn.Module, BlockSite | str]]:
    for stage_index, stage in enumerate(network.blocks):
        for block_index, block in enumerate(stage):
            yield f'blocks.{stage_index}.{block_index}', block, BlockSite.of(block)


def _sites(network: nn.Module) -> Iterator[tuple[str, nn.Module, BlockSite]]:
    return ((name, block, site) for name, block, site in _all_sites(network) if isinstance(site, BlockSite))


def _out_channels(block: nn.Module, site: BlockSite) -> int:
    return block.get_submodule(site.project or site.linear).out_channels


def _stride(block: nn.Module) -> int:
    strides = [module.stride for module in block.modules() if hasattr(module, 'stride')]  # of a blur too
    return max(stride[0] if isinstance(stride, tuple) else stride for stride in strides)


def _expand_ratios(block: nn.Module, site: BlockSite, shares: Sequence[float]) -> tuple[int | float, ...]:
    own = site.expand_ratio(block)
    if not site.can_narrow(block):
        return (own,)
    in_chs = block.get_submodule(site.expand).in_channels
    # Several shares may round to one width, of which the largest names it
    ratios = {make_divisible(in_chs * own): own}
    for share in sorted(shares, reverse=True):
        ratio = round(own * share, 4)
        ratios.setdefault(make_divisible(in_chs * ratio), int(ratio) if ratio == int(ratio) else ratio)
    return tuple(sorted(ratios.values()))


def _including(space: BackboneSpace, arch: Arch | str | None) -> BackboneSpace:
    """The space with what an arch of the same blocks needs beyond it, for a network that is not searched any more."""
    arch = Arch(arch) if arch is not None else space.default_arch
    blocks = list(space.blocks)
    for index, (spec, choice) in enumerate(zip(blocks, arch.blocks)):
        kernels = {*spec.kernel_sizes, *(k for group in choice.groups for k in group)}
        ratios = set(spec.expand_ratios)
        if 0 < choice.expand_ratio < max(ratios) and ratios != {1}:
            ratios.add(choice.expand_ratio)
        blocks[index] = replace(spec, kernel_sizes=tuple(sorted(kernels)), expand_ratios=tuple(sorted(ratios)))
    space = replace(space, blocks=tuple(blocks))
    return space.with_max_paths(space.max_paths_limit)


def _build_network(
    name: str, make: Callable[..., nn.Module] | None = None, *, output_stride: int = 32, **kwargs: Any
) -> nn.Module:
    """A network as timm builds it, or `make` with the same arguments, dilated for a smaller output stride.

    Of its class MobileNetV3 timm builds dilated blocks for `features_only` alone, without a head.
    """
    make = make or partial(timm.create_model, name)
    if output_stride == 32:
        return make(**kwargs)
    if type(plain_network(name)) is EfficientNet:
        return make(output_stride=output_stride, **kwargs)
    network = make(**kwargs)
    dilated = timm.create_model(name, features_only=True, output_stride=output_stride, **kwargs)
    dilated.blocks.load_state_dict(network.blocks.state_dict(), assign=True)
    network.blocks, network.feature_info = dilated.blocks, dilated.feature_info.info
    return network


def _build_net(space: BackboneSpace, arch: Arch | str | None, **kwargs: Any) -> BackboneNet:
    network = _build_network(space.name, **kwargs)
    return _NETS[type(network)](network, _including(space, arch), arch)


def _create(variant: str, pretrained: bool, backbone: str | None = None, **kwargs: Any) -> nn.Module:
    """Create a model through timm's builder.

    Weights that the pretrained cfg names are the model's own, unless they are a file of the backbone's. Where it names
    none, `pretrained` means those of the backbone.
    """
    cfg = kwargs.pop('pretrained_cfg', None)
    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    sources = {key: overlay[key] for key in SOURCE_KEYS if overlay.get(key)}
    config = config_beside(sources['file']) if pretrained and sources.get('file') else {}
    if backbone is None:
        of_file = config.get('model_args') or {} if config.get('architecture') == variant else {}
        backbone = of_file.get('backbone', DEFAULT_BACKBONE)
    check_backbone(backbone)
    name = backbone.partition('.')[0]
    if isinstance(cfg, PretrainedCfg):
        cfg = cfg.to_dict()
    is_own = isinstance(cfg, str) or any((cfg or {}).get(key) for key in SOURCE_KEYS)
    if variant in _DISCOVERED:  # whose weights are not the backbone's, unless such are named
        is_own = not sources
    num_classes = None
    if config.get('architecture') == variant:
        is_own = True
    elif pretrained and sources and not is_own:
        is_own, num_classes = _look_into(sources, backbone)
    if not cfg:
        cfg = _backbone_cfg(backbone, variant)
    from_backbone = pretrained and not is_own
    network_cfg: dict[str, Any] = {}
    if from_backbone:
        if variant in _DISCOVERED:
            cfg = _backbone_cfg(backbone, variant)
        network_cfg = {**({} if num_classes is None else {'num_classes': num_classes}), **overlay}
        where = next((str(v) if isinstance(v, str | Path) else 'a state dict' for v in sources.values()), '')
        cfg = {**cfg, 'notes': (describe_origin(backbone, where),)}
        if sources.get('file'):
            cfg.update(preprocessing_beside(sources['file']))
        overlay = {key: value for key, value in overlay.items() if key not in SOURCE_KEYS}

    def make_network(**network_kwargs: Any) -> nn.Module:
        network_kwargs['cache_dir'] = kwargs.get('cache_dir')
        make = partial(_pretrained_network, backbone, network_cfg) if from_backbone else None
        return _build_network(name, make, **network_kwargs)

    def make_model(
        arch: str | None = None,
        kernel_sizes: Sequence[int] | None = None,
        expansions: Sequence[float] = _EXPANSIONS,
        skip: bool = True,
        m: int | None = None,
        sum_norm: str = 'sbn',
        seed: int = 0,
        sampling: str = 'paths',
        share_widths: bool = True,
        backbone: str = backbone,  # which config.json says of own weights
        more_kernel_sizes: Sequence[int] | None = None,
        **network_kwargs: Any,
    ) -> nn.Module:
        if backbone.partition('.')[0] != name:
            raise UsageError(f'the weights are of a network around {backbone}, not {name}; pass backbone={backbone!r}')
        if not isinstance(share_widths, bool):
            raise UsageError(f'share_widths={share_widths!r} must be True or False')
        more_kernel_sizes = _KERNEL_SIZES if more_kernel_sizes is None else more_kernel_sizes
        more_kernel_sizes = _as_kernel_sizes(more_kernel_sizes, 'more_kernel_sizes')
        space = backbone_space(backbone, kernel_sizes, expansions, skip, m, more_kernel_sizes)
        if not variant.endswith('_supernet'):
            space = _including(space, arch)
            space.arch(arch if arch is not None else space.default_arch)  # before anything is loaded
            network = make_network(**network_kwargs)
            model = _NETS[type(network)](network, space, arch)
            if variant not in _DISCOVERED:
                model._model_args = dict(backbone=backbone, arch=str(model.arch))  # whatever the defaults were
            return model
        if arch is not None:
            space.arch(arch)
        network = make_network(**network_kwargs)
        own = {key: value for key, value in network_kwargs.items() if key not in ('device', 'dtype')}
        model = _SUPERNETS[type(network)](network, space, own, arch, sum_norm, seed, sampling, share_widths)
        model._model_args = dict(backbone=backbone, expansions=expansions, skip=skip, share_widths=share_widths)
        if kernel_sizes is None:
            model._model_args['more_kernel_sizes'] = list(more_kernel_sizes)
        return model

    def check(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        try:
            return check_state_dict(state_dict, model)
        except RunError as e:
            if not sources:
                raise
            raise RunError(f'{e}; nor are they those of its backbone {backbone}') from None

    return build_model(
        make_model,
        variant,
        pretrained and is_own,
        num_features=len(plain_network(name).feature_info),
        filter_fn=check,
        bind_bn_args=False,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )


def _look_into(sources: dict[str, Any], backbone: str) -> tuple[bool, int | None]:
    """Whether weights are a model's own, not those of its backbone, and for how many classes they are."""
    state_dict = sources.get('state_dict')
    if state_dict is None:
        if not (path := sources.get('file')):
            return not sources.get('url'), None
        if not Path(path).is_file():
            if Path(path).is_dir():
                return True, None
            raise UsageError(f'weights file {str(path)!r} does not exist')
        with readable(backbone, sources):
            state_dict = load_state_dict(path, device='cpu', weights_only=True)
    name = backbone.partition('.')[0]
    weight = state_dict.get(f'{plain_network(name).pretrained_cfg["classifier"]}.weight')
    return _backbone_difference(state_dict, name) is not None, None if weight is None else weight.shape[0]


def difference(
    given: dict[str, Any], expected: dict[str, torch.Tensor], left_out: str | tuple[str, ...] = ()
) -> str | None:
    """Say what some weights have otherwise than those of a network, None if names and shapes are the same.

    Args:
        given: The weights.
        expected: Those of the network.
        left_out: What the names of those begin with that do not matter.
    """
    for key in sorted({*given, *expected}):
        found, needed = (getattr(tensors.get(key), 'shape', None) for tensors in (given, expected))
        if found != needed and not key.startswith(left_out):
            found, needed = (f'shape {tuple(shape)}' if shape is not None else 'nothing' for shape in (found, needed))
            return f'they have {found} at {key}, it has {needed}'
    return None


def _backbone_difference(state_dict: dict[str, Any], name: str) -> str | None:
    """What weights have otherwise than a backbone, beside classes and input channels."""
    network = plain_network(name)
    adapted = (f'{network.pretrained_cfg["classifier"]}.', f'{network.pretrained_cfg["first_conv"]}.')
    return difference(state_dict, network.state_dict(), adapted)


def is_backbones(state_dict: dict[str, Any], model: nn.Module) -> bool:
    """Whether weights are those of the backbone of a model, with any classes and input channels."""
    is_on_one = isinstance(model, BackboneNet | BackboneSupernet)
    return is_on_one and _backbone_difference(state_dict, model.space.name) is None


def check_weights(backbone: str, path: str) -> None:
    """Check that a file holds weights of a backbone: timm loads what fits where the classes differ, and no more.

    Raises:
        UsageError: There is no such file, or it holds those of another network.
        RunError: It can't be read.
    """
    name = backbone.partition('.')[0]
    if Path(path).is_dir():
        raise UsageError(f'weights {str(path)!r} are a folder; name the file in it, such as its {WEIGHTS_NAME}')
    if not Path(path).is_file():
        raise UsageError(f'weights file {str(path)!r} does not exist')
    with readable(name, {'file': path}):
        state_dict = load_state_dict(path, device='cpu', weights_only=True)
    if problem := _backbone_difference(state_dict, name):
        raise UsageError(f'the weights in {str(path)!r} are not those of {name}: {problem}')


def _pretrained_network(backbone: str, overlay: dict[str, Any], **kwargs: Any) -> nn.Module:
    cfg = get_pretrained_cfg(backbone)
    if not (cfg.has_weights or any(overlay.get(key) for key in SOURCE_KEYS)):
        raise RunError(
            f'timm has no pretrained weights of {backbone}; name a file of them with '
            "pretrained_cfg_overlay=dict(file='model.safetensors'), or start from nothing without pretrained=True"
        )
    place = overlay.get('file') or overlay.get('hf_hub_id') or cfg.hf_hub_id or cfg.url
    with readable(backbone, {'file': place}) if overlay.get('file') else hub_errors(place):
        return timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def describe_origin(name: str, path: str = '') -> str:
    """Say from which weights a warm start was, for a model card.

    Args:
        name: Name in timm, with or without a tag, or a source such as `local-dir:DIR`.
        path: File of the weights, where it was not timm's own.
    """
    cfg = None if ':' in name else get_pretrained_cfg(name)
    if path or cfg is None:
        base = name.partition('.')[0]
        if ':' in name:  # of a folder its name, not where it is
            kind, _, place = name.partition(':')
            base = f'the folder {Path(place).name}' if kind == 'local-dir' else name
        place = f' in {Path(path).name}' if path else ''
        return f'warm start from weights of {base}{place}, whose licence is not recorded'
    tagged = name if '.' in name or not cfg.tag else f'{name}.{cfg.tag}'
    return f'warm start from {tagged}, whose weights are under the licence {cfg.license or "unknown"}'


def inherited(model: BackboneNet | BackboneSupernet, source: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a model inherits from its backbone, see `timm_mixpath.warm_start`."""
    blocks = tuple(f'{block}.' for block in model.space.block_names)
    weights = {key: value for key, value in source.state_dict().items() if not key.startswith(blocks)}
    for name in model.get_choice_blocks():
        fresh = model.inherit(name, source.get_submodule(name))
        weights.update({f'{name}.{key}': value for key, value in fresh.state_dict().items()})
    return weights


def _backbone_cfg(backbone: str, variant: str) -> dict[str, Any]:
    """The pretrained cfg of a model on a backbone: the backbone's, without its weights."""
    cfg = get_pretrained_cfg(backbone).to_dict(remove_source=True)
    for key in ('custom_load', 'tag'):
        cfg.pop(key, None)
    return {**cfg, 'architecture': variant}


def _create_discovered(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    backbone, genotype = _DISCOVERED[variant]
    for name in ('backbone', 'arch'):
        if name in kwargs:
            raise ValueError(f'{variant} has a fixed {name}; use mixpath with {name}={kwargs[name]!r}')
    cfg = kwargs.pop('pretrained_cfg', None) or get_pretrained_cfg(variant)
    return _create(variant, pretrained, backbone=backbone, arch=genotype, pretrained_cfg=cfg, **kwargs)


default_cfgs = generate_default_cfgs(
    add_weights(
        {
            'mixpath.untrained': _backbone_cfg(DEFAULT_BACKBONE, 'mixpath'),
            'mixpath_supernet.untrained': _backbone_cfg(DEFAULT_BACKBONE, 'mixpath_supernet'),
            **{f'{name}.untrained': _backbone_cfg(backbone, name) for name, (backbone, _) in _DISCOVERED.items()},
        }
    )
)


@register_model
def mixpath(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Network of timm, `backbone`, with blocks of the given `arch`; `pretrained` starts it from the backbone's weights.

    See `backbone_space` for what an arch is made of.
    """
    return _create('mixpath', pretrained, **kwargs)


@register_model
def mixpath_supernet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Supernet around a network of timm, `backbone`; `pretrained` starts it from the backbone's weights.

    Arguments beside those of the backbone: `arch`, `kernel_sizes`, `expansions`, `skip` and `m` as in `backbone_space`;
    `sum_norm`, `seed`, `sampling` and `share_widths` as in `BackboneSupernet`.
    """
    return _create('mixpath_supernet', pretrained, **kwargs)


@register_model
def mixpath_lite0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientNet-Lite0 with the depthwise kernels and expansions that a search around it chose, on Imagenette at the
    backbone's cost. Not in the paper; found by `timm-mixpath adapt`.
    """
    return _create_discovered('mixpath_lite0', pretrained, **kwargs)
