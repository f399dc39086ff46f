import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from commands import fails, full_disk
from safetensors import safe_open

from timm_mixpath import cli, sample
from timm_mixpath.hub.export import export, save_model
from timm_mixpath.hub.publish import write_repo
from timm_mixpath.search.accuracy import evaluate
from timm_mixpath.search.config import SearchConfig
from timm_mixpath.search.images import SearchData, load_batches, open_search_split
from timm_mixpath.search.run import search_checkpoint
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.utils.errors import RunError, UsageError


def test_exported_subnet_is_rebuilt_bit_equal(supernet_run: Path, tmp_path: Path) -> None:
    supernet = load_model(supernet_run / 'last.pth.tar').model
    arch = sample(supernet.space, seed=0, step=7)
    model = export(supernet_run / 'last.pth.tar', tmp_path / 'model', arch)
    assert sorted(p.name for p in (tmp_path / 'model').iterdir()) == ['config.json', 'model.safetensors']
    again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x))
    supernet.active_arch = arch
    torch.testing.assert_close(again(x), supernet(x), rtol=0, atol=1e-5)


def test_config_says_what_the_model_was_trained_with(supernet_run: Path, tmp_path: Path) -> None:
    export(supernet_run / 'last.pth.tar', tmp_path / 'model', 'k3_e6,' * 7 + 'k3+5_e3')
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['architecture'] == 'mixpath_nano'
    assert config['model_args']['arch'] == 'k3_e6,' * 7 + 'k3+5_e3'
    assert config['pretrained_cfg']['input_size'] == [3, 16, 16]


def test_supernet_itself_can_be_exported_and_searched_again(supernet_run: Path, tmp_path: Path) -> None:
    export(supernet_run / 'last.pth.tar', tmp_path / 'model')
    a = load_model(supernet_run / 'last.pth.tar').model
    b = load_model(tmp_path / 'model').model
    assert b.space == a.space
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_subnet_of_supernet_with_bn_eps_can_be_saved(tmp_path: Path) -> None:
    model = timm.create_model('mixpath_nano_supernet', bn_eps=1e-3, m=1).extract()
    timm.models.save_for_hf(model, str(tmp_path / 'm'), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True)
    assert again.bn1.eps == 1e-3


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_exported_in_half_precision(supernet_run: Path, tmp_path: Path, dtype: str) -> None:
    arch = sample(load_model(supernet_run / 'last.pth.tar').model.space, seed=0, step=7)
    model = export(supernet_run / 'last.pth.tar', tmp_path / 'model', arch, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the one at hand stays as it was
    with safe_open(tmp_path / 'model' / 'model.safetensors', 'pt') as f:
        stored = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {getattr(torch, dtype)}
    again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.to(stored[key].dtype).to(value.dtype))


def test_weights_out_of_range_of_the_dtype_are_refused(tmp_path: Path) -> None:
    model = timm.create_model('mixpath_nano')
    model.bn1.running_var[3] = 1e6
    with pytest.raises(UsageError, match=r'bn1.running_var of the MixPath does not fit into float16; store it as bf'):
        save_model(model, tmp_path / 'm', dtype='float16')
    assert list(tmp_path.iterdir()) == []
    save_model(model, tmp_path / 'm', dtype='bfloat16')
    with pytest.raises(UsageError, match=r"dtype 'half' is none .*: float32, float16, bfloat16"):
        save_model(model, tmp_path / 'n', dtype='half')


def test_new_names_replace_those_of_the_weights_before(tmp_path: Path) -> None:
    model = timm.create_model('mixpath_lite0', pretrained=True)
    folder = save_model(model, tmp_path / 'm', label_names=list('abcdefghij'))
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert again.pretrained_cfg['label_names'] == list('abcdefghij')
    assert not again.pretrained_cfg.get('label_descriptions')


def test_classes_of_imagenet_are_described_in_words(tmp_path: Path) -> None:
    model = timm.create_model('mixpath_nano', num_classes=2)
    for names, expected in (
        (['n03028079', 'n03445777'], {'n03028079': 'church, church building', 'n03445777': 'golf ball'}),
        (['n03028079', 'n99999999'], None),
        (['n03028079', 'dog'], None),
    ):
        folder = save_model(model, tmp_path / '-'.join(names), label_names=names)
        assert json.loads((folder / 'config.json').read_text()).get('label_descriptions') == expected
        again = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert again.pretrained_cfg['label_names'] == names
        assert again.pretrained_cfg.get('label_descriptions') == expected


