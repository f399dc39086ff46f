"""MixPath networks, after `MixPath: A Unified Approach for One-shot Neural Architecture Search` (ICCV 2023).

Paper: https://arxiv.org/abs/2001.05887

`mixpath_a`, `mixpath_b` and `mixpath_c` are reconstructions of the discovered models, see
`timm_mixpath.spaces.genotypes`. `mixpath_<space>` is a stand-alone network of a given arch,
`mixpath_<space>_supernet` the one-shot network that holds every arch of the space. Space S1 follows the published
description; S2 and S3 are reconstructions on the backbone that the published budgets point to, timm's mixnet_m; `nano`
is this package's own.
"""

import re
import sys
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn
from timm.layers import LayerType, create_classifier, create_conv2d, get_act_layer, get_norm_act_layer
from timm.models import generate_default_cfgs, is_model, register_model
from timm.models.efficientnet import EfficientNet, efficientnet_init_weights

from ..spaces.arch import Arch
from ..spaces.catalog import add_space, get_space, list_spaces
from ..spaces.genotypes import MIXPATH_A, MIXPATH_B, MIXPATH_C, MIXPATH_NANO
from ..spaces.space import BlockSpec, SearchSpace
from ..utils.errors import as_usage_error
from ..utils.modes import without_memory
from ._timm import init_weight_goog
from .blocks import DepthwiseSeparable, MultiPathResidual, spec_kwargs
from .choice_blocks import ActivePathSum, ChoiceBlock
from .layers import ReLU6FromOutput, fold_bn, saves_its_output
from .pretrained import add_weights, build_model, check_state_dict, space_cfg
from .released import checkpoint_filter_fn, remap_state_dict
from .supernet import BlockSupernet, Supernet

__all__ = ['BUILTIN_SPACES', 'MixPath', 'MixPathSupernet', 'register_space']


BUILTIN_SPACES = frozenset(list_spaces())  # those that are known before anybody registers one


