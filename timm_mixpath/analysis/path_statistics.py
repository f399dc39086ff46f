"""Do k summed paths look like k times one path? The observation that Shadow Batch Normalization rests on.

MixPath (arXiv 2001.05887) sees that features of different paths have a high cosine similarity, concludes that a sum of
k paths has about k times the mean and k^2 times the variance of one path, and so keeps a batch norm per k. Here the
three are measured on a trained supernet: the similarity, the moments of sums, and what the shadow batch norms learned.

This is a reconstruction of what the paper's figure shows; the paper's exact protocol is not published.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, combinations_with_replacement
from typing import Any

import torch
from torch import nn

from ..models.layers import ShadowBatchNorm2d
from ..models.supernet import SumSite, Supernet
from ..search.images import Batches
from ..spaces.sampling import sample
from ..utils.errors import RunError, UsageError
from ..utils.modes import eval_mode

__all__ = ['PathStatistics', 'ShadowStatistics', 'StatsResult', 'path_statistics', 'shadow_statistics', 'sum_ratios']

_logger = logging.getLogger(__name__)


# Archs in which a sum has to run before no more are drawn: what comes before it differs from arch to arch
_ARCHS_PER_SUM = 3


@dataclass(frozen=True)
class PathStatistics:
    """How alike the paths of one sum are, over N images and A archs.

    y_p [C, H, W] is the output of path p of P for an image. The moments are per channel, over images and positions,
    and averaged over the archs: a batch norm, too, sees one arch at a time. Only sums that some arch makes count: where
    paths are alternatives, as the operations on an edge of a cell are, they are neither a pair nor in a set together.

    Attributes:
        name: Name of the module that sums.
        paths: Names of the candidate paths.
        num_channels: C.
        num_images: N.
        num_archs: A, archs that ran the module; they differ in what comes before it.
        cosine: Cosine similarity [P, P]: mean over images and archs of <y_p, y_q> / (|y_p| |y_q|) with y flattened, 0
            where a path puts out zeros only. Outputs behind a ReLU are not negative, so the similarity of unrelated
            ones is above 0 too (0.64 for half-normal ones); `correlation` does not have that floor.
        correlation: Mean of sum_c Cov_c[y_p, y_q] over `pairs`, relative to the mean of sum_c Var_c[y_p] over the
            members of the pairs: 1 if the paths are equal, 0 if they are uncorrelated, nan without pairs.
        mean_ratio: Per k = 1, 2, ... up to the largest sum, the norm of the vector E_c[sum of k paths], relative to
            that of one of the k: k if the paths are equal. Root mean square over all sets of k paths that can be
            active. Of the norm, because the means of channels may have either sign and cancel. Behind a ReLU the
            means are positive and can agree without the features being alike: a ratio near k says little there
            without the variance.
        var_ratio: Per k the total variance sum_c Var_c[sum of k paths], relative to that of one of the k: k^2 if the
            paths are equal, k if they are uncorrelated. Mean over all sets of k paths that can be active. Of the
            total, because the ratios of channels that are nearly dead say nothing and can be anything.
        pairs: Indices p < q of the paths that some arch sums; none where all paths are alternatives.
    """

    name: str
    paths: tuple[str, ...]
    num_channels: int
    num_images: int
    num_archs: int
    cosine: tuple[tuple[float, ...], ...]
    correlation: float
    mean_ratio: tuple[float, ...]
    var_ratio: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def has_sums(self) -> bool:
        """Whether some arch sums two or more of the paths; they are alternatives if not."""
        return len(self.var_ratio) > 1

    @property
    def pair_cosines(self) -> list[float]:
        """Cosine similarity of each of `pairs`, of every two paths where all are alternatives."""
        return [self.cosine[p][q] for p, q in self.pairs or combinations(range(len(self.paths)), 2)]

    @property
    def cosine_mean(self) -> float:
        """Mean of `pair_cosines`."""
        return sum(self.pair_cosines) / len(self.pair_cosines)

    @property
    def cosine_min(self) -> float:
        """Similarity of the two paths that are least alike."""
        return min(self.pair_cosines)

    @property
    def cosine_max(self) -> float:
        """Similarity of the two paths that are most alike."""
        return max(self.pair_cosines)


@dataclass(frozen=True)
class ShadowStatistics:
    """What the members of one `ShadowBatchNorm2d` learned; entry k - 1 of each tuple is of k active paths.

    In the inverted bottlenecks of full width the shadows stand behind the 1x1 projection of the sum. That is linear,
    so k and k^2 are to be expected there too; a squeeze-and-excite in between (spaces S2 and S3) is not linear.

    Attributes:
        name: Name of the module.
        num_channels: Number of channels C.
        num_batches: Training batches that each shadow has seen; 0 means that it was never trained.
        mean_norm: Norm of the running mean, a vector [C].
        var: Running variance, mean over channels.
        weight: Mean over channels of |weight|, nan without affine parameters.
        bias: Mean over channels of |bias|, nan without affine parameters.
    """

    name: str
    num_channels: int
    num_batches: tuple[int, ...]
    mean_norm: tuple[float, ...]
    var: tuple[float, ...]
    weight: tuple[float, ...]
    bias: tuple[float, ...]

    @property
    def mean_ratio(self) -> tuple[float, ...]:
        """`mean_norm` relative to the first shadow, k if the paths are equal; nan if one of both was never trained."""
        return self._ratio(self.mean_norm)

    @property
    def var_ratio(self) -> tuple[float, ...]:
        """`var` relative to the first shadow, k^2 if the paths are equal; nan if one of both was never trained."""
        return self._ratio(self.var)

    def _ratio(self, values: Sequence[float]) -> tuple[float, ...]:
        return tuple(
            value / values[0] if count and self.num_batches[0] and values[0] else math.nan
            for value, count in zip(values, self.num_batches)
        )


@dataclass(frozen=True)
class StatsResult:
    """Statistics of a supernet.

    Attributes:
        space: Name of its search space.
        max_paths: m.
        num_images: Number of images.
        sites: One entry per sum that ran, in the order of the network.
        shadows: One entry per shadow batch norm, none for a supernet without.
        source: Where the images come from.
        sum_norm: What normalises sums, `'sbn'`, `'bn'` or `'none'`.
    """

    space: str
    max_paths: int
    num_images: int
    sites: list[PathStatistics]
    shadows: list[ShadowStatistics]
    source: dict[str, Any]
    sum_norm: str = 'sbn'


def path_statistics(
    supernet: nn.Module, batches: Batches, *, num_archs: int = 20, seed: int = 0
) -> list[PathStatistics]:
    """Compare the paths of every sum of a supernet, and sums of k of them with one.

    Archs are drawn as in training and run in eval mode until every sum has run in three of them: a sum runs only in
    archs that choose its expansion. Nothing of the size of the features is kept, and no sum is computed: the inner
    products of the paths determine the moments of every sum of them.

    Args:
        supernet: Supernet. It is left as it was.
        batches: Images [B, C, H, W] and classes [B], on its device; the classes are not used.
        num_archs: Largest number of archs to run.
        seed: Seed of the archs.

    Returns:
        One entry per `SumSite` that ran and has more than one path, in the order of the network.

    Raises:
        UsageError: Not a supernet, it is folded or sums nothing, fewer than two images, or no arch.
        RunError: The features are not finite.
    """
    _check_supernet(supernet)
    num_images = sum(len(x) for x, _ in batches)
    if num_images < 2:
        raise UsageError(f'{num_images} images are too few for a variance, at least 2 are needed')
    if num_archs < 1:
        raise UsageError(f'number of archs {num_archs} must be at least 1')
    modules = {name: module for name, module in supernet.named_modules() if isinstance(module, SumSite)}
    if not modules:
        raise UsageError(f'{type(supernet).__name__} has no sum of paths to look at')
    sites = {name: _Site() for name in modules}
    with _left_as_it_was(supernet), torch.inference_mode():
        handles = [
            module.register_forward_pre_hook(partial(_look, sites[name]), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            for step in range(num_archs):
                supernet.active_arch = sample(supernet.space, seed=seed, step=step, strategy=supernet.sampling)
                for x, _ in batches:
                    supernet(x)
                for site in sites.values():
                    site.end_arch()
                if all(site.num_archs >= _ARCHS_PER_SUM for site in sites.values()):
                    break
        finally:
            for handle in handles:
                handle.remove()
    unseen = [name for name, site in sites.items() if not site.num_archs]
    if unseen:
        _logger.warning(
            f'{len(unseen)} of {len(sites)} sums did not run in {num_archs} archs and are left out, {unseen[0]} for '
            'one; more archs would reach them'
        )
    return [
        site.result(name, num_images, _path_sets(modules[name], site.paths, supernet.space.max_paths))
        for name, site in sites.items()
        if site.num_archs and len(site.paths) > 1
    ]


def _look(site: '_Site', module: SumSite, args: tuple, kwargs: dict[str, Any]) -> None:
    outputs = module.path_outputs(*args, **kwargs)
    if outputs:
        site.add(outputs)


def _path_sets(module: SumSite, paths: Sequence[str], max_paths: int) -> list[tuple[str, ...]]:
    """Return the sets of paths that can be active at once."""
    if hasattr(module, 'path_sets'):
        return module.path_sets()
    return [chosen for k in range(1, max_paths + 1) for chosen in combinations(paths, k)]


class _Site:
    """Sums over the images of the current arch, and over the archs that have ended, in float64 on the CPU."""

    def __init__(self) -> None:
        self.paths: tuple[str, ...] = ()
        self.num_archs = 0
        self.cosine = self.means = self.covariance = torch.zeros(())  # [P, P], sums over archs
        self._start()

    def _start(self) -> None:
        self._num_images = self._num_positions = 0
        self._cosine = self._dots = torch.zeros((), dtype=torch.float64)  # [P, P]
        self._sums = torch.zeros((), dtype=torch.float64)  # [P, C]

    def add(self, outputs: dict[str, torch.Tensor]) -> None:
        """Take in the outputs [B, C, H, W] of all paths for a batch."""
        if self.paths and self.paths != tuple(outputs):
            raise ValueError(f'the paths of a sum must stay the same, got {tuple(outputs)} after {self.paths}')
        self.paths = tuple(outputs)
        # half precision would lose the sums over positions
        features = [y.to(torch.promote_types(y.dtype, torch.float32)) for y in outputs.values()]
        dots = _inner_products(features)  # [B, P, P]
        norms = dots.diagonal(dim1=1, dim2=2).sqrt()  # [B, P]
        self._cosine = self._cosine + (dots / (norms[:, :, None] * norms[:, None]).clamp_min(1e-30)).sum(0)
        self._dots = self._dots + dots.sum(0)
        self._sums = self._sums + torch.stack([y.sum((2, 3)).cpu().double().sum(0) for y in features])
        batch_size, _, height, width = features[0].shape
        self._num_images += batch_size
        self._num_positions += batch_size * height * width

    def end_arch(self) -> None:
        """Turn the sums over images into moments."""
        if not self._num_images:
            return
        means = self._sums / self._num_positions  # [P, C]
        inner = means @ means.T
        self.num_channels = means.shape[1]
        self.cosine = self.cosine + self._cosine / self._num_images
        self.means = self.means + inner
        self.covariance = self.covariance + (self._dots / self._num_positions - inner)
        self.num_archs += 1
        self._start()

    def result(self, name: str, num_images: int, path_sets: Sequence[Sequence[str]]) -> PathStatistics:
        """Return the statistics, over the sets of paths that can be active at once."""
        if not all(t.isfinite().all() for t in (self.cosine, self.means, self.covariance)):
            raise RunError(f'the outputs of the paths of {name} are not finite; the training may have diverged')
        index = {path: p for p, path in enumerate(self.paths)}
        sets = [sorted(index[path] for path in chosen) for chosen in path_sets]
        pairs = sorted({pair for chosen in sets for pair in combinations(chosen, 2)})
        return PathStatistics(
            name,
            self.paths,
            self.num_channels,
            num_images,
            self.num_archs,
            cosine=tuple(tuple(row) for row in (self.cosine / self.num_archs).tolist()),
            correlation=_correlation(self.covariance, pairs),
            mean_ratio=tuple(math.sqrt(v) for v in sum_ratios(self.means, sets)),
            var_ratio=sum_ratios(self.covariance, sets),
            pairs=tuple(pairs),
        )


def _inner_products(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """P features [B, C, H, W] -> inner products per image [B, P, P], float64 on the CPU."""
    dots = torch.empty(len(features[0]), len(features), len(features), dtype=torch.float64)
    # pair by pair: all at once would need the features twice, and a matrix product is less exact than a sum
    for p, q in combinations_with_replacement(range(len(features)), 2):
        dots[:, p, q] = dots[:, q, p] = (features[p] * features[q]).sum((1, 2, 3)).cpu().double()
    return dots


def _correlation(covariance: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> float:
    """Mean covariance of pairs relative to the mean variance of their members; nan without pairs or variance."""
    if not pairs:
        return math.nan
    p, q = torch.tensor(pairs).T
    variance = covariance.diagonal()
    own = (variance[p] + variance[q]).mean().item() / 2
    return covariance[p, q].mean().item() / own if own > 0 else math.nan


def sum_ratios(matrix: torch.Tensor, sets: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Quadratic form of sums of k vectors relative to that of one of the k, from the forms G_pq of the vectors.

    A sum over a set S has the form sum_{p, q in S} G_pq, and its members have sum_{p in S} G_pp / k on average. Both
    are averaged over the sets of size k. The members are those of the same sets because others may differ in size:
    a path that is only ever one of four says nothing about one that is active alone.

    Args:
        matrix: G [P, P]. Covariances give ratios of variances, inner products those of squared norms.
        sets: Indices of the vectors that are summed, of every size from 1 to the largest.

    Returns:
        The ratio for k = 1, 2, ... up to the largest set, nan where the G_pp are 0.
    """
    ratios: list[float] = []
    for k in range(1, max(map(len, sets)) + 1):
        chosen = torch.tensor([s for s in sets if len(s) == k])  # [number of sets, k]
        own = matrix.diagonal()[chosen].mean().item()
        total = matrix[chosen[:, :, None], chosen[:, None]].sum((1, 2)).mean().item()
        ratios.append(max(0.0, total / own) if own > 0 else math.nan)
    return tuple(ratios)


