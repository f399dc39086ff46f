"""Measure a latency table: archs of a space on the device that matters, and how well others are predicted by them."""

import logging
import math
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models.cost import cost_table
from ..models.latency import make_images, measure_side_by_side
from ..models.latency_table import CHUNK, LatencyTable, arch_runner, fit_latency, layers_digest, space_digest
from ..models.runtimes import check_runtime, describe_device, runtime_versions
from ..models.supernet import Supernet
from ..search.archive import Archive
from ..spaces.sampling import sample
from ..utils.errors import RunError, UsageError
from ..utils.progress import progress_bar
from ..version import __version__
from .rank_statistics import require_scipy

if TYPE_CHECKING:
    from ..models.cost import CostTable

__all__ = ['LatencyConfig', 'compare_prediction', 'measure_table', 'spread_archs']

_logger = logging.getLogger(__name__)

# Fewer networks tell nothing of a space, or of a table
_MIN_FITS, _MIN_TESTS = 10, 5


@dataclass(frozen=True)
class LatencyConfig:
    """How to measure a latency table.

    Attributes:
        runtime: `'torch'`, `'compile'` or `'onnxruntime'`, see `make_runner`.
        threads: CPU threads, as many as torch is set to if None.
        batch_size: Images per batch.
        num_archs: Archs to fit the table to.
        test_archs: Archs to test it with.
        rounds: Visits of every arch.
        visit_ms: Length of a visit, in milliseconds.
        seed: Seed of the archs and of their order.

    Raises:
        UsageError: A value is out of range.
    """

    runtime: str = 'torch'
    threads: int | None = None
    batch_size: int = 1
    num_archs: int = 150
    test_archs: int = 50
    rounds: int = 10
    visit_ms: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        least_of = dict(batch_size=1, num_archs=_MIN_FITS, test_archs=_MIN_TESTS, rounds=1, seed=0)
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UsageError(f'{name}={getattr(self, name)} must be at least {least}')
        if self.threads is not None and self.threads < 1:
            raise UsageError(f'threads={self.threads} must be at least 1')
        if not self.visit_ms > 0:
            raise UsageError(f'visit_ms={self.visit_ms} must be positive')


