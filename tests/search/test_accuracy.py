import copy

import pytest
import timm
import torch
from reference import perturb
from torch import nn

from timm_mixpath import MixPathSupernet, sample
from timm_mixpath.search.accuracy import SupernetEvaluator, evaluate, prepare_device, recalibrate_bn
from timm_mixpath.search.images import load_batches
from timm_mixpath.train.data import open_dataset
from timm_mixpath.utils.distributed import Ranks
from timm_mixpath.utils.errors import UsageError

DATA_CONFIG = dict(input_size=(3, 16, 16), interpolation='bilinear', mean=(0.5,) * 3, std=(0.3,) * 3, crop_pct=1.0)


@pytest.fixture(scope='module')
def supernet() -> MixPathSupernet:
    torch.manual_seed(0)
    model = timm.create_model('mixpath_nano_supernet', m=3)
    perturb(model)
    return model.eval()


@pytest.fixture(scope='module')
def batches(digits):
    return load_batches(open_dataset('', str(digits), 'train'), DATA_CONFIG, batch_size=64, workers=0)


def test_load_batches_equals_the_loader_of_timm(digits, batches) -> None:
    dataset = open_dataset('', str(digits), 'train')
    loader = timm.data.create_loader(
        dataset, (3, 16, 16), 200, interpolation='bilinear', mean=(0.5,) * 3, std=(0.3,) * 3, crop_pct=1.0,
        num_workers=0, device=torch.device('cpu'), persistent_workers=False,
    )  # fmt: skip
    (x, y) = next(iter(loader))
    assert torch.equal(torch.cat([b[0] for b in batches]), x)
    assert torch.equal(torch.cat([b[1] for b in batches]), y)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_load_batches_takes_part_of_every_class(digits) -> None:
    (part,) = load_batches(open_dataset('', str(digits), 'train'), DATA_CONFIG, max_images=50, workers=0)
    assert part[1].bincount().tolist() == [5] * 10


def test_evaluator_equals_supernet_and_counts_by_hand(supernet, batches) -> None:
    evaluator = SupernetEvaluator(supernet, batches)
    for step in range(4):
        arch = sample(supernet.space, seed=1, step=step)
        found = evaluator(arch)
        supernet.active_arch = arch
        with torch.no_grad():
            logits = torch.cat([supernet(x) for x, _ in batches])
        labels = torch.cat([y for _, y in batches])
        assert found['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=0.6)
        assert found['loss'] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_evaluator_leaves_the_supernet_as_it_was(supernet, batches) -> None:
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    for recalibration in (None, batches):
        SupernetEvaluator(supernet, batches, recalibration)(sample(supernet.space, seed=2, step=0))
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())


def test_recalibration_equals_train_mode_statistics_of_the_extracted_model(supernet, batches) -> None:
    """The reference: extract, reset, average the statistics over the images with everything in train mode."""
    arch = sample(supernet.space, seed=3, step=0)
    model = supernet.extract(arch)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    seen = 0
    with torch.no_grad():
        for x, _ in batches:
            seen += len(x)
            for norm in norms:
                norm.momentum = len(x) / seen
            model(x)
    assert len({len(x) for x, _ in batches}) > 1
    expected = evaluate(model, batches)
    with recalibrate_bn(supernet, arch, batches) as recalibrated:
        found = evaluate(recalibrated, batches)
    assert found['loss'] == pytest.approx(expected['loss'], rel=1e-4)
    assert found != evaluate(supernet.extract(arch), batches)


def test_recalibration_weighs_batches_by_their_images(supernet, batches) -> None:
    arch = sample(supernet.space, seed=3, step=0)
    (x, y), *_ = batches
    small = x[:2] * 5 + 3, y[:2]  # which would be half of it
    model = supernet.extract(arch).train()
    norm, sums = model.bn1, 0.0
    norm.momentum = 1.0
    for images in (x, small[0]):
        model(images)
        sums = sums + len(images) * norm.running_mean.clone()
    with recalibrate_bn(supernet, arch, [(x, y), small]) as recalibrated:
        torch.testing.assert_close(recalibrated.bn1.running_mean, sums / (len(x) + 2))


def test_one_image_has_no_batch_statistics(supernet) -> None:
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    image = torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    with (
        pytest.raises(UsageError, match=r'a batch of 1 image\(s\) is too small for batch statistics'),
        recalibrate_bn(supernet, supernet.space.default_arch, [image]),
    ):
        pass
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())


def test_recalibration_carries_nothing_from_one_candidate_to_the_next(supernet, batches) -> None:
    evaluator = SupernetEvaluator(supernet, batches, batches[:2])
    archs = [sample(supernet.space, seed=4, step=i) for i in range(3)]
    forward = [evaluator(a) for a in archs]
    backward = [evaluator(a) for a in reversed(archs)][::-1]
    assert forward == backward
    assert len({f['loss'] for f in forward}) == 3