def shadow_statistics(supernet: nn.Module) -> list[ShadowStatistics]:
    """Return what each shadow batch norm of a supernet learned, in the order of the network.

    Raises:
        UsageError: Not a supernet, or it is folded.
    """
    _check_supernet(supernet)
    result: list[ShadowStatistics] = []
    for name, module in supernet.named_modules():
        if not isinstance(module, ShadowBatchNorm2d) or module.shadows[0].running_mean is None:
            continue

        def values(of: Callable[[nn.Module], torch.Tensor | None], sbn: ShadowBatchNorm2d = module) -> tuple:
            tensors = [of(bn) for bn in sbn.shadows]
            return tuple(math.nan if t is None else t.detach().double().cpu().abs().mean().item() for t in tensors)

        result.append(
            ShadowStatistics(
                name,
                module.num_features,
                num_batches=tuple(int(bn.num_batches_tracked) for bn in module.shadows),
                mean_norm=tuple(bn.running_mean.double().norm().item() for bn in module.shadows),
                var=values(lambda bn: bn.running_var),
                weight=values(lambda bn: bn.weight),
                bias=values(lambda bn: bn.bias),
            )
        )
    return result


@contextmanager
def _left_as_it_was(supernet: Supernet) -> Iterator[None]:
    """Within the context the supernet is in eval mode; then every module has its mode, and the arch is back."""
    arch = supernet.active_arch
    with eval_mode(supernet):
        try:
            yield
        finally:
            supernet.active_arch = arch


def _check_supernet(model: nn.Module) -> None:
    if not isinstance(model, Supernet):
        raise UsageError(f'{type(model).__name__} is no supernet; statistics of paths need one')
    if model.is_folded:
        raise UsageError('the batch norms of this supernet are folded; pass the supernet it was made of')