def measure_table(
    supernet: Supernet,
    output: str | os.PathLike,
    config: LatencyConfig,
    *,
    input_size: tuple[int, int, int] | None = None,
    progress: bool = True,
) -> LatencyTable:
    """Measure networks of a supernet where it is, and write a table that predicts the others.

    Whole networks are measured, twenty at a time, each in many short visits in random order. The smallest, the default
    and the largest network are measured with every twenty; by what these took longer the others are corrected, so
    that a machine that changes its speed does not favour what was measured in a good minute. The networks of the test
    are measured twice, at different times: predictions can hardly agree better than these do with each other.

    Every twenty go to `<output>.jsonl` at once: a measurement that was cut off goes on there.

    Args:
        supernet: Supernet in any mode; its weights do not matter.
        output: JSON file.
        config: How to measure.
        input_size: Input as (channels, height, width), in pixels; the supernet's own if None.
        progress: Show a progress bar on a terminal, lines elsewhere.

    Returns:
        The table, with the result of its own test.

    Raises:
        UsageError: A value is out of range, or the output belongs to another measurement.
        ImportError: The runtime or scipy is not installed.
    """
    require_scipy()
    try:
        check_runtime(config.runtime)
    except ValueError as e:
        raise UsageError(str(e)) from None
    output, archive_path = Path(output), Path(f'{output}.jsonl')
    if output.is_dir():
        raise UsageError(f'output {str(output)!r} is a folder, name a file such as {str(output / "latency.json")!r}')
    if output.exists() and not archive_path.exists():
        raise UsageError(
            f'{str(output)!r} exists without the {archive_path.name} of its measurement and is not overwritten; choose '
            'another output'
        )
    device = next(supernet.parameters()).device
    threads = config.threads or torch.get_num_threads()
    cost = cost_table(supernet, input_size)
    versions = dict(timm_mixpath=__version__, **runtime_versions(config.runtime))
    fits, tests = _draw(cost, config)
    archs = [*fits, *tests, *tests]
    random.Random(config.seed).shuffle(archs)
    what = dict(
        digest=space_digest(cost),
        layers=layers_digest(cost),
        input_size=cost.input_size,
        num_classes=cost.num_classes,
        device=device.type,
        device_name=describe_device(device),
        threads=threads,
    )
    fingerprint = {**what, **{f'{name}_version': version for name, version in versions.items()}}
    archive = Archive(archive_path, 'latency', config=asdict(config), fingerprint=fingerprint, versions=versions)
    try:
        records = archive.open()
        chunks = [archs[i : i + CHUNK] for i in range(0, len(archs), CHUNK)]
        for record, chunk in zip(records, chunks):
            if record.get('archs') != list(map(str, chunk)):
                raise RunError(f'archive {str(archive.path)!r} holds other archs; delete it or choose another --output')
        if len(records) < len(chunks):
            measure = _Meter(supernet, cost, config, threads)
            with progress_bar(len(archs), 'Latency', disable=not progress) as bar:
                done = sum(map(len, chunks[: len(records)]))
                bar.update(done)
                for chunk in chunks[len(records) :]:
                    latency, references = measure(chunk)
                    record = dict(
                        archs=list(map(str, chunk)), metrics=dict(latency_ms=latency, references_ms=references)
                    )
                    archive.append(record)
                    records.append(record)
                    done += len(chunk)
                    bar.update(len(chunk))
                    if progress and bar.disable:
                        _logger.info(f'Latency: {done}/{len(archs)} networks measured')
    finally:
        archive.close()

    table = LatencyTable(
        **what,
        space=cost.space.name,
        max_paths=cost.space.max_paths,
        batch_size=config.batch_size,
        runtime=config.runtime,
        versions=versions,
        protocol=dict(
            rounds=config.rounds,
            visit_ms=config.visit_ms,
            seed=config.seed,
            drift=_drift(records),
        ),
        **_fit(cost, fits, tests, _without_drift(records)),
    )
    table.save(output)
    return table


def spread_archs(cost: 'CostTable', num_archs: int, seed: int = 0) -> list[str]:
    """Draw different archs whose costs are spread over all that a space reaches.

    Sampled archs crowd in the middle, as sums of many draws do, and a search goes to the ends. So every arch is
    a sampled one of which a random share of the genes is that of the smallest or of the largest arch.

    Args:
        cost: Costs of the space.
        num_archs: Number of archs, fewer if the space holds no more.
        seed: Seed of the draw.
    """
    space = cost.space
    ends = [space.encode(cost.smallest('macs')), space.encode(cost.largest('macs'))]
    archs: dict[str, None] = {}
    for step in range(20 * num_archs):
        if len(archs) == num_archs:
            break
        draw = random.Random(f'{seed}/spread/{step}')
        genes = space.encode(sample(space, seed=seed, step=step))
        towards = 2 * draw.random() - 1
        end = ends[towards > 0]
        archs[space.decode([e if draw.random() < abs(towards) else g for g, e in zip(genes, end)])] = None
    return list(archs)


