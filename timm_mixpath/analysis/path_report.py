"""Statistics of summed paths as CSV, JSON, table and figure."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from ..utils.figures import ACCENT, BLUE, new_figure, save_figure, tidy_axes
from ..utils.tables import format_table, write_csv, write_json
from .path_statistics import PathStatistics, ShadowStatistics, StatsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['PROTOCOL_NOTE', 'format_stats', 'plot_stats', 'write_stats_csv', 'write_stats_json']


# Batches behind which a tenth of what running statistics began with is left, at torch's momentum of 0.1
_EARLY = 22

PROTOCOL_NOTE = "Reconstruction of the content of the paper's figure; the paper's exact protocol is not published."


def write_stats_json(result: StatsResult, path: str | os.PathLike) -> None:
    """Write all statistics as JSON, whole or not at all.

    The names are those of the dataclasses; null stands for what is not defined.
    """
    content = dict(
        protocol=PROTOCOL_NOTE,
        space=result.space,
        max_paths=result.max_paths,
        num_images=result.num_images,
        sum_norm=result.sum_norm,
        source=result.source,
        verdict=_verdict(result),
        sites=[dict(asdict(s), cosine_mean=s.cosine_mean, cosine_min=s.cosine_min) for s in result.sites],
        shadows=[dict(asdict(s), mean_ratio=s.mean_ratio, var_ratio=s.var_ratio) for s in result.shadows],
    )
    write_json(path, _without_nan(content))


def write_stats_csv(result: StatsResult, path: str | os.PathLike) -> None:
    """Write one row per sum and k, and one per shadow batch norm and k, as CSV, whole or not at all.

    Columns are `kind` (sum or shadow), the `name` of the module, `k`, then `mean_ratio` and `var_ratio` of both kinds,
    and columns that only one of them has; those of the other, and what is not defined, are empty.
    """
    of_sums = ('num_candidates', 'cosine_mean', 'cosine_min', 'cosine_max', 'correlation', 'num_images', 'num_archs')
    of_shadows = ('num_batches', 'mean_norm', 'var', 'weight', 'bias')
    rows: list[dict[str, Any]] = []
    for site in result.sites:
        common = {name: getattr(site, name) for name in of_sums[1:]}
        common.update(kind='sum', name=site.name, num_channels=site.num_channels, num_candidates=len(site.paths))
        for i, (mean, var) in enumerate(zip(site.mean_ratio, site.var_ratio)):
            rows.append(dict(common, k=i + 1, mean_ratio=mean, var_ratio=var))
    for sbn in result.shadows:
        for i, (mean, var) in enumerate(zip(sbn.mean_ratio, sbn.var_ratio)):
            row = {name: getattr(sbn, name)[i] for name in of_shadows}
            row.update(kind='shadow', name=sbn.name, num_channels=sbn.num_channels)
            rows.append(dict(row, k=i + 1, mean_ratio=mean, var_ratio=var))
    names = ('kind', 'name', 'k', 'mean_ratio', 'var_ratio', 'num_channels', *of_sums, *of_shadows)
    write_csv(path, names, [[_without_nan(row.get(name)) for name in names] for row in rows])


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def format_stats(result: StatsResult) -> str:
    """Return the statistics as tables for the terminal, with a verdict in plain words."""
    ks = range(2, result.max_paths + 1)

    def ratios(of: PathStatistics | ShadowStatistics) -> list[str]:
        # a sum of few candidates ends before m
        return [_number(r[k - 1], 2) if k <= len(r) else '' for r in (of.mean_ratio, of.var_ratio) for k in ks]

    ratio_names = [f'{name} k={k}' for name in ('mean', 'var') for k in ks]
    header = ('sum of paths', 'paths', 'cosine', 'lowest', 'correlation', *ratio_names)
    rows = [
        (s.name, str(len(s.paths)), *(_number(v, 3) for v in (s.cosine_mean, s.cosine_min, s.correlation)), *ratios(s))
        for s in result.sites
    ]
    parts = [format_table([header, *rows], '<>')]
    if result.shadows and result.max_paths > 1:
        header = ('shadow batch norm', 'batches k=1', *[f'k={k}' for k in ks], *ratio_names)
        rows = [(s.name, *map(str, s.num_batches), *ratios(s)) for s in result.shadows]
        parts.append(format_table([header, *rows], '<>'))
    return '\n\n'.join([*parts, '\n'.join([*_verdict(result), PROTOCOL_NOTE])])


def _verdict(result: StatsResult) -> list[str]:
    """What the statistics say, a sentence each."""
    if not result.sites:
        return ['no sum has more than one candidate path: there is nothing to compare']
    sums = [s for s in result.sites if s.has_sums]
    alternatives = [s for s in result.sites if not s.has_sums]
    lines: list[str] = []
    if sums:
        lines += [
            f'cosine similarity of different paths: {_spread([s.cosine_mean for s in sums], 3)} over {len(sums)} sums',
            f'correlation of different paths: {_spread([s.correlation for s in sums], 3)} '
            '(1 if paths were equal, 0 if uncorrelated)',
        ]
    if alternatives:
        lines.append(
            f'cosine similarity of alternatives: {_spread([s.cosine_mean for s in alternatives], 3)} at '
            f'{len(alternatives)} places where no two paths are ever summed'
        )
    if result.max_paths == 1:
        return [*lines, 'm = 1: paths are never summed, so there is no sum to compare with one path']
    for k in range(2, result.max_paths + 1):
        reached = [s for s in sums if len(s.mean_ratio) >= k]
        if reached:
            lines.append(
                f'sum of {k} paths: mean {_spread([s.mean_ratio[k - 1] for s in reached], 2, "x")} ({k} if paths were '
                f'equal), variance {_spread([s.var_ratio[k - 1] for s in reached], 2, "x")} ({k * k} if equal, '
                f'{k} if uncorrelated)'
            )
    defined = [s for s in sums if not math.isnan(s.var_ratio[-1])]
    if defined:
        close = sum(_is_nearer_to_equal(s) for s in defined)
        lines.append(
            f'so a sum of as many as can be is nearer to k equal paths than to k uncorrelated ones at {close} of '
            f'{len(defined)} sums'
        )
    if not result.shadows:
        behind = {
            'sbn': 'without running statistics there is nothing that shadow batch norms learned',
            'bn': 'there are no shadow batch norms: a single batch norm stands behind every sum',
            'none': 'there are no shadow batch norms: no norm stands behind a sum',
        }
        return [*lines, behind[result.sum_norm]]
    for k in range(2, result.max_paths + 1):
        means, variances = ([r[k - 1] for r in ratios if len(r) >= k] for ratios in (
            [s.mean_ratio for s in result.shadows], [s.var_ratio for s in result.shadows]
        ))  # fmt: skip
        if any(v == v for v in variances):
            lines.append(
                f'shadow {k} relative to shadow 1: running mean {_spread(means, 2, "x")}, '
                f'running variance {_spread(variances, 2, "x")}'
            )
    counts = [n for s in result.shadows for n in s.num_batches]
    if 0 in counts:
        lines.append(
            f'{counts.count(0)} of {len(counts)} shadows were never trained (0 batches): they are as initialised, and '
            'have no ratios'
        )
    early = sum(0 < n < _EARLY for n in counts)
    if early:
        lines.append(
            f'{early} of {len(counts)} shadows have seen fewer than {_EARLY} batches: their running statistics are '
            'still in part what they began with, and so are their ratios'
        )
    return lines


def _is_nearer_to_equal(site: PathStatistics) -> bool:
    """Whether the variance of the largest sum of k paths is nearer to k^2 times that of one than to k times."""
    k = len(site.var_ratio)
    return site.var_ratio[-1] > (k + k * k) / 2


def _spread(values: Sequence[float], digits: int, unit: str = '') -> str:
    """Median and range, of what is defined."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return 'undefined'
    if len(values) == 1:
        return f'{values[0]:.{digits}f}{unit}'
    return f'{median(values):.{digits}f}{unit} [{min(values):.{digits}f} to {max(values):.{digits}f}]'


