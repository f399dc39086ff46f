"""Data sets and loaders of a training."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from timm import utils
from timm.data import FastCollateMixup, Mixup, create_loader
from torch.utils.data.distributed import DistributedSampler

from ..models.supernet import Supernet
from ..utils.errors import UsageError
from .cached_loader import CachedLoader
from .data import (
    HOLDOUT_SPLIT,
    check_classes,
    hold_out,
    image_mode,
    open_dataset,
    split_record,
    warn_of_other_images,
)
from .options import mixup_active

__all__ = ['create_loaders', 'open_data']


def open_data(args: Namespace, model: torch.nn.Module, data_config: dict[str, Any]) -> tuple[Any, Any]:
    args.input_img_mode = image_mode(data_config['input_size'][0], args.input_img_mode)
    common = dict(
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=args.input_img_mode,
        input_key=args.input_key,
        target_key=args.target_key,
    )
    train = dict(is_training=True, seed=args.seed, num_samples=args.train_num_samples)
    val = dict(is_training=False, num_samples=args.val_num_samples)
    if args.distributed and args.dataset_download:
        # one process downloads, the others find the files
        if utils.is_primary(args):
            open_dataset(args.dataset, args.data_dir, args.train_split, **common)
        dist.barrier()
    train_set = open_dataset(args.dataset, args.data_dir, args.train_split, **train, **common)
    splits = {f'split {args.train_split!r}': train_set}
    val_set = None
    if args.val_split and args.val_split != HOLDOUT_SPLIT:
        val_set = open_dataset(args.dataset, args.data_dir, args.val_split, **val, **common)
        splits[f'split {args.val_split!r}'] = val_set
    # What was trained before with other names may be fine-tuned, a run that goes on may not meet them
    trained = getattr(args, 'label_names', None)
    args.label_names = check_classes(splits, model.num_classes, trained) or trained
    if args.search_holdout is None:
        args.search_holdout = 0.1 if isinstance(model, Supernet) else 0.0
    before = getattr(args, 'held_out', None)
    by_position = bool(args.resume) and before is None  # as versions did that kept no record
    if args.search_holdout:
        train_set, held = hold_out(train_set, args.search_holdout, by_position=by_position)
        if not by_position:
            args.held_out = split_record(held)
            if before is not None:
                warn_of_other_images(before, args.held_out)
    if args.val_split == HOLDOUT_SPLIT:
        if not args.search_holdout:
            raise UsageError(f'--val-split {HOLDOUT_SPLIT} needs a --search-holdout SHARE, for example 0.1')
        whole = open_dataset(args.dataset, args.data_dir, args.train_split, is_training=False, **common)
        _, val_set = hold_out(whole, args.search_holdout, by_position=by_position)
    return train_set, val_set


def create_loaders(
    args: Namespace,
    data_config: dict[str, Any],
    train_set: Any,
    val_set: Any,
    device: torch.device,
) -> tuple[Iterable, Iterable | None, Mixup | None]:
    if args.aug_repeats and (not args.distributed or args.cache_images):
        raise UsageError(
            f'--aug-repeats {args.aug_repeats:g} shows an image in several processes of torchrun at once; leave it out '
            'in a single process and with --cache-images'
        )
    prefetcher = not args.no_prefetcher
    collate_fn = mixup_fn = None
    if mixup_active(args):
        mixup_args = dict(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        if prefetcher:
            collate_fn = FastCollateMixup(**mixup_args)
        else:
            mixup_fn = Mixup(**mixup_args)
    common = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        distributed=args.distributed,
        use_prefetcher=prefetcher,
    )
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    if args.cache_images:
        loader_train = CachedLoader(
            train_set,
            data_config,
            batch_size=args.batch_size,
            device=device,
            hflip=args.hflip,
            augment=not args.no_aug,
            seed=args.seed,
            rank=args.rank,
            world_size=args.world_size,
            workers=args.workers,
        )
        return loader_train, _create_val_loader(args, data_config, val_set, common), None
    loader_train = create_loader(
        train_set,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=interpolation,
        collate_fn=collate_fn,
        worker_seeding=args.worker_seeding,
        # Workers that live on keep random state that a resumed run could not restore, and go on to mix images
        persistent_workers=args.use_multi_epochs_loader and args.workers > 0 and not args.mixup_off_epoch,
        **common,
    )
    if isinstance(loader_train.sampler, DistributedSampler):
        loader_train.sampler.seed = args.seed
    return loader_train, _create_val_loader(args, data_config, val_set, common), mixup_fn


def _create_val_loader(args: Namespace, data_config: dict[str, Any], val_set: Any, common: dict[str, Any]) -> Any:
    if val_set is None:
        return None
    return create_loader(
        val_set,
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config.get('crop_mode'),
        persistent_workers=False,
        **common,
    )
