"""From the checkpoint of a supernet to outputs: its search, and how well it ranks archs."""

import hashlib
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .accuracy_table import read_table
from .checkpoint import LoadedModel, load_model
from .cost import CellCostTable, CostTable, cost_table, measure_latency
from .data import Subset, hold_out, open_dataset
from .device import open_process
from .errors import UsageError, as_usage_error
from .evaluate import SupernetEvaluator, load_batches
from .files import make_output_dir
from .plots import plot_or_warn, plot_pareto, plot_ranking
from .ranking import (
    RankConfig,
    RankedArch,
    RankResult,
    evaluate_table,
    format_ranking,
    require_scipy,
    summarize,
    write_ranking_csv,
    write_ranking_json,
)
from .search import (
    Candidate,
    SearchConfig,
    SearchResult,
    check_limits,
    format_front,
    require_pymoo,
    search,
    write_front_csv,
    write_front_json,
)
from .supernet import Supernet

__all__ = [
    'SearchData',
    'open_search_split',
    'print_ranking',
    'print_result',
    'rank_checkpoint',
    'recalibration_batches',
    'search_checkpoint',
    'state_dict_sha256',
]

_logger = logging.getLogger(__name__)

# Batches with which a candidate's batch norms are recalibrated: fewer images give noisy variances
_RECALIBRATION_BATCH_SIZE = 128


@dataclass
class SearchData:
    """Where the search split comes from. None takes the value that the supernet was trained with.

    Attributes:
        data_dir: Root folder.
        dataset: Type and name as in timm.
        train_split: Training split, of which a share is held out for the search.
        search_holdout: The share. It must be the one that the training left out, or the supernet has seen the images.
        search_split: A split that is used whole instead of held-out training images.
        class_map: File that maps class names to indices.
        dataset_download: Download the data set where timm can.
        num_images: Number of images to score archs with, all of the split if None.
    """

    data_dir: str | None = None
    dataset: str | None = None
    train_split: str | None = None
    search_holdout: float | None = None
    search_split: str | None = None
    class_map: str | None = None
    dataset_download: bool = False
    num_images: int | None = None


def search_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    config: SearchConfig,
    data: SearchData | None = None,
    *,
    recalibration_images: int = 0,
    cost_input_size: tuple[int, int, int] | None = None,
    cost_num_classes: int | None = None,
    batch_size: int = 100,
    device: str | None = None,
    workers: int = 2,
    latency: bool = False,
    progress: bool = True,
) -> SearchResult:
    """Search a trained supernet.

    Under torchrun the evaluations are shared among the ranks.

    Args:
        checkpoint: Training checkpoint or model folder of a supernet.
        output: Folder for `archive.jsonl`, `front.csv`, `front.json`, `pareto.png`. A search that was cut off goes on
            where it stopped when it is called with the same arguments.
        config: What to search for.
        data: Where the search split comes from.
        recalibration_images: Training images to recalibrate the batch norms of every candidate with, 0 for none.
        cost_input_size: Input (channels, height, width) to count MACs for, in pixels; that of the training if None.
            A supernet may be trained at a lower resolution than its winner.
        cost_num_classes: Number of classes to count MACs and parameters for, that of the supernet if None.
        batch_size: Images per forward pass.
        device: Device, the GPU if there is one and None is given.
        workers: Processes that decode the images, once.
        latency: Measure the latency of the archs on the front too, on this machine.
        progress: Show a progress bar on a terminal, lines elsewhere.

    Returns:
        The result.

    Raises:
        UsageError: See `search`, `load_model` and `open_dataset`; or the checkpoint is not of a supernet.
        RunError: The data, checkpoint or archive can't be read, or the output not be written.
    """
    if config.algorithm == 'nsga2':
        require_pymoo()
    loaded = _load_supernet(checkpoint, 'search', recalibration_images)
    with open_process(device) as process:
        rank = process.rank
        output = make_output_dir(output)
        supernet = loaded.model.to(device=process.device, memory_format=torch.channels_last)
        if cost_num_classes is not None and cost_num_classes < 0:
            raise UsageError(f'number of classes {cost_num_classes} to count costs for must not be negative')
        cost = _cost_table(supernet, cost_input_size or loaded.data_config['input_size'], cost_num_classes)
        check_limits(config, cost)
        images = _load_images(loaded, data, recalibration_images, batch_size, process.device, workers)
        fingerprint = dict(
            **images.fingerprint,
            cost_input_size=list(cost.input_size),
            cost_num_classes=cost.num_classes,
        )
        if rank == 0:
            _logger.info(
                f'Searching space {supernet.space.name} (m = {supernet.space.max_paths}, {supernet.space.size:.3g} '
                f'archs): {config.num_evaluations} evaluations on {fingerprint["num_images"]} images of split '
                f'{fingerprint["split"]!r}'
            )
        show = _search_progress(config.num_evaluations) if progress and rank == 0 else None
        result = search(
            supernet.space,
            cost,
            SupernetEvaluator(supernet, images.batches, images.recalibration),
            config,
            archive_path=output / 'archive.jsonl',
            fingerprint=fingerprint,
            progress=show,
            rank=rank,
            world_size=process.world_size,
        )
        if show is not None:
            show.close()
        if rank == 0:
            if latency:
                _measure_front(result, supernet)
            write_front_csv(result, output / 'front.csv')
            write_front_json(result, output / 'front.json')
            plot_or_warn(plot_pareto, result, output / 'pareto.png')
        return result


