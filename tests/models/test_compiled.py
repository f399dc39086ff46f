"""torch.compile for supernets: steps are those of eager mode, and no graph is made behind the warm-up."""

import copy
import logging
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_mixpath import BlockSpec, SearchSpace
from timm_mixpath.models.compiled import CompiledRegions, check_compile
from timm_mixpath.models.mixpath import MixPathSupernet
from timm_mixpath.utils.errors import UsageError

# Plain sums, and sums of channel groups behind squeeze-and-excite
SMALL = SearchSpace(
    name='compiled',
    blocks=(BlockSpec(8, 1, (2, 3), (3, 5)), BlockSpec(8, 1, (2,), (3, 5), num_groups=2, se_ratio=0.5)),
    stem_chs=8,
    stem_stride=2,
    num_features=16,
    max_paths=2,
)


def make(name: str | None = None, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    if name is None:
        return MixPathSupernet(SMALL, num_classes=10, **kwargs).double().train()
    return timm.create_model(name, num_classes=10, **kwargs).double().train()


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).double()


def step(model: nn.Module, x: torch.Tensor, seed: int) -> dict[str, torch.Tensor | None]:
    """Output, gradients and buffers of a training step; the seed is that of drop path."""
    torch.manual_seed(seed)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {'output': y.detach(), **{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}


def assert_same(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    assert [n for n, v in found.items() if v is None] == [n for n, v in expected.items() if v is None]
    for name, value in expected.items():
        if value is not None:
            # Sums over a batch may be taken in another order
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f'{n}: {m}')


def test_steps_are_those_of_eager_mode_and_compile_nothing_behind_the_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    model = make(drop_path_rate=0.2)
    before = copy.deepcopy(model.state_dict())
    plain, x = copy.deepcopy(model), images()
    regions = CompiledRegions(model, 'aot_eager')
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO):
        regions.warm_up(x)
    # The warm-up tells what it does, and leaves everything as it was
    assert f'{regions.num_graphs} graphs serve all archs' in caplog.text
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    # A region is a graph, or two where the paths run in between, and is never compiled again
    graphs = regions.num_graphs
    assert 0 < graphs <= 2 * len(regions._compiled)
    archs = set()
    for seed in range(12):
        assert_same(step(model, x, seed), step(plain, x, seed))
        archs.add(model.sampled_arch)
    assert len(archs) > 6
    assert regions.num_graphs == graphs


@pytest.mark.parametrize(
    'name, kwargs',
    [
        # Sliced widths, squeeze-and-excite, skipped blocks
        pytest.param('mixpath_supernet', dict(backbone='mobilenetv3_small_050'), marks=pytest.mark.slow),
        pytest.param('mixpath_supernet', dict(backbone='mobilenetv4_conv_small', m=1), marks=pytest.mark.slow),
        pytest.param('mixpath_supernet', dict(backbone='efficientnetv2_rw_t'), marks=pytest.mark.slow),
        pytest.param('mixpath_s2_supernet', dict(), marks=pytest.mark.slow),
        ('mixpath_nb201_supernet', dict(num_cells=1, width=4)),
        ('mixpath_nb101_supernet', dict(num_cells=1, width=8)),
    ],
    ids=lambda value: value if isinstance(value, str) else ' '.join(f'{k}={v}' for k, v in value.items()),
)
def test_every_kind_of_supernet(name: str, kwargs: dict[str, Any]) -> None:
    model, x = make(name, **kwargs), images(32)
    plain = copy.deepcopy(model)
    regions = CompiledRegions(model, 'eager')
    for seed in range(2):
        assert_same(step(model, x, seed), step(plain, x, seed))
    assert regions.num_graphs > 5
    # The same arch again needs nothing new
    graphs = regions.num_graphs
    model._step = 0
    model(x)
    assert regions.num_graphs == graphs


def test_checkpointing_and_mixed_precision() -> None:
    model, x = make(), images()
    plain = copy.deepcopy(model)
    CompiledRegions(model, 'eager')
    for net in (model, plain):
        net.set_grad_checkpointing()
    assert_same(step(model, x, 0), step(plain, x, 0))
    for net in (model.float(), plain.float()):
        net.set_grad_checkpointing(False)
    with torch.autocast('cpu', torch.bfloat16):
        found, expected = step(model, x.float(), 1), step(plain, x.float(), 1)
    assert found['output'].dtype == torch.bfloat16
    assert_same(found, expected)


def test_evaluation_copies_and_sub_networks_are_not_compiled() -> None:
    model, x = make('mixpath_nano_supernet'), images()
    regions = CompiledRegions(model, 'eager')
    twin, subnet = copy.deepcopy(model), model.extract()
    for net in (twin, subnet):
        net(x).sum().backward()
    expected = subnet.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin.load_state_dict(model.state_dict()) and twin.eval()(x))
        assert expected.shape == (4, 10)
    assert regions.num_graphs == 0
    # A copy runs its own paths
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert twin.train()(x).abs().max() == 0
    assert regions.num_graphs == 0


def test_a_graph_behind_the_warm_up_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = make('mixpath_nb201_supernet', num_cells=1, width=4)
    regions = CompiledRegions(model, 'eager')
    regions.warm_up(images())
    with caplog.at_level(logging.WARNING):
        model(images())
    assert 'behind the warm-up' not in caplog.text
    with caplog.at_level(logging.WARNING):
        model(images(32))
    assert 'compiled behind the warm-up, for an input of [4, ' in caplog.text


@pytest.mark.parametrize(
    'backend, mode, text',
    [
        ('inducer', None, "'inducer' is no backend of torch.compile, allowed are aot_eager, "),
        ('inductor', 'fast', "'fast' is unknown, allowed are default, "),
        ('aot_eager', 'default', 'leave it out'),
        ('inductor', 'reduce-overhead', 'CUDA graphs'),
        ('cudagraphs', None, 'CUDA graphs'),
    ],
)
def test_wrong_names_are_one_sentence(backend: str, mode: str | None, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        CompiledRegions(make(), backend, mode)
    assert '\n' not in str(caught.value)


def test_synchronised_batch_norms_are_refused() -> None:
    with pytest.raises(UsageError, match='--sync-bn'):
        CompiledRegions(timm.layers.convert_sync_batchnorm(make()))
    check_compile('inductor', 'max-autotune-no-cudagraphs')


@pytest.mark.slow
def test_inductor_gives_the_same_gradients() -> None:
    model, x = make('mixpath_nb201_supernet', num_cells=1, width=4), images()
    plain = copy.deepcopy(model)
    regions = CompiledRegions(model)
    regions.warm_up(x)
    graphs = regions.num_graphs
    for seed in range(6):
        assert_same(step(model, x, seed), step(plain, x, seed))
    assert regions.num_graphs == graphs
