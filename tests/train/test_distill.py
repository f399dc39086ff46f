"""Distillation into a supernet: tasks, training loop, two processes."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from commands import assert_equal, command, start_processes, torchrun
from conftest import CLASSES, small_args
from timm.models import save_for_hf
from timm.task import DistillationTeacher, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import unwrap_model

from timm_mixpath.train.checkpoint import read_checkpoint
from timm_mixpath.train.loop import train
from timm_mixpath.train.task import (
    STAND_INS,
    SupernetFeatureDistillationTask,
    SupernetLogitDistillationTask,
)
from timm_mixpath.utils.errors import UsageError

WORLD_SIZE = 2
TASKS = {'logit': SupernetLogitDistillationTask, 'feature': SupernetFeatureDistillationTask}


def make_task(kind: str):
    torch.manual_seed(0)
    teacher = timm.create_model(
        'mixpath_nano.untrained', num_classes=CLASSES, width_mult=0.5 if kind == 'feature' else 1.0
    )
    student = timm.create_model('mixpath_nano_supernet', num_classes=CLASSES, seed=3)
    return TASKS[kind](student, teacher, torch.nn.CrossEntropyLoss(), verbose=False)


def make_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(CLASSES, (4,), generator=generator)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD_SIZE)
    results = {}
    for kind in TASKS:
        task, alone = make_task(kind), make_task(kind)
        task.prepare_distributed(device_ids=[rank])
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
        errors, archs = [], []
        for step in range(3):
            batch = make_batch(100 * rank + step)
            alone.get_trainable_module().load_state_dict(unwrap_model(task.get_trainable_module()).state_dict())
            alone.zero_grad()
            alone(*batch)['loss'].backward()
            optimizer.zero_grad()
            task(*batch)['loss'].backward()
            for p, q in zip(task.get_trainable_module().parameters(), alone.get_trainable_module().parameters()):
                assert (p.grad is None) == (q.grad is None)
                if p.grad is not None:
                    dist.all_reduce(q.grad)
                    errors.append((p.grad - q.grad / WORLD_SIZE).abs().max().item())
            archs.append(str(unwrap_model(task.get_eval_model()).sampled_arch))
            optimizer.step()
        results[kind] = dict(error=max(errors), archs=archs)
    torch.save(results, Path(folder) / f'{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_train_what_one_would(tmp_path: Path) -> None:
    start_processes(worker, (str(tmp_path),), WORLD_SIZE)
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(WORLD_SIZE))
    for kind in TASKS:
        assert first[kind]['archs'] == second[kind]['archs'] and len(set(first[kind]['archs'])) == 3
        assert max(first[kind]['error'], second[kind]['error']) < 1e-5


def test_loss_is_that_of_the_formula() -> None:
    task = SupernetLogitDistillationTask(
        timm.create_model('mixpath_nano_supernet', num_classes=CLASSES),
        timm.create_model('mixpath_nano.untrained', num_classes=CLASSES),
        torch.nn.CrossEntropyLoss(),
        task_loss_weight=0.3,
        temperature=2.0,
        verbose=False,
    )
    x, target = make_batch(0)
    student = copy.deepcopy(task.get_trainable_module())
    logits, teacher = student(x), task.teacher.model(x)
    divergence = (teacher.div(2).softmax(1) * (teacher.div(2).log_softmax(1) - logits.div(2).log_softmax(1))).sum() / 4
    expected = 0.3 * F.cross_entropy(logits, target) + 0.7 * 4 * divergence
    torch.testing.assert_close(task(x, target)['loss'], expected)
    assert not any(p.grad is not None for p in task.teacher.parameters())


@pytest.mark.parametrize('kind', ['logit', pytest.param('feature', marks=pytest.mark.slow)])
def test_compiled_steps_are_those_of_eager_mode(kind: str) -> None:
    """The student is compiled by regions, and of the teacher what the task calls."""
    torch.manual_seed(0)
    teacher = timm.create_model('mixpath_nb201', num_classes=CLASSES, num_cells=1, width=4)
    student = timm.create_model('mixpath_nb201_supernet', num_classes=CLASSES, num_cells=1, width=4)
    plain = TASKS[kind](student, teacher, torch.nn.CrossEntropyLoss(), verbose=False)
    compiled = copy.deepcopy(plain)
    compiled.compile('eager')
    for seed in range(3):
        losses = []
        for task in (plain, compiled):
            task.zero_grad()
            losses.append(task(*make_batch(seed))['loss'])
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters()):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_ordinary_students_get_timms_own_tasks() -> None:
    student, teacher = (timm.create_model('mixpath_nano.untrained', num_classes=CLASSES) for _ in range(2))
    for task_cls in (LogitDistillationTask, FeatureDistillationTask):
        task = STAND_INS[task_cls](student_model=student, teacher_model=teacher, verbose=False)
        assert type(task) is task_cls
    assert TokenDistillationTask not in STAND_INS


@pytest.fixture(scope='module')
def teacher(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a network that was trained on the digits."""
    output = tmp_path_factory.mktemp('teacher')
    run = train(small_args(digits, output, model='mixpath_nano', epochs=3)).output_dir
    model = timm.create_model('mixpath_nano.untrained', num_classes=CLASSES)
    model.load_state_dict(read_checkpoint(run / 'last.pth.tar')['state_dict'])
    save_for_hf(model, output / 'folder', safe_serialization=True)
    return output / 'folder'


