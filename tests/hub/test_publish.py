"""The real huggingface_hub client and the real timm over HTTP, against a Hub-shaped server on 127.0.0.1."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from conftest import small_args
from hub_server import READ_TOKEN, TOKEN, Fault, Hub
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

import timm_mixpath
from timm_mixpath import cli
from timm_mixpath.hub.card import CardDetails, make_card
from timm_mixpath.hub.export import export, save_model
from timm_mixpath.hub.publish import push, push_packaged, write_repo
from timm_mixpath.models.cost import CostTable
from timm_mixpath.models.pretrained import PACKAGED, packaged_weights
from timm_mixpath.search.config import SearchConfig
from timm_mixpath.search.images import SearchData
from timm_mixpath.search.run import search_checkpoint
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import RunError, UsageError

ARCH = ','.join(['k3+5_e6', *['k3_e3'] * 7])
NAME = 'org/mixpath_nano.digits'
SOURCE = f'hf-hub:{NAME}'
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A server that the client of this process talks to, with an empty cache and a token that may write."""
    server = Hub()
    # What HF_ENDPOINT and its like set when huggingface_hub is imported
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)  # the server speaks LFS
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 1)
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    yield server
    server.close()
    huggingface_hub.close_session()


def environment(hub: Hub, home: Path, **extra: str) -> dict[str, str]:
    """Environment of a new process that talks to the server, with an empty cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TIMM_MIXPATH'))}
    env.update(PYTHONPATH=str(Path(timm_mixpath.__file__).parents[1]), HF_ENDPOINT=hub.url, HF_HOME=str(home))
    env.update(HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1')
    env.update(OMP_NUM_THREADS='1', HF_HUB_DISABLE_UPDATE_CHECK='1')
    return {**env, **extra}


@pytest.fixture(scope='module')
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short training of a sub-network."""
    args = small_args(
        digits, tmp_path_factory.mktemp('final'), model='mixpath_nano', model_kwargs={'arch': ARCH}, epochs=1
    )
    return train(args).output_dir