class MixPath(EfficientNet):
    """A network of a MixPath search space: stem, multi-path inverted bottlenecks, head.

    Features, classifier, pruning and parameter groups are timm's EfficientNet; constructor, blocks and folding are not.

    Args:
        space: Search space.
        arch: Text or `Arch`, the space's `default_arch` if None. Any number of paths per block is allowed.
        num_classes: Number of classes.
        in_chans: Input channels.
        width_mult: Multiplier of all widths, see `SearchSpace.scaled`.
        output_stride: Largest stride of the features, more is turned into dilation.
        act_layer: Activation, the space's if None. As in timm, blocks for which the space names an activation of
            their own keep it.
        norm_layer: Normalisation.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth rate of the last block, growing linearly.
        global_pool: Global pooling.
        norm_sums: In a space with channel groups, put a batch norm behind the sums, see `MultiPathResidual`. If None,
            the network has them when its arch sums paths. Networks extracted from a supernet with m > 1 always do.

    Raises:
        ValueError: The space does not hold the arch.
    """

    def __init__(
        self,
        space: SearchSpace,
        arch: Arch | str | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        width_mult: float = 1.0,
        output_stride: int = 32,
        act_layer: LayerType | None = None,
        norm_layer: LayerType | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = 'avg',
        norm_sums: bool | None = None,
        device=None,
        dtype=None,
    ) -> None:
        nn.Module.__init__(self)  # EfficientNet's own constructor builds blocks of a fixed set of types
        dd = {'device': device, 'dtype': dtype}
        self._set_space(space.scaled(width_mult), arch, norm_sums)
        space = self.space
        act_layer = _find_act_layer(act_layer or space.act_layer)
        norm_layer = norm_layer or nn.BatchNorm2d
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        # Stem
        self.conv_stem = create_conv2d(in_chans, space.stem_chs, 3, stride=space.stem_stride, **dd)
        self.bn1 = norm_act_layer(space.stem_chs, inplace=saves_its_output(act_layer), **dd)

        # Stages of blocks, feature taps as timm's EfficientNetBuilder places them
        stages = _fixed_stages(space) + space.stages
        num_blocks = sum(map(len, stages))
        in_chs, block_index, reduction, dilation = space.stem_chs, 0, space.stem_stride, 1
        self.feature_info = []
        if stages[0][0].stride > 1:
            self.feature_info.append(dict(module='bn1', num_chs=in_chs, stage=0, reduction=reduction))
        choice_index = 0
        layers = []
        for stage_index, stage in enumerate(stages):
            blocks = []
            for spec in stage:
                stride, block_dilation = spec.stride, dilation
                if stride > 1:
                    if reduction * stride > output_stride:
                        dilation *= stride
                        stride = 1
                    else:
                        reduction *= stride
                kwargs = dict(
                    stride=stride,
                    dilation=block_dilation,
                    act_layer=_find_act_layer(spec.act_layer) if spec.act_layer else act_layer,
                    norm_layer=norm_layer,
                    drop_path_rate=drop_path_rate * block_index / num_blocks,
                    **dd,
                )
                if spec.kernel_sizes:
                    blocks.append(self._make_block(choice_index, in_chs, spec, **kwargs))
                    choice_index += 1
                else:
                    blocks.append(DepthwiseSeparable(in_chs, spec.out_chs, **kwargs))
                in_chs = spec.out_chs
                block_index += 1
            layers.append(nn.Sequential(*blocks))
            if stage_index + 1 == len(stages) or stages[stage_index + 1][0].stride > 1:
                self.feature_info.append(
                    dict(module=f'blocks.{stage_index}', num_chs=in_chs, stage=stage_index + 1, reduction=reduction)
                )
        self.blocks = nn.Sequential(*layers)
        self.stage_ends = [f['stage'] for f in self.feature_info]

        # Head + Pooling
        self.conv_head = create_conv2d(in_chs, space.num_features, 1, **dd)
        self.bn2 = norm_act_layer(space.num_features, inplace=saves_its_output(act_layer), **dd)
        self.num_features = space.num_features
        self.global_pool, self.classifier = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        efficientnet_init_weights(self, partial(init_weight_goog, fix_group_fanout=space.fix_group_fanout))

    def _set_space(self, space: SearchSpace, arch: Arch | str | None, norm_sums: bool | None) -> None:
        # m bounds the search, not what a stand-alone network may be made of
        self.space = space.with_max_paths(space.max_paths_limit)
        self.arch = self.space.arch(arch) if arch is not None else space.default_arch
        if norm_sums is None:
            norm_sums = any(max(choice.num_paths) > 1 for choice in self.arch.blocks)
        self.group_norm_sums = norm_sums

    def _make_block(self, index: int, in_chs: int, spec: BlockSpec, **kwargs: Any) -> nn.Module:
        choice = self.arch.blocks[index]
        return MultiPathResidual(
            in_chs,
            spec.out_chs,
            choice.groups,
            choice.expand_ratio,
            norm_sums=self.group_norm_sums and spec.num_groups > 1,
            **spec_kwargs(spec),
            **kwargs,
        )

    def get_choice_blocks(self) -> dict[str, nn.Module]:
        """Return the blocks that an arch describes, in its order, by module name."""
        return {
            f'blocks.{stage_index}.{block_index}': block
            for stage_index, stage in enumerate(self.blocks)
            for block_index, block in enumerate(stage)
            if not isinstance(block, DepthwiseSeparable)
        }

    def reparameterize(self) -> None:
        """Fold the batch norms of stem and head into the convolutions, in place, as the blocks do with theirs.

        `timm.utils.reparameterize_model` asks the parts of a model, not the model itself: it calls this where the
        network is part of another, and leaves stem and head alone otherwise.
        """
        fold_bn(self, 'conv_stem', 'bn1')
        fold_bn(self, 'conv_head', 'bn2')


