"""The search of stage 2: which archs of a trained supernet are the best trade-offs of accuracy and cost.

NSGA-II (pymoo) or random search propose archs, `evaluate` scores them in the supernet, and every score goes to an
archive on disk at once. A search is a function of its configuration and of the scores, so a search that was cut off
is run again from its start with the scores of the archive in the place of evaluations, and ends where it would have.

NSGA-II and the hypervolume need `pip install 'timm-mixpath[search]'`; to import this module does not.
"""

import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models.backbone import BackboneSupernet
from ..models.cost import cost_table
from ..models.latency import measure_latency
from ..models.latency_table import MIN_TAU, LatencyTable, measure_archs
from ..models.supernet import Supernet
from ..spaces.arch import Arch
from ..spaces.space import BlockSpace, SearchSpace
from ..train.checkpoint import load_supernet
from ..utils.distributed import Ranks, open_process
from ..utils.errors import RunError, UsageError, as_usage_error
from ..utils.figures import plot_or_warn
from ..utils.files import make_output_dir
from ..utils.progress import Progress
from ..utils.tables import format_size
from ..version import __version__
from .accuracy import SupernetEvaluator, prepare_device
from .archive import Archive, evaluate_all, read_config
from .config import SearchConfig
from .front import plot_pareto, write_front_csv, write_front_json
from .images import SearchData, describe_images, load_images
from .nsga2 import NSGA2Search, RandomSearch
from .pareto import require_pymoo
from .pool import ArchPool, check_limits
from .result import Candidate, SearchResult, is_diverged, make_front, make_record, restore, with_metrics

if TYPE_CHECKING:
    from ..models.cost import CostTable

__all__ = ['objectives_of', 'search', 'search_checkpoint']

# In the folder of a search
ARCHIVE = 'archive.jsonl'

_logger = logging.getLogger(__name__)


def search(
    space: SearchSpace,
    cost: 'CostTable',
    evaluate: Callable[[Arch], Mapping[str, Any]],
    config: SearchConfig,
    *,
    archive_path: str | os.PathLike,
    fingerprint: Mapping[str, Any],
    progress: Callable[[Candidate, int], None] | None = None,
    ranks: Ranks | None = None,
) -> SearchResult:
    """Search a space, or go on with a search that was cut off.

    All random numbers come from `config.seed`; global random states are neither read nor changed. `evaluate` should
    be a function of the arch alone, otherwise a search that was resumed or distributed differs from one that was not.

    Args:
        space: Space to search.
        cost: Costs of the archs of this space, or of one that this is a part of; with `LatencyTable.add_to` their
            latency is one of them.
        evaluate: Returns the metrics of an arch on the search split, at least `top1` in percent and `loss`. Metrics
            are numbers, text or None.
        config: What to search for.
        archive_path: Archive of this search, JSON lines. A search of the same configuration and fingerprint goes on
            with it; `generations` alone may have grown.
        fingerprint: All that the scores depend on (checkpoint, data, ...), JSON-ready.
        progress: Called in rank 0 after every new evaluation, with the candidate and `config.num_evaluations`.
        ranks: Processes that share the evaluations, this one alone if None. All of them call `search` with the same
            arguments. The first proposes and keeps the archive, the others evaluate what it hands out.

    Returns:
        The result, the same in all ranks.

    Raises:
        UsageError: The limits exclude every arch, the archive belongs to another search, or the metrics lack `top1`
            or `loss`.
        RunError: The archive does not hold what this search would have evaluated, or another rank failed.
        ImportError: pymoo is not installed.
    """
    if config.algorithm == 'nsga2':
        require_pymoo()
    cost = cost.within(space)
    check_limits(config, cost)
    if config.near not in (None, 'none'):
        with as_usage_error(f'near={config.near!r} is no arch of the space'):
            space.arch(config.near)
    ranks = ranks or Ranks(0, 1)
    archive = Archive(
        archive_path,
        'search',
        config=config.to_dict(),
        fingerprint=fingerprint,
        versions=_versions(config),
        grows='generations',
    )
    pool = ArchPool(space, cost, config)
    algorithm = (NSGA2Search if config.algorithm == 'nsga2' else RandomSearch)(pool, config)

    def keep(candidate: Candidate) -> None:
        archive.append(make_record(candidate))
        if progress is not None:
            progress(candidate, config.num_evaluations)

    evaluations: list[Candidate] = []
    try:
        records = ranks.from_first(archive.open)
        while archs := ranks.from_first(algorithm.ask):
            generation = evaluations[-1].generation + 1 if evaluations else 0
            todo = [
                Candidate(
                    arch,
                    math.nan,
                    math.nan,
                    cost.macs(arch),
                    cost.params(arch),
                    index,
                    generation,
                    cost.cost('latency', arch) if 'latency' in cost.metrics else None,
                )
                for index, arch in enumerate(archs, len(evaluations))
            ]
            candidates = evaluate_all(
                todo,
                evaluate,
                records=records[len(evaluations) :],
                restore=lambda candidate, record: restore(candidate, record, archive.path),
                complete=with_metrics,
                keep=keep,
                ranks=ranks,
            )
            ranks.from_first(lambda candidates=candidates: algorithm.tell(candidates))
            evaluations += candidates
    finally:
        archive.close()
    if len(evaluations) < len(records):
        raise RunError(
            is_diverged(archive.path, f'it holds {len(records)} evaluations, this search {len(evaluations)}')
        )

    front = make_front(evaluations, config.objective_names)
    if not front:
        raise RunError(
            f'the loss of none of the {len(evaluations)} archs is finite, so none can be chosen; look at the loss of '
            'the training, or recalibrate with --recalibration-images'
        )
    return SearchResult(
        space=space,
        config=config,
        fingerprint=archive.header['fingerprint'],
        evaluations=evaluations,
        front=front,
        bounds={'error': (0.0, 100.0), 'loss': (0.0, 1.0), **{metric: cost.bounds(metric) for metric in cost.metrics}},
    )