def compare_prediction(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Compare predicted with measured latency.

    Returns:
        `num_archs`, Kendall's `tau`, and `mean_error` and `max_error` as shares of what was measured.
    """
    from scipy.stats import kendalltau

    errors = np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
    tau = float(kendalltau(predicted, measured).statistic)
    return dict(
        num_archs=len(errors),
        tau=round(tau, 4) if math.isfinite(tau) else 0.0,  # equal predictions order nothing
        mean_error=round(float(errors.mean()), 5),
        max_error=round(float(errors.max()), 5),
    )


def _draw(cost: 'CostTable', config: LatencyConfig) -> tuple[list[str], list[str]]:
    """Archs to fit to, and others as a search draws them, of which a small space has to leave some."""
    fits = spread_archs(cost, min(config.num_archs, cost.space.size * 2 // 3), config.seed)
    tests: dict[str, None] = {}
    for step in range(20 * config.test_archs):
        arch = sample(cost.space, seed=config.seed + 1, step=step)
        if len(tests) < config.test_archs and arch not in fits:
            tests[arch] = None
    if len(fits) < _MIN_FITS or len(tests) < _MIN_TESTS:
        raise UsageError(f'space {cost.space.name!r} has too few archs for a table; measure them all instead')
    return fits, list(tests)


class _Meter:
    """Measures archs, and three references beside them."""

    def __init__(self, supernet: Supernet, cost: 'CostTable', config: LatencyConfig, threads: int) -> None:
        self.config = config
        self.threads = threads
        self.runner = partial(
            arch_runner,
            supernet,
            make_images(supernet, config.batch_size, cost.input_size),
            runtime=config.runtime,
            num_threads=threads,
            num_classes=cost.num_classes,
        )
        archs = [cost.smallest('macs'), cost.space.default_arch, cost.largest('macs')]
        self.references = list(map(self.runner, archs))

    def __call__(self, archs: Sequence[str]) -> tuple[list[float], list[float]]:
        times = measure_side_by_side(
            [*self.references, *map(self.runner, archs)],
            num_threads=self.threads,
            rounds=self.config.rounds,
            min_visit_s=self.config.visit_ms / 1e3,
            seed=self.config.seed,
        )
        return times[3:], times[:3]


def _references(records: Sequence[dict[str, Any]]) -> tuple[list[list[float]], list[float]]:
    """What the references took with every twenty, and their usual times."""
    times = [record['metrics']['references_ms'] for record in records]
    return times, [statistics.median(column) for column in zip(*times)]


def _drift(records: Sequence[dict[str, Any]]) -> float:
    """Ratio of the slowest to the fastest measurement of the same network."""
    times, usual = _references(records)
    ratios = [statistics.fmean(t / u for t, u in zip(row, usual)) for row in times]
    return round(max(ratios) / min(ratios), 4)


def _without_drift(records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Measured latencies of archs, in milliseconds, without what the twenty were slower or faster than usual."""
    times, usual = _references(records)
    latency: dict[str, list[float]] = {}
    for record, references in zip(records, times):
        # A small network may slow down by another factor than a large one: a line through the three
        x = np.log(references)
        line = np.polyfit(x, x - np.log(usual), 1) if np.ptp(x) > 0.1 else [0.0, float(np.mean(x - np.log(usual)))]
        for arch, ms in zip(record['archs'], record['metrics']['latency_ms']):
            at = float(np.clip(np.log(ms), x.min(), x.max()))
            latency.setdefault(arch, []).append(ms / float(np.exp(np.polyval(line, at))))
    return latency


def _fit(cost: 'CostTable', fits: Sequence[str], tests: Sequence[str], times: dict[str, list[float]]) -> dict[str, Any]:
    latency_ms = {arch: statistics.fmean(own) for arch, own in times.items()}
    base, parts = fit_latency(cost, fits, [latency_ms[str(arch)] for arch in fits])
    cost.add_metric('latency', base, parts)
    test = compare_prediction([cost.cost('latency', a) for a in tests], [latency_ms[str(a)] for a in tests])
    test['tau_of_macs'] = compare_prediction([cost.macs(a) for a in tests], [latency_ms[str(a)] for a in tests])['tau']
    repeats = compare_prediction(*zip(*(times[str(a)] for a in tests)))
    test['repeats'] = {key: repeats[key] for key in ('tau', 'mean_error', 'max_error')}

    def rows() -> Iterator[dict[str, Any]]:
        for use, archs in (('fit', fits), ('test', tests)):
            yield from (dict(arch=str(a), latency_ms=round(latency_ms[str(a)], 5), use=use) for a in archs)

    return dict(
        measured=list(rows()),
        base=base,
        parts=[[*part, ms] for part, ms in parts.items()],
        test=test,
    )