def _find_act_layer(act_layer: LayerType) -> Any:
    try:
        return get_act_layer(act_layer)
    except KeyError:
        raise ValueError(f'unknown activation {act_layer!r}; give one of timm.layers, such as relu or swish') from None


def _fixed_stages(space: SearchSpace) -> list[list[BlockSpec]]:
    """What stands between the stem and the choice blocks; a block without kernels to choose from is fixed."""
    return [[BlockSpec(space.ds_chs, kernel_sizes=())]] if space.ds_chs is not None else []


class MixPathSupernet(BlockSupernet, MixPath):
    """A MixPath supernet of inverted bottlenecks. How it samples, runs and hands out sub-networks: see `Supernet`.

    Args:
        space: Search space.
        arch: The arch that eval mode runs at first, the space's `default_arch` if None.
        m: Largest number of active paths per block, the space's own if None.
        sum_norm: What normalises a sum of paths: `'sbn'`, Shadow Batch Normalization, or `'bn'`, one batch norm for all
            numbers of paths.
        seed: Seed of the sampled sequence.
        sampling: How archs are drawn, see `timm_mixpath.sample`.
        nested_init: Start all kernels of a sum from the smallest one, padded with zeros, so that all archs compute
            the same at first. Not in the paper; supernets of many blocks then learn in a short training.
        num_classes: Number of classes.
        width_mult: Multiplier of all widths.
        **kwargs: See `MixPath`.

    Raises:
        ValueError: m is out of range, the space does not hold the arch, or a name is unknown.
    """

    subnet_cls = MixPath
    _supernet_args: ClassVar[tuple[str, ...]] = (*Supernet._supernet_args, 'sum_norm', 'nested_init')
    _sum_args = ('norm_sums',)

    def __init__(
        self,
        space: SearchSpace,
        arch: Arch | str | None = None,
        m: int | None = None,
        sum_norm: str = 'sbn',
        seed: int = 0,
        sampling: str = 'paths',
        nested_init: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        width_mult: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if sum_norm not in ('sbn', 'bn'):
            raise ValueError(f'unknown sum_norm {sum_norm!r}, known are sbn, bn')
        self._num_shadows = space.with_max_paths(m).max_paths if sum_norm == 'sbn' else None
        super().__init__(
            space.with_max_paths(m),
            arch,
            num_classes=num_classes,
            in_chans=in_chans,
            width_mult=width_mult,
            **kwargs,
        )
        if nested_init:
            for module in self.modules():
                if isinstance(module, ActivePathSum):
                    module.nest()
        self._network_kwargs = {key: value for key, value in kwargs.items() if key not in ('device', 'dtype')}
        norms_groups = self.group_norm_sums and any(spec.num_groups > 1 for spec in space.blocks)
        if norms_groups:
            self._network_kwargs['norm_sums'] = True
        has_sums = norms_groups or any(spec.num_groups == 1 for spec in space.blocks)
        self.sum_norm = sum_norm if has_sums else 'bn'
        self._init_sampling(seed, sampling, kwargs.get('device'))

    def _set_space(self, space: SearchSpace, arch: Arch | str | None, norm_sums: bool | None) -> None:
        self.space = space
        self.group_norm_sums = space.max_paths > 1 if norm_sums is None else norm_sums
        self._active_arch = space.arch(arch) if arch is not None else space.default_arch

    def _make_block(self, index: int, in_chs: int, spec: BlockSpec, **kwargs: Any) -> nn.Module:
        norm_sums = self.group_norm_sums and spec.num_groups > 1
        if kwargs['act_layer'] is nn.ReLU6:
            kwargs['act_layer'] = ReLU6FromOutput
        return ChoiceBlock(in_chs, spec, num_shadows=self._num_shadows, norm_sums=norm_sums, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        remap_state_dict(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def create_mixpath(
    model_cls: type[MixPath],
    variant: str,
    space: SearchSpace,
    pretrained: bool = False,
    **kwargs: Any,
) -> MixPath:
    """Create a MixPath model through timm's builder.

    Args:
        model_cls: `MixPath` or `MixPathSupernet`.
        variant: Registered name.
        space: Search space.
        pretrained: Load the weights of the pretrained cfg.
        **kwargs: Arguments of the model class and of `timm.models.build_model_with_cfg`.
    """
    strides = [stage[0].stride for stage in _fixed_stages(space) + space.stages]
    num_features = (strides[0] > 1) + sum(s > 1 for s in strides[1:]) + 1
    return build_model(
        model_cls,
        variant,
        pretrained,
        num_features=num_features,
        filter_fn=_checkpoint_filter_fn,
        space=space,
        **kwargs,
    )


def _checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Bring a checkpoint into the layout of a model and check it before anything of it is used."""
    return check_state_dict(checkpoint_filter_fn(state_dict, model), model)


def _create_discovered(variant: str, space_name: str, genotype: str, pretrained: bool, **kwargs: Any) -> MixPath:
    if 'arch' in kwargs:
        raise ValueError(f'{variant} has a fixed arch; use mixpath_{space_name} with arch={kwargs["arch"]!r}')
    return create_mixpath(MixPath, variant, get_space(space_name), pretrained, arch=genotype, **kwargs)


def _cfg(space: SearchSpace, **kwargs: Any) -> dict[str, Any]:
    return space_cfg(
        space,
        space.reduction,
        first_conv='conv_stem',
        classifier='classifier',
        paper_ids='arXiv:2001.05887',
        paper_name='MixPath: A Unified Approach for One-shot Neural Architecture Search',
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    add_weights(
        {
            'mixpath_a.untrained': _cfg(get_space('s3')),
            'mixpath_b.untrained': _cfg(get_space('s2')),
            'mixpath_c.untrained': _cfg(get_space('s1')),
            'mixpath_s1.untrained': _cfg(get_space('s1')),
            'mixpath_s1_supernet.untrained': _cfg(get_space('s1')),
            'mixpath_s2.untrained': _cfg(get_space('s2')),
            'mixpath_s2_supernet.untrained': _cfg(get_space('s2')),
            'mixpath_s3.untrained': _cfg(get_space('s3')),
            'mixpath_s3_supernet.untrained': _cfg(get_space('s3')),
            'mixpath_nano.untrained': _cfg(get_space('nano')),
            'mixpath_nano_supernet.untrained': _cfg(get_space('nano')),
        }
    )
)


@register_model
def mixpath_a(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """MixPath-A for ImageNet, reconstructed: found by this package's search within the published 349 M MACs and 5.0 M
    parameters, since the paper draws its genotype only. Space S3 with m = 1: mixed kernels, no sums.
    """
    return _create_discovered('mixpath_a', 's3', MIXPATH_A, pretrained, **kwargs)


@register_model
def mixpath_b(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """MixPath-B for ImageNet, reconstructed: found by this package's search within the published 378 M MACs and 5.1 M
    parameters, since the paper draws its genotype only. Space S2 with m = 2: up to two kernels summed.
    """
    return _create_discovered('mixpath_b', 's2', MIXPATH_B, pretrained, **kwargs)


@register_model
def mixpath_c(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """MixPath-c for CIFAR, reconstructed: found by this package's search, since the paper draws its genotype only and
    gives no budget. Its supernet had a quarter of the width and 10 epochs of CIFAR-10. Space S1.
    """
    return _create_discovered('mixpath_c', 's1', MIXPATH_C, pretrained, **kwargs)


@register_model
def mixpath_s1(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Sub-network of S1, the paper's CIFAR space, of the given `arch`."""
    return create_mixpath(MixPath, 'mixpath_s1', get_space('s1'), pretrained, **kwargs)


@register_model
def mixpath_s1_supernet(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Supernet of S1, the paper's CIFAR space (m = 4 by default)."""
    return create_mixpath(MixPathSupernet, 'mixpath_s1_supernet', get_space('s1'), pretrained, **kwargs)


@register_model
def mixpath_s2(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Sub-network of S2, the reconstructed ImageNet space of full-width sums, of the given `arch`."""
    return create_mixpath(MixPath, 'mixpath_s2', get_space('s2'), pretrained, **kwargs)


@register_model
def mixpath_s2_supernet(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Supernet of S2, the reconstructed ImageNet space of full-width sums (m = 2 by default)."""
    return create_mixpath(MixPathSupernet, 'mixpath_s2_supernet', get_space('s2'), pretrained, **kwargs)


@register_model
def mixpath_s3(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Sub-network of S3, the reconstructed ImageNet space of four channel groups, of the given `arch`."""
    return create_mixpath(MixPath, 'mixpath_s3', get_space('s3'), pretrained, **kwargs)


@register_model
def mixpath_s3_supernet(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Supernet of S3, the reconstructed ImageNet space of four channel groups (m = 1 by default)."""
    return create_mixpath(MixPathSupernet, 'mixpath_s3_supernet', get_space('s3'), pretrained, **kwargs)


@register_model
def mixpath_nano(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Sub-network of nano, a small space in the manner of S1 (not in the paper), of the given `arch`; without one of
    that which this package's search found, to which the packaged weights belong.
    """
    defaults = dict(arch=MIXPATH_NANO)
    return create_mixpath(MixPath, 'mixpath_nano', get_space('nano'), pretrained, defaults=defaults, **kwargs)


@register_model
def mixpath_nano_supernet(pretrained: bool = False, **kwargs: Any) -> MixPath:
    """Supernet of nano, a small space in the manner of S1 (not in the paper; m = 2 by default)."""
    return create_mixpath(MixPathSupernet, 'mixpath_nano_supernet', get_space('nano'), pretrained, **kwargs)


def register_space(space: SearchSpace) -> None:
    """Register a search space of your own and its models `mixpath_<name>` and `mixpath_<name>_supernet` with timm.

    Args:
        space: The space. Registering an equal one again does nothing.

    Raises:
        ValueError: A different space or a model of that name exists, the name can't be part of a model name, no network
            can be built of the space, or it is not a `SearchSpace`: the benchmarks' spaces of cells are registered as
            they are. Nothing is registered then.
    """
    if not isinstance(space, SearchSpace):
        raise ValueError(f'{space!r} is no SearchSpace, no other spaces can be registered')
    if not re.fullmatch('[a-z][a-z0-9_]*', space.name) or space.name.endswith('_supernet'):
        raise ValueError(
            f'space name {space.name!r} must be made of lower case letters, digits and _, and not end in _supernet: '
            'the models are called mixpath_<name> and mixpath_<name>_supernet'
        )
    is_known = space.name in list_spaces()
    if not is_known and is_model(f'mixpath_{space.name}'):
        raise ValueError(f'there is a model mixpath_{space.name} already, choose another name for the space')
    if not is_known:
        # All that can fail comes first: a name stands for one space as long as the process runs
        cfg = _cfg(space)
        with as_usage_error(f'no network can be built of space {space.name!r}'), without_memory():
            MixPathSupernet(space)
    add_space(space)
    if is_known:
        return
    module = sys.modules[__name__]
    for suffix, supernet in (('', False), ('_supernet', True)):
        name = f'mixpath_{space.name}{suffix}'

        def entrypoint(
            pretrained: bool = False, _name: str = name, _supernet: bool = supernet, **kwargs: Any
        ) -> MixPath:
            model_cls = MixPathSupernet if _supernet else MixPath
            return create_mixpath(model_cls, _name, space, pretrained, **kwargs)

        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__doc__ = f'{"Supernet" if supernet else "Sub-network"} of space {space.name}.'
        default_cfgs.update(generate_default_cfgs({f'{name}.untrained': cfg}))
        setattr(module, name, register_model(entrypoint))