def rank_checkpoint(
    checkpoint: str | os.PathLike,
    table: str | os.PathLike,
    output: str | os.PathLike | None = None,
    config: RankConfig | None = None,
    data: SearchData | None = None,
    *,
    arch_column: str | None = None,
    accuracy_column: str | None = None,
    recalibration_images: int = 1024,
    batch_size: int = 100,
    device: str | None = None,
    workers: int = 2,
    progress: bool = True,
) -> RankResult:
    """Compare the scores that a trained supernet gives to archs with the accuracies that they reach on their own.

    Under torchrun the evaluations are shared among the ranks.

    Args:
        checkpoint: Training checkpoint or model folder of a supernet.
        table: Stand-alone accuracies, see `read_table`.
        output: Folder for `archive.jsonl`, `ranking.csv`, `ranking.json`, `ranking.png`. A ranking that was cut off
            goes on where it stopped when it is called with the same arguments; the number of archs may grow, and the
            score, the top k and the bootstrap may change without new evaluations. Nothing is kept if None.
        config: What to rank and to report.
        data: Images to score archs with, as in a search.
        arch_column: Column of the table that holds the archs, see `read_table`.
        accuracy_column: Column of the table that holds the accuracies, see `read_table`.
        recalibration_images: Training images to recalibrate the batch norms of every arch with, for a second score
            beside that with the statistics of the training; 0 for none.
        batch_size: Images per forward pass.
        device: Device, the GPU if there is one and None is given.
        workers: Processes that decode the images, once.
        progress: Show a progress bar on a terminal, lines elsewhere.

    Returns:
        The result, the same in all ranks.

    Raises:
        UsageError: See `evaluate_table`, `read_table`, `load_model` and `open_dataset`; or the checkpoint is not of a
            supernet.
        RunError: The data, checkpoint or archive can't be read, or the output not be written.
        ImportError: scipy is not installed.
    """
    config = config or RankConfig()
    require_scipy()
    loaded = _load_supernet(checkpoint, 'ranking', recalibration_images)
    supernet = loaded.model
    accuracies = read_table(table, supernet.space, arch_column=arch_column, accuracy_column=accuracy_column)
    chosen = accuracies.choose(config.num_archs, seed=config.seed)
    with open_process(device) as process:
        rank = process.rank
        if output is not None:
            output = make_output_dir(output)
        supernet = supernet.to(device=process.device, memory_format=torch.channels_last)
        cost = _cost_table(supernet, loaded.data_config['input_size'])
        images = _load_images(loaded, data, recalibration_images, batch_size, process.device, workers)
        fingerprint = dict(**images.fingerprint, table_sha256=accuracies.sha256, table_archs=len(accuracies))
        if rank == 0:
            for left_out in accuracies.left_out:
                _logger.info(f'{accuracies.path.name}: left out {left_out}')
            if config.num_archs is not None and config.num_archs > len(chosen):
                _logger.warning(
                    f'{accuracies.path.name} has {len(chosen)} archs that can be used, fewer than the '
                    f'{config.num_archs} asked for: all are taken'
                )
            _logger.info(
                f'Ranking {len(chosen)} of the {len(accuracies)} archs of {accuracies.path.name}, column '
                f'{accuracies.accuracy_column!r}, on {fingerprint["num_images"]} images of split '
                f'{fingerprint["split"]!r}'
            )
        evaluators = {'': SupernetEvaluator(supernet, images.batches)}
        if images.recalibration:
            evaluators['_recalibrated'] = SupernetEvaluator(supernet, images.batches, images.recalibration)

        def evaluate(arch: str) -> dict[str, float]:
            found = {suffix: evaluator(arch) for suffix, evaluator in evaluators.items()}
            return {f'{name}{suffix}': found[suffix][name] for suffix in found for name in ('top1', 'loss')}

        show = _rank_progress(len(chosen)) if progress and rank == 0 else None
        archs = evaluate_table(
            chosen,
            evaluate,
            config,
            archive_path=None if output is None else output / 'archive.jsonl',
            fingerprint=fingerprint,
            progress=show,
            rank=rank,
            world_size=process.world_size,
        )
        if show is not None:
            show.close()
        archs = [replace(r, macs=cost.cost('macs', r.arch), params=cost.cost('params', r.arch)) for r in archs]
        result = summarize(accuracies, config, fingerprint, archs)
        if rank == 0 and output is not None:
            write_ranking_csv(result, output / 'ranking.csv')
            write_ranking_json(result, output / 'ranking.json')
            plot_or_warn(plot_ranking, result, output / 'ranking.png')
        return result


