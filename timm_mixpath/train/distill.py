"""Distillation from a teacher, with the options of timm's train.py and one more."""

import argparse
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.task import (
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from ..utils.errors import UsageError, as_usage_error
from ..utils.numbers import parse_float
from ..utils.tables import format_size
from .checkpoint import resolve_data
from .task import STAND_INS

__all__ = ['add_distillation_options', 'check_distillation', 'create_distillation_task']


# Options whose default means nothing without a teacher
_ONLY_WITH_TEACHER = ('distill_loss_weight', 'task_loss_weight', 'kd_teacher_img_size')


def add_distillation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of timm's train.py for distillation, and the size of the teacher's images."""
    add = parser.add_argument_group('distillation').add_argument
    add('--kd-model-name', default=None, metavar='NAME',
        help='teacher, with its pretrained weights: any timm name, local-dir:DIR or hf-hub:ORG/NAME')  # fmt: skip
    add('--kd-teacher-img-size', type=int, default=None, metavar='N',
        help="pixels that the teacher's images are resized to (default: those of the student; not an option of timm's "
             'train.py)')  # fmt: skip
    add('--kd-distill-type', default='logit', choices=('logit', 'feature', 'token'), help='what the student matches')
    add('--kd-loss-type', default='kl', choices=('kl',), help='loss between logits')
    add('--distill-loss-weight', type=parse_float, default=None, metavar='N', help='weight of the distillation loss')
    add('--task-loss-weight', type=parse_float, default=None, metavar='N',
        help='weight of the loss against the labels; alone, the other one is 1 minus it')  # fmt: skip
    add('--kd-temperature', type=parse_float, default=4.0, metavar='T', help='temperature of the softmax')
    add('--kd-student-feature-dim', type=int, default=None, metavar='N', help="features (default: the student's)")
    add('--kd-teacher-feature-dim', type=int, default=None, metavar='N', help="features (default: the teacher's)")
    add('--kd-token-distill-type', default='soft', choices=('soft', 'hard'), help='for models with a second head')


def check_distillation(args: Namespace) -> None:
    """Check the values of the options.

    Raises:
        UsageError: One is out of range, or has no effect without a teacher.
    """
    if not args.kd_model_name:
        given = [name for name in _ONLY_WITH_TEACHER if getattr(args, name) is not None]
        if given:
            option = given[0].replace('_', '-')
            raise UsageError(
                f'--{option} {getattr(args, given[0])} has no effect without --kd-model-name, name a teacher'
            )
        return
    if args.kd_teacher_img_size is not None and args.kd_teacher_img_size < 1:
        raise UsageError(f'--kd-teacher-img-size {args.kd_teacher_img_size} must be positive')
    if args.kd_temperature <= 0:
        raise UsageError(f'--kd-temperature {args.kd_temperature} must be positive')
    for name in ('distill_loss_weight', 'task_loss_weight'):
        if (getattr(args, name) or 0) < 0:
            raise UsageError(f'--{name.replace("_", "-")} {getattr(args, name)} must not be negative')


def create_distillation_task(
    model: nn.Module, criterion: nn.Module, args: Namespace, data_config: dict[str, Any], **kwargs: Any
) -> TrainingTask:
    """Create the task of timm that `--kd-distill-type` names, one for supernets where the student is a supernet.

    Args:
        model: Student.
        criterion: Loss against the labels.
        args: Training options with a `kd_model_name`.
        data_config: How the student's images are prepared; the teacher gets them with its own mean and std.
        **kwargs: `device` and `verbose` of the task.

    Raises:
        UsageError: No such teacher, it has no weights, its classifier is for other classes, it can't take images of
            this size, or the student has no second head.
    """
    teacher = _create_teacher(model, args, data_config['input_size'], kwargs['device'])
    weights = dict(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    task_cls, options = {
        'logit': (LogitDistillationTask, dict(loss_type=args.kd_loss_type, temperature=args.kd_temperature)),
        'feature': (
            FeatureDistillationTask,
            dict(student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim),
        ),
        'token': (
            TokenDistillationTask,
            dict(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature),
        ),
    }[args.kd_distill_type]
    works = as_usage_error(f'--kd-distill-type {args.kd_distill_type} does not work for {args.model}')
    with works, _normalised(model, data_config['mean'], data_config['std']):
        return STAND_INS.get(task_cls, task_cls)(
            student_model=model, teacher_model=teacher, criterion=criterion, **weights, **options, **kwargs
        )


@contextmanager
def _normalised(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Iterator[None]:
    """Say in a model's pretrained cfg how its images are normalised, which is where timm's tasks look."""
    own = model.pretrained_cfg
    model.pretrained_cfg = {**own, 'mean': tuple(mean), 'std': tuple(std)}
    try:
        yield
    finally:
        model.pretrained_cfg = own


def _create_teacher(
    model: nn.Module, args: Namespace, input_size: tuple[int, int, int], device: Any
) -> DistillationTeacher:
    name = args.kd_model_name
    with as_usage_error(f'teacher --kd-model-name {name!r} can not be created'):
        teacher = timm.create_model(name, pretrained=True, in_chans=model.in_chans).to(device)
    if args.kd_distill_type != 'feature' and teacher.num_classes != model.num_classes:
        raise UsageError(
            f'teacher {name!r} tells {teacher.num_classes} classes apart and the student {model.num_classes}, so there '
            'is nothing to match: fine-tune it on these images and name its folder, local-dir:DIR, or take '
            '--kd-distill-type feature'
        )
    size = args.kd_teacher_img_size
    data_config = resolve_data(Namespace(in_chans=model.in_chans), teacher)
    with _normalised(teacher, data_config['mean'], data_config['std']):
        made = DistillationTeacher(teacher, device=device) if size is None else _ResizingTeacher(teacher, size, device)
    # Some networks take images of one size only, which the first step would find out
    pixels = (f'{size}x{size}' if size else format_size(input_size[1:])) + ' pixels'
    with as_usage_error(f'teacher {name!r} takes no images of {pixels}, see --kd-teacher-img-size'), torch.no_grad():
        made(torch.zeros(2, *input_size, device=device))
    return made


class _ResizingTeacher(DistillationTeacher):
    """timm's teacher, with images of a size of its own.

    Smaller images of the student, enlarged, show the teacher objects as large as in its training: a network is best
    near the scale at which it saw them there (arXiv 1906.06423).

    Args:
        model: Teacher.
        img_size: Size that its images [B, C, H, W] are resized to, in pixels.
        device: Its device.
    """

    def __init__(self, model: nn.Module, img_size: int, device: Any) -> None:
        super().__init__(model, device=device)
        self.img_size = img_size

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if input.shape[-2:] != (self.img_size, self.img_size):
            input = resize(input, [self.img_size, self.img_size], InterpolationMode.BICUBIC, antialias=True)
        return super().forward(input, return_features)
