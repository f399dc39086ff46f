"""torch.compile for supernets, by regions: a bounded number of graphs for any sequence of archs."""

import copy
import logging
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..spaces.sampling import sample
from ..utils.errors import UsageError
from .backbone_blocks import BackboneChoice
from .blocks import PathSum
from .cells import CellNode, CellPath, NB101Cell, NB201Cell
from .choice_blocks import ChoiceBlock
from .supernet import Supernet

__all__ = ['CompiledRegions', 'check_compile', 'with_own_code']

_logger = logging.getLogger(__name__)

# Modes of torch.compile that record CUDA graphs
_CUDA_GRAPH_MODES = ('reduce-overhead', 'max-autotune')

# Draws in a row that hold no new region until all are known
_PATIENCE = 500


class _Region(NamedTuple):
    """A module that is compiled by itself.

    Attributes:
        module: The module.
        function: What is compiled, of the module and its input.
        fullgraph: It is one graph; otherwise two, before and behind the paths.
        counters: Modules inside whose work depends on the number of active paths.
    """

    module: nn.Module
    function: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    fullgraph: bool
    counters: tuple[nn.Module, ...]


def check_compile(backend: str, mode: str | None = None) -> None:
    """Check backend and mode of `torch.compile`, which looks at them when it compiles.

    Raises:
        UsageError: There is no such backend or mode.
    """
    from torch._dynamo import list_backends

    if backend not in list_backends(exclude_tags=None):
        allowed = ', '.join(sorted({*list_backends(), 'eager', 'aot_eager'}))
        raise UsageError(f'--torchcompile {backend!r} is no backend of torch.compile, allowed are {allowed}')
    modes = ('default', *torch._inductor.list_mode_options())
    if mode is not None and mode not in modes:
        raise UsageError(f'--torchcompile-mode {mode!r} is unknown, allowed are {", ".join(dict.fromkeys(modes))}')
    if mode is not None and backend != 'inductor':
        raise UsageError(f'--torchcompile-mode {mode!r} is one of the backend inductor, leave it out with {backend!r}')


class CompiledRegions:
    """Compiles the parts of a supernet between which an arch chooses, and leaves the choice in Python.

    A step of a supernet runs another graph than the one before, so compiling all of it would compile in every step.
    Here every candidate path is a graph of its own, and so are the layers before and behind the paths of a block, for
    every expansion and every number of active paths. Modules are inputs of a graph: blocks of equal shapes share it.
    Every kind of region has a code object of its own, so that torch's limit of recompilations, behind which it goes on
    without compiling and says nothing, is never met. Only training is compiled; in eval mode, and in copies of the
    supernet, nothing changes. Parameters, buffers and their names remain as they are.

    Args:
        supernet: The supernet, changed in place.
        backend: Backend of `torch.compile`.
        mode: Its mode.

    Attributes:
        num_graphs: Number of graphs that were compiled so far.
        is_warm: `warm_up` is done.

    Raises:
        UsageError: There is no such backend or mode, or it records CUDA graphs, which would be one per arch; or the
            supernet has synchronised batch norms.
    """

    def __init__(self, supernet: Supernet, backend: str = 'inductor', mode: str | None = None) -> None:
        from torch._dynamo.utils import counters  # slow to import, and most trainings compile nothing

        check_compile(backend, mode)
        if mode in _CUDA_GRAPH_MODES or backend == 'cudagraphs':
            raise UsageError(
                f'{mode or backend} records CUDA graphs, of a supernet one for every arch; use --torchcompile '
                'inductor, without --torchcompile-mode or with max-autotune-no-cudagraphs'
            )
        if any(isinstance(module, nn.SyncBatchNorm) for module in supernet.modules()):
            raise UsageError(
                'a supernet with synchronised batch norms can not be compiled, they wait for other processes; leave '
                'out --sync-bn, --dist-bn reduce (the default) averages the statistics after every epoch'
            )
        self.backend, self.mode = backend, mode
        self.is_warm = False
        self._statistics = counters['stats']  # torch's own, of the process
        self._compiled: dict[tuple, Callable] = {}
        self.num_graphs = 0
        self._supernet = supernet
        self._attach(supernet)

    def _attach(self, supernet: Supernet) -> None:
        for region in _regions(supernet):
            # Where nn.Module.compile has its own; a deep copy of a module leaves it out
            region.module._compiled_call_impl = partial(self._call, region, repr(region.module))

    def _call(self, region: _Region, text: str, x: torch.Tensor) -> torch.Tensor:
        module = region.module
        if not module.training or module._forward_hooks or module._forward_pre_hooks:
            return module._call_impl(x)
        key = (
            region.function,
            text,
            tuple(counter.num_paths for counter in region.counters),
            tuple(x.shape),
            tuple(x.stride()),
            x.dtype,
            x.device,
            x.requires_grad,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(x.device.type),
            torch.get_autocast_dtype(x.device.type),
        )
        before = self._statistics['unique_graphs']
        function = self._compiled.get(key)
        if function is None:
            function = self._compiled[key] = self._compile(region)
        y = function(module, x)
        new = self._statistics['unique_graphs'] - before
        if new:
            self.num_graphs += new
            if self.is_warm:
                _logger.warning(f'{new} graph(s) compiled behind the warm-up, for an input of {list(x.shape)}')
        return y

    def _compile(self, region: _Region) -> Callable:
        own = with_own_code(region.function, len(self._compiled))
        return torch.compile(own, fullgraph=region.fullgraph, dynamic=False, backend=self.backend, mode=self.mode)

    def warm_up(self, x: torch.Tensor) -> None:
        """Compile all regions by training steps of archs that hold them, in a copy of the supernet.

        The supernet, its sequence of archs and torch's random numbers stay as they are.

        Args:
            x: Images as in training [B, C, H, W], on the supernet's device, within its autocast context.
        """
        start = time.monotonic()
        twin = copy.deepcopy(self._supernet).train()
        self._attach(twin)
        twin._sample = lambda: None  # it has been chosen
        archs = list(_covering_archs(twin))
        _logger.info(f'torch.compile: {len(archs)} archs hold every part of the supernet, compiling these')
        devices = [x.device] if x.device.type == 'cuda' else []
        with torch.random.fork_rng(devices):
            for index, arch in enumerate(archs):
                before = self.num_graphs
                twin._activate(arch)
                twin.forward_features(x).float().mean().backward()
                twin.zero_grad()
                _logger.info(
                    f'torch.compile: arch {index + 1} of {len(archs)}, {self.num_graphs - before} new graphs, '
                    f'{time.monotonic() - start:.0f} s'
                )
        _logger.info(f'torch.compile: {self.num_graphs} graphs serve all archs')
        self.is_warm = True