def _versions(config: SearchConfig) -> dict[str, str]:
    versions = {'timm_mixpath': __version__, 'numpy': np.__version__}
    if config.algorithm == 'nsga2':
        import pymoo

        versions['pymoo'] = pymoo.__version__
    return versions


def objectives_of(output: str | os.PathLike) -> Any:
    """Return the objectives of the search that a folder holds, and the default ones where it holds none.

    They were the error and costs in earlier versions: without objectives of its own a search goes on as it began.
    """
    return read_config(Path(output) / ARCHIVE).get('objectives') or SearchConfig().objectives


def search_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    config: SearchConfig,
    data: SearchData | None = None,
    *,
    recalibration_images: int = 256,
    img_size: int | None = None,
    cost_input_size: tuple[int, int, int] | None = None,
    cost_num_classes: int | None = None,
    batch_size: int | None = None,
    amp_dtype: str | None = None,
    device: str | torch.device | None = None,
    workers: int = 2,
    latency: bool = False,
    latency_table: str | os.PathLike | None = None,
    space: BlockSpace | None = None,
    progress: bool = True,
    like: Namespace | None = None,
) -> SearchResult:
    """Search a trained supernet.

    Under torchrun the images are shared among the ranks, and the result is what one process gets.

    Args:
        checkpoint: Training checkpoint or model folder of a supernet.
        output: Folder for `archive.jsonl`, `front.csv`, `front.json`, `pareto.png`. A search that was cut off goes on
            where it stopped when it is called with the same arguments.
        config: What to search for.
        data: Where the search split comes from.
        recalibration_images: Training images to recalibrate the batch norms of every candidate with, 0 for none.
        img_size: Size that the images are brought to, in pixels; that of the training if None. Recalibration
            makes up for much of a difference.
        cost_input_size: Input (channels, height, width) to count MACs for, in pixels; that of the images if None. A
            supernet may be trained at a lower resolution than its winner.
        cost_num_classes: Number of classes to count MACs and parameters for, that of the supernet if None.
        batch_size: Images per forward pass, 100 on a CPU and 512 elsewhere if None.
        amp_dtype: 'bfloat16' or 'float16' to score archs in mixed precision, None for float32.
        device: Device, the GPU if there is one and None is given.
        workers: Processes that decode the images, once.
        latency: Measure the latency of the archs on the front too, on this machine.
        latency_table: JSON file of a `LatencyTable` of this space and the input that costs are counted for: predicts
            the latency of every arch, for `max_latency` and as an objective. If this is the device that it was
            measured on, the archs of the front are measured in the same way at the end.
        space: Part of the supernet's space to search, such as `BackboneSpace.without_more`; all of it if None.
        progress: Show a progress bar on a terminal, lines elsewhere.
        like: What `checkpoint` is of, if it holds weights alone, see `load_model`.

    Returns:
        The result.

    Raises:
        UsageError: See `search`, `load_model`, `open_dataset` and `LatencyTable`; or the checkpoint is not of a
            supernet.
        RunError: The data, checkpoint or archive can't be read, or the output not be written.
    """
    if config.algorithm == 'nsga2':
        require_pymoo()
    loaded = load_supernet(checkpoint, 'search', recalibration_images, like, img_size)
    with open_process(device) as process:
        rank = process.rank
        output = make_output_dir(output)
        supernet = loaded.model.to(device=process.device, memory_format=torch.channels_last)
        if cost_num_classes is not None and cost_num_classes < 0:
            raise UsageError(f'number of classes {cost_num_classes} to count costs for must not be negative')
        cost = cost_table(supernet, cost_input_size or loaded.data_config['input_size'], cost_num_classes)
        table = None
        if latency_table is not None:
            table = LatencyTable.load(latency_table)
            table.add_to(cost)
            if rank == 0 and table.test and not table.test['tau'] >= MIN_TAU:
                _logger.warning(
                    f'The latency table is poor: it ranks unseen networks with tau {table.test["tau"]}, at least '
                    f'{MIN_TAU} is wanted; measure it again on an idle machine or with more networks'
                )
        check_limits(config, cost if space is None else cost.within(space))
        if config.near is None and config.algorithm == 'nsga2' and isinstance(supernet, BackboneSupernet):
            config = replace(config, near=str(supernet.space.default_arch))
        batch_size, autocast = prepare_device(process.device, batch_size, amp_dtype)
        ranks = Ranks(rank, process.world_size, together=True)
        images = load_images(loaded, data, recalibration_images, batch_size, process.device, workers, ranks)
        fingerprint = dict(
            **images.fingerprint,
            cost_input_size=list(cost.input_size),
            cost_num_classes=cost.num_classes,
            **({} if amp_dtype is None else dict(amp_dtype=amp_dtype)),
            **({} if table is None else dict(latency_table=table.fingerprint(), latency_of=table.describe())),
        )
        if space is None:
            space = supernet.space
        else:
            fingerprint |= dict(max_paths=space.max_paths, kernel_sizes=[list(b.kernel_sizes) for b in space.blocks])
        if rank == 0:
            _logger.info(
                f'Searching space {space.name} (m = {space.max_paths}, {space.size:.3g} archs): '
                f'{config.num_evaluations} evaluations on {describe_images(fingerprint)}'
            )
        show = _search_progress(config.num_evaluations, config.score) if progress and rank == 0 else None
        result = search(
            space,
            cost,
            SupernetEvaluator(supernet, images.batches, images.recalibration, ranks=ranks, autocast=autocast),
            config,
            archive_path=output / ARCHIVE,
            fingerprint=fingerprint,
            progress=show,
            ranks=ranks,
        )
        if show is not None:
            show.close()
        if rank == 0:
            if table is not None:
                _measure_as_predicted(result, supernet, table)
            elif latency:
                _measure_front(result, supernet, cost)
            write_front_csv(result, output / 'front.csv')
            write_front_json(result, output / 'front.json')
            plot_or_warn(plot_pareto, result, output / 'pareto.png')
        return result


