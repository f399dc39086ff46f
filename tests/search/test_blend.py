from pathlib import Path

import pytest
import timm
import torch
from conftest import small_args

import timm_mixpath
from timm_mixpath.search.accuracy import evaluate, recalibrate_bn
from timm_mixpath.search.blend import SHARES, inherit_blended, inherit_refitted
from timm_mixpath.search.images import SearchData, load_images
from timm_mixpath.train.checkpoint import load_model, write_checkpoint
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import UsageError

BACKBONE = 'mobilenetv3_small_050'


@pytest.fixture(scope='module')
def source() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(BACKBONE, num_classes=10).eval()


@pytest.fixture(scope='module')
def checkpoint(digits: Path, source: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet around `source` after a few steps."""
    folder = tmp_path_factory.mktemp('blend')
    torch.save(source.state_dict(), folder / 'source.pth')
    args = small_args(
        digits, folder, model='mixpath_supernet', model_kwargs=dict(backbone=BACKBONE), pretrained=True,
        pretrained_path=str(folder / 'source.pth'), img_size=32, epochs=1,
    )  # fmt: skip
    return train(args).output_dir / 'last.pth.tar'


@pytest.mark.parametrize('recalibration_images', [0, 32])
def test_best_mean_of_trained_and_first_weights(
    checkpoint: Path, source: torch.nn.Module, recalibration_images: int
) -> None:
    data = SearchData(num_images=20)
    options = dict(data=data, recalibration_images=recalibration_images, workers=0, device='cpu')
    trained = load_model(checkpoint)
    arch = timm_mixpath.sample(trained.model.space, seed=0, step=2)
    blend = inherit_blended(checkpoint, arch, source, **options)
    assert tuple(blend.scores) == SHARES
    assert blend.scores[blend.share]['loss'] == min(scores['loss'] for scores in blend.scores.values())
    # What was scored is what is handed out
    images = load_images(trained, data, recalibration_images, 100, 'cpu', 0)
    assert evaluate(blend.model, images.batches)['loss'] == pytest.approx(blend.scores[blend.share]['loss'], rel=1e-4)

    # Its weights, beside those of the two networks
    own = trained.model.extract(arch).state_dict()
    model = timm.create_model('mixpath', backbone=BACKBONE, arch=str(arch), num_classes=10)
    timm_mixpath.warm_start(model, source)
    first = dict(model.named_parameters())
    for name, value in blend.model.named_parameters():
        expected = (1 - blend.share) * own[name] + blend.share * first[name]
        torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_source_of_another_network_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=f'the weights are not those of {BACKBONE}'):
        inherit_blended(checkpoint, 'k3_e1', timm.create_model('mobilenetv3_small_075', num_classes=10), workers=0)


@pytest.mark.parametrize('is_better', [True, False])
def test_refitted_where_that_scores_better(
    checkpoint: Path, source: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_better: bool
) -> None:
    loaded = load_model(checkpoint)
    supernet = loaded.model
    timm_mixpath.warm_start(supernet, source)
    write_checkpoint(tmp_path / 'start.pth.tar', supernet, loaded.args)
    data = SearchData(num_images=20)
    images = load_images(loaded, data, 64, 100, 'cpu', 0)
    arch = timm_mixpath.sample(supernet.space, seed=0, step=2)
    with recalibrate_bn(supernet, arch, images.recalibration):
        inherited = evaluate(supernet, images.batches)
        assert images.batches.num_images == 20
    (x, _), *_ = images.batches

    def refit(model: torch.nn.Module, source: torch.nn.Module, batches: object) -> None:
        """The classes as they are, or anything but them."""
        timm_mixpath.refit(model, source, batches)
        with torch.no_grad():
            model.eval()
            features = model.forward_head(model.forward_features(x), pre_logits=True)
            labels = torch.cat([y for _, y in images.batches])
            targets = 20.0 * torch.nn.functional.one_hot(labels, 10) * (1 if is_better else -1)
            model.classifier.weight.copy_(torch.linalg.lstsq(features, targets).solution.T)
            model.classifier.bias.zero_()

    monkeypatch.setattr('timm_mixpath.search.blend.refit', refit)
    found = inherit_refitted(
        tmp_path / 'start.pth.tar', arch, source, num_images=64, data=data, workers=0, device='cpu'
    )
    loss = evaluate(found.model, images.batches)['loss']
    assert loss == pytest.approx(found.scores[0.0]['loss'], rel=1e-3)
    if is_better:
        assert loss < 0.5 * inherited['loss']
    else:
        assert loss == pytest.approx(inherited['loss'], rel=1e-4)
