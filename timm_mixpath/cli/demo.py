"""The whole job on images of your own or on a small real data set: supernet, search, training of the winner."""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..hub.export import save_model
from ..models.cost import CostTable
from ..search.config import SearchConfig
from ..search.front import print_result
from ..search.images import SearchData
from ..search.pareto import require_pymoo
from ..search.pool import check_limits
from ..search.run import objectives_of, search_checkpoint
from ..spaces.catalog import get_space
from ..train.checkpoint import load_model
from ..train.loop import train_or_resume
from ..train.options import default_args
from ..utils.errors import UsageError, as_usage_error
from ..utils.files import write_dir_atomic
from ..utils.numbers import check_at_least, parse_count
from .common import (
    add_user_images,
    check_single_process,
    from_args,
    job_folder,
    setup_logging,
    user_images,
)

__all__ = ['DemoConfig', 'add_demo', 'digits_folder', 'run_demo', 'run_demo_command']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does.

    Attributes:
        data_dir: Root of an image data set with a training and a validation split; scikit-learn's handwritten digits
            (1,797 real images of 8x8 pixels, in 10 classes) if None and `dataset` is empty.
        dataset: Type and name as in timm.
        train_split: Training split.
        val_split: Validation split, for the final accuracy only.
        dataset_download: Download the data set where timm can.
        class_map: File that maps class names to indices.
        input_key: Key of the images in data sets of hfds/, endings of the files of a folder.
        target_key: Key of the class indices in data sets of hfds/.
        img_size: Size that the images are brought to, in pixels.
        supernet_epochs: Epochs of the supernet.
        train_epochs: Epochs of the winner.
        batch_size: Images per step.
        generations: Generations of the search.
        max_macs: Limit of the search.
        seed: Seed of everything.
        workers: Processes that load images.
        device: Device, the GPU if there is one and None is given.
    """

    data_dir: str | None = None
    dataset: str = ''
    train_split: str = 'train'
    val_split: str = 'validation'
    dataset_download: bool = False
    class_map: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    img_size: int = 32
    supernet_epochs: int = 20
    train_epochs: int = 10
    batch_size: int = 64
    generations: int = 8
    max_macs: int | None = None
    seed: int = 0
    workers: int = 2
    device: str | None = None


def digits_folder() -> Path:
    """Return scikit-learn's digits as an image folder in the user's cache, written at the first call.

    Every fifth image is in `validation`, the others in `train`.

    Raises:
        UsageError: scikit-learn is not installed.
        RunError: The cache can't be written.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_mixpath'
    folder = cache / 'digits'
    if (folder / 'validation').is_dir():
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the demo's own data set needs scikit-learn: pip install 'timm-mixpath[demo]', or pass --data-dir"
        ) from None
    from PIL import Image

    digits = load_digits()
    with write_dir_atomic(folder) as temporary:
        for index, (image, label) in enumerate(zip(digits.images, digits.target)):
            split = temporary / ('validation' if index % 5 == 0 else 'train') / str(label)
            split.mkdir(parents=True, exist_ok=True)
            pixels = np.round(image * (255 / 16)).astype(np.uint8)  # values are 0 to 16
            Image.fromarray(pixels).save(split / f'{index:04d}.png')
    return folder


def run_demo(config: DemoConfig, output: str | os.PathLike) -> Path:
    """Train a nano supernet, search it, train the winner from scratch and save it.

    A run that was cut off goes on where it stopped.

    Args:
        config: What to do.
        output: Folder for `supernet/`, `search/`, `final/` and `model/`.

    Returns:
        The model folder, for `timm.create_model('local-dir:...', pretrained=True)`.

    Raises:
        UsageError: The output belongs to another configuration, a value is out of range, or the data does not exist.
        RunError: Training failed, or files can't be read or written.
    """
    check_at_least(config, dict.fromkeys(('supernet_epochs', 'train_epochs', 'batch_size', 'img_size'), 1))
    search_config = SearchConfig(
        population=24,
        offspring=12,
        generations=config.generations,
        objectives=objectives_of(Path(output) / 'search'),
        max_macs=config.max_macs,
        seed=config.seed,
    )
    require_pymoo()  # not after minutes of training
    check_single_process('demo')
    with job_folder(output, config, 'demo.json') as folder:
        return _run(config, search_config, folder)


