"""The one-shot supernet: samples an arch per training step, runs `active_arch` in eval, hands out sub-networks."""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import timm
import torch
import torch.nn as nn
from timm.layers import FrozenBatchNormAct2d, unfreeze_batch_norm_2d
from timm.models import get_model_args
from torchvision.ops import FrozenBatchNorm2d

from ..spaces.arch import Arch
from ..spaces.sampling import check_strategy, sample
from ..spaces.space import Space
from ..utils.modes import without_memory

__all__ = ['BlockSupernet', 'SumSite', 'Supernet']


@runtime_checkable
class SumSite(Protocol):
    """A module that sums paths. `path_statistics` looks at every module of a supernet that has this method."""

    def path_outputs(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return the outputs of all candidate paths, not only of the active ones; nothing if a path has no input.

        A sum that can not be of any 1 to m of these has a method `path_sets() -> list[tuple[str, ...]]`, the sets of
        paths that can be active at once, by name.

        Args:
            *args: What the module's `forward` gets; it must be left as it is.
            **kwargs: Likewise.

        Returns:
            Outputs [B, C, H, W] by the name of the path, as they would be summed; the same names in every call.
        """
        ...


class Supernet(nn.Module):
    """What all supernets do, as a mixin in front of the network's class: sample, activate, hand out sub-networks.

    In training mode every forward samples an arch, a function of `seed` and of the step counter `sample_step`, a
    persistent buffer: all ranks of a distributed run agree in every step, and a resumed run goes on with the very
    same sequence. What else writes into the buffer, as DDP does at its start, counts from the next `train()` on.
    Parameters that were not sampled take no part in the graph, their gradient stays None, so neither
    weight decay nor momentum moves them. In eval mode `active_arch` runs.

    The active arch is state of the module. Threads that evaluate archs of one supernet at once get each other's: give
    every thread a network of its own, `supernet.extract(arch)`, or `copy.deepcopy(supernet)` to go through many archs.

    With gradient checkpointing, a backward pass has to follow its forward pass before the next one samples.

    `torch.export` and ONNX export trace `active_arch` in eval mode, and what they make is bound to it. Export
    `extract()` instead to leave the weights of the other paths out of the file. `torch.jit.script` takes the
    sub-networks that `extract` gives, not a supernet.

    Attributes:
        space: The space that is searched, with this supernet's m and width.
        sum_norm: What stands behind sums of paths: `'sbn'`, `'bn'` or `'none'`; `'bn'` where no sum has a norm of its
            own, as in S3.
        subnet_cls: Class of the sub-networks.
        subnet_name: Name of the sub-networks in timm, `mixpath_<space>` if None.
        seed: Seed of the sampled sequence.
        sampling: How archs are drawn, see `timm_mixpath.sample`.
        sampled_arch: The arch of the latest forward in training mode, None before.
        sample_step: Number of archs sampled so far, int64 scalar tensor.
    """

    space: Space
    sampled_arch: str | None
    sum_norm: str
    subnet_cls: Callable[..., nn.Module]
    subnet_name: ClassVar[str | None] = None
    # Arguments of the supernet that its sub-networks do not take, and those that it decides for them
    _supernet_args: ClassVar[tuple[str, ...]] = ('arch', 'm', 'seed', 'sampling')
    _sum_args: ClassVar[tuple[str, ...]]
    # Arguments of the network that do not depend on what the supernet has become since it was built
    _network_kwargs: dict[str, Any]
    # Arguments of the sub-networks in any case, beside their arch
    _subnet_args: Mapping[str, Any] = MappingProxyType({})

    def _init_sampling(self, seed: int, sampling: str, device: Any = None) -> None:
        """Start the sequence; the network's constructor calls it when all modules exist."""
        self.seed = seed
        self.sampling = check_strategy(sampling)
        self.sampled_arch = None
        # The buffer is what is saved, broadcast and averaged; the int beside it spares a device sync per step.
        self.register_buffer('sample_step', torch.zeros((), dtype=torch.int64, device=device))
        self._step = 0
        self._activate(self._active_arch)

    @property
    def active_arch(self) -> str:
        """The arch that eval mode runs, an arch of the space or its text to set; `space.default_arch` at first."""
        return self._active_arch

    @active_arch.setter
    def active_arch(self, arch: str) -> None:
        self._active_arch = self.space.arch(arch)
        self._activate(self._active_arch)
        if (args := get_model_args(self)) is not None:  # for config.json: a folder gives the supernet back as it is
            self._model_args = {**args, 'arch': str(self._active_arch)}

    def _activate(self, arch: str) -> None:
        """Make the paths of an arch those that a forward runs."""
        raise NotImplementedError

    def _sample(self) -> None:
        self.sampled_arch = sample(self.space, seed=self.seed, step=self._step, strategy=self.sampling)
        self._activate(self.sampled_arch)
        self._step += 1
        self.sample_step += 1

    @property
    def is_folded(self) -> bool:
        """Whether batch norms are folded into convolutions: such a supernet can be evaluated and nothing else."""
        return any(getattr(module, 'folded', False) for module in self.modules())

    def train(self, mode: bool = True) -> 'Supernet':
        """Set the mode, see `nn.Module.train`; eval mode runs `active_arch`.

        Raises:
            RuntimeError: Training mode for a supernet whose batch norms are folded.
        """
        if mode and self.is_folded:
            raise RuntimeError('the batch norms of this supernet are folded, it can be evaluated but not trained')
        super().train(mode)
        if mode:
            self.count_steps()
        else:
            self._activate(self._active_arch)
        return self

    def count_steps(self) -> None:
        """Go on with the arch of step `sample_step`, whoever has written it; waits for the device."""
        if not self.sample_step.is_meta:
            self._step = int(self.sample_step)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._sample()
        return super().forward_features(x)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any):
        if self.training:
            self._sample()
        return super().forward_intermediates(x, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.count_steps()

    def extract(self, arch: str | None = None) -> nn.Module:
        """Return the stand-alone network of an arch with the weights it inherits.

        Shadow batch norms are reduced to the plain one that was in use, so the network equals this supernet in eval
        mode with that `active_arch`. Nothing in it is frozen, whatever is in this supernet.

        Args:
            arch: Arch or its text, `active_arch` if None.

        Returns:
            A `mixpath_<space>` model in the mode, on the device and in the dtype of the supernet.

        Raises:
            ValueError: The space does not hold the arch, it is not registered, the batch norms are folded, or layers
                were wrapped by something that renames their weights.
        """
        arch = self.space.arch(arch) if arch is not None else self.active_arch
        name = self.subnet_name or f'mixpath_{self.space.name}'
        if not timm.is_model(name):
            raise ValueError(
                f'space {self.space.name!r} is not registered; call timm_mixpath.register_space(space) first'
            )
        if self.is_folded:
            raise ValueError('the batch norms of this supernet are folded; extract from the supernet it was made of')
        if any(isinstance(module, (FrozenBatchNorm2d, FrozenBatchNormAct2d)) for module in self.modules()):
            # timm.utils.freeze has put norms without parameters in the place of those that sub-networks have; a copy of
            # all for one network, which has its time where somebody freezes a supernet
            thawed = unfreeze_batch_norm_2d(copy.deepcopy(self)).to(self.sample_step.device)
            return thawed.extract(arch)
        kwargs = self.subnet_kwargs()
        with without_memory():  # what it would be initialised with is overwritten
            model = self.subnet_cls(self.space, arch, **kwargs)
        self._prune_like_this(model)
        model.load_state_dict(self._inherited(model), assign=True)
        _fill_buffers(model)
        cfg = getattr(self, 'pretrained_cfg', None) or timm.models.resolve_pretrained_cfg(name).to_dict()
        model.pretrained_cfg = model.default_cfg = dict(cfg, architecture=name)
        # What timm writes into config.json: the supernet's own in the form that it was given, JSON-ready
        given = get_model_args(self)
        args = dict(kwargs if given is None else {k: v for k, v in given.items() if k not in self._supernet_args})
        args.update({k: kwargs[k] for k in ('num_classes', 'global_pool', *self._sum_args) if k in kwargs})
        model._model_args = {**args, **self._subnet_args, 'arch': str(arch)}
        return model.train(self.training)

    def _inherited(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Copy what a new sub-network inherits, whose names have to be its own."""
        strange: set[str] = set()
        try:
            inherited = self._subnet_state_dict(model)
            strange = inherited.keys() ^ model.state_dict().keys()
        except KeyError as e:  # a tensor that is not there
            strange = {str(e.args[0])}
        if strange:
            name = min(strange)
            raise ValueError(
                f'layers of this supernet were wrapped or changed after it was built, the first is at {name!r}, so a '
                'sub-network does not find its weights; undo it first (parametrize.remove_parametrizations for '
                'weight norm, prune.remove for pruning, merge_and_unload for LoRA), then extract'
            )
        return {key: value.detach().clone() for key, value in inherited.items()}

    def subnet_kwargs(self, num_classes: int | None = None) -> dict[str, Any]:
        """Return what the networks that `extract` gives are built with, beside the space of this supernet and the arch.

        Args:
            num_classes: Number of classes, the supernet's own if None.

        Returns:
            Arguments of `subnet_cls`. `width_mult` is not among them, the space is scaled already.
        """
        num_classes = self.num_classes if num_classes is None else num_classes
        # reset_classifier may have changed the pooling
        own = dict(in_chans=self.in_chans, num_classes=num_classes, global_pool=self.global_pool.pool_type)
        return {**self._network_kwargs, **own}

    def _prune_like_this(self, model: nn.Module) -> None:
        """Take from a new sub-network what was taken from this supernet, by features_only for example."""

    def is_pruned(self) -> bool:
        """Return whether a part of the network was taken from this supernet, by features_only for example."""
        with without_memory():
            model = self.subnet_cls(self.space, self.active_arch, **self.subnet_kwargs())
        whole = model.state_dict().keys()
        self._prune_like_this(model)
        return model.state_dict().keys() != whole

    def _subnet_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What the sub-network of `model.arch` inherits, by its own names."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        # The hook of torch.jit.script, which would fail with a sentence about Python's super()
        raise RuntimeError(
            'a supernet can not be scripted, it chooses its modules when it runs; script extract() instead'
        )


class BlockSupernet(Supernet):
    """A supernet whose archs are one choice per block, see `Supernet`.

    A choice block has the methods `set_choice(choice)`, and `inherited(choice, block)` for the state dict of the block
    of a sub-network.
    """

    get_choice_blocks: Callable[[], dict[str, nn.Module]]  # of the network

    def _activate(self, arch: Arch) -> None:
        for block, choice in zip(self.get_choice_blocks().values(), arch.blocks):
            block.set_choice(choice)

    def _prune_like_this(self, model: nn.Module) -> None:
        if isinstance(self.conv_head, nn.Identity) and not isinstance(model.conv_head, nn.Identity):
            model.prune_intermediate_layers([len(self.blocks)], extra_blocks=True)
            model.reset_classifier(self.num_classes, self.global_pool.pool_type)

    def _subnet_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        blocks, fixed_blocks = self.get_choice_blocks(), model.get_choice_blocks()
        left_out = ('sample_step', *(f'{name}.' for name in blocks))
        state_dict = {key: value for key, value in self.state_dict().items() if not key.startswith(left_out)}
        for (name, block), choice in zip(blocks.items(), model.arch.blocks):
            inherited = block.inherited(choice, fixed_blocks[name])
            state_dict.update({f'{name}.{key}': value for key, value in inherited.items()})
        return state_dict


def _fill_buffers(model: nn.Module) -> None:
    """Compute the buffers that no state dict holds, such as the filter of a blur, in a model that was built on meta."""
    like = next(model.parameters())
    for module in model.modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in empty.items():
            dtype = like.dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty_like(buffer, device=like.device, dtype=dtype))
        if empty:
            module.init_non_persistent_buffers()