def _number(value: float, digits: int) -> str:
    return '-' if math.isnan(value) else f'{value:.{digits}f}'


def plot_stats(result: 'StatsResult', path: str | os.PathLike, *, title: str | None = None) -> None:
    """Draw how alike the paths of a supernet are, and what that does to sums of them, as PNG, whole or not at all.

    Above, the cosine similarity of the paths of every sum: mean and range over the pairs that can be summed, or over
    all pairs where paths are alternatives. Below, the mean and variance of a sum of k paths relative to one of them,
    and the running variance of shadow batch norm k relative to the first: a thin line per sum, the median bold, and
    what equal and uncorrelated paths would give dashed. The panels below are left out where nothing is summed (m = 1),
    the last one where there are no shadows that were trained.

    It is a reconstruction of the content of the paper's figure, and says so; the paper's exact protocol is not
    published.

    Args:
        result: Statistics of a supernet.
        path: PNG file to write.
        title: Title, the space, m and the number of images if None.

    Raises:
        ImportError: matplotlib is not installed.
    """

    sums = [s for s in result.sites if s.has_sums]
    shadows = [s.var_ratio for s in result.shadows if any(v == v for v in s.var_ratio[1:])]
    # Room for a legible label per sum, within what fits a page
    figure = new_figure(min(16.0, max(9.5, 2.0 + 0.26 * len(result.sites))), 7.4 if sums else 4.2)
    num_panels = 3 if shadows else 2
    grid = figure.add_gridspec(2 if sums else 1, num_panels if sums else 1, height_ratios=(1.0, 1.15) if sums else None)

    _plot_cosines(figure.add_subplot(grid[0, :]), result)
    if sums:
        uncorrelated = ('uncorrelated: k', lambda k: k)
        equal = ('equal paths: k²', lambda k: k * k)
        mean, var = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        _plot_ratios(mean, [s.mean_ratio for s in sums], [('equal paths: k', lambda k: k)])
        _plot_ratios(var, [s.var_ratio for s in sums], [equal, uncorrelated])
        mean.set_title('Mean of a sum of k paths', fontsize=10)
        var.set_title('Variance of a sum of k paths', fontsize=10)
        for ax in (mean, var):
            ax.set_xlabel('summed paths k')
            ax.set_ylabel('relative to one path')
        if shadows:
            ax = figure.add_subplot(grid[1, 2])
            _plot_ratios(ax, shadows, [equal, uncorrelated], 'one batch norm')
            ax.set_title('Running variance of shadow k', fontsize=10)
            ax.set_xlabel('shadow k')
            ax.set_ylabel('relative to shadow 1')
    if title is None:
        title = f'Paths of the supernet of {result.space}, m = {result.max_paths}, {result.num_images} images'
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(PROTOCOL_NOTE, fontsize=8, color='0.4', x=0.99, ha='right')

    save_figure(figure, path)


