"""Latency of any arch of a space, predicted from measured ones.

A network runs one module after the other, so its latency is close to a sum over its parts, the parts by which
multiply-adds are counted (`timm_mixpath.models.cost`). What a part costs on a device is not known and hard to measure
alone: caches and fused operations behave otherwise there. So whole networks are measured, and the costs of the parts
are fitted to them, in two steps. First every kind of part (an expansion, a kernel of 5) gets a price per piece and one
per multiply-add. Then every single part may depart from its price, as far as the measurements ask for it: a ridge
regression, whose strength is the one of smallest leave-one-out error.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..utils.errors import UsageError, needs
from ..utils.tables import write_json
from .latency import make_images, measure_side_by_side
from .runtimes import check_runtime, describe_device, make_runner

if TYPE_CHECKING:
    from .cost import CostTable, Part
    from .supernet import Supernet

__all__ = [
    'MIN_TAU',
    'LatencyTable',
    'arch_runner',
    'fit_latency',
    'layers_digest',
    'measure_archs',
    'space_digest',
]


_logger = logging.getLogger(__name__)

_FORMAT = 'timm-mixpath latency table'

_VERSION = 1

# Below this Kendall's tau on unseen archs a table is too poor to search by
MIN_TAU = 0.8

# Networks that are in memory at once
CHUNK = 20

# Largest departures from the prices of kinds, as shares, that are tried
_DEPARTURES = (0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class LatencyTable:
    """Latency of any arch of one space, on one device and runtime, for one size of input.

    Attributes:
        space: Name of the space.
        max_paths: m of the paper.
        input_size: Input as (channels, height, width), in pixels.
        num_classes: Number of classes.
        digest: Digest of the parts of the space's networks and their multiply-adds, see `space_digest`.
        batch_size: Images per batch.
        runtime: How the networks were run, see `make_runner`.
        device: Type of the device as torch calls it.
        device_name: Name of the device.
        threads: Threads on a CPU.
        versions: Versions of what was measured with.
        protocol: How was measured.
        measured: Measured archs: `arch`, `latency_ms` and `use`, which is `'fit'` or `'test'`.
        base: What all archs share, in milliseconds per batch.
        parts: Milliseconds per batch of every part: its entries, then the time.
        test: How well the archs of use `'test'` are predicted: `num_archs`, `tau`, `mean_error` and `max_error`, the
            errors as shares of the measured latency; `repeats` has the same for a second measurement in the place of
            the prediction.
        layers: Digest of the other layers of the networks, see `layers_digest`; None in tables of earlier versions.
    """

    space: str
    max_paths: int
    input_size: tuple[int, int, int]
    num_classes: int
    digest: str
    batch_size: int
    runtime: str
    device: str
    device_name: str
    threads: int
    versions: dict[str, str]
    protocol: dict[str, Any]
    measured: list[dict[str, Any]]
    base: float
    parts: list[list[Any]]
    test: dict[str, Any] = field(default_factory=dict)
    layers: str | None = None

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'LatencyTable':
        """Read a table.

        Raises:
            UsageError: There is no such file, or it is no table of this version.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) else 'it is not JSON'
            raise UsageError(f'latency table {str(path)!r} can not be read: {reason}') from None
        if not isinstance(content, dict) or content.pop('format', None) != _FORMAT:
            raise UsageError(f'{str(path)!r} is no latency table, `timm-mixpath latency` makes one')
        if (version := content.pop('version', None)) != _VERSION:
            raise UsageError(f'latency table {str(path)!r} has format version {version}, this is {_VERSION}')
        try:
            table = cls(**{**content, 'input_size': tuple(content['input_size'])})
            if not all(map(math.isfinite, (table.base, *table.prices().values()))):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UsageError(f'latency table {str(path)!r} is damaged, measure it again') from None
        return table

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(path, dict(format=_FORMAT, version=_VERSION, **asdict(self)))

    def prices(self) -> dict['Part', float]:
        """Return the milliseconds of every part."""
        return {tuple(key): float(ms) for *key, ms in self.parts}

    def fingerprint(self) -> str:
        """Return a digest of all predictions."""
        return hashlib.sha256(json.dumps([self.base, self.parts]).encode()).hexdigest()

    def describe(self) -> str:
        """Return what was measured, in a few words."""
        threads = f', {self.threads} thread{"s" * (self.threads > 1)}' if self.device == 'cpu' else ''
        return f'{self.runtime} on {self.device_name}{threads}, batches of {self.batch_size}'

    def why_not_here(self) -> str | None:
        """Say why networks can't be measured as those of the table were by this process; None if they can."""
        here = describe_device(self.device) if self.device == 'cpu' or torch.cuda.is_available() else 'no GPU'
        if self.device_name != here:
            return f'the table is of {self.device_name}, this is {here}'
        try:
            check_runtime(self.runtime)
        except ImportError as e:
            return str(e)
        return None

    def add_to(self, cost: 'CostTable') -> None:
        """Make `'latency'`, in milliseconds per batch, a metric of a table of costs.

        Raises:
            UsageError: The table is of another space or input.
        """
        for what, own, other in (
            ('space', self.space, cost.space.name),
            ('input size', list(self.input_size), list(cost.input_size)),
        ):
            if own != other:
                raise UsageError(f'the latency table is of {what} {own}, this search of {other}; measure one for it')
        prices = self.prices()
        if cost.part_costs('macs').keys() - prices.keys() or self.digest != space_digest(cost):
            raise UsageError(
                f'the latency table is of another variant of space {self.space!r} (width, expansions, kernels or norms '
                'of sums differ); measure one for this supernet'
            )
        if self.layers is not None and self.layers != layers_digest(cost):
            raise UsageError(
                f'the latency table is of another variant of space {self.space!r} (activations, gates, norms or '
                'pooling differ); measure one for this supernet'
            )
        if self.max_paths < cost.space.max_paths:
            _logger.warning(
                f'The latency table was measured with sums of up to {self.max_paths} path(s), and those of this space '
                f'have up to {cost.space.max_paths}: what larger ones take is extrapolated, measure a table with '
                f'm={cost.space.max_paths}'
            )
        cost.add_metric('latency', self.base, prices)