def _search_progress(total: int, score: str) -> Progress:
    lowest = math.inf

    def status(candidate: Candidate) -> str:
        nonlocal lowest
        lowest = min(lowest, getattr(candidate, score))  # a loss that is not a number is never below
        return f'lowest {score} {_score_text(lowest, score)}'

    return Progress('Search', total, lambda c: f'{score} {_score_text(getattr(c, score), score)}  {c.arch}', status)


def _score_text(value: float, score: str) -> str:
    return f'{value:.2f} %' if score == 'error' else f'{value:.4f}'


def _measure_front(result: SearchResult, supernet: Supernet, cost: 'CostTable') -> None:
    """Measure the networks that the costs are of: for that input and as many classes."""
    for candidate in result.front:
        model = supernet.extract(candidate.arch)
        if model.num_classes != cost.num_classes:
            model.reset_classifier(cost.num_classes)
        latency = measure_latency(model, input_size=cost.input_size, channels_last=True)
        candidate.extra['latency_ms'] = round(latency, 4)
        _logger.info(f'{latency:.2f} ms per image of {format_size(cost.input_size)}  {candidate.arch}')


def _measure_as_predicted(result: SearchResult, supernet: Supernet, table: LatencyTable) -> None:
    """Measure the front as the archs of a table were, if this is its device."""
    if reason := table.why_not_here():  # after hours of a search that does not need it
        _logger.warning(
            f'The latency of the front is predicted and not measured, {reason}; on the device of the table, with its '
            'runtime, `timm-mixpath latency` measures it, with --latency-table, --archs front.json and --checkpoint'
        )
        return
    measured = measure_archs(supernet, [c.arch for c in result.front], table)
    for candidate, ms in zip(result.front, measured):
        candidate.extra['latency_ms'] = round(ms, 4)
