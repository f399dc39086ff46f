"""From the checkpoint of a supernet to what is known of it: how it ranks archs, how alike its paths are."""

import logging
import os
from argparse import Namespace
from dataclasses import replace

import torch

from ..models.cost import cost_table
from ..search.accuracy import SupernetEvaluator, prepare_device
from ..search.images import SearchData, describe_images, load_batches, load_images, open_search_split
from ..train.checkpoint import load_supernet
from ..utils.distributed import Ranks, open_process
from ..utils.figures import plot_or_warn
from ..utils.files import make_output_dir
from ..utils.progress import Progress
from .accuracy_table import read_table
from .path_report import plot_stats, write_stats_csv, write_stats_json
from .path_statistics import StatsResult, path_statistics, shadow_statistics
from .rank_statistics import require_scipy
from .ranking import RankConfig, RankedArch, RankResult, evaluate_table, summarize
from .ranking_report import plot_ranking, write_ranking_csv, write_ranking_json

__all__ = ['rank_checkpoint', 'stats_checkpoint']

_logger = logging.getLogger(__name__)


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
    batch_size: int | None = None,
    amp_dtype: str | None = None,
    device: str | torch.device | None = None,
    workers: int = 2,
    progress: bool = True,
    like: Namespace | None = None,
) -> RankResult:
    """Compare the scores that a trained supernet gives to archs with the accuracies that they reach on their own.

    Under torchrun the images are shared among the ranks, and the result is what one process gets.

    Args:
        checkpoint: Training checkpoint or model folder of a supernet.
        table: Stand-alone accuracies, see `read_table`.
        output: Folder for `archive.jsonl`, `ranking.csv`, `ranking.json`, `ranking.png`. A ranking that was cut off
            goes on where it stopped when it is called with the same arguments; the number of archs may grow, and the
            score, the top k, the band, the level and the number of resamples may change without new evaluations.
            Nothing is kept if None.
        config: What to rank and to report.
        data: Images to score archs with, as in a search.
        arch_column: Column of the table that holds the archs, see `read_table`.
        accuracy_column: Column of the table that holds the accuracies, see `read_table`.
        recalibration_images: Training images to recalibrate the batch norms of every arch with, for a second score
            beside that with the statistics of the training; 0 for none.
        batch_size: Images per forward pass, 100 on a CPU and 512 elsewhere if None.
        amp_dtype: 'bfloat16' or 'float16' to score archs in mixed precision, None for float32.
        device: Device, the GPU if there is one and None is given.
        workers: Processes that decode the images, once.
        progress: Show a progress bar on a terminal, lines elsewhere.
        like: What `checkpoint` is of, if it holds weights alone, see `load_model`.

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
    loaded = load_supernet(checkpoint, 'ranking', recalibration_images, like)
    supernet = loaded.model
    accuracies = read_table(table, supernet.space, arch_column=arch_column, accuracy_column=accuracy_column)
    chosen = accuracies.choose(config.num_archs, seed=config.seed)
    with open_process(device) as process:
        rank = process.rank
        if output is not None:
            output = make_output_dir(output)
        supernet = supernet.to(device=process.device, memory_format=torch.channels_last)
        cost = cost_table(supernet, loaded.data_config['input_size'])
        batch_size, autocast = prepare_device(process.device, batch_size, amp_dtype)
        ranks = Ranks(rank, process.world_size, together=True)
        images = load_images(loaded, data, recalibration_images, batch_size, process.device, workers, ranks)
        precision = {} if amp_dtype is None else dict(amp_dtype=amp_dtype)
        fingerprint = dict(
            **images.fingerprint, **precision, table_sha256=accuracies.sha256, table_archs=len(accuracies)
        )
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
                f'{accuracies.accuracy_column!r}, on {describe_images(fingerprint)}'
            )
            if len(counts := accuracies.num_seeds([arch for arch, _ in chosen])) > 1:
                found = ', '.join(f'{number} with {seeds}' for seeds, number in sorted(counts.items()))
                _logger.warning(
                    f'The archs of {accuracies.path.name} have accuracies of different numbers of seeds ({found}): '
                    'their means are compared as they are, and how well seeds agree is not told; the `table` command '
                    'that began it goes on with it'
                )
        how = dict(ranks=ranks, autocast=autocast)
        evaluators = {'': SupernetEvaluator(supernet, images.batches, **how)}
        if images.recalibration is not None:
            evaluators['_recalibrated'] = SupernetEvaluator(supernet, images.batches, images.recalibration, **how)

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
            ranks=ranks,
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


def _rank_progress(total: int) -> Progress:
    def status(ranked: RankedArch) -> str:
        if ranked.top1_recalibrated is None:
            return f'top-1 {ranked.top1:.2f} %'
        return f'top-1 {ranked.top1:.2f} %, recalibrated {ranked.top1_recalibrated:.2f} %'

    return Progress('Rank', total, lambda r: f'{status(r)}, alone {r.accuracy:.2f} %  {r.arch}', status)


def stats_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike | None = None,
    data: SearchData | None = None,
    *,
    num_archs: int = 20,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    workers: int = 2,
    like: Namespace | None = None,
) -> StatsResult:
    """Compute the statistics of a trained supernet.

    Under torchrun every rank computes all of them, and only the first one writes.

    Args:
        checkpoint: Training checkpoint or model folder of a supernet.
        output: Folder for `stats.json`, `stats.csv` and `stats.png`, nothing is written if None.
        data: Where the images come from; 512 images of the search split that the training held out if None.
        num_archs: See `path_statistics`.
        batch_size: Images per forward pass. The outputs of all paths of a block are in memory at once.
        device: Device, the GPU if there is one and None is given.
        workers: Processes that decode the images, once.
        like: What `checkpoint` is of, if it holds weights alone, see `load_model`.

    Returns:
        The statistics.

    Raises:
        UsageError: See `path_statistics`, `load_model` and `open_dataset`.
        RunError: The data or checkpoint can't be read, or the output not be written.
    """
    data = data or SearchData(num_images=512)
    loaded = load_supernet(checkpoint, 'statistic of paths', 0, like)
    with open_process(device) as process:
        if output is not None:
            output = make_output_dir(output)
        supernet = loaded.model.to(device=process.device, memory_format=torch.channels_last)
        # features of images that were trained on are features all the same
        images, _, source = open_search_split(loaded, data, warn=False)
        batches = load_batches(
            images,
            loaded.data_config,
            device=process.device,
            batch_size=batch_size,
            max_images=data.num_images,
            workers=workers,
        )
        result = StatsResult(
            supernet.space.name,
            supernet.space.max_paths,
            sum(len(x) for x, _ in batches),
            path_statistics(supernet, batches, num_archs=num_archs),
            shadow_statistics(supernet),
            source,
            supernet.sum_norm,
        )
    if output is not None and process.rank == 0:
        write_stats_json(result, output / 'stats.json')
        write_stats_csv(result, output / 'stats.csv')
        plot_or_warn(plot_stats, result, output / 'stats.png')
    return result