def test_names_and_descriptions_of_a_folder_are_kept(tmp_path: Path) -> None:
    model = timm.create_model('mixpath_nano', num_classes=3)
    descriptions = {'a': 'an ant', 'b': 'a bee', 'c': 'a cat'}
    model.pretrained_cfg.update(num_classes=3, label_names=list('abc'), label_descriptions=descriptions)
    save_model(model, tmp_path / 'first')
    export(tmp_path / 'first', tmp_path / 'second')
    write_repo(tmp_path / 'second', 'org/name', tmp_path / 'third')
    for name in ('first', 'second', 'third'):
        cfg = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).pretrained_cfg
        assert (cfg['label_names'], cfg['label_descriptions']) == (list('abc'), descriptions)
    # Of the same classes in another order
    save_model(load_model(tmp_path / 'first').model, tmp_path / 'other', label_names=list('acb'))
    assert 'label_descriptions' not in json.loads((tmp_path / 'other' / 'config.json').read_text())


def test_class_names_that_are_numbers(tmp_path: Path) -> None:
    """A config.json of others may have them."""
    save_model(timm.create_model('mixpath_nano', num_classes=3), tmp_path / 'a', label_names=list('012'))
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    (tmp_path / 'a' / 'config.json').write_text(json.dumps({**config, 'label_names': [0, 1, 2]}))
    export(tmp_path / 'a', tmp_path / 'b')
    assert json.loads((tmp_path / 'b' / 'config.json').read_text())['label_names'] == ['0', '1', '2']


def test_model_in_channels_last_is_saved(tmp_path: Path) -> None:
    model = timm.create_model('mixpath_nano').to(memory_format=torch.channels_last)
    save_model(model, tmp_path / 'm')
    again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_recalibrated_export_is_what_the_search_scored(supernet_run: Path, tmp_path: Path) -> None:
    last = supernet_run / 'last.pth.tar'
    config = SearchConfig(population=2, offspring=1, generations=0)
    chosen = search_checkpoint(last, tmp_path / 's', config, recalibration_images=100, workers=0).chosen
    export(last, tmp_path / 'a', chosen.arch, recalibration_images=100)
    export(last, tmp_path / 'b', chosen.arch)
    loaded = load_model(last)
    search_set, _, _ = open_search_split(loaded, SearchData())
    batches = load_batches(search_set, loaded.data_config, workers=0)
    recalibrated, plain = (evaluate(load_model(tmp_path / n).model, batches)['loss'] for n in 'ab')
    assert recalibrated == pytest.approx(chosen.loss, rel=1e-4) and plain != pytest.approx(chosen.loss, rel=1e-4)


