"""Metrics of a training for those who watch it: Weights & Biases, TensorBoard."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..utils.errors import RunError, concise, needs

__all__ = ['open_metrics_log']


@contextmanager
def open_metrics_log(
    args: Namespace, output_dir: Path, start_epoch: int
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Within the context there is a run of Weights & Biases for timm's `update_summary`, if it is asked for.

    What the context gives logs the metrics of an epoch for TensorBoard, if that is asked for, by their names in
    summary.csv.

    Args:
        args: Options of the training.
        output_dir: Folder of the run.
        start_epoch: First epoch; what TensorBoard has of it and of later ones gives way.

    Raises:
        ImportError: What `--log-wandb` or `--log-tensorboard` needs is not installed.
        RunError: Weights & Biases can't be reached.
    """
    writer = None
    with ExitStack() as stack:
        if args.log_wandb:
            stack.callback(_open_wandb(args, output_dir).finish)
        if args.log_tensorboard:
            with needs('--log-tensorboard needs tensorboard', 'log'):
                from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(output_dir / 'tensorboard'), purge_step=start_epoch or None)
            stack.callback(writer.close)

        def log(epoch: int, metrics: Mapping[str, float]) -> None:
            if writer is not None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, epoch)
                writer.flush()

        yield log


def _open_wandb(args: Namespace, output_dir: Path) -> Any:
    with needs('--log-wandb needs wandb', 'log'):
        import wandb
    try:
        # As timm's train.py does
        return wandb.init(
            project=args.wandb_project,
            name=output_dir.name,
            config=vars(args),
            tags=args.wandb_tags,
            dir=str(output_dir),
            resume='must' if args.wandb_resume_id else None,
            id=args.wandb_resume_id or None,
        )
    except (wandb.Error, OSError, ValueError) as e:
        raise RunError(f'--log-wandb can not begin a run: {concise(e)}; WANDB_MODE=offline needs no account') from e