def _run(config: DemoConfig, search_config: SearchConfig, output: Path) -> Path:
    data_dir = config.data_dir
    if data_dir is None and not config.dataset:
        data_dir = str(digits_folder())
    images, classes, _ = user_images(config, data_dir)

    with as_usage_error(f'image size {config.img_size} is out of range'):
        check_limits(search_config, CostTable(get_space('nano'), input_size=(3, config.img_size, config.img_size)))

    common = dict(
        **images,
        num_classes=len(classes),
        img_size=config.img_size,
        # The same for the winner, whose name has weights that were trained with others
        mean=list(IMAGENET_DEFAULT_MEAN),
        std=list(IMAGENET_DEFAULT_STD),
        batch_size=config.batch_size,
        device=config.device,
        workers=config.workers,
        seed=config.seed,
        channels_last=True,
        output=str(output),
        sched_on_updates=True,
        warmup_epochs=1,
        warmup_lr=0.01,
        lr=0.05,
        weight_decay=3e-4,
        clip_grad=5.0,
        smoothing=0.0,
        scale=[0.7, 1.0],
        ratio=[0.9, 1.1],
        hflip=0.5 if config.data_dir or config.dataset else 0.0,  # a mirrored digit is no digit
        color_jitter=0.0,
        checkpoint_hist=1,
        log_interval=1000,
        val_interval=5,
    )
    _logger.info('1/3 Training the supernet')
    train_or_resume(
        default_args(**common, model='mixpath_nano_supernet', epochs=config.supernet_epochs, experiment='supernet')
    )
    supernet = output / 'supernet' / 'last.pth.tar'

    _logger.info('2/3 Searching')
    result = search_checkpoint(
        supernet,
        output / 'search',
        search_config,
        SearchData(),
        recalibration_images=0,  # which takes half of the time
        workers=config.workers,
        device=config.device,
    )
    arch = str(result.chosen.arch)

    _logger.info(f'3/3 Training {arch}')
    final = train_or_resume(
        default_args(
            **common,
            model='mixpath_nano',
            model_kwargs={'arch': arch},
            epochs=config.train_epochs,
            experiment='final',
        )
    )
    folder = output / 'model'
    if not folder.exists():
        loaded = load_model(output / 'final' / 'last.pth.tar')
        save_model(loaded.model, folder, loaded.data_config, loaded.label_names)

    print()
    print_result(result, output / 'search')
    print(
        f'\ntrained from scratch: top-1 {float(final["eval_top1"]):.2f} % on the validation split\n'
        f"timm.create_model('local-dir:{folder}', pretrained=True)  # after `import timm, timm_mixpath`"
    )
    return folder


def add_demo(parser: argparse.ArgumentParser) -> None:
    default = DemoConfig()
    add = parser.add_argument
    add('--output', default='mixpath-demo', metavar='DIR', help='output folder (default: mixpath-demo)')
    add_user_images(add, "your images (default: scikit-learn's digits)")
    add('--img-size', type=int, default=default.img_size, metavar='N', help='pixels (default: %(default)s)')
    add('--supernet-epochs', type=int, default=default.supernet_epochs, metavar='N')
    add('--train-epochs', type=int, default=default.train_epochs, metavar='N')
    add('-b', '--batch-size', type=int, default=default.batch_size, metavar='N')
    add('--generations', type=int, default=default.generations, metavar='N', help='generations of the search')
    add('--max-macs', type=parse_count, metavar='N', help='limit of the search, for example 15M')
    add('--seed', type=int, default=default.seed)
    add('-j', '--workers', type=int, default=default.workers, metavar='N')
    add('--device', metavar='NAME')


def run_demo_command(args: argparse.Namespace) -> None:
    setup_logging()
    run_demo(from_args(DemoConfig, args), args.output)