def _whole(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module._call_impl(x)


def _counters(module: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(m for m in module.modules() if hasattr(m, 'num_paths'))


# Modules whose parts are compiled one by one
_TAKEN_APART = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, ChoiceBlock, BackboneChoice, NB101Cell, NB201Cell, CellNode, CellPath,
)  # fmt: skip


def _regions(module: nn.Module) -> Iterator[_Region]:
    """Find what is compiled by itself, as fine as the choice of an arch makes it."""
    for branch, paths in _branches(module):
        # Forward is left to timm; the graph ends where the paths are called
        forward = torch.compiler.disable(type(paths).forward)
        paths.forward = types.MethodType(forward, paths)
        yield _Region(branch, type(branch).forward, False, _counters(branch))
        for part in paths.modules():
            if isinstance(part, PathSum):
                yield from (_Region(path, _whole, True, ()) for path in part.values())
    if isinstance(module, ChoiceBlock | BackboneChoice):
        return
    for child in module.children():
        if isinstance(child, _TAKEN_APART) or not any(True for _ in child.children()):
            yield from _regions(child)
        elif any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in child.modules()):
            yield _Region(child, _whole, True, _counters(child))


def _branches(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The expansions of a choice block, each with the module inside that runs the active paths."""
    if isinstance(module, ChoiceBlock):
        yield from ((branch, branch.paths) for branch in module.children())
    elif isinstance(module, BackboneChoice):
        yield from ((branch, branch.get_submodule(module.site.paths)) for branch in module.children())


def _used(supernet: Supernet) -> set[tuple]:
    """What the active arch makes use of, and with how many paths."""
    used: set[tuple] = set()
    for name, module in supernet.named_modules():
        if isinstance(module, ChoiceBlock | BackboneChoice) and module.active_branch is not None:
            branch = module.get_submodule(module.active_branch)
            prefix = f'{name}.{module.active_branch}'
            used.add((prefix, tuple(counter.num_paths for counter in _counters(branch))))
            sums = ((key, part) for key, part in branch.named_modules() if isinstance(part, PathSum))
            used.update((prefix, key, path) for key, part in sums for path in part.active)
        elif isinstance(module, CellNode):
            used.update((name, path) for path in module.active)
            used.add((name, len(module.active)))
        elif isinstance(module, NB101Cell):
            used.add((name, module.active))
    return used


def _covering_archs(supernet: Supernet) -> Iterator[Any]:
    """Draw archs until no part of the supernet is left out, and give those that have something new."""
    seen: set[tuple] = set()
    since = 0
    step = 0
    while since < _PATIENCE:
        arch = sample(supernet.space, seed=0, step=step)
        step, since = step + 1, since + 1
        supernet._activate(arch)
        used = _used(supernet)
        if not used <= seen:
            seen |= used
            since = 0
            yield arch


def with_own_code(function: Callable, number: int) -> Callable:
    """Copy a function, with a code object of its own: torch counts recompilations by that, and gives up after some.

    Args:
        function: Function in Python.
        number: Another one for each copy.
    """
    code = function.__code__
    return types.FunctionType(
        code.replace(co_name=f'{code.co_name}_{number}'),
        function.__globals__,
        code.co_name,
        function.__defaults__,
        function.__closure__,
    )