def measure_archs(
    supernet: 'Supernet',
    archs: Sequence[str],
    table: LatencyTable,
    *,
    rounds: int = 10,
    min_visit_s: float = 0.03,
    seed: int = 0,
) -> list[float]:
    """Measure networks of a supernet as those of a table were: same runtime, threads, batch and input.

    Twenty at a time are in memory. They are measured where the supernet is if that is the type of device that the table
    is of, otherwise on one of that type.

    Args:
        supernet: Supernet in any mode; its weights do not matter.
        archs: Archs of its space.
        table: Table.
        rounds: Visits of every network, see `measure_side_by_side`.
        min_visit_s: Length of a visit, in seconds.
        seed: Seed of the order.

    Returns:
        Latency of a batch of each in milliseconds.

    Raises:
        ValueError: The space does not hold an arch.
        ImportError: The runtime is not installed.
    """
    x = make_images(supernet, table.batch_size, table.input_size)
    if x.device.type != table.device:  # torch's first GPU would take the place of the second one
        x = x.to(table.device)
    runner = partial(
        arch_runner, supernet, x, runtime=table.runtime, num_threads=table.threads, num_classes=table.num_classes
    )
    times: list[float] = []
    for start in range(0, len(archs), CHUNK):
        times += measure_side_by_side(
            list(map(runner, archs[start : start + CHUNK])),
            num_threads=table.threads,
            rounds=rounds,
            min_visit_s=min_visit_s,
            seed=seed,
        )
    return times


def arch_runner(
    supernet: 'Supernet', x: torch.Tensor, arch: str, *, runtime: str, num_threads: int, num_classes: int
) -> Callable[[], Any]:
    """Prepare the network of an arch to be measured on the device of `x`, see `make_runner`."""
    model = supernet.extract(arch).to(x.device)
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    return make_runner(model, x, runtime=runtime, num_threads=num_threads)


def space_digest(cost: 'CostTable') -> str:
    """Return a digest of what the networks of a space are made of, whatever the number of classes."""
    macs, params = cost.part_costs('macs'), cost.part_costs('params')
    parts = sorted([json.dumps(part), macs[part], params[part]] for part in macs)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def layers_digest(cost: 'CostTable') -> str:
    """Return a digest of the kinds of layers that the parts of `space_digest` say nothing of, such as activations."""
    return hashlib.sha256(json.dumps(cost.layer_kinds).encode()).hexdigest()