@pytest.mark.parametrize('kind', ['logit', pytest.param('feature', marks=pytest.mark.slow)])
def test_supernet_learns_from_a_teacher(digits: Path, teacher: Path, tmp_path: Path, kind: str) -> None:
    options = dict(kd_model_name=f'local-dir:{teacher}', kd_distill_type=kind, sched='none', model_ema=True)
    plain = train(small_args(digits, tmp_path, experiment='plain', sched='none', epochs=1)).metrics
    cut = train(small_args(digits, tmp_path, experiment='cut', **options, epochs=1))
    assert cut.metrics['train_loss'] != plain['train_loss']
    last = cut.output_dir / 'last.pth.tar'
    train(small_args(digits, tmp_path, experiment='cut', **options, epochs=2, resume=str(last)))
    whole = read_checkpoint(train(small_args(digits, tmp_path, **options, epochs=2)).output_dir / 'last.pth.tar')
    assert_equal(read_checkpoint(last)['state_dict'], whole['state_dict'])
    assert_equal(read_checkpoint(last)['state_dict_ema'], whole['state_dict_ema'])
    model = timm.create_model('mixpath_nano_supernet', num_classes=CLASSES)
    model.load_state_dict(whole['state_dict'])  # the student alone, neither teacher nor projection


def test_torchrun_with_a_teacher(digits: Path, teacher: Path, tmp_path: Path) -> None:
    args = small_args(digits, tmp_path, epochs=1, batch_size=16, kd_model_name=f'local-dir:{teacher}')
    result = torchrun('train', *command(args))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'run' / 'last.pth.tar').exists()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(kd_model_name='resnet999'), 'resnet999'),
        (dict(kd_model_name='mixpath_s1'), 'no weights of mixpath_s1'),
        (dict(kd_teacher_img_size=64), r'--kd-teacher-img-size 64 has no effect without --kd-model-name'),
        (dict(kd_model_name='resnet18', kd_teacher_img_size=0), '--kd-teacher-img-size 0 must be positive'),
        (dict(distill_loss_weight=2.0), r'--distill-loss-weight 2.0 has no effect without --kd-model-name'),
        (dict(kd_model_name='resnet18', kd_temperature=0.0), '--kd-temperature 0.0 must be positive'),
        (dict(kd_model_name='resnet18', task_loss_weight=-1.0), '--task-loss-weight -1.0 must not be negative'),
    ],
)
def test_wrong_options_are_one_sentence(digits: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises((UsageError, RuntimeError), match=message):
        train(small_args(digits, tmp_path, **options))


def test_teacher_of_other_classes_is_refused(digits: Path, teacher: Path, tmp_path: Path) -> None:
    save_for_hf(timm.create_model('mixpath_nano', num_classes=4), tmp_path / 'four', safe_serialization=True)
    with pytest.raises(UsageError, match=r'tells 4 classes apart and the student 10.*--kd-distill-type feature'):
        train(small_args(digits, tmp_path, kd_model_name=f'local-dir:{tmp_path / "four"}'))
    with pytest.raises(UsageError, match=r'--kd-distill-type token does not work for mixpath_nano_supernet'):
        train(small_args(digits, tmp_path, kd_model_name=f'local-dir:{teacher}', kd_distill_type='token'))


@pytest.mark.parametrize(
    'kind, in_chans',
    [('logit', 3), ('feature', 1), *(pytest.param(*p, marks=pytest.mark.slow) for p in (('feature', 3), ('logit', 1)))],
)
def test_teacher_gets_images_as_it_was_trained(
    digits: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, in_chans: int
) -> None:
    # The student's images are normalised as the options say, not as its name does
    given = dict(mean=[0.2, 0.4, 0.6][:in_chans], std=[0.5, 0.25, 0.125][:in_chans], in_chans=in_chans)
    inputs: dict[str, torch.Tensor] = {}
    made = DistillationTeacher.normalize_input

    def spy(self: DistillationTeacher, input: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        inputs['student'], inputs['teacher'] = input.clone(), made(self, input, *args)
        return inputs['teacher']

    monkeypatch.setattr(DistillationTeacher, 'normalize_input', spy)
    train(small_args(digits, tmp_path, epochs=1, kd_model_name=f'local-dir:{teacher}', kd_distill_type=kind, **given))
    cfg = timm.create_model(f'local-dir:{teacher}').pretrained_cfg
    pixels = inputs['student'] * column(given['std']) + column(given['mean'])
    mean, std = (v if in_chans == 3 else [sum(v) / 3] for v in (cfg['mean'], cfg['std']))
    torch.testing.assert_close(inputs['teacher'], (pixels - column(mean)) / column(std), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'kind, img_size',
    [
        ('logit', None),
        ('logit', 24),
        ('feature', 24),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (('feature', None), ('logit', 16), ('feature', 16))),
    ],
)
def test_teacher_gets_images_of_its_own_size(
    digits: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, img_size: int | None
) -> None:
    """As seen by its first convolution; the students' are 16x16."""
    students: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    made, create = DistillationTeacher.normalize_input, timm.create_model

    def spy(self: DistillationTeacher, input: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        students.append(made(self, input, *args).clone())
        return students[-1]

    def create_model(name: str, *args: object, **kwargs: object) -> torch.nn.Module:
        model = create(name, *args, **kwargs)
        if name.startswith('local-dir:'):
            conv = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
            conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        return model

    monkeypatch.setattr(DistillationTeacher, 'normalize_input', spy)
    monkeypatch.setattr('timm_mixpath.train.distill.timm.create_model', create_model)
    options = dict(kd_model_name=f'local-dir:{teacher}', kd_distill_type=kind, kd_teacher_img_size=img_size)
    train(small_args(digits, tmp_path, epochs=1, **options))
    seen = seen[-len(students) :]  # the task may ask the teacher for the number of its features
    assert students[0].shape[-2:] == (16, 16) and seen[0].shape[-2:] == (img_size or 16,) * 2
    for student, teachers in zip(students, seen, strict=True):
        how = dict(size=seen[0].shape[-2:], mode='bicubic', antialias=True, align_corners=False)
        torch.testing.assert_close(teachers, torch.nn.functional.interpolate(student, **how))


def test_teacher_of_one_size(digits: Path, tmp_path: Path) -> None:
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, num_classes=CLASSES)
    save_for_hf(vit, tmp_path / 'vit', model_args=dict(img_size=32, depth=1), safe_serialization=True)
    options = dict(kd_model_name=f'local-dir:{tmp_path / "vit"}', epochs=1)
    for size, shown in ((None, '16x16'), (48, '48x48')):
        message = rf"teacher 'local-dir:.*' takes no images of {shown} pixels, see --kd-teacher-img-size: Input height"
        with pytest.raises(UsageError, match=message):
            train(small_args(digits, tmp_path / 'wrong', kd_teacher_img_size=size, **options))
    assert not (tmp_path / 'wrong').exists()
    assert (train(small_args(digits, tmp_path, kd_teacher_img_size=32, **options)).output_dir / 'last.pth.tar').exists()


@pytest.mark.parametrize('then, now', [(24, None), (None, 24), ('missing', 24)])
def test_another_size_of_the_teachers_images_is_named(
    digits: Path,
    teacher: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    then: int | str | None,
    now: int | None,
) -> None:
    options = dict(kd_model_name=f'local-dir:{teacher}', epochs=1)
    before = None if then == 'missing' else then
    last = train(small_args(digits, tmp_path, kd_teacher_img_size=before, **options)).output_dir / 'last.pth.tar'
    if then == 'missing':  # a checkpoint of an earlier version
        checkpoint = torch.load(last, weights_only=False)
        del checkpoint['args'].kd_teacher_img_size
        torch.save(checkpoint, last)
    monkeypatch.setattr('timm_mixpath.train.loop._train_all', lambda *_: None)  # it is named before
    options |= dict(epochs=2, resume=str(last))
    train(small_args(digits, tmp_path, kd_teacher_img_size=before, **options))
    assert 'trained with other options' not in caplog.text
    train(small_args(digits, tmp_path, kd_teacher_img_size=now, **options))
    assert f'--kd-teacher-img-size {before} -> {now}' in caplog.text


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)