@pytest.mark.parametrize('name', ['mixpath_nano_supernet', 'mixpath_nb201_supernet'])
def test_recalibration_touches_only_the_norms_that_the_arch_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    supernet = timm.create_model(name, num_classes=10).eval()
    arch = sample(supernet.space, seed=0, step=0)
    reset: list[nn.Module] = []
    original = nn.BatchNorm2d.reset_running_stats
    used = [m for m in supernet.extract(arch).modules() if isinstance(m, nn.BatchNorm2d)]
    monkeypatch.setattr(nn.BatchNorm2d, 'reset_running_stats', lambda bn: (reset.append(bn), original(bn))[1])
    batch = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    with recalibrate_bn(supernet, arch, [batch, batch]):
        norms = [m for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(bn.training for bn in norms)
    assert len(reset) == len(set(reset)) == len(used) < len(norms)
    assert not any(bn._forward_pre_hooks for bn in norms)


def test_recalibration_that_fails_leaves_the_supernet_as_it_was(supernet, batches) -> None:
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    broken = [batches[0], (batches[0][0][:, :2], batches[0][1])]  # the second batch has too few channels
    with pytest.raises(RuntimeError), recalibrate_bn(supernet, supernet.space.default_arch, broken):
        pass
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())
    norms = [m for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(bn.training or bn._forward_pre_hooks or bn.momentum is None for bn in norms)


def test_nothing_to_recalibrate(supernet, batches) -> None:
    frozen = copy.deepcopy(supernet)
    timm.utils.freeze(frozen)
    arch = frozen.space.default_arch
    with recalibrate_bn(frozen, arch, batches) as same, recalibrate_bn(supernet, arch, None) as plain:
        torch.testing.assert_close(same(batches[0][0]), plain(batches[0][0]), rtol=1e-4, atol=1e-4)


def test_no_images(supernet) -> None:
    with pytest.raises(UsageError, match='there are no images to evaluate'):
        evaluate(supernet, [])
    with (
        pytest.raises(UsageError, match='there are no images to recalibrate'),
        recalibrate_bn(supernet, supernet.space.default_arch, []),
    ):
        pass


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('mixpath_nano_supernet', {}),
        ('mixpath_s3_supernet', {}),
        ('mixpath_nb201_supernet', {}),
        ('mixpath_nb101_supernet', {}),
        ('mixpath_supernet', dict(backbone='mobilenetv3_small_050')),
    ],
)
def test_recalibration_never_waits_for_the_device(name: str, kwargs: dict) -> None:
    """A tensor of the meta device has no value that could be waited for: whoever asks for one fails."""
    supernet = timm.create_model(name, num_classes=10, device='meta', **kwargs)
    batch = torch.randn(4, 3, 32, 32, device='meta'), torch.zeros(4, dtype=torch.int64, device='meta')
    arch = sample(supernet.space, seed=0, step=0)
    with recalibrate_bn(supernet, arch, [batch, batch]), torch.no_grad():
        assert supernet(batch[0]).shape == (4, 10)


def test_images_are_kept_as_bytes(batches) -> None:
    assert all(x.dtype == torch.uint8 for x, _ in batches.raw)
    assert sum(x.numel() * x.element_size() for x, _ in batches.raw) == 200 * 3 * 16 * 16
    assert batches.num_images == 200 and len(batches) == 4
    for (x, y), (one_x, one_y) in zip(batches, [batches[i] for i in range(4)]):
        assert x.dtype == torch.float32 and torch.equal(x, one_x) and torch.equal(y, one_y)
    assert torch.equal(batches[1:][0][0], batches[1][0])


def test_images_from_other_processes_do_not_stay_in_shared_memory(digits, batches) -> None:
    """Containers have little of it, and every tensor there keeps a file open."""
    loaded = load_batches(open_dataset('', str(digits), 'train'), DATA_CONFIG, batch_size=64, workers=1)
    assert not any(tensor.is_shared() for batch in loaded.raw for tensor in batch)
    assert loaded.digests() == batches.digests()


def test_shares_of_processes_are_all_batches(digits, batches) -> None:
    dataset = open_dataset('', str(digits), 'train')

    class Process(Ranks):
        def __init__(self, rank: int, world_size: int) -> None:
            self.rank, self.world_size = rank, world_size

    for world_size in (2, 3, 7):
        shares = [
            load_batches(dataset, DATA_CONFIG, batch_size=64, workers=0, ranks=Process(rank, world_size))
            for rank in range(world_size)
        ]
        digests = [share.digests() for share in shares]
        assert [d for i in range(4) for d in [digests[i % world_size][i // world_size]]] == batches.digests()
        assert sum(map(len, digests)) == 4


@pytest.mark.parametrize('device, batch_size, expected', [('cpu', None, 100), ('meta', None, 512), ('cpu', 7, 7)])
def test_batch_size_fits_the_device(device: str, batch_size: int | None, expected: int) -> None:
    assert prepare_device(device, batch_size, None)[0] == expected
    with pytest.raises(UsageError, match="unknown dtype 'int8' of mixed precision, known are float16, bfloat16"):
        prepare_device(device, batch_size, 'int8')
