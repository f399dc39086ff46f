import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from commands import start_processes
from timm.task import ClassificationTask
from timm.utils import distribute_bn, unwrap_model

from timm_mixpath import MixPathSupernet, SupernetTask, get_space, sample

WORLD_SIZE = 2
NUM_STEPS = 4


def make_task(**kwargs: Any) -> SupernetTask:
    return SupernetTask(timm.create_model('mixpath_nano_supernet', **kwargs), nn.CrossEntropyLoss(), verbose=False)


def make_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)


def make_optimizer(task: SupernetTask) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def run_step(task: SupernetTask, optimizer: torch.optim.Optimizer, batches: list) -> dict[str, Any]:
    """One optimizer step over micro-batches, and what it did to every parameter."""
    model: MixPathSupernet = unwrap_model(task.get_trainable_module())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # What the step has to give, without DDP: gradients of this rank, then averaged by hand
    local = copy.deepcopy(model)
    for x, target in batches:
        (F.cross_entropy(local(x), target) / len(batches)).backward()

    optimizer.zero_grad()
    archs = []
    for i, (x, target) in enumerate(batches):
        if i < len(batches) - 1:
            with task.no_sync():
                (task(x, target)['loss'] / len(batches)).backward()
        else:
            (task(x, target)['loss'] / len(batches)).backward()
        archs.append(str(model.sampled_arch))

    grad_error = 0.0
    for (name, p), p_local in zip(model.named_parameters(), local.parameters()):
        assert (p.grad is None) == (p_local.grad is None), name
        if p.grad is not None:
            dist.all_reduce(p_local.grad)
            grad_error = max(grad_error, (p.grad - p_local.grad / WORLD_SIZE).abs().max().item())
    optimizer.step()
    return {
        'archs': archs,
        'with_grad': sorted(name for name, p in model.named_parameters() if p.grad is not None),
        'moved': sorted(name for name, p in model.named_parameters() if not torch.equal(p, before[name])),
        'grad_error': grad_error,
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD_SIZE)
    # timm's train.py gives every rank another global seed
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    task = make_task(seed=3).prepare_distributed(device_ids=[rank])
    optimizer = make_optimizer(task)
    model = unwrap_model(task.get_trainable_module())
    results = {'steps': [], 'accumulated': []}
    for step in range(NUM_STEPS):
        results['steps'].append(run_step(task, optimizer, [make_batch(100 * rank + step)]))
    for step in range(2):
        batches = [make_batch(100 * rank + 10 * step + i + 50) for i in range(3)]
        results['accumulated'].append(run_step(task, optimizer, batches))

    statistics = {n: b.clone() for n, b in model.named_buffers() if 'running' in n}
    results['statistics'] = statistics
    distribute_bn(task.get_trainable_module(), WORLD_SIZE, reduce=True)
    results['state_dict'] = model.state_dict()
    torch.save(results, Path(folder) / f'{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """Results of a run on two gloo processes."""
    folder = tmp_path_factory.mktemp('ddp')
    start_processes(worker, (str(folder),), WORLD_SIZE)
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(WORLD_SIZE)]


def expected_names(archs: list[str]) -> list[str]:
    space = get_space('nano')
    names = dict(timm.create_model('mixpath_nano_supernet', device='meta').named_parameters())
    return sorted(n for n in names if any(reference.active_parameter(n, space, space.arch(a)) for a in archs))


def test_ranks_sample_the_same_archs(ranks):
    space = get_space('nano')
    for result in ranks:
        archs = [arch for step in result['steps'] + result['accumulated'] for arch in step['archs']]
        assert archs == [sample(space, seed=3, step=i) for i in range(NUM_STEPS + 2 * 3)]


@pytest.mark.parametrize('kind', ['steps', 'accumulated'])
def test_ranks_move_sampled_parameters_only(ranks, kind):
    for result in ranks:
        for step in result[kind]:
            assert step['with_grad'] == expected_names(step['archs'])
            assert step['moved'] == step['with_grad']
    first, second = ranks[0][kind][:2]
    assert set(first['moved']) - set(second['moved'])  # had momentum and rested in the next step


@pytest.mark.parametrize('kind', ['steps', 'accumulated'])
def test_gradients_are_the_average_over_ranks(ranks, kind):
    assert all(step['grad_error'] < 1e-5 for result in ranks for step in result[kind])


def test_ranks_end_with_equal_weights(ranks):
    first, second = (result['state_dict'] for result in ranks)
    assert first['sample_step'].item() == NUM_STEPS + 2 * 3
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_distribute_bn_averages_every_shadow(ranks):
    first, second = (result['statistics'] for result in ranks)
    assert sum(not torch.equal(first[n], second[n]) for n in first) > 10  # each rank saw other images
    for name in first:
        torch.testing.assert_close(ranks[0]['state_dict'][name], (first[name] + second[name]) / 2, msg=name)


@pytest.mark.parametrize('name', ['mixpath_nano', 'resnet18'])
def test_refuses_an_ordinary_model(name):
    model = timm.create_model(name, device='meta')
    with pytest.raises(TypeError, match=rf'not {type(model).__name__};.*ClassificationTask'):
        SupernetTask(model)


def test_is_a_classification_task():
    task = make_task()
    assert isinstance(task, ClassificationTask)
    result = task(*make_batch(0))
    assert result['output'].shape == (4, 10)
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], make_batch(0)[1]))


def test_accumulation_in_one_process():
    task = make_task()
    model = task.get_trainable_module()
    archs = []
    for seed in range(2):
        with task.no_sync():
            task(*make_batch(seed))['loss'].backward()
        archs.append(str(model.sampled_arch))
    assert archs == [sample(get_space('nano'), seed=0, step=i) for i in range(2)]
    assert sorted(n for n, p in model.named_parameters() if p.grad is not None) == expected_names(archs)


def test_compile_is_by_regions_and_warms_up_in_the_first_step(caplog):
    model = timm.create_model('mixpath_nb201_supernet', num_cells=1, width=4)
    task = SupernetTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.5)
    keys = list(task.get_checkpoint_state()['state_dict'])
    assert task.compile('eager') is model
    assert task.compile_ema('eager') is task.get_eval_model(ema=True)
    assert task.get_trainable_module() is model and task.get_eval_model() is model
    with caplog.at_level(logging.INFO):
        task(*make_batch(0))['loss'].backward()
    assert 'graphs serve all archs' in caplog.text
    assert model.sample_step == 1
    graphs = task._regions.num_graphs
    for seed in range(1, 5):
        task(*make_batch(seed))['loss'].backward()
    assert task._regions.num_graphs == graphs > 0
    task.update_ema(step=1)
    assert list(task.get_checkpoint_state()['state_dict']) == keys


def test_checkpoint_state_continues_the_sequence():
    task = make_task(seed=2)
    task.setup_ema(decay=0.5)
    optimizer = make_optimizer(task)
    for seed in range(3):
        task(*make_batch(seed))['loss'].backward()
        optimizer.step()
        task.update_ema()
    state, ema_state = task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)
    assert state['state_dict']['sample_step'].item() == 3
    assert ema_state['state_dict_ema']['sample_step'].item() == 3
    resumed = make_task(seed=2)
    resumed.load_checkpoint_state(state['state_dict'])
    resumed(*make_batch(0))
    assert resumed.get_trainable_module().sampled_arch == sample(get_space('nano'), seed=2, step=3)