def _load_supernet(checkpoint: str | os.PathLike, what: str, recalibration_images: int) -> LoadedModel:
    """Load the supernet that a search or ranking is of."""
    if recalibration_images < 0:
        raise UsageError(f'number of recalibration images {recalibration_images} must not be negative')
    loaded = load_model(checkpoint)
    if not isinstance(loaded.model, Supernet):
        raise UsageError(f'{str(checkpoint)!r} holds {type(loaded.model).__name__}, a {what} needs a supernet')
    return loaded


def _cost_table(
    supernet: Supernet, input_size: tuple[int, int, int], num_classes: int | None = None
) -> CostTable | CellCostTable:
    with as_usage_error('costs can not be counted'):
        return cost_table(supernet, input_size, num_classes)


@dataclass
class _Images:
    """What archs are scored with.

    Attributes:
        batches: Images of the search split.
        recalibration: Training images to recalibrate batch norms with, None for none.
        fingerprint: What the scores of archs depend on: weights, images and where they come from.
    """

    batches: list[tuple[torch.Tensor, torch.Tensor]]
    recalibration: list[tuple[torch.Tensor, torch.Tensor]] | None
    fingerprint: dict[str, Any]


def _load_images(
    loaded: LoadedModel,
    data: SearchData | None,
    recalibration_images: int,
    batch_size: int,
    device: str,
    workers: int,
) -> _Images:
    """Decode the search split, and the training images for recalibration."""
    data = data or SearchData()
    search_set, train_set, source = open_search_split(loaded, data)
    batches = load_batches(
        search_set,
        loaded.data_config,
        device=device,
        batch_size=batch_size,
        max_images=data.num_images,
        workers=workers,
    )
    recalibration = None
    if recalibration_images:
        recalibration = recalibration_batches(train_set, loaded, recalibration_images, device, workers)
    supernet = loaded.model
    fingerprint = dict(
        checkpoint_sha256=state_dict_sha256(supernet.state_dict()),
        images_sha256=state_dict_sha256(
            {f'{i} {j}': t for i, batch in enumerate(batches) for j, t in enumerate(batch)}
        ),
        recalibration_sha256=state_dict_sha256({str(i): x for i, (x, _) in enumerate(recalibration or [])}),
        space=supernet.space.name,
        max_paths=supernet.space.max_paths,
        input_size=list(loaded.data_config['input_size']),
        num_images=sum(len(y) for _, y in batches),
        recalibration_images=recalibration_images,
        **source,
    )
    return _Images(batches, recalibration, fingerprint)


def open_search_split(loaded: LoadedModel, data: SearchData, *, warn: bool = True) -> tuple[Any, Any, dict[str, Any]]:
    """Return the search split, the training images and a description of where the split comes from.

    Args:
        loaded: Model that the images are for.
        data: Where the split comes from.
        warn: Say when the model may have been trained on the split, which makes accuracies look too good.
    """

    def pick(value: Any, name: str, default: Any = None) -> Any:
        return value if value is not None else getattr(loaded.args, name, default)

    dataset = pick(data.dataset, 'dataset', '')
    root = pick(data.data_dir, 'data_dir')
    train_split = pick(data.train_split, 'train_split', 'train')
    options = dict(
        num_classes=loaded.model.num_classes,
        class_map=pick(data.class_map, 'class_map', ''),
        download=data.dataset_download,
        input_img_mode=pick(None, 'input_img_mode') or ('RGB' if loaded.data_config['input_size'][0] == 3 else 'L'),
    )
    if data.search_split:
        search_set = open_dataset(dataset, root, data.search_split, **options)
        train_set = open_dataset(dataset, root, train_split, **options)
        return search_set, train_set, dict(dataset=dataset, split=data.search_split)
    trained_holdout = getattr(loaded.args, 'search_holdout', None)
    holdout = next(v for v in (data.search_holdout, trained_holdout or None, 0.1) if v is not None)
    if not warn:
        pass
    elif not vars(loaded.args):
        _logger.warning(
            'a model folder does not tell which images its supernet was trained on; if they include those that score '
            'archs now, errors will look too low. A training checkpoint tells, or name an unseen --search-split'
        )
    elif not trained_holdout or loaded.args.initial_checkpoint or loaded.args.pretrained:
        _logger.warning(
            'the supernet was trained on all training images, or started from weights that may have been, also on '
            'those that score archs now: errors will look too low. Train with `timm-mixpath train`, which holds a '
            'search split out, or name an unseen --search-split'
        )
    elif holdout != trained_holdout:
        _logger.warning(
            f'the training held out {trained_holdout} of the images, the search takes {holdout}: '
            'some of them may have been trained on'
        )
    train_set, search_set = hold_out(open_dataset(dataset, root, train_split, **options), holdout)
    return search_set, train_set, dict(dataset=dataset, split=train_split, holdout=holdout)


