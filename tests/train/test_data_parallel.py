"""Two gloo processes: the gradients are those of DistributedDataParallel."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from commands import start_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_mixpath  # noqa: F401  registers the models
from timm_mixpath.models.compiled import CompiledRegions
from timm_mixpath.train.data_parallel import SampledDataParallel

WORLD_SIZE = 2
CASES: dict[str, dict[str, Any]] = {
    'plain': dict(name='mixpath_nano_supernet'),
    'checkpointing': dict(name='mixpath_nano_supernet', checkpointing=True),
    'groups': dict(name='mixpath_s3_supernet', num_classes=10),
    'shared widths': dict(name='mixpath_supernet', backbone='mobilenetv3_small_050', num_classes=10),
    'cells': dict(name='mixpath_nb201_supernet', num_classes=10),
    'channels last': dict(name='mixpath_nano_supernet', channels_last=True),
    'compiled': dict(name='mixpath_nb201_supernet', num_cells=1, width=4, compiled=True),
}


def gradients(model: nn.Module, wrapped: nn.Module, rank: int, step: int, accumulate: int, scale: float) -> dict:
    """Gradients of a step of several micro-batches, and those of a loss that is scaled, as a GradScaler does."""
    model.zero_grad()
    for index in range(accumulate):
        generator = torch.Generator().manual_seed(100 * step + 10 * index + rank)
        x = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
        if index < accumulate - 1:
            with wrapped.no_sync():
                (wrapped(x).square().mean() * scale).backward()
        else:
            (wrapped(x).square().mean() * scale).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def worker(rank: int, folder: str, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD_SIZE)
    options = dict(CASES[case])
    torch.manual_seed(rank)  # other weights, until they are made equal
    checkpointing, channels_last = options.pop('checkpointing', False), options.pop('channels_last', False)
    compiled = options.pop('compiled', False)
    model = timm.create_model(options.pop('name'), **options).double().train()
    model.set_grad_checkpointing(checkpointing)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        CompiledRegions(model, 'eager')
    ours = SampledDataParallel(model)
    other = copy.deepcopy(model)  # DDP without a broadcast of buffers does not make them equal at the start either
    theirs = DistributedDataParallel(other, find_unused_parameters=True, broadcast_buffers=False)
    worst, num_none, start = 0.0, 0, {n: v.clone() for n, v in model.state_dict().items()}
    for step, (accumulate, scale) in enumerate([(1, 1.0), (1, 1.0), (3, 1.0), (1, 2.0**10), (2, 1.0)]):
        found = gradients(model, ours, rank, step, accumulate, scale)
        expected = gradients(other, theirs, rank, step, accumulate, scale)
        for name, grad in expected.items():
            assert (grad is None) == (found[name] is None), (step, name)
            num_none += grad is None
            if grad is not None:
                worst = max(worst, ((grad - found[name]).abs().max() / grad.abs().max().clamp_min(1e-30)).item())
    results: dict[str, Any] = dict(worst=worst, num_none=num_none, start=start)
    # The first process alone has a supernet that had been trained for a while
    archs = {}
    for kind in ('ours', 'DDP'):
        other = copy.deepcopy(model)
        if rank == 0:
            other.load_state_dict({**other.state_dict(), 'sample_step': torch.tensor(100 + rank)})
        if kind == 'ours':
            SampledDataParallel(other)
        else:
            DistributedDataParallel(other, find_unused_parameters=True).train()
        with torch.no_grad():
            other(torch.zeros(2, 3, 32, 32, dtype=torch.float64))
        archs[kind] = str(other.sampled_arch), other.sample_step.item()
    results['archs'] = archs
    with torch.no_grad():
        assert not ours(torch.zeros(2, 3, 32, 32, dtype=torch.float64)).requires_grad
    torch.save(results, Path(folder) / f'{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp('ranks')
    start_processes(worker, (str(folder), request.param), WORLD_SIZE)
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(WORLD_SIZE)]


SLOW = ('groups', 'shared widths', 'channels last')
each_case = pytest.mark.parametrize(
    'ranks', [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES], indirect=True
)


@each_case
def test_gradients_are_those_of_ddp(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result['worst'] < 1e-12
        assert result['num_none'] > 10


@each_case
def test_all_start_as_the_first(ranks: list[dict[str, Any]]) -> None:
    first, second = (result['start'] for result in ranks)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@each_case
def test_all_sample_what_the_first_does(ranks: list[dict[str, Any]]) -> None:
    for kind in ('ours', 'DDP'):
        (arch, step), other = (result['archs'][kind] for result in ranks)
        assert (arch, step) == other
        assert step == 101