def fit_latency(
    cost: 'CostTable', archs: Sequence[str], latency_ms: Sequence[float]
) -> tuple[float, dict['Part', float]]:
    """Fit what the parts of networks cost to the measured latency of whole ones.

    Errors count as shares of the latency, and nothing has a negative price.

    Args:
        cost: Costs of the archs, whose parts are priced.
        archs: Measured archs.
        latency_ms: Their latency, in milliseconds.

    Returns:
        What all archs share, and the price of every part, in milliseconds.

    Raises:
        ValueError: There are fewer than three archs.
        ImportError: scipy is not installed.
    """
    if len(archs) < 3:
        raise ValueError(f'{len(archs)} measured archs are too few to fit a latency to')
    y = np.asarray(latency_ms, dtype=float)  # [num_archs]
    macs = cost.part_costs('macs')
    parts = list(macs)
    place = {part: i for i, part in enumerate(parts)}
    counts = np.zeros((len(archs), len(parts)))
    for row, arch in zip(counts, archs):
        for part, n in Counter(cost.parts(arch)).items():
            row[place[part]] = n
    ones = np.ones((len(archs), 1))

    # Prices of the kinds: per piece and per multiply-add
    kinds = [cost.part_kind(part) for part in parts]
    columns = [np.array([kind == other for other in kinds], dtype=float) for kind in dict.fromkeys(kinds)]
    sizes = np.array([macs[part] for part in parts], dtype=float)
    columns += [column * sizes for column in columns if (column * sizes).any()]
    prices = np.stack(columns, axis=1)  # [num_parts, num_prices]
    x = counts @ prices
    usual = np.maximum(x.mean(axis=0), 1e-12)
    shares = np.concatenate([[y.mean()], y.mean() / usual])  # what the base or a price would be if it were everything
    weights = _fit(np.hstack([ones, x]), y, np.zeros(len(shares)), shares, 0.01)
    expected = prices @ weights[1:]  # ms of every part

    # Departures of the parts. One that costs nothing by its price may still cost something
    least = y.mean() / max(counts.sum(axis=1).mean(), 1) / 20
    x = np.hstack([ones, counts])
    center = np.concatenate([weights[:1], expected])
    spread = np.concatenate([[y.mean()], np.maximum(expected, least)])
    strength = min((0.01 / d for d in _DEPARTURES), key=lambda k: _leave_one_out(x, y, center, spread, k))
    weights = _fit(x, y, center, spread, strength)
    return float(weights[0]), dict(zip(parts, map(float, weights[1:])))


def _fit(x: np.ndarray, y: np.ndarray, center: np.ndarray, spread: np.ndarray, strength: float) -> np.ndarray:
    """Weights of at least 0 of the least squares of relative errors, drawn towards a center.

    Args:
        x: Counts, [num_archs, num_weights].
        y: Latency, [num_archs].
        center: Where the weights are without measurements, [num_weights].
        spread: Unit of a weight's distance from there, [num_weights].
        strength: Weight of these distances beside the errors.
    """
    with needs('fitting a latency table needs scipy', 'rank'):
        from scipy.optimize import nnls

    # In units of the spread, so that all columns are of a size
    rows = np.vstack([x * spread / y[:, None], strength * np.eye(len(center))])
    return nnls(rows, np.concatenate([np.ones(len(y)), strength * center / spread]))[0] * spread


def _leave_one_out(x: np.ndarray, y: np.ndarray, center: np.ndarray, spread: np.ndarray, strength: float) -> float:
    """Mean squared relative error of archs that were left out of a fit without bounds, in closed form."""
    z = x * spread / y[:, None]
    rest = 1 - x @ center / y
    # The same as inverting z.T z + strength^2, whose size is the number of parts
    kernel = z @ z.T
    hat = np.linalg.solve(kernel + strength**2 * np.eye(len(y)), kernel).T
    errors = (rest - hat @ rest) / np.maximum(1 - np.diag(hat), 1e-9)
    return float((errors**2).mean())