@pytest.fixture(scope='module')
def searched(supernet_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a search of the supernet."""
    output = tmp_path_factory.mktemp('search')
    config = SearchConfig(population=4, offspring=2, generations=1)
    search_checkpoint(supernet_run / 'last.pth.tar', output, config, SearchData(num_images=10), workers=0)
    return output


@pytest.fixture(scope='module')
def model_dir(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of the trained sub-network."""
    folder = tmp_path_factory.mktemp('model') / 'm'
    export(run / 'last.pth.tar', folder)
    return folder


@pytest.fixture
def published(hub: Hub, model_dir: Path) -> Hub:
    """The server with a repo on it."""
    hub.put(NAME, {path.name: path.read_bytes() for path in model_dir.iterdir()})
    return hub


def output_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(X)


def cached(tmp_path: Path) -> list[str]:
    """Names of the files in the cache that hold content."""
    return sorted(p.name for p in (tmp_path / 'cache').rglob('*') if p.is_file() and p.parts[-2] not in ('refs', 'x'))


# Push


def test_from_push_to_a_new_process_and_offline(hub: Hub, run: Path, tmp_path: Path) -> None:
    result = push(run / 'last.pth.tar', NAME)
    assert result.created and hub.repos[NAME].refs['main'] == result.commit
    assert sorted(hub.files(NAME)) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    code = (
        'import sys, timm_mixpath, timm, torch\n'
        'x = torch.load(sys.argv[1])\n'
        f"model = timm.create_model('{SOURCE}', pretrained=True).eval()\n"
        'assert len(model.pretrained_cfg["label_names"]) == 10\n'
        'torch.save(model(x), sys.argv[2])\n'
    )
    torch.save(X, tmp_path / 'x.pt')
    expected = output_of(load_model(run / 'last.pth.tar').model)
    for extra in ({}, {'HF_HUB_OFFLINE': '1'}):
        env = environment(hub, tmp_path / 'home', **extra)
        command = [sys.executable, '-c', code, str(tmp_path / 'x.pt'), str(tmp_path / 'y.pt')]
        before = len(hub.requests)
        subprocess.run(command, env=env, check=True)
        assert torch.equal(torch.load(tmp_path / 'y.pt'), expected)
        assert (len(hub.requests) == before) == bool(extra)
        (tmp_path / 'y.pt').unlink()


def test_one_commit_per_push_and_none_for_the_same_content(hub: Hub, run: Path, model_dir: Path) -> None:
    first = push(run / 'last.pth.tar', NAME)
    assert len(hub.repos[NAME].log) == 2  # the first is the Hub's own, of .gitattributes
    again = push(run / 'last.pth.tar', NAME)
    assert not again.created and again.commit == first.commit and len(hub.repos[NAME].log) == 2
    assert hub.count('PUT /lfs/') == 1
    other = push(run / 'last.pth.tar', NAME, details=CardDetails(license='mit'))
    assert other.created and len(hub.repos[NAME].log) == 3
    assert hub.count('PUT /lfs/') == 1


def test_command_line(hub: Hub, run: Path, capsys: pytest.CaptureFixture) -> None:
    words = ['push', '--checkpoint', str(run / 'last.pth.tar'), '--repo-id', NAME, '--message', 'My words']
    assert cli.main([*words, '--private', '--revision', 'v1']) == 0
    out = capsys.readouterr().out
    assert f'pushed to {hub.url}/{NAME}, commit' in out
    repo = hub.repos[NAME]
    assert repo.private and len(repo.log) == 2
    assert 'config.json' in hub.files(NAME, 'v1') and 'config.json' not in hub.files(NAME)
    model = eval(out.strip().splitlines()[-1], {'timm': timm})
    assert model.arch == ARCH and '@v1' in hub.files(NAME, 'v1')['README.md'].decode()
    assert cli.main([*words, '--private', '--revision', 'v1']) == 0
    assert 'nothing to push' in capsys.readouterr().out and len(repo.log) == 2


def test_dry_run_writes_the_folder_and_asks_nobody(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.chdir(tmp_path)
    words = ['push', '--checkpoint', str(run / 'last.pth.tar'), '--repo-id', NAME, '--dry-run']
    assert cli.main(words) == 0
    folder = tmp_path / 'mixpath_nano.digits'
    names = sorted(path.name for path in folder.iterdir())
    assert names == ['README.md', 'config.json', 'model.safetensors']
    out = capsys.readouterr().out
    assert f'would push to {NAME} in one commit' in out and all(name in out for name in names)
    assert hub.requests == []
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(output_of(model), output_of(load_model(run / 'last.pth.tar').model))
    assert cli.main(words) == 2 and 'exists already' in capsys.readouterr().err


def test_pushed_in_half_precision_with_what_validate_measured(hub: Hub, run: Path, tmp_path: Path) -> None:
    """What timm's validate.py writes, as it writes it."""
    model = load_model(run / 'last.pth.tar').model
    params = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    results = tmp_path / 'results.json'
    content = dict(model='m', top1=91.2345, top1_err=8.7655, top5=99.5, top5_err=0.5, param_count=params)
    content.update(img_size=24, crop_pct=0.9, interpolation='bicubic')
    results.write_text(json.dumps(content))
    details = CardDetails(dataset_id='org/digits', dataset_name='Digits', provenance='Digits are free.')
    push(run / 'last.pth.tar', NAME, details=details, results=results, dtype='float16', img_size=24)
    stored = safetensors.torch.load(hub.files(NAME)['model.safetensors'])
    assert {v.dtype for v in stored.values()} == {torch.float16, torch.int64}
    loaded = timm.create_model(SOURCE, pretrained=True)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == (3, 24, 24)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().to(value.dtype))
    card = ModelCard(hub.files(NAME)['README.md'].decode())
    assert '| the validation images of Digits | 91.23 | 99.50 |' in card.text
    assert "timm's `validate.py` at 24x24 pixels (crop 0.9), with the weights as stored in float16" in card.text
    assert 'Digits are free.' in card.text and 'Measured in the training' not in card.text
    assert [result.metric_value for result in card.data.eval_results] == [91.234, 99.5]

    results.write_text(json.dumps({**content, 'param_count': 7.0}))
    with pytest.raises(UsageError, match=r'is of a network of 7\.0 M parameters, this one has'):
        write_repo(run / 'last.pth.tar', NAME, tmp_path / 'other', results=results)
    for text in ('top1\n5\n', '[]', '{}'):
        results.write_text(text)
        with pytest.raises(UsageError, match='--results-format json'):
            write_repo(run / 'last.pth.tar', NAME, tmp_path / 'other', results=results)
    assert not (tmp_path / 'other').exists()


@pytest.mark.slow
def test_packaged_weights_are_pushed_in_one_command(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All of them, one repo each; what is there already is not pushed again, and what failed is."""
    words = ['push', '--packaged', '--org', 'lab']
    first = next(push_packaged('lab'))  # cut off behind the first repo
    assert first.created and list(hub.repos) == [f'lab/{min(PACKAGED)}']
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.count('nothing to push') == 1 and out.count('pushed to') == len(PACKAGED) - 1
    before = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    assert set(before) == {f'lab/{name}' for name in PACKAGED}
    assert cli.main(words) == 0 and capsys.readouterr().out.count('nothing to push') == len(PACKAGED)
    assert {name: dict(repo.refs) for name, repo in hub.repos.items()} == before
    for name, folder in packaged_weights().items():
        card = ModelCard(hub.files(f'lab/{name}')['README.md'].decode())
        assert f'hf-hub:lab/{name}' in card.text and 'timm-mixpath/' not in card.text
        card.validate()
        pushed = timm.create_model(f'hf-hub:lab/{name}', pretrained=True)
        own = timm.create_model(name, pretrained=True)
        assert all(torch.equal(value, own.state_dict()[key]) for key, value in pushed.state_dict().items())
        assert hub.files(f'lab/{name}')['model.safetensors'] == (folder / 'model.safetensors').read_bytes()

    requests = len(hub.requests)
    assert cli.main([*words, '--dry-run', '--output', str(tmp_path / 'repos')]) == 0
    assert sorted(path.name for path in (tmp_path / 'repos').iterdir()) == sorted(PACKAGED)
    assert len(hub.requests) == requests
    # A dry run goes on, too, and overwrites nothing
    assert cli.main([*words, '--dry-run', '--output', str(tmp_path / 'repos')]) == 0
    card = tmp_path / 'repos' / min(PACKAGED) / 'README.md'
    card.write_text('mine')
    assert cli.main([*words, '--dry-run', '--output', str(tmp_path / 'repos')]) == 2 and card.read_text() == 'mine'


@pytest.mark.parametrize(
    'words, text',
    [
        (['--packaged'], '--packaged needs the organisation or user to publish under: --org ORG'),
        (['--packaged', '--org', 'a/b'], "'a/b/mixpath_"),
        (['--packaged', '--org', 'lab', '--checkpoint', 'x'], '--checkpoint is of a push of one model'),
        (['--packaged', '--org', 'lab', '--license', 'mit'], '--license is of a push of one model'),
        (['--packaged', '--org', 'lab', '--config', 'nano_cifar10'], '--config is of a push of one model'),
        (['--org', 'lab', '--checkpoint', 'x'], '--org lab is for --packaged'),
        (['--repo-id', 'lab/x'], '--checkpoint is missing'),
        (['--checkpoint', 'x'], '--repo-id is missing'),
    ],
)
def test_wrong_push_of_packaged_weights(hub: Hub, capsys: pytest.CaptureFixture, words: list[str], text: str) -> None:
    assert cli.main(['push', *words]) == 2
    assert text in capsys.readouterr().err and hub.requests == []


def test_averaged_weights_are_pushed_where_there_are_any(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    ema = {key: value + 1 if value.is_floating_point() else value for key, value in checkpoint['state_dict'].items()}
    torch.save({**checkpoint, 'state_dict_ema': ema}, tmp_path / 'ema.pth.tar')
    write_repo(tmp_path / 'ema.pth.tar', NAME, tmp_path / 'repo')
    assert torch.equal(load_file(tmp_path / 'repo' / 'model.safetensors')['conv_stem.weight'], ema['conv_stem.weight'])
    assert 'moving average' in (tmp_path / 'repo' / 'README.md').read_text()


def test_supernet_is_pushed_and_searched_from_the_hub(
    hub: Hub, supernet_run: Path, digits: Path, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = 'org/mixpath_nano_supernet.digits'
    push(supernet_run / 'last.pth.tar', name, search=searched)
    card = ModelCard(hub.files(name)['README.md'].decode())
    assert 'pareto.png' in hub.files(name) and '](pareto.png)' in card.text
    assert f'timm-mixpath search --checkpoint hf-hub:{name}' in card.text
    assert card.data.eval_results is None and 'supernet' in card.data.tags
    supernet = timm.create_model(f'hf-hub:{name}', pretrained=True)
    original = load_model(supernet_run / 'last.pth.tar').model
    assert supernet.space == original.space
    assert all(torch.equal(v, supernet.state_dict()[k]) for k, v in original.state_dict().items())
    words = f'search --checkpoint hf-hub:{name} --data-dir {digits} --search-split validation --num-images 10 -j 0'
    budget = f'--population 3 --offspring 1 --generations 1 --output {tmp_path / "search"}'
    assert cli.main([*words.split(), *budget.split()]) == 0
    assert 'chosen (*)' in capsys.readouterr().out and (tmp_path / 'search' / 'front.json').exists()
    export(f'hf-hub:{name}', tmp_path / 'm', ARCH)
    assert load_model(tmp_path / 'm').model.arch == ARCH


def test_space_of_ones_own_is_defined_on_the_card(tmp_path: Path) -> None:
    blocks = timm_mixpath.BlockSpec(16, stride=2, kernel_sizes=(3, 7)), timm_mixpath.BlockSpec(24)
    space = timm_mixpath.SearchSpace('hubtest', blocks, stem_chs=8, stem_stride=2, num_features=64)
    timm_mixpath.register_space(space)
    save_model(timm.create_model('mixpath_hubtest', num_classes=2), tmp_path / 'm')
    write_repo(tmp_path / 'm', 'org/mine', tmp_path / 'repo')
    snippet = re.search(r'```python\n(.*?)```', (tmp_path / 'repo' / 'README.md').read_text(), re.DOTALL)[1]
    assert snippet.startswith('import timm_mixpath\n')
    exec(snippet.split('\nmodel = ')[0], {})  # registering an equal space again does nothing


# Card


def test_card_says_what_is_recorded_and_nothing_else(run: Path, model_dir: Path, tmp_path: Path) -> None:
    details = CardDetails('apache-2.0', 'org/digits', 'Digits', 'abc123')
    write_repo(run / 'last.pth.tar', NAME, tmp_path / 'a', details=details)
    card = ModelCard.load(tmp_path / 'a' / 'README.md')
    top1, top5 = card.data.eval_results
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    assert top1.metric_value == pytest.approx(checkpoint['metric'], abs=1e-3) and top5.metric_value >= top1.metric_value
    assert (top1.dataset_type, top1.dataset_name, top1.dataset_split) == ('org/digits', 'Digits', None)
    assert card.data.to_dict()['license'] == 'apache-2.0' and card.data.library_name == 'timm'
    assert card.data.datasets == ['org/digits'] and card.data.metrics == ['accuracy']
    text = card.text
    assert text.split('```python\n')[1].startswith('import timm_mixpath')
    model = load_model(model_dir).model
    macs = CostTable(model.space.with_max_paths(2), input_size=(3, 16, 16)).macs(ARCH)
    assert (
        f'{macs / 1e6:.2f} M MACs' in text and f'{sum(p.numel() for p in model.parameters()) / 1e6:.3f} M par' in text
    )
    assert 'are depthwise convolutions whose outputs are summed' in text and 'from scratch' not in text
    assert text.count('| `k3_e3` |') == 7 and '`abc123`' in text and 'seed 42' in text and 'batch_size: 32' in text
    assert f'{checkpoint["metric"]:.2f}' in text and 'after epoch 1 of 1' in text
    assert str(run.parent) not in text and 'data_dir' not in text and '## Search' not in text
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert config['pretrained_cfg']['tag'] == 'digits' and config['pretrained_cfg']['license'] == 'apache-2.0'
    assert config['label_names'] == [str(i) for i in range(10)] and config['model_args']['arch'] == ARCH

    write_repo(model_dir, NAME, tmp_path / 'b')
    card = ModelCard.load(tmp_path / 'b' / 'README.md')
    for key in ('license', 'datasets', 'metrics', 'model-index'):
        assert key not in card.data.to_dict()
    assert '## Training' not in card.text and '## Results' not in card.text and 'is not recorded here' in card.text
    assert 'license' not in timm.create_model(f'local-dir:{tmp_path / "b"}').pretrained_cfg


def test_licence_of_a_folder_stays(tmp_path: Path) -> None:
    save_model(timm.create_model('mixpath_nano'), tmp_path / 'model')
    write_repo(tmp_path / 'model', NAME, tmp_path / 'a', details=CardDetails('cc-by-nc-4.0'))
    write_repo(tmp_path / 'a', NAME, tmp_path / 'b')
    write_repo(tmp_path / 'b', NAME, tmp_path / 'c', details=CardDetails('mit'))
    for name, expected in (('b', 'cc-by-nc-4.0'), ('c', 'mit')):
        config = json.loads((tmp_path / name / 'config.json').read_text())
        assert config['pretrained_cfg']['license'] == expected
        assert ModelCard.load(tmp_path / name / 'README.md').data.to_dict()['license'] == expected


def test_card_of_a_network_around_a_backbone(tmp_path: Path) -> None:
    backbone = timm.create_model('mobilenetv3_small_050', num_classes=10)
    for name, start in (('mixpath', 'An image classifier (`mixpath`)'), ('mixpath_supernet', 'A one-shot supernet')):
        model = timm.create_model(name, backbone='mobilenetv3_small_050', num_classes=10)
        timm_mixpath.warm_start(model, backbone)
        save_model(model, tmp_path / name, resolve_model_data_config(model))
        write_repo(tmp_path / name, f'org/{name}', tmp_path / f'{name}-repo')
        text = ModelCard.load(tmp_path / f'{name}-repo' / 'README.md').text
        assert start in text and ',.' not in text and "around timm's `mobilenetv3_small_050`" in text
        assert 'from a mobilenetv3_small_050 at hand; if its weights go back to mobilenetv3_small_050.lamb_in1k' in text
        assert 'apache-2.0' in text


def test_card_names_the_teacher_but_not_where_it_was(run: Path, model_dir: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    for teacher, said in (
        (f'local-dir:{model_dir}', 'distilled from a network in a folder'),
        ('local-dir:relative', 'distilled from a network in a folder'),
        ('resnet18.a1_in1k', 'distilled from `resnet18.a1_in1k`'),
    ):
        checkpoint['args'].kd_model_name = teacher
        path = tmp_path / 'last.pth.tar'
        torch.save(checkpoint, path)
        folder = tmp_path / teacher.rpartition('/')[2]
        write_repo(path, NAME, folder)
        card = (folder / 'README.md').read_text()
        assert f'- {said}\n' in card and str(model_dir.parent) not in card
        # The options are a recipe, which a folder of another machine would end
        is_folder = teacher.startswith('local-dir:')
        assert (f'kd_model_name: {teacher}\n' in card) != is_folder and 'local-dir' not in card
        assert ('for its `-c`, which has to be told its teacher (`--kd-model-name`):' in card) == is_folder


def test_card_of_a_network_that_was_trained_before(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    args = checkpoint['args']
    args.initial_checkpoint, args.model_kwargs = 'before/last.pth.tar', dict(arch=','.join(['k3_e3'] * 8))
    model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    torch.save({**checkpoint, 'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    write_repo(tmp_path / 'last.pth.tar', NAME, tmp_path / 'repo')
    card = (tmp_path / 'repo' / 'README.md').read_text()
    assert '- started from other weights, not from scratch: this is the last training alone\n' in card
    assert 'for its `-c`, which has to be told the weights that it started from:' in card and 'before' not in card
    assert 'joined by' not in card and '`k` is the depthwise kernel, `e` the expansion.' in card


def test_card_is_valid_and_its_links_lead_somewhere(
    hub: Hub, supernet_run: Path, searched: Path, tmp_path: Path
) -> None:
    front = json.loads((searched / 'front.json').read_text())
    arch = front['front'][0]['arch']
    export(supernet_run / 'last.pth.tar', tmp_path / 'm', arch)
    write_repo(tmp_path / 'm', NAME, tmp_path / 'repo', search=searched, details=CardDetails('mit', 'a/b'))
    card = ModelCard.load(tmp_path / 'repo' / 'README.md')
    card.validate()
    assert hub.requests == ['POST /api/validate-yaml']
    links = re.findall(r'\]\(([^)]+)\)', card.text)
    assert 'pareto.png' in links
    assert all(link.startswith('https://') or (tmp_path / 'repo' / link).is_file() for link in links)
    entry = front['front'][0]
    assert f'error of {entry["error"]:.2f} %' in card.text and f'{front["num_evaluations"]} evaluations' in card.text
    assert re.search(r'scored on 10 images of .*`, 16x16 pixels each', card.text)  # not always those of the model


def test_card_tells_of_a_search_for_latency(supernet_run: Path, searched: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'search'
    shutil.copytree(searched, folder)
    front = json.loads((folder / 'front.json').read_text())
    front['config'].update(objectives=dict(error=1.0, latency=1.0), max_latency=2.5)
    front['fingerprint'].update(latency_table='abc', latency_of='onnxruntime on a phone, 1 thread, batches of 1')
    front['front'][0].update(latency=1.25, metrics={**front['front'][0]['metrics'], 'latency_ms': 1.3})
    (folder / 'front.json').write_text(json.dumps(front))
    export(supernet_run / 'last.pth.tar', tmp_path / 'm', front['front'][0]['arch'])
    write_repo(tmp_path / 'm', NAME, tmp_path / 'repo', search=folder, details=CardDetails('mit', 'a/b'))
    text = (tmp_path / 'repo' / 'README.md').read_text()
    for fact in (
        'minimised: error, latency',
        'limits: max latency 2.5 ms',
        'latency predicted from a table: onnxruntime on a phone, 1 thread, batches of 1',
        'its latency: 1.25 ms predicted, 1.30 ms measured',
    ):
        assert fact in text


def test_recipe_is_named_where_the_options_are_its_own(run: Path) -> None:
    import argparse

    from timm_mixpath.hub.card import _recipe
    from timm_mixpath.train.options import add_train_options, apply_config
    from timm_mixpath.utils.recipes import find_recipe

    parser = argparse.ArgumentParser()
    add_train_options(parser)
    apply_config(parser, find_recipe('nano_cifar10'))
    assert _recipe(parser.parse_args([])) == 'options of recipe `nano_cifar10` of timm-mixpath'
    assert _recipe(parser.parse_args(['--epochs', '6'])).endswith(' except epochs (6, not 20)')
    assert _recipe(load_model(run / 'last.pth.tar').args) is None


@pytest.mark.parametrize('name', ['mixpath_a', 'mixpath_b', 'mixpath_c'])
def test_card_says_that_the_papers_models_are_reconstructions(model_dir: Path, name: str) -> None:
    loaded = load_model(model_dir)
    loaded.model.pretrained_cfg = {**loaded.model.pretrained_cfg, 'architecture': name}
    card = make_card(f'org/{name}', loaded, CardDetails())
    assert 'own reconstruction' in card.text and "neither its arch nor its weights are the authors'" in card.text


def test_search_of_something_else_is_refused(run: Path, searched: Path, supernet_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='is not on the front'):
        write_repo(run / 'last.pth.tar', NAME, tmp_path / 'r', search=searched)
    checkpoint = torch.load(supernet_run / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict']['conv_stem.weight'] += 1
    torch.save(checkpoint, tmp_path / 'other.pth.tar')
    with pytest.raises(UsageError, match='another supernet'):
        write_repo(tmp_path / 'other.pth.tar', NAME, tmp_path / 'r', search=searched)
    with pytest.raises(UsageError, match=r'no valid front\.json'):
        write_repo(run / 'last.pth.tar', NAME, tmp_path / 'r', search=tmp_path)
    assert not (tmp_path / 'r').exists()


def test_summary_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / 'run')
    text = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    values = dict(zip(text[0].split(','), text[1].split(',')))
    values['eval_top1'] = '99.9'
    (tmp_path / 'run' / 'summary.csv').write_text(f'{text[0]}\n{",".join(values.values())}\n')
    with pytest.raises(RunError, match='not of the same run'):
        write_repo(tmp_path / 'run' / 'last.pth.tar', NAME, tmp_path / 'r')


# Weights by name


def test_list_pretrained_lists_what_can_be_loaded(hub: Hub, model_dir: Path, tmp_path: Path) -> None:
    """A package with small weights inside and one line for weights on the Hub, as a release would have them."""
    package = tmp_path / 'site' / 'timm_mixpath'
    shutil.copytree(Path(timm_mixpath.__file__).parent, package, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(model_dir, package / 'weights' / 'mixpath_nano.tiny')
    source = (package / 'models' / 'pretrained.py').read_text()
    digest = hashlib.sha256((model_dir / 'model.safetensors').read_bytes()).hexdigest()
    for line, entry in (
        ('PUBLISHED: dict[str, dict[str, Any]] = {', "'mixpath_nano_supernet.digits': {}, "),
        ('PACKAGED: dict[str, str] = {', f"'mixpath_nano.tiny': '{digest}', "),
    ):
        assert line in source
        source = source.replace(line, line + entry)
    (package / 'models' / 'pretrained.py').write_text(source)
    supernet = timm.create_model('mixpath_nano_supernet', m=1, num_classes=7)
    for org in ('lab', 'other'):
        save_model(supernet, tmp_path / org)
        files = {path.name: path.read_bytes() for path in (tmp_path / org).iterdir()}
        hub.put(f'{org}/mixpath_nano_supernet.digits', files, private=org == 'lab')
        supernet.conv_stem.weight.data += 1
    code = (
        'import timm, timm_mixpath\n'
        "names = ['mixpath_nano.tiny', 'mixpath_nano_supernet.digits']\n"
        f"assert timm.list_pretrained('mixpath*') == sorted([*names, *{sorted(PACKAGED)}])\n"
        'models = [timm.create_model(name, pretrained=True) for name in names]\n'
        "models.append(timm.create_model(timm.list_pretrained('mixpath_nano.*')[0], pretrained=True))\n"
        f"assert models[0].arch == '{ARCH}' and models[2].space == models[0].space\n"
        'assert models[1].num_classes == 7 and models[1].space.max_paths == 1\n'
        'print(float(models[1].conv_stem.weight.mean()))\n'
        "overlay = dict(hf_hub_id='other/mixpath_nano_supernet.digits')\n"
        "model = timm.create_model('mixpath_nano_supernet', pretrained=True, pretrained_cfg_overlay=overlay)\n"
        'print(float(model.conv_stem.weight.mean()))\n'
        "timm.models.save_for_hf(models[2], 'again', safe_serialization=True)\n"
        "assert timm.create_model('local-dir:again', pretrained=True).arch == models[2].arch\n"
    )
    env = environment(hub, tmp_path / 'home', TIMM_MIXPATH_HUB_ORG='lab', HF_TOKEN=TOKEN)
    env['PYTHONPATH'] = str(tmp_path / 'site')
    result = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [round(float(line)) for line in result.stdout.split()] == [0, 1]


def test_no_weights_is_one_sentence() -> None:
    published = timm.list_pretrained('mixpath*')
    for name in timm.list_models('mixpath*'):
        if any(p.startswith(f'{name}.') for p in published) or name in ('mixpath', 'mixpath_supernet'):
            continue  # the last two start from their backbone's
        with pytest.raises(RunError) as e:
            timm.create_model(name, pretrained=True)
        for part in (name, 'timm-mixpath train', 'pretrained_cfg_overlay=dict(file=', 'checkpoint_path=', "'hf-hub:"):
            assert part in str(e.value)
    with pytest.raises(RunError, match='-c s1_supernet_cifar10'):
        timm.create_model('mixpath_s1_supernet', pretrained=True)


def test_weights_of_ones_own(published: Hub, run: Path, model_dir: Path) -> None:
    expected = output_of(timm.create_model(f'local-dir:{model_dir}', pretrained=True))

    def create(overlay: dict[str, Any], **kwargs: Any) -> torch.nn.Module:
        return timm.create_model('mixpath_nano', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    for overlay in ({'file': str(model_dir)}, {'file': str(model_dir / 'model.safetensors')}, {'hf_hub_id': NAME}):
        model = create(overlay)
        assert torch.equal(output_of(model), expected)
        assert model.pretrained_cfg['input_size'] == (3, 16, 16) and model._model_args['arch'] == ARCH
    assert torch.equal(output_of(create({'file': str(run / 'last.pth.tar')}, arch=ARCH)), expected)
    assert torch.equal(
        output_of(create({'state_dict': load_file(model_dir / 'model.safetensors')}, arch=ARCH)), expected
    )
    assert create({'hf_hub_id': NAME}, num_classes=3, in_chans=1).classifier.out_features == 3
    assert create({'hf_hub_id': NAME}, features_only=True).feature_info.channels()
    model = timm.create_model('mixpath_nano', arch=ARCH, checkpoint_path=str(run / 'last.pth.tar'))
    assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize(
    'overlay, error, text',
    [
        ({'file': '/nowhere'}, UsageError, "'/nowhere' does not exist"),
        ({'file': 'checkpoint'}, RunError, 'it must be built as for the training'),
        ({'file': 'pickle'}, RunError, 'weights_only=True blocked'),
        ({'file': 'damaged'}, RunError, 'can not be loaded'),
        ({'hf_hub_id': 'org/mixpath_nano.digits', 'hf_hub_filename': 'x.bin'}, UsageError, 'not a safetensors file'),
        ({'hf_hub_id': 'org/supernet'}, UsageError, 'weights of mixpath_nano_supernet, not of mixpath_nano'),
    ],
)
def test_weights_that_are_refused(
    published: Hub, run: Path, tmp_path: Path, overlay: dict[str, str], error: type, text: str
) -> None:
    if overlay.get('file') == 'checkpoint':
        overlay = {'file': str(run / 'last.pth.tar')}  # without its arch
    if overlay.get('file') == 'pickle':
        torch.save({'state_dict': {}, 'args': Path('x'), 'f': Arbitrary()}, tmp_path / 'x.pth')
        overlay = {'file': str(tmp_path / 'x.pth')}
    if overlay.get('file') == 'damaged':
        (tmp_path / 'x.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{"a":{}}')
        overlay = {'file': str(tmp_path / 'x.safetensors')}
    config = {'architecture': 'mixpath_nano_supernet', 'pretrained_cfg': {}}
    published.put('org/supernet', {'config.json': json.dumps(config).encode(), 'model.safetensors': b'x'})
    with pytest.raises(error, match=re.escape(text)) as e:
        timm.create_model('mixpath_nano', pretrained=True, pretrained_cfg_overlay=overlay)
    assert '\n' not in str(e.value)


class Arbitrary:
    pass


def test_sizes_and_shapes_are_checked_before_weights_are_used(published: Hub, tmp_path: Path) -> None:
    """Also where timm is no longer strict, because it adapts the classifier."""
    files = published.files(NAME)
    (tmp_path / 'w.safetensors').write_bytes(files['model.safetensors'])
    weights = load_file(tmp_path / 'w.safetensors')
    for change in ('missing', 'shape', 'extra'):
        changed = dict(weights)
        if change == 'missing':
            del changed['bn2.weight']
        elif change == 'shape':
            changed['bn2.weight'] = torch.ones(3)
        else:
            changed['more'] = torch.ones(3)
        save_file(changed, tmp_path / 'w.safetensors')
        published.put(NAME, {**files, 'model.safetensors': (tmp_path / 'w.safetensors').read_bytes()})
        for kwargs in ({}, {'num_classes': 3}):
            with pytest.raises(RunError, match=r'do not fit this mixpath_nano: .*(bn2\.weight|more)'):
                timm.create_model(SOURCE, pretrained=True, **kwargs)


def test_config_is_data(published: Hub) -> None:
    """What config.json says is looked up by name or refused, never run."""
    files = published.files(NAME)
    config = json.loads(files['config.json'])
    for key, value in (
        ('architecture', '__import__("os").system("false")'),
        ('model_args', {'act_layer': '__import__("os").system("false")'}),
        ('model_args', {'arch': 'k3_e6'}),
        ('pretrained_cfg', 'x'),
    ):
        published.put(NAME, {**files, 'config.json': json.dumps({**config, key: value}).encode()})
        with pytest.raises((RunError, UsageError)) as e:
            load_model(SOURCE)
        assert '\n' not in str(e.value) and NAME in str(e.value)
    cfg = {**config['pretrained_cfg'], 'custom_load': 'hf', 'hf_hub_filename': 'code.py'}
    published.put(NAME, {**files, 'config.json': json.dumps({**config, 'pretrained_cfg': cfg}).encode()})
    with pytest.raises(UsageError, match=r"'code\.py' of .* is not a safetensors file"):
        timm.create_model(SOURCE, pretrained=True)


def test_pickles_are_never_loaded_from_the_hub(hub: Hub, model_dir: Path) -> None:
    hub.put(NAME, {'config.json': (model_dir / 'config.json').read_bytes(), 'pytorch_model.bin': b'\x80\x02.'})
    for load in (load_model, lambda source: timm.create_model(source, pretrained=True)):
        with pytest.raises(RunError, match=r'has no model\.safetensors; other files'):
            load(SOURCE)
    assert hub.count('pytorch_model.bin') == 0


def test_checkpoint_that_needs_pickle_is_not_pushed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({'state_dict': {}, 'args': Arbitrary()}, tmp_path / 'x.pth.tar')
    assert cli.main(['push', '--checkpoint', str(tmp_path / 'x.pth.tar'), '--repo-id', NAME]) == 1
    assert 'weights_only' in capsys.readouterr().err and hub.requests == []


# Faults while loading


def cut(body: bytes) -> bytes:
    return body[:-100]


def flip(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


CDN, CONFIG = 'GET /cdn/', r'GET /org/.*/config\.json'


@pytest.mark.parametrize(
    'fault',
    [
        Fault(r'HEAD .*config\.json', status=429, headers={'Retry-After': '0'}),
        Fault(r'HEAD .*config\.json', status=500),
        Fault(CDN, status=429, headers={'Retry-After': '0'}),
        Fault(CDN, drop_after=100_000),
        Fault(CONFIG, drop_after=100),
        Fault(CDN, alter=flip),
        Fault(CONFIG, alter=flip),
        Fault(r'HEAD .*config\.json', delay=1.5),
        Fault(CDN, delay=1.5),
    ],
    ids=lambda f: f'{f.request[:4]}-{f.status or ("drop" if f.drop_after else "flip" if f.alter else "slow")}',
)
def test_fault_that_passes_is_survived(published: Hub, model_dir: Path, fault: Fault) -> None:
    """Retried, resumed, or loaded again where the content was wrong."""
    fault.times = 1
    published.faults.append(fault)
    model = load_model(SOURCE).model
    assert torch.equal(output_of(model), output_of(load_model(model_dir).model))
    assert not published.faults


def test_download_is_resumed_where_it_broke_off(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    content = published.server.RequestHandlerClass.content
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 10_000)  # what it resumes by is 10 MB

    def record(self: Any, body: bytes, headers: dict[str, str]) -> Any:
        answer = content(self, body, headers)
        if '/cdn/' in self.route:
            sent.append(len(answer[1]))
        return answer

    monkeypatch.setattr(published.server.RequestHandlerClass, 'content', record)
    published.faults.append(Fault(CDN, drop_after=100_000))
    load_model(SOURCE)
    size = len(published.files(NAME)['model.safetensors'])
    assert sent == [size, size - 100_000]


@pytest.mark.parametrize(
    'fault, text',
    [
        (Fault(CDN, alter=cut), 'arrived incomplete and was not kept'),
        (Fault(CDN, alter=flip, times=2), 'arrived twice with another content than the Hub lists'),
        (Fault(CONFIG, alter=flip, times=2), 'arrived twice with another content than the Hub lists'),
        (Fault(CDN, status=500), 'answered 500'),
        (Fault(CDN, status=403), 'is not allowed to'),
    ],
)
def test_fault_that_stays_is_one_sentence_and_leaves_nothing(
    published: Hub, model_dir: Path, tmp_path: Path, fault: Fault, text: str
) -> None:
    published.faults.append(fault)
    with pytest.raises(RunError, match=text) as e:
        load_model(SOURCE)
    assert '\n' not in str(e.value) and NAME in str(e.value)
    wrong = fault.request.removeprefix('GET ').strip('/')
    assert not [name for name in cached(tmp_path) if name.endswith('.incomplete')]
    if wrong == 'cdn':
        assert not list((tmp_path / 'cache').rglob('model.safetensors'))
    # the next load is a good one
    model = timm.create_model(SOURCE, pretrained=True)
    assert torch.equal(output_of(model), output_of(load_model(model_dir).model))


def test_altered_download_is_noticed_by_plain_create_model(published: Hub, tmp_path: Path) -> None:
    published.faults.append(Fault(CDN, alter=flip, times=2))
    with pytest.raises(RunError, match='arrived twice'):
        timm.create_model(SOURCE, pretrained=True)
    published.faults.append(Fault(CONFIG, alter=lambda b: b.replace(b'0.4', b'0.5')))
    shutil.rmtree(tmp_path / 'cache')
    with pytest.raises(RunError, match='load the model again'):
        timm.create_model(SOURCE, pretrained=True)
    timm.create_model(SOURCE, pretrained=True)


@pytest.mark.parametrize('symlinks', [True, False])
def test_damaged_cache_is_noticed(
    published: Hub, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symlinks: bool
) -> None:
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SYMLINKS', not symlinks)
    load_model(SOURCE)
    (path,) = (tmp_path / 'cache').rglob('model.safetensors')
    assert path.is_symlink() == symlinks
    path.write_bytes(flip(path.read_bytes()))
    model = timm.create_model(SOURCE, pretrained=True)
    assert torch.equal(output_of(model), output_of(load_model(model_dir).model))


@pytest.mark.parametrize(
    'name, token, text',
    [
        ('org/none', TOKEN, 'there is no such repo, or your token can not see it'),
        ('org/none', '', 'there is no such repo, or it is private; log in with `hf auth login` or set HF_TOKEN'),
        ('org/private', '', 'there is no such repo, or it is private'),
        ('org/gated', '', 'the repo is gated; ask for access'),
        ('org/gated', READ_TOKEN, 'the repo is gated; ask for access'),
        (NAME, 'hf_wrong', 'does not accept your token'),
        (f'{NAME}@nope', TOKEN, 'no such revision'),
        ('org/empty', TOKEN, r'has no config\.json'),
        ('org/half', TOKEN, r'has no model\.safetensors'),
        ('a b', TOKEN, 'is not the name of a Hub repo'),
    ],
)
def test_repo_that_can_not_be_had(
    published: Hub, monkeypatch: pytest.MonkeyPatch, name: str, token: str, text: str
) -> None:
    files = published.files(NAME)
    published.put('org/private', files, private=True)
    published.put('org/gated', files, gated=True)
    published.put('org/empty', {'x.txt': b''})
    published.put('org/half', {'config.json': files['config.json']})
    monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises((RunError, UsageError), match=text) as e:
        load_model(f'hf-hub:{name}')
    assert '\n' not in str(e.value) and name in str(e.value)


def test_token_opens_private_and_gated_repos_and_stays_on_the_hub(published: Hub) -> None:
    for flag in ('private', 'gated'):
        published.put(f'org/{flag}', published.files(NAME), **{flag: True})
        timm.create_model(f'hf-hub:org/{flag}', pretrained=True)
    assert published.count('cdn') == 2 and published.count('cdn.* token') == 0


def test_offline(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RunError, match=r'offline mode is on .* not in the cache'):
        load_model(SOURCE)
    overlay = {'hf_hub_id': NAME}
    with pytest.raises(RunError, match=r'offline mode is on .* not in the cache'):
        timm.create_model('mixpath_nano', pretrained=True, pretrained_cfg_overlay=overlay)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    expected = output_of(load_model(SOURCE).model)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    requests = len(published.requests)
    for model in (
        load_model(SOURCE).model,
        timm.create_model(SOURCE, pretrained=True),
        timm.create_model('mixpath_nano', pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        assert torch.equal(output_of(model), expected)
    assert len(published.requests) == requests


# Faults while pushing


@pytest.mark.parametrize(
    'token, fault, text',
    [
        ('hf_wrong', None, 'does not accept your token'),
        (READ_TOKEN, None, 'your token is not allowed to .*write token'),
        (TOKEN, Fault('POST .*/commit/', status=409), 'being changed by somebody else'),
        (TOKEN, Fault('POST .*/commit/', status=412), 'changed by somebody else in the meantime'),
        (TOKEN, Fault('POST .*/commit/', status=429, headers={'Retry-After': '7'}), 'wait 7 seconds'),
        (TOKEN, Fault('POST .*/commit/', status=500), 'answered 500'),
        (TOKEN, Fault('PUT /lfs/', status=403), 'is not allowed to'),
        (TOKEN, Fault('POST /api/repos/create', drop_after=-1), 'can not be reached'),
    ],
)
def test_push_that_fails_leaves_the_repo_as_it_was(
    published: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, token: str, fault: Fault | None, text: str
) -> None:
    monkeypatch.setenv('HF_TOKEN', token)
    before = dict(published.repos[NAME].refs)
    if fault:
        fault.times = 1
        published.faults.append(fault)
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict']['conv_stem.weight'] += 1
    torch.save(checkpoint, run / 'changed.pth.tar')
    with pytest.raises(RunError, match=text) as e:
        push(run / 'changed.pth.tar', NAME)
    assert '\n' not in str(e.value) and NAME in str(e.value)
    assert published.repos[NAME].refs == before
    if fault:
        assert push(run / 'changed.pth.tar', NAME).created


@pytest.mark.parametrize(
    'fault',
    [
        Fault('POST .*/preupload/', status=500),
        Fault('POST .*/preupload/', status=429, headers={'Retry-After': '0'}),
        Fault('POST .*lfs/objects/batch', status=500),
        Fault('PUT /lfs/', status=500),
        Fault('PUT /lfs/', drop_after=-1),
        Fault('PUT /lfs/', delay=1.5),
    ],
    ids=lambda f: f'{f.request}-{f.status or ("drop" if f.drop_after else "slow")}',
)
def test_push_survives_what_passes(hub: Hub, run: Path, fault: Fault) -> None:
    fault.times = 1
    hub.faults.append(fault)
    assert push(run / 'last.pth.tar', NAME).created and len(hub.repos[NAME].log) == 2


def test_push_whose_answer_was_lost_is_not_committed_twice(hub: Hub, run: Path) -> None:
    hub.faults.append(Fault('POST .*/commit/', drop_after=-1))
    with pytest.raises(RunError, match='run the same command again'):
        push(run / 'last.pth.tar', NAME)
    assert not push(run / 'last.pth.tar', NAME).created
    assert len(hub.repos[NAME].log) == 2


def test_push_into_a_repo_that_changes_meanwhile_is_refused(published: Hub, run: Path) -> None:
    """Nobody's commit is overwritten unseen, and no repo is left with the weights of one and the config of another."""
    handler = published.server.RequestHandlerClass
    dispatch = handler.dispatch

    def somebody_else(self: Any) -> Any:
        if '/commit/' in self.route:
            handler.dispatch = dispatch
            published.repos[NAME].commit('main', {'README.md': published.store(b'theirs', lfs=False)}, 'theirs')
        return dispatch(self)

    handler.dispatch = somebody_else
    with pytest.raises(RunError, match='in the meantime'):
        push(run / 'last.pth.tar', NAME)
    assert published.files(NAME) == {'README.md': b'theirs'}


@pytest.mark.parametrize(
    'words, status, text',
    [
        (['--repo-id', 'mine'], 2, "'mine' is not the name of a Hub repo, ORG/NAME"),
        (['--repo-id', 'a/b/c'], 2, "'a/b/c' is not the name of a Hub repo, ORG/NAME"),
        (['--repo-id', 'org/x--y'], 2, "'org/x--y' is not the name of a Hub repo, ORG/NAME"),
        (['--repo-id', NAME, '--output', 'x'], 2, '--output x is the folder of --dry-run'),
        (['--repo-id', NAME, '--checkpoint', '/nowhere'], 2, "'/nowhere' does not exist"),
        (['--repo-id', NAME, '--private'], 2, 'exists and is public'),
        (['--repo-id', NAME, '--img-size', '0'], 2, 'image size 0 must be positive'),
        (['--repo-id', NAME, '--results', '/nowhere'], 2, "'/nowhere' does not exist"),
        (['--repo-id', NAME, '--license', 'secret'], 2, '"license" must be one of'),
        (['--repo-id', NAME, '--search', '/nowhere'], 2, "'/nowhere' is not the output folder"),
        (['--repo-id', NAME, '--checkpoint', 'resnet'], 2, 'which is not of timm-mixpath'),
    ],
)
def test_wrong_push(
    published: Hub, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], status: int,
    text: str,
) -> None:  # fmt: skip
    if 'resnet' in words:
        words = [*words[:-1], str(tmp_path / 'resnet')]
        model = timm.create_model('test_resnet')
        timm.models.save_for_hf(model, str(tmp_path / 'resnet'), safe_serialization=True)
    before = dict(published.repos[NAME].refs)
    assert cli.main(['push', '--checkpoint', str(model_dir), *words]) == status
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert text in message and message.startswith('timm-mixpath: error: ')
    assert published.repos[NAME].refs == before


def test_push_without_a_token(hub: Hub, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(UsageError, match='needs a token with write access: `hf auth login`, or set HF_TOKEN'):
        push(model_dir, NAME)
    assert hub.requests == []


# The client's own command


def test_hf_download(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run / 'last.pth.tar', NAME, private=True)
    hf = Path(sys.executable).with_name('hf')
    if not hf.exists():
        pytest.skip('the hf command is not installed beside this Python')
    env = environment(hub, tmp_path / 'home', HF_TOKEN=READ_TOKEN)
    subprocess.run([hf, 'download', NAME, '--local-dir', tmp_path / 'copy'], env=env, check=True, capture_output=True)
    for name, content in hub.files(NAME).items():
        assert (tmp_path / 'copy' / name).read_bytes() == content
    model = timm.create_model(f'local-dir:{tmp_path / "copy"}', pretrained=True)
    assert torch.equal(output_of(model), output_of(load_model(run / 'last.pth.tar').model))


@pytest.mark.slow
def test_killed_push_leaves_the_repo_whole_and_is_repeated(hub: Hub, model_dir: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of the exchange: at any time the repo holds everything or nothing of a push."""
    # Slow answers, or a push on this machine would be over at once
    hub.faults.append(Fault(request='.*', delay=0.25, times=10**9))
    command = [sys.executable, '-m', 'timm_mixpath.cli', 'push', '--checkpoint', str(model_dir), '--repo-id', NAME]
    env = environment(hub, tmp_path / 'home', HF_TOKEN=TOKEN)
    draw, states = random.Random(0), []
    for _ in range(8):
        seen = len(hub.requests)
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while len(hub.requests) == seen and process.poll() is None:
            time.sleep(0.01)  # until it talks to the server
        time.sleep(draw.uniform(0, 2.0))
        process.kill()
        process.communicate()
        time.sleep(0.5)  # what was on its way arrives
        repo = hub.repos.get(NAME)
        states.append(sorted(repo.commits[repo.refs['main']]) if repo is not None and repo.log else [])
    whole = ['README.md', 'config.json', 'model.safetensors']
    assert all(set(whole) <= set(state) or not set(whole) & set(state) for state in states), states
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    repo = hub.repos[NAME]
    assert set(whole) <= repo.commits[repo.refs['main']].keys()
    # Whatever was killed behind its commit made no second one
    with_weights = [oid for oid in repo.log if 'model.safetensors' in repo.commits[oid]]
    assert len(with_weights) == 1
    loaded = timm.create_model(SOURCE, pretrained=True)
    assert torch.equal(output_of(loaded), output_of(timm.create_model(f'local-dir:{model_dir}', pretrained=True)))