def recalibration_batches(
    train_set: Any, loaded: LoadedModel, count: int, device: str = 'cpu', workers: int = 2
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw training images to recalibrate batch norms with, in batches of about equal size.

    Args:
        train_set: Training images.
        loaded: Model that they are for.
        count: Number of images, all if there are fewer.
        device: Where the images are kept.
        workers: Processes that decode.
    """
    # Drawn at random: batch statistics of images that are sorted by class would be those of one class
    count = min(count, len(train_set))
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:count].tolist()
    # every batch counts the same in the average, so a small last one must not be
    batch_size = math.ceil(count / math.ceil(count / _RECALIBRATION_BATCH_SIZE))
    return load_batches(
        Subset(train_set, order), loaded.data_config, device=device, batch_size=batch_size, workers=workers
    )


def state_dict_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return a fingerprint of tensors by name."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f'{key} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


class _Progress:
    """A bar on a terminal, ten lines elsewhere.

    Args:
        name: What makes progress.
        total: Number of evaluations.
        line: Says what was found for an evaluated arch, in a log.
        status: Says the same behind the bar.
    """

    def __init__(self, name: str, total: int, line: Callable[[Any], str], status: Callable[[Any], str]) -> None:
        self._name = name
        self._line = line
        self._status = status
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=name, dynamic_ncols=True)

    def __call__(self, evaluated: Candidate | RankedArch, total: int) -> None:
        done = evaluated.index + 1
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(self._status(evaluated))
        elif done % max(1, total // 10) == 0 or done == total:
            _logger.info(f'{self._name}: {done}/{total}  {self._line(evaluated)}')

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _search_progress(total: int) -> _Progress:
    lowest = 100.0

    def status(candidate: Candidate) -> str:
        nonlocal lowest
        lowest = min(lowest, candidate.error)
        return f'lowest error {lowest:.2f} %'

    return _Progress('Search', total, lambda c: f'error {c.error:.2f} %  {c.arch}', status)


def _rank_progress(total: int) -> _Progress:
    def status(ranked: RankedArch) -> str:
        if ranked.top1_recalibrated is None:
            return f'top-1 {ranked.top1:.2f} %'
        return f'top-1 {ranked.top1:.2f} %, recalibrated {ranked.top1_recalibrated:.2f} %'

    return _Progress('Rank', total, lambda r: f'{status(r)}, alone {r.accuracy:.2f} %  {r.arch}', status)


def _measure_front(result: SearchResult, supernet: Supernet) -> None:
    for candidate in result.front:
        model = supernet.extract(candidate.arch)
        candidate.extra['latency_ms'] = round(measure_latency(model, channels_last=True), 4)
        _logger.info(f'{candidate.extra["latency_ms"]:.2f} ms per image  {candidate.arch}')


def print_result(result: SearchResult, output: str | os.PathLike) -> None:
    """Print the front and where it was written."""
    print(format_front(result))
    chosen = result.chosen
    print(
        f'\nchosen (*): error {chosen.error:.2f} % on the search split, {chosen.macs / 1e6:.2f} M MACs, '
        f'{chosen.params / 1e6:.3f} M params\n{chosen.arch}\n'
        f'{len(result.evaluations)} evaluations and the front are in {Path(output)}'
    )


def print_ranking(result: RankResult, output: str | os.PathLike | None = None) -> None:
    """Print the statistics and where they were written."""
    table, fingerprint = result.table, result.fingerprint
    print(
        f'{len(result.archs)} archs of {table.path.name}, column {table.accuracy_column!r}; supernet scored on '
        f'{fingerprint["num_images"]} images of split {fingerprint["split"]!r}\n\n{format_ranking(result)}'
    )
    if output is not None:
        print(f'scores, statistics and plot are in {Path(output)}')
