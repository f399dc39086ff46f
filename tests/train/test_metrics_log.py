import sys
from pathlib import Path

import pytest
from conftest import small_args

from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import UsageError
from timm_mixpath.utils.tables import read_csv


def test_tensorboard_shows_the_summary_also_of_a_run_that_goes_on(digits: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    options = dict(model='mixpath_nano', log_tensorboard=True)
    folder = train(small_args(digits, tmp_path, epochs=2, **options)).output_dir
    # The second epoch is done again, and a third one
    start = str(folder / 'checkpoint-0.pth.tar')
    train(small_args(digits, tmp_path, epochs=3, resume=start, **options))
    events = accumulator.EventAccumulator(str(folder / 'tensorboard')).Reload()
    expected = read_csv(folder / 'summary.csv')
    assert [row['epoch'] for row in expected] == ['0', '1', '2']
    assert set(events.Tags()['scalars']) == expected[0].keys() - {'epoch'}
    for name in ('train_loss', 'eval_top1', 'lr'):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [0, 1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx([float(row[name]) for row in expected], rel=1e-6)


@pytest.mark.slow
def test_wandb_gets_options_and_metrics(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    args = small_args(digits, tmp_path, model='mixpath_nano', log_wandb=True, wandb_project='digits', wandb_tags=['x'])
    folder = train(args).output_dir
    (log,) = folder.glob('wandb/offline-run-*/run-*.wandb')
    content = log.read_bytes()
    for text in (b'eval_top1', b'train_loss', b'digits', b'mixpath_nano'):
        assert text in content


@pytest.mark.parametrize('option, module', [('log_wandb', 'wandb'), ('log_tensorboard', 'torch.utils.tensorboard')])
def test_what_is_missing_is_one_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'timm-mixpath\[log\]'"):
        train(small_args(digits, tmp_path, model='mixpath_nano', **{option: True}))


@pytest.mark.parametrize(
    'options, text',
    [
        (dict(wandb_project='digits'), '--wandb-project has no effect without --log-wandb'),
        (dict(log_wandb=True, wandb_resume_id='abc'), '--wandb-resume-id abc goes on with a run and needs --resume'),
    ],
)
def test_options_of_wandb_that_can_not_be_meant(digits: Path, tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        train(small_args(digits, tmp_path, **options))
