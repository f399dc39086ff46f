"""The whole job from a network of timm, on real images, without a connection."""

import json
import os
import shutil
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

import timm_mixpath
from timm_mixpath import backbone_space, cli
from timm_mixpath.cli.adapt import AdaptConfig, run_adapt
from timm_mixpath.cli.adapt_config import find_reused
from timm_mixpath.cli.common import describe_job, job_folder
from timm_mixpath.models.cost import count_macs
from timm_mixpath.models.runtimes import describe_device
from timm_mixpath.search.blend import Blend
from timm_mixpath.search.result import SearchResult
from timm_mixpath.search.run import search_checkpoint
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.loop import train_or_resume
from timm_mixpath.utils.errors import RunError, UsageError

BACKBONE = 'mobilenetv3_small_050'


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'backbone.safetensors'
    save_file(timm.create_model(BACKBONE).state_dict(), path)
    return path


@pytest.fixture
def tiny(weights: Path, digits: Path) -> AdaptConfig:
    return AdaptConfig(
        backbone=BACKBONE,
        backbone_weights=str(weights),
        data_dir=str(digits),
        img_size=32,
        finetune_epochs=1,
        winner_epochs=1,
        supernet_epochs=1,
        batch_size=32,
        generations=1,
        num_images=20,
        recalibration_images=32,
        max_macs=700_000,
        workers=0,
        device='cpu',
    )


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_supernet_is_searched_as_it_starts(
    tiny: AdaptConfig, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, supernet_epochs=0, winner_epochs=2, refit_images=0)
    monkeypatch.setattr('timm_mixpath.cli.adapt.inherit_blended', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_adapt(config, tmp_path / 'job')
    kept = ['backbone/last.pth.tar', 'supernet/last.pth.tar', 'search/archive.jsonl']
    before = [(tmp_path / 'job' / name).read_bytes() for name in kept]
    monkeypatch.undo()
    run_adapt(config, tmp_path / 'job')
    assert [(tmp_path / 'job' / name).read_bytes() for name in kept] == before
    assert 'fine-tuned for 1 epochs, the winner for 2.' in capsys.readouterr().out

    # What was searched computes what the fine-tuned backbone does, and tells by itself what it is of
    backbone = timm.create_model(f'local-dir:{tmp_path / "job" / "backbone" / "model"}', pretrained=True).eval()
    loaded = load_model(tmp_path / 'job' / 'supernet' / 'last.pth.tar')
    supernet = loaded.model
    assert loaded.label_names == [str(i) for i in range(10)] and loaded.data_config['input_size'] == (3, 32, 32)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(supernet(x), backbone(x), rtol=1e-4, atol=1e-5)
    # and the winner started from what it inherits there, but for its recalibrated statistics
    inherited = timm.create_model(f'local-dir:{tmp_path / "job" / "inherited"}', pretrained=True)
    arch = json.loads((tmp_path / 'job' / 'summary.json').read_text())['arch']
    expected = supernet.extract(arch).state_dict()
    differs = {k for k, v in inherited.state_dict().items() if not torch.equal(v, expected[k])}
    assert differs and all('running_' in k or 'num_batches' in k for k in differs)
    # Another job uses the backbone and the start, one that trains its supernet the backbone alone
    monkeypatch.chdir(tmp_path)  # where its paths have other names
    images = os.path.relpath(str(tiny.data_dir))
    trained: list[str] = []
    monkeypatch.setattr(
        'timm_mixpath.cli.adapt.train_or_resume',
        lambda args: (trained.append(f'{args.output}/{args.experiment}'), train_or_resume(args))[1],
    )
    for name, reuse, changes in (
        ('other', 'job', dict(max_macs=600_000)),
        ('trained', 'other', dict(supernet_epochs=1)),
        ('same', 'trained', dict(supernet_epochs=1, max_macs=600_000)),  # its supernet, and the first one's backbone
        ('more paths', 'trained', dict(m=3)),
    ):
        run_adapt(replace(config, reuse=reuse, data_dir=images, **changes), name)
        assert not (tmp_path / name / 'backbone').exists()
    # In the folder of another job, which one may only be allowed to read, nothing is begun
    assert trained == [
        'other/winner', 'trained/supernet', 'trained/winner', 'same/winner', 'more paths/winner',
    ]  # fmt: skip
    with_supernet = [
        name for name in ('other', 'trained', 'same', 'more paths') if (tmp_path / name / 'supernet').exists()
    ]
    assert with_supernet == ['trained', 'more paths']
    # which is not used by a job that has one, wherever it appears later
    shutil.rmtree('more paths/model')
    shutil.copytree('more paths/supernet', 'trained/supernet', dirs_exist_ok=True)
    (tmp_path / 'trained' / 'supernet' / 'last.pth.tar').write_bytes(b'of others')
    run_adapt(replace(config, reuse='trained', data_dir=images, m=3), 'more paths')
    assert (tmp_path / 'more paths' / 'model').exists()


@pytest.mark.slow
def test_winner_without_a_training(
    tiny: AdaptConfig, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = tmp_path / 'classes.txt'  # in another order, and one more, for which there are no images yet
    classes.write_text('\n'.join(['later', *map(str, reversed(range(10)))]))
    config = replace(tiny, supernet_epochs=0, winner_epochs=0, refit_images=100, class_map=str(classes))
    refits: list[int] = []

    def refit(model: torch.nn.Module, source: torch.nn.Module, batches: list) -> None:
        timm_mixpath.refit(model, source, batches)
        refits.append(sum(len(x) for x, _ in batches))

    monkeypatch.setattr('timm_mixpath.search.blend.refit', refit)
    folder = run_adapt(config, tmp_path)
    assert refits == [100]
    assert 'fine-tuned for 1 epochs, the winner not at all.' in capsys.readouterr().out
    assert not (tmp_path / 'winner').exists()
    assert config.data_dir is not None
    summary = json.loads((tmp_path / 'summary.json').read_text())
    winner = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert winner.pretrained_cfg['label_names'] == classes.read_text().split()
    dataset = timm.data.create_dataset('', config.data_dir, split='validation', class_map=str(classes))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(winner))
    with torch.inference_mode():
        hits = [winner(image[None]).argmax().item() == label for image, label in dataset]
    assert summary['rows'][1]['top1'] == round(100 * sum(hits) / len(hits), 2)


@pytest.mark.slow
def test_mixed_precision(tiny: AdaptConfig, tmp_path: Path) -> None:
    config = replace(tiny, supernet_epochs=0, winner_epochs=0, refit_images=0, amp=True, amp_dtype='bfloat16')
    folder = run_adapt(config, tmp_path / 'job')
    args = yaml.safe_load((tmp_path / 'job' / 'backbone' / 'args.yaml').read_text())
    assert (args['amp'], args['amp_dtype']) == (True, 'bfloat16')
    header = json.loads((tmp_path / 'job' / 'search' / 'archive.jsonl').read_text().splitlines()[0])
    assert "'amp_dtype': 'bfloat16'" in str(header)
    assert {weight.dtype for weight in load_file(folder / 'model.safetensors').values()} == {torch.float32, torch.int64}
    with pytest.raises(UsageError, match=r'holds a run with another amp \(True, now False\)'):
        run_adapt(replace(config, amp=False), tmp_path / 'job')
    # which does not hinder another job from using its backbone
    assert run_adapt(replace(config, amp=False, reuse=str(tmp_path / 'job')), tmp_path / 'other').exists()


@pytest.mark.slow
def test_backbone_itself_is_chosen(
    tiny: AdaptConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = backbone_space(BACKBONE, m=tiny.m).default_arch

    def only_the_backbone(*args: object, **kwargs: object) -> SearchResult:  # which generation 0 tries
        result = search_checkpoint(*args, **kwargs)
        return replace(result, front=[c for c in result.evaluations if c.arch == default])

    monkeypatch.setattr('timm_mixpath.cli.adapt.search_checkpoint', only_the_backbone)
    run_adapt(replace(tiny, max_macs=None, supernet_epochs=0), tmp_path)
    assert json.loads((tmp_path / 'summary.json').read_text())['arch'] == str(default)
    assert 'The search chose the backbone itself' in caplog.text and '--supernet-epochs 5' in caplog.text


@pytest.mark.parametrize(
    'img_size, max_macs, expected',
    [(64, 2_000_000, 48), (64, 1_200_000, 32), (64, 2_288_448, None), (64, 3_000_000, None), (60, 1_900_000, 48)],
)
def test_smaller_images_are_the_other_way_to_a_limit(
    tiny: AdaptConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    img_size: int,
    max_macs: int,
    expected: int | None,
) -> None:
    monkeypatch.setattr('timm_mixpath.cli.adapt._Job.train', interrupt)
    with pytest.raises(KeyboardInterrupt), caplog.at_level('INFO'):
        run_adapt(replace(tiny, img_size=img_size, max_macs=max_macs), tmp_path / 'job')
    backbone = timm.create_model(BACKBONE, num_classes=10, device='meta').eval()
    macs = {size: sum(count_macs(backbone, (3, size, size)).values()) for size in (32, 48, img_size)}
    within = max((size for size in macs if macs[size] <= max_macs), default=None)
    assert (within if within != img_size else None) == expected
    text = f'With images of {expected}x{expected} pixels the backbone itself is within {max_macs / 1e6:g} M MACs'
    assert (text in caplog.text) == (expected is not None) == ('With images of' in caplog.text)


@pytest.mark.slow
def test_best_of_several_image_sizes(
    tiny: AdaptConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {32: 0.7, 48: 0.5, 64: 0.6}
    blends: list[int] = []

    def inherit_refitted(*args: object, img_size: int, **kwargs: object) -> Blend:
        blend = timm_mixpath.search.blend.inherit_refitted(*args, img_size=img_size, **kwargs)
        assert blend.loaded.data_config['input_size'] == (3, img_size, img_size)
        blends.append(img_size)
        return replace(blend, scores={blend.share: {**blend.score, 'loss': losses[img_size]}})

    monkeypatch.setattr('timm_mixpath.cli.adapt.inherit_refitted', inherit_refitted)
    config = replace(tiny, img_size=(64, 24, 32, 48), max_macs=1_200_000, supernet_epochs=0, refit_images=32)
    with caplog.at_level('INFO'):
        folder = run_adapt(config, tmp_path / 'job')
    assert 'so smaller images (24x24) are left out' in caplog.text and '--img-size' not in caplog.text

    # With images of 32 pixels the backbone itself is within the limit, with larger ones networks around it are
    job = tmp_path / 'job'
    evaluated = {
        int(path.name): [json.loads(line) for line in (path / 'archive.jsonl').read_text().splitlines()[1:]]
        for path in (job / 'search').iterdir()
    }
    own = str(backbone_space(BACKBONE, m=tiny.m).default_arch)
    assert sorted(evaluated) == sorted(blends) == [32, 48, 64]
    assert [record['arch'] for record in evaluated[32]] == [own]
    assert all(record['macs'] <= 1_200_000 for size in evaluated for record in evaluated[size])
    assert all(record['macs'] >= 960_000 for size in (48, 64) for record in evaluated[size])
    assert {len(evaluated[48]), len(evaluated[64])} == {36}

    # What gives the lowest loss is trained with images of its size
    size = 48
    summary = json.loads((job / 'summary.json').read_text())
    backbone, winner = summary['rows']
    assert summary['input_size'] == [3, size, size] and (backbone['img_size'], winner['img_size']) == (64, size)
    trained = load_model(job / 'winner' / 'last.pth.tar')
    assert trained.data_config['input_size'] == (3, size, size) and trained.args.kd_teacher_img_size == 64
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert timm.data.resolve_model_data_config(model)['input_size'] == (3, size, size)
    assert winner['macs'] == sum(count_macs(model, (3, size, size)).values()) <= 1_200_000
    assert summary['arch'] in {record['arch'] for record in evaluated[size]}
    assert f'are in {job / "search" / str(size)}' in capsys.readouterr().out

    # A job that was cut off has chosen; another one takes the backbone, which has seen images of the largest size
    before = (job / 'winner' / 'last.pth.tar').read_bytes()
    shutil.rmtree(job / 'model')
    blends.clear()
    assert run_adapt(config, job) == folder and not blends
    assert (job / 'winner' / 'last.pth.tar').read_bytes() == before
    run_adapt(replace(config, img_size=(48, 64), reuse=str(job), winner_epochs=0), tmp_path / 'other')
    assert not (tmp_path / 'other' / 'backbone').exists() and blends == [48, 64]
    with pytest.raises(UsageError, match=r'has another img_size \(64, now 48\), and so another backbone'):
        run_adapt(replace(config, img_size=(32, 48), reuse=str(job)), tmp_path / 'third')


@pytest.mark.parametrize(
    'changes, expected',
    [
        # Of sizes with which the backbone is within the limit, the largest: with all of them it is as usual
        (dict(img_size=(32, 64), max_macs=None), {64: 24}),
        (dict(img_size=(32, 64), max_macs=None, supernet_epochs=0), {64: 24}),
        (dict(img_size=(32, 64), max_macs=2_000_000), {32: 1, 64: 24}),
        # A supernet that is trained may know better
        (dict(img_size=(32, 64), max_macs=2_000_000, supernet_epochs=1), {32: 24, 64: 24}),
        # and with large ones there may be nothing
        (dict(img_size=(32, 128), max_macs=600_000), {32: 24}),
    ],
)
def test_sizes_that_are_searched(
    tiny: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, expected: dict
) -> None:
    searched: dict[int, int] = {}

    def search(*args: object, img_size: int, **kwargs: object) -> None:
        searched[img_size] = args[2].num_evaluations
        if len(searched) == len(expected):
            interrupt()

    monkeypatch.setattr('timm_mixpath.cli.adapt._Job.train', lambda *_, **__: 50.0)
    monkeypatch.setattr('timm_mixpath.cli.adapt._Job.save', lambda *_: None)
    monkeypatch.setattr('timm_mixpath.cli.adapt._Job.supernet', lambda *_: None)
    monkeypatch.setattr('timm_mixpath.cli.adapt.search_checkpoint', search)
    config = replace(tiny, generations=0, supernet_epochs=None)
    with pytest.raises(KeyboardInterrupt):
        run_adapt(replace(config, **changes), tmp_path)
    assert searched == expected


@pytest.mark.slow
@pytest.mark.parametrize('near, factor', [(-100.0, 1), (100.0, 4)])
def test_winner_is_trained_gently_where_it_starts_near_the_backbone(
    tiny: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: float, factor: int
) -> None:
    monkeypatch.setattr('timm_mixpath.cli.adapt._NEAR', near)
    run_adapt(replace(tiny, supernet_epochs=0), tmp_path)
    assert load_model(tmp_path / 'winner' / 'last.pth.tar').args.lr == tiny.lr / factor
    assert load_model(tmp_path / 'backbone' / 'last.pth.tar').args.lr == tiny.lr / 4


@pytest.mark.slow
def test_job_of_before_the_floor_goes_on(tiny: AdaptConfig, tmp_path: Path) -> None:
    config = replace(tiny, supernet_epochs=0, winner_epochs=0, refit_images=0)
    run_adapt(replace(config, search_floor=0.0), tmp_path)
    archive = (tmp_path / 'search' / 'archive.jsonl').read_bytes()
    job = json.loads((tmp_path / 'adapt.json').read_text())
    with pytest.raises(UsageError, match=r'another search_floor \(0\.0, now 0\.8\)'):
        run_adapt(config, tmp_path)
    # It looked at what an untrained supernet can't tell from the backbone, unless it is told not to
    assert more_than_the_backbone(tmp_path)
    del job['search_floor'], job['reduce_only']
    (tmp_path / 'adapt.json').write_text(json.dumps(job))
    shutil.rmtree(tmp_path / 'model')
    folder = run_adapt(config, tmp_path)
    assert folder.exists() and (tmp_path / 'search' / 'archive.jsonl').read_bytes() == archive
    run_adapt(replace(config, reuse=str(tmp_path), reduce_only=True), tmp_path / 'now')
    assert not more_than_the_backbone(tmp_path / 'now')


@pytest.mark.parametrize('content', ['null', '3', '[]'])
def test_damaged_job_is_one_sentence(tiny: AdaptConfig, tmp_path: Path, content: str) -> None:
    (tmp_path / 'adapt.json').write_text(content)
    with pytest.raises(UsageError, match=r'adapt\.json. is damaged; choose another --output'):
        run_adapt(tiny, tmp_path)
    assert (tmp_path / 'adapt.json').read_text() == content


def more_than_the_backbone(job: Path) -> list[str]:
    """Archs that a job evaluated with a sum of paths, or with a kernel that is larger than the backbone's."""
    part = backbone_space(BACKBONE).without_more()
    lines = (job / 'search' / 'archive.jsonl').read_text().splitlines()[1:]
    archs = [json.loads(line)['arch'] for line in lines]
    found = []
    for arch in archs:
        try:
            part.arch(arch)
        except ValueError:
            found.append(arch)
    return found


@pytest.mark.parametrize('size, later', [(None, 224), (224, None), (None, (160, 224)), ((160, 224), None)])
def test_size_of_the_backbone_has_two_names(
    tiny: AdaptConfig, tmp_path: Path, size: int | tuple | None, later: int | tuple | None
) -> None:
    (tmp_path / 'backbone' / 'model').mkdir(parents=True)
    (tmp_path / 'backbone' / 'summary.csv').touch()
    content = describe_job(asdict(replace(tiny, img_size=size)))
    (tmp_path / 'adapt.json').write_text(json.dumps(content))
    assert find_reused(replace(tiny, img_size=later), tmp_path) == {'backbone': tmp_path / 'backbone'}
    with pytest.raises(UsageError, match=r'has another img_size \(224, now 160\), and so another backbone'):
        find_reused(replace(tiny, img_size=160), tmp_path)


def test_images_that_were_downloaded_are_the_same(tiny: AdaptConfig, tmp_path: Path) -> None:
    config = replace(tiny, dataset='torch/cifar10', dataset_download=True)
    (tmp_path / 'backbone' / 'model').mkdir(parents=True)
    (tmp_path / 'backbone' / 'summary.csv').touch()
    with job_folder(tmp_path, config, 'adapt.json'):
        pass
    later = replace(config, dataset_download=False)
    with job_folder(tmp_path, later, 'adapt.json'):
        assert find_reused(later, tmp_path).keys() == {'backbone'}


def test_what_another_job_still_trains_is_not_taken(tiny: AdaptConfig, tmp_path: Path) -> None:
    for name in ('backbone', 'supernet'):
        (tmp_path / name).mkdir()
    (tmp_path / 'adapt.json').write_text(json.dumps(describe_job(asdict(tiny))))
    with pytest.raises(UsageError, match='has not trained its backbone to the end yet'):
        find_reused(tiny, tmp_path)
    (tmp_path / 'backbone' / 'model').mkdir()
    (tmp_path / 'backbone' / 'summary.csv').touch()
    assert find_reused(tiny, tmp_path).keys() == {'backbone'}
    (tmp_path / 'search').mkdir()
    assert find_reused(tiny, tmp_path).keys() == {'backbone', 'supernet'}
    (tmp_path / 'adapt.json').write_text('[1]')
    with pytest.raises(UsageError, match='is not the output folder of an adapt job'):
        find_reused(tiny, tmp_path)


@pytest.mark.parametrize('command', ['adapt', 'demo'])
def test_one_process_alone(
    command: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in dict(WORLD_SIZE='2', RANK='1', LOCAL_RANK='1').items():
        monkeypatch.setenv(name, value)
    words = [command, '--data-dir', str(digits), '--output', str(tmp_path / 'job')]
    assert cli.main([*words, *(['--backbone', BACKBONE] if command == 'adapt' else [])]) == 2
    assert f'`timm-mixpath {command}` is one process, and was started as one of 2' in capsys.readouterr().err
    assert not (tmp_path / 'job').exists()


@pytest.mark.parametrize('sizes', [(), '128', [96.5], (32, '64'), (True,)])
def test_sizes_are_integers(sizes: object) -> None:
    with pytest.raises(UsageError, match='must be one or more integers'):
        AdaptConfig(backbone=BACKBONE, img_size=sizes)


def test_job_is_cut_off_and_goes_on(
    tiny: AdaptConfig, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('timm_mixpath.cli.adapt.inherit_blended', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_adapt(tiny, tmp_path)
    kept = ['backbone/last.pth.tar', 'supernet/last.pth.tar', 'search/archive.jsonl']
    before = [(tmp_path / name).read_bytes() for name in kept]
    monkeypatch.undo()
    # A version without an option has not written it
    job = json.loads((tmp_path / 'adapt.json').read_text())
    del job['refit_images']
    (tmp_path / 'adapt.json').write_text(json.dumps(job))

    folder = run_adapt(tiny, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in kept] == before
    assert (tmp_path / 'search' / 'pareto.png').exists()
    assert more_than_the_backbone(tmp_path)  # a supernet that is trained may find them good
    # The search begins near the backbone
    header = json.loads((tmp_path / 'search' / 'archive.jsonl').read_text().splitlines()[0])
    assert header['config']['near'] == str(backbone_space(BACKBONE).default_arch)

    # The supernet began as the fine-tuned backbone, and the table tells what the folder holds
    backbone = timm.create_model(f'local-dir:{tmp_path / "backbone" / "model"}', pretrained=True).eval()
    args = (tmp_path / 'supernet' / 'args.yaml').read_text()
    assert str(tmp_path / 'backbone' / 'model' / 'model.safetensors') in args and 'kd_model_name' in args
    line = capsys.readouterr().out.strip().splitlines()[-1]
    winner = eval(line, {'timm': timm}).eval()
    assert str(folder) in line and winner(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    first, second = json.loads((tmp_path / 'summary.json').read_text())['rows']
    assert first['macs'] == sum(count_macs(backbone, (3, 32, 32)).values())
    assert second['macs'] == sum(count_macs(winner, (3, 32, 32)).values()) <= 700_000
    assert second['params'] == sum(p.numel() for p in winner.parameters())
    assert winner.pretrained_cfg['notes'] == [
        f'warm start from weights of {BACKBONE} in backbone.safetensors, whose licence is not recorded'
    ]
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_args']['backbone'] == BACKBONE and config['label_names'] == [str(i) for i in range(10)]

    with pytest.raises(UsageError, match=r'another seed \(0, now 1\)'):
        run_adapt(replace(tiny, seed=1), tmp_path)

    # A second limit takes what is trained
    other = tmp_path / 'other'
    reuse = replace(tiny, reuse=str(tmp_path), max_macs=600_000, winner_epochs=2)
    run_adapt(reuse, other)
    assert 'the backbone was fine-tuned for 1 epochs, the winner for 2 behind 1' in capsys.readouterr().out
    assert (other / 'winner' / 'summary.csv').read_text().splitlines()[-1].startswith('1,')  # the second epoch
    assert [(tmp_path / name).read_bytes() for name in kept] == before
    assert not (other / 'backbone').exists() and not (other / 'supernet').exists()
    rows = json.loads((other / 'summary.json').read_text())['rows']
    assert rows[0]['top1'] == first['top1'] and rows[1]['macs'] <= 600_000
    assert timm.create_model(f'local-dir:{other / "model"}', pretrained=True).num_classes == 10
    for changes, message in (
        (dict(seed=1), r'has another seed \(0, now 1\), and so another backbone'),
        (dict(reuse=str(tmp_path / 'supernet')), 'is not the output folder of an adapt job'),
    ):
        with pytest.raises(UsageError, match=message):
            run_adapt(replace(reuse, **changes), tmp_path / 'third')
    assert not (tmp_path / 'third').exists()


@pytest.mark.parametrize(
    'limits, epochs',
    [(dict(max_macs=None), 5), (dict(max_macs=900_000), 5), (dict(max_macs=None, max_params=500_000), 0), (dict(), 0)],
)
def test_supernet_is_trained_where_the_backbone_is_within_the_limits(
    tiny: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict, epochs: int
) -> None:
    def begin(args: Namespace) -> None:
        (Path(args.output) / args.experiment).mkdir()
        interrupt()

    monkeypatch.setattr('timm_mixpath.cli.adapt.train_or_resume', begin)
    with pytest.raises(KeyboardInterrupt):
        run_adapt(replace(tiny, supernet_epochs=None, **limits), tmp_path)
    assert json.loads((tmp_path / 'adapt.json').read_text())['supernet_epochs'] == epochs


@pytest.mark.parametrize('supernet_epochs', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_all_stages_see_images_as_the_tag_does(tiny: AdaptConfig, tmp_path: Path, supernet_epochs: int) -> None:
    name = 'mobilenetv4_conv_small.e3600_r256_in1k'  # the other tags have another mean, std and crop
    backbone = timm.create_model(name)
    save_file(backbone.state_dict(), tmp_path / 'backbone.safetensors')
    changes = dict(backbone=name, backbone_weights=str(tmp_path / 'backbone.safetensors'), max_macs=None)
    folder = run_adapt(replace(tiny, supernet_epochs=supernet_epochs, **changes), tmp_path / 'job')
    expected = timm.data.resolve_model_data_config(backbone) | dict(input_size=(3, 32, 32))

    def with_tuples(config: dict) -> dict:  # JSON and YAML know lists only
        return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}

    assert expected['mean'] == (0.5, 0.5, 0.5)
    for stage in ('backbone', 'supernet', 'winner'):
        assert with_tuples(load_model(tmp_path / 'job' / stage / 'last.pth.tar').data_config) == expected, stage
    winner = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert with_tuples(timm.data.resolve_model_data_config(winner)) == expected


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            dict(max_macs=1000),
            r'max_macs=1000 excludes every arch, the smallest of the space has \d+ and the largest \d+',
        ),
        (dict(backbone='resnet18'), "'resnet18' can not be a backbone"),
        (dict(backbone_weights='nope.safetensors'), "weights file 'nope.safetensors' does not exist"),
        (dict(backbone_weights='.'), r"weights '\.' are a folder; name the file in it, such as its model.safetensors"),
        (dict(data_dir=None), 'pass --data-dir DIR'),
        (dict(max_latency=5.0), 'needs a latency table'),
        (dict(latency_table='none.json'), "latency table 'none.json' can not be read"),
        (dict(m=9), 'm=9 is out of range'),
        (dict(winner_epochs=-1), '--winner-epochs -1 must be at least 0'),
        (dict(refit_images=-1), '--refit-images -1 must be at least 0'),
        (dict(supernet_epochs=-1), '--supernet-epochs -1 must be at least 0'),
        (dict(train_split='nope'), 'nope'),
        # which the search or the first training would find
        (dict(num_images=0), '--num-images 0 must be at least 1'),
        (dict(recalibration_images=-1), '--recalibration-images -1 must be at least 0'),
        (dict(recalibration_images=1), '--recalibration-images 1 has no batch statistics'),
        (dict(refit_images=1), '--refit-images 1 has no batch statistics'),
        (dict(recalibration_images=0, supernet_epochs=0), '--recalibration-images 0 leaves archs'),
        (dict(img_size=0), '--img-size 0 must be at least 1'),
        (dict(img_size=(64, -1)), '--img-size -1 must be at least 1'),
        (dict(search_floor=1.0), '--search-floor 1.0 must be at least 0 and below 1'),
        (dict(search_floor=-0.1), '--search-floor -0.1 must be at least 0 and below 1'),
        (dict(batch_size=0), '--batch-size 0 must be at least 1'),
        (dict(lr=-1.0), r'--lr -1\.0 must be a positive number'),
        (dict(lr=float('nan')), '--lr nan must be a positive number'),
        (dict(val_split='nope'), 'nope'),
        (dict(val_split=''), "--val-split '': the result is measured on a split of its own"),
        (dict(val_split='search-holdout'), "--val-split 'search-holdout': the result is measured on a split"),
        (dict(device='foo'), 'foo'),
        (dict(amp_dtype='int8'), "--amp-dtype 'int8' must be one of float16, bfloat16"),
    ],
)
def test_wrong_values_end_before_any_training(tiny: AdaptConfig, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_adapt(replace(tiny, **changes), tmp_path)
    assert not list(tmp_path.iterdir())  # so the same folder takes the right value


@pytest.mark.parametrize(
    'other, message',
    [
        ('mobilenetv3_small_075', r'they have shape \(.*\) at blocks\..*, it has shape'),
        # As lite0 fits efficientnet_b0 where that has it: timm would train, and leave the rest at random
        (f'{BACKBONE} without squeeze-and-excite', r'they have nothing at blocks\..*\.se\.'),
    ],
)
def test_weights_of_another_backbone_leave_nothing(tiny: AdaptConfig, tmp_path: Path, other: str, message: str) -> None:
    file = tmp_path / 'other.safetensors'
    name, without, _ = other.partition(' without')
    state_dict = timm.create_model(name).state_dict()
    save_file({key: value for key, value in state_dict.items() if not (without and '.se.' in key)}, file)
    with pytest.raises(UsageError, match=f'other.safetensors. are not those of {BACKBONE}: {message}') as info:
        run_adapt(replace(tiny, backbone_weights=str(file)), tmp_path / 'job')
    assert '\n' not in str(info.value) and not (tmp_path / 'job').exists()


def test_weights_that_can_not_be_read(
    tiny: AdaptConfig, tmp_path: Path, capsys: pytest.CaptureFixture, digits: Path
) -> None:
    (tmp_path / 'junk.safetensors').write_bytes(b'junk' * 100)
    junk = str(tmp_path / 'junk.safetensors')
    with pytest.raises(RunError, match=r'junk\.safetensors. can not be loaded'):
        run_adapt(replace(tiny, backbone_weights=junk), tmp_path / 'job')
    assert not (tmp_path / 'job').exists()
    for start in (['--warm-start', 'mixnet_m', '--model', 'mixpath_a'], ['--pretrained', '--model', BACKBONE]):
        words = ['train', *start, '--pretrained-path', junk, '--data-dir', str(digits), '--output', str(tmp_path)]
        assert cli.main([*words, '--num-classes', '10']) == 1
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith('timm-mixpath: error: weights of ')


def test_command_line(capsys: pytest.CaptureFixture, tmp_path: Path, digits: Path) -> None:
    words = ['adapt', '--backbone', 'resnet18', '--data-dir', str(digits), '--output', str(tmp_path)]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("timm-mixpath: error: 'resnet18' can not be")


def printed(capsys: pytest.CaptureFixture) -> str:
    return ' '.join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_latency_is_the_budget(
    tiny: AdaptConfig, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = 'latency --num-classes 10 --input-size 3 32 32 --num-archs 12 --test-archs 5 --rounds 1 --threads 1'
    model = ['--model', 'mixpath_supernet', '--model-kwargs', f'backbone={BACKBONE}', 'm=2']
    table = tmp_path / 'here.json'
    assert cli.main([*words.split(), *model, '--device', 'cpu', '--output', str(table)]) == 0
    times = sorted(row['latency_ms'] for row in json.loads(table.read_text())['measured'])
    config = replace(tiny, max_macs=None, latency_table=str(table), max_latency=times[len(times) // 2])
    run_adapt(config, tmp_path / 'job')
    front = json.loads((tmp_path / 'job' / 'search' / 'front.json').read_text())
    assert front['config']['objectives'] == {'loss': 1.0, 'latency': 1.0}
    assert all(c['latency'] <= config.max_latency for c in front['front'])
    rows = json.loads((tmp_path / 'job' / 'summary.json').read_text())['rows']
    assert all(row['latency_ms'] > 0 for row in rows)
    assert f'ms measured on this machine, as the latency table: torch on {describe_device("cpu")}' in printed(capsys)
    # A table of another device, or of a runtime that is not here, still leaves a result
    content = json.loads(table.read_text())
    for name, changes, reason in (
        ('phone', dict(device_name='a phone'), 'the table is of a phone, this is'),
        ('runtime', dict(runtime='onnxruntime'), 'the runtime needs onnxruntime'),
    ):
        other = tmp_path / f'{name}.json'
        other.write_text(json.dumps({**content, **changes}))
        if name == 'runtime':
            monkeypatch.setitem(sys.modules, 'onnxruntime', None)
        run_adapt(replace(config, latency_table=str(other), reuse=str(tmp_path / 'job')), tmp_path / name)
        assert f'thread(s) (not as the latency table: {reason}' in printed(capsys)
    with pytest.raises(UsageError, match=r'max_latency=0\.0001 ms excludes every arch'):
        run_adapt(replace(config, max_latency=0.0001), tmp_path / 'other')