def _plot_cosines(ax: 'Axes', result: 'StatsResult') -> None:
    sites = result.sites
    x = range(len(sites))
    low, high = [s.cosine_min for s in sites], [s.cosine_max for s in sites]
    if any(len(s.paths) > 2 for s in sites):
        ax.vlines(x, low, high, color=BLUE, alpha=0.45, linewidth=3.0, label='range over pairs of paths')
    ax.plot(x, [s.cosine_mean for s in sites], 'o', color=BLUE, markersize=5, label='mean over pairs of paths')
    every = math.ceil(len(sites) / 100) or 1
    labels = _short_names([s.name for s in sites])
    ax.set_xticks(x[::every], labels[::every], rotation=90 if len(sites) > 8 else 0, fontsize=8)
    ax.set_xlim(-0.7, len(sites) - 0.3)
    # An axis from 0 keeps small differences small, but similarities of signed features may be negative
    ax.set_ylim(min([0.0, *(v - 0.05 for v in low)]), 1.02)
    ax.set_ylabel('cosine similarity')
    ax.set_title('Features of different paths, per sum in the order of the network', fontsize=10, loc='left')
    tidy_axes(ax)
    ax.legend(loc='lower right', bbox_to_anchor=(1.0, 0.99), fontsize=8, ncols=2, frameon=False)  # beside the title


def _plot_ratios(
    ax: 'Axes', lines: Sequence[Sequence[float]], baselines: Sequence[tuple], name: str = 'one sum'
) -> None:
    """A thin line per entry, called `name`, their median, and dashed what (text, function of k) says."""
    largest = max(map(len, lines))
    ks = list(range(1, largest + 1))
    for i, line in enumerate(lines):
        ax.plot(ks[: len(line)], line, color=BLUE, alpha=0.3, linewidth=0.9, label='' if i else name, zorder=2)
    columns = [[v for line in lines for v in line[k - 1 : k] if v == v] for k in ks]
    medians = [median(column) if column else math.nan for column in columns]
    ax.plot(ks, medians, 'o-', color=BLUE, linewidth=2.4, markersize=5, label='median', zorder=4)
    for (text, of), color in zip(baselines, (ACCENT, '0.45')):
        # joined by straight lines as the others are: between the numbers of paths there is nothing to compare
        ax.plot(ks, [of(k) for k in ks], '--', color=color, linewidth=1.2, label=text, zorder=5)
    ax.set_xticks(ks)
    ax.set_ylim(bottom=0)
    ax.locator_params(axis='y', nbins=6)
    tidy_axes(ax)
    ax.legend(loc='upper left', fontsize=8, frameon=False)


def _short_names(names: Sequence[str]) -> list[str]:
    """Module names without the words that are in all of them: `blocks.0.0.e3.paths` -> `0.0.e3`."""
    parts = [name.split('.') for name in names]
    common = {word for word in set.intersection(*map(set, parts)) if not word.isdigit()} if len(names) > 1 else set()
    short = ['.'.join(word for word in p if word not in common) for p in parts]
    return short if len(set(short)) == len(names) and all(short) else list(names)