def test_recalibrated_export_of_a_folder_takes_the_images_of_the_search(
    digits: Path, supernet_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A folder does not tell its images, and the search took others than the training
    assert (
        cli.main(['export', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--output', str(tmp_path / 'm')]) == 0
    )
    images = ['--data-dir', str(digits), '--train-split', 'validation', '--search-holdout', '0.3']
    common = ['--checkpoint', str(tmp_path / 'm'), '--recalibration-images', '30', *images]
    sizes = ['--population', '2', '--offspring', '1', '--generations', '0', '-j', '0']
    assert cli.main(['search', *common, *sizes, '--output', str(tmp_path / 's')]) == 0
    chosen = next(c for c in json.loads((tmp_path / 's' / 'front.json').read_text())['front'] if c['chosen'])
    caplog.clear()
    assert cli.main(['export', *common, '--arch', chosen['arch'], '--output', str(tmp_path / 'a')]) == 0
    assert 'errors will look too low' not in caplog.text  # nothing is scored
    loaded = load_model(tmp_path / 'a')
    data = SearchData(data_dir=str(digits), train_split='validation', search_holdout=0.3)
    search_set, _, _ = open_search_split(loaded, data, warn=False)
    found = evaluate(loaded.model, load_batches(search_set, loaded.data_config, workers=0))['loss']
    assert found == pytest.approx(chosen['metrics']['loss'], rel=1e-4)


def test_existing_output_is_not_overwritten(supernet_run: Path, tmp_path: Path) -> None:
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'mine.txt').write_text('precious')
    with pytest.raises(UsageError, match='not overwritten'):
        export(supernet_run / 'last.pth.tar', tmp_path / 'model')
    assert [p.name for p in tmp_path.iterdir()] == ['model']
    assert (tmp_path / 'model' / 'mine.txt').read_text() == 'precious'


def test_full_disk_is_one_sentence_and_leaves_nothing(capsys, supernet_run: Path, tmp_path: Path) -> None:
    """safetensors has an exception of its own for a file that it can not write to its end."""
    words = ['export', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--output', str(tmp_path / 'model')]
    with full_disk(50_000):
        status, message = fails(capsys, words)
    assert status == 1 and 'model folder can not be written' in message and 'make room on the disk' in message
    assert not list(tmp_path.iterdir())


def test_weights_are_safetensors_only(supernet_run: Path, tmp_path: Path) -> None:
    export(supernet_run / 'last.pth.tar', tmp_path / 'model', 'k3_e6,' * 7 + 'k3_e6')
    with safe_open(tmp_path / 'model' / 'model.safetensors', 'pt') as f:
        assert 'conv_stem.weight' in f.keys()  # noqa: SIM118  not a dict


def test_wrong_input(supernet_run: Path, tmp_path: Path) -> None:
    last = supernet_run / 'last.pth.tar'
    for arch, text in (
        ('k3_e6', '1 blocks'),
        ('k4_e6,' * 7 + 'k3_e6', "'k4_e6'"),
        ('k3_e6,' * 7 + 'k9_e6', 'kernel 9'),
    ):
        with pytest.raises(UsageError, match=text):
            export(last, tmp_path / 'model', arch)
    with pytest.raises(UsageError, match='does not exist'):
        export(tmp_path / 'no.pth.tar', tmp_path / 'model')
    with pytest.raises(UsageError, match=r'no config\.json'):
        export(tmp_path, tmp_path / 'model')

    export(last, tmp_path / 'subnet', 'k3_e6,' * 7 + 'k3_e6')
    with pytest.raises(UsageError, match='needs the checkpoint of a supernet'):
        export(tmp_path / 'subnet', tmp_path / 'model', 'k3_e6,' * 7 + 'k3_e6')

    shutil.copytree(tmp_path / 'subnet', tmp_path / 'cut')
    weights = tmp_path / 'cut' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match='can not be loaded'):
        export(tmp_path / 'cut', tmp_path / 'model')


def test_checkpoint_with_missing_keys_or_of_another_space(supernet_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(supernet_run / 'last.pth.tar', weights_only=False)
    del checkpoint['state_dict']['classifier.weight']
    torch.save(checkpoint, tmp_path / 'a.pth.tar')
    with pytest.raises(RunError, match=r'classifier\.weight'):
        export(tmp_path / 'a.pth.tar', tmp_path / 'model')
    checkpoint['args'].model = 'mixpath_s1_supernet'
    torch.save(checkpoint, tmp_path / 'b.pth.tar')
    with pytest.raises(RunError, match='do not fit mixpath_s1_supernet'):
        export(tmp_path / 'b.pth.tar', tmp_path / 'model')


class Arbitrary:
    pass


def test_checkpoint_that_needs_arbitrary_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({'state_dict': {}, 'args': Arbitrary()}, tmp_path / 'a.pth.tar')
    with pytest.raises(RunError, match='weights_only'):
        export(tmp_path / 'a.pth.tar', tmp_path / 'model')
    torch.save({'weights': torch.zeros(1)}, tmp_path / 'b.pth.tar')
    with pytest.raises(UsageError, match='not a training checkpoint'):
        export(tmp_path / 'b.pth.tar', tmp_path / 'model')


def test_export_and_push_write_the_same_config(supernet_run: Path, tmp_path: Path) -> None:
    """One record, the checkpoint, and one writer; the data set of the training need not be there any more."""
    run = tmp_path / 'run'
    run.mkdir()
    checkpoint = torch.load(supernet_run / 'last.pth.tar', weights_only=False)
    checkpoint['args'].data_dir = str(tmp_path / 'gone')
    torch.save(checkpoint, run / 'last.pth.tar')
    export(run / 'last.pth.tar', tmp_path / 'model')
    write_repo(run / 'last.pth.tar', 'org/mixpath_nano_supernet', tmp_path / 'repo')
    exported, pushed = (json.loads((tmp_path / name / 'config.json').read_text()) for name in ('model', 'repo'))
    assert exported['label_names'] == [str(i) for i in range(10)]
    for key in ('tag', 'license'):  # what only a repo has
        exported['pretrained_cfg'].pop(key, None), pushed['pretrained_cfg'].pop(key, None)
    assert exported == pushed
    # and from folder to folder
    write_repo(tmp_path / 'model', 'org/mixpath_nano_supernet', tmp_path / 'again')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['label_names'] == exported['label_names']
