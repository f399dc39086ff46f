"""Figures. They need `pip install 'timm-mixpath[plots]'`, which this module does not need to be imported.

Figures are drawn on matplotlib's objects, not through pyplot: no window system, no backend and no global state.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .ranking import RankResult
    from .search import SearchResult
    from .stats import StatsResult

__all__ = ['plot_or_warn', 'plot_pareto', 'plot_ranking', 'plot_stats']

_logger = logging.getLogger(__name__)

_GREY = '0.72'
_ACCENT = '#c1272d'
_BLUE = '#3b6fb5'


def _new_figure(width: float, height: float) -> 'Figure':
    """A figure of a size in inches that can be saved as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(f"plots need matplotlib ({e}): pip install 'timm-mixpath[plots]'") from e
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def plot_or_warn(plot: Callable[[Any, Path], None], result: Any, path: Path) -> None:
    """Draw a figure, or say why there is none: matplotlib is an extra, and what was computed stands without it.

    Args:
        plot: One of the functions below.
        result: What it draws.
        path: PNG file to write.
    """
    try:
        plot(result, path)
    except ImportError as e:
        _logger.warning(f'no {path.name}: {e}')


def plot_pareto(result: 'SearchResult', path: str | os.PathLike, *, title: str | None = None) -> None:
    """Draw what a search evaluated and its front as PNG, whole or not at all.

    MACs (in millions) lie on the x axis and the top-1 error on the search split (in percent) on the y axis. Evaluated
    candidates are small and grey, those of the front are large and, if parameters are an objective, coloured by them.
    The line joins the candidates of the front that nothing beats in error and MACs alone; with parameters as third
    objective the front has others too, which lie above the line because they have fewer parameters.

    Args:
        result: Result of a search.
        path: PNG file to write.
        title: Title, the space and the numbers of evaluations and of candidates on the front if None.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _new_figure(8.0, 5.0)
    front, chosen = result.front, result.chosen
    ax = figure.add_subplot()

    ax.scatter(
        [c.macs / 1e6 for c in result.evaluations],
        [c.error for c in result.evaluations],
        s=12,
        color=_GREY,
        linewidths=0,
        label='evaluated',
        zorder=1,
    )
    # The front is sorted by MACs, so each candidate has to be better than all before it
    line = [c for i, c in enumerate(front) if all(c.error < earlier.error for earlier in front[:i])]
    ax.plot(
        [c.macs / 1e6 for c in line],
        [c.error for c in line],
        color='0.35',
        linewidth=1.0,
        label='best error up to these MACs',
        zorder=2,
    )
    x, y = [c.macs / 1e6 for c in front], [c.error for c in front]
    label = f'front ({", ".join("MACs" if n == "macs" else n for n in result.config.objective_names)})'
    style = dict(s=34, edgecolors='0.2', linewidths=0.5, label=label, zorder=3)
    if 'params' in result.config.objective_names:
        points = ax.scatter(x, y, c=[c.params / 1e6 for c in front], cmap='viridis', **style)
        figure.colorbar(points, ax=ax, label='parameters (M)', pad=0.02)
    else:
        ax.scatter(x, y, color=_BLUE, **style)

    at = (chosen.macs / 1e6, chosen.error)
    ax.scatter(*at, s=190, marker='o', facecolors='none', edgecolors=_ACCENT, linewidths=1.8, label='chosen', zorder=4)
    # The chosen one has the lowest error, so there are no points below it
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.1 * (high - low), high)
    left, right = ax.get_xlim()
    to_the_right = at[0] < (left + right) / 2
    ax.annotate(
        f'{chosen.top1:.2f} % top-1, {chosen.macs / 1e6:.1f} M MACs, {chosen.params / 1e6:.2f} M parameters',
        at,
        xytext=(-8 if to_the_right else 8, -14),
        textcoords='offset points',
        ha='left' if to_the_right else 'right',
        va='top',
        color=_ACCENT,
        fontsize=9,
    )

    ax.set_xlabel('MACs (M)')
    ax.set_ylabel('top-1 error on the search split (%)')
    if title is None:
        counts = f'archs evaluated: {len(result.evaluations)}, on the Pareto front: {len(front)}'
        title = f'Search in {result.space.name}, {counts}'
    ax.set_title(title, fontsize=11)
    _tidy(ax)
    legend = ax.legend(loc='upper right', fontsize=9, frameon=True, framealpha=0.9, edgecolor='none')
    for handle in legend.legend_handles:
        if hasattr(handle, 'set_sizes'):
            handle.set_sizes([40])  # the ring of the chosen one would be larger than the line of text

    _save(figure, path)


def plot_ranking(result: 'RankResult', path: str | os.PathLike) -> None:
    """Draw the supernet's scores of archs against their stand-alone accuracies as PNG, whole or not at all.

    One panel for the batch norm statistics of the training and, where there are such scores, one for recalibrated
    ones. Better is up in both, also where the score is a loss. The grey line is the median, to the right of it lies
    the top half.

    Args:
        result: Result of a ranking.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = [name for name in ('trained', 'recalibrated') if name in result.statistics]
    figure = _new_figure(5.2 * len(names), 4.8)
    accuracies = [r.accuracy for r in result.archs]
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        scores = [getattr(r, result.score_name(name)) for r in result.archs]
        # Many archs have the same accuracy on few images, so points are translucent
        ax.scatter(accuracies, scores, s=16, color=_BLUE, alpha=0.45, linewidths=0, zorder=2)
        middle = median(accuracies)
        ax.axvline(middle, color=_GREY, linewidth=1.0, zorder=1)
        ax.text(middle, 0.01, ' median', transform=ax.get_xaxis_transform(), color='0.4', fontsize=8)
        if result.config.score == 'loss':
            ax.invert_yaxis()
        ax.set_xlabel('stand-alone accuracy (%)')
        ax.set_ylabel({'top1': 'top-1 in the supernet (%)', 'loss': 'loss in the supernet (nats)'}[result.config.score])
        parts = result.statistics[name]
        bn = {'trained': 'BN as trained', 'recalibrated': 'BN recalibrated'}[name]
        ax.set_title(
            f'{bn}, {parts["all"].n} archs\n'
            f'Kendall tau {parts["all"].kendall_tau.text(2)}, top half {parts["top_half"].kendall_tau.text(2)}',
            fontsize=10,
        )
        _tidy(ax)
    _save(figure, path)


def _save(figure: 'Figure', path: str | os.PathLike) -> None:
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format='png')


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
    from .stats import PROTOCOL_NOTE  # which imports this module

    sums = [s for s in result.sites if s.has_sums]
    shadows = [s.var_ratio for s in result.shadows if any(v == v for v in s.var_ratio[1:])]
    # Room for a legible label per sum, within what fits a page
    figure = _new_figure(min(16.0, max(9.5, 2.0 + 0.26 * len(result.sites))), 7.4 if sums else 4.2)
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

    _save(figure, path)


def _plot_cosines(ax: 'Axes', result: 'StatsResult') -> None:
    sites = result.sites
    x = range(len(sites))
    low, high = [s.cosine_min for s in sites], [s.cosine_max for s in sites]
    if any(len(s.paths) > 2 for s in sites):
        ax.vlines(x, low, high, color=_BLUE, alpha=0.45, linewidth=3.0, label='range over pairs of paths')
    ax.plot(x, [s.cosine_mean for s in sites], 'o', color=_BLUE, markersize=5, label='mean over pairs of paths')
    every = math.ceil(len(sites) / 100) or 1
    labels = _short_names([s.name for s in sites])
    ax.set_xticks(x[::every], labels[::every], rotation=90 if len(sites) > 8 else 0, fontsize=8)
    ax.set_xlim(-0.7, len(sites) - 0.3)
    # An axis from 0 keeps small differences small, but similarities of signed features may be negative
    ax.set_ylim(min([0.0, *(v - 0.05 for v in low)]), 1.02)
    ax.set_ylabel('cosine similarity')
    ax.set_title('Features of different paths, per sum in the order of the network', fontsize=10, loc='left')
    _tidy(ax)
    ax.legend(loc='lower right', bbox_to_anchor=(1.0, 0.99), fontsize=8, ncols=2, frameon=False)  # beside the title


def _plot_ratios(
    ax: 'Axes', lines: Sequence[Sequence[float]], yardsticks: Sequence[tuple], name: str = 'one sum'
) -> None:
    """A thin line per entry, called `name`, their median, and dashed what (text, function of k) says."""
    largest = max(map(len, lines))
    ks = list(range(1, largest + 1))
    for i, line in enumerate(lines):
        ax.plot(ks[: len(line)], line, color=_BLUE, alpha=0.3, linewidth=0.9, label='' if i else name, zorder=2)
    columns = [[v for line in lines for v in line[k - 1 : k] if v == v] for k in ks]
    medians = [median(column) if column else math.nan for column in columns]
    ax.plot(ks, medians, 'o-', color=_BLUE, linewidth=2.4, markersize=5, label='median', zorder=4)
    for (text, of), color in zip(yardsticks, (_ACCENT, '0.45')):
        # joined by straight lines as the others are: between the numbers of paths there is nothing to compare
        ax.plot(ks, [of(k) for k in ks], '--', color=color, linewidth=1.2, label=text, zorder=5)
    ax.set_xticks(ks)
    ax.set_ylim(bottom=0)
    ax.locator_params(axis='y', nbins=6)
    _tidy(ax)
    ax.legend(loc='upper left', fontsize=8, frameon=False)


def _short_names(names: Sequence[str]) -> list[str]:
    """Module names without the words that are in all of them: `blocks.0.0.e3.paths` -> `0.0.e3`."""
    parts = [name.split('.') for name in names]
    common = {word for word in set.intersection(*map(set, parts)) if not word.isdigit()} if len(names) > 1 else set()
    short = ['.'.join(word for word in p if word not in common) for p in parts]
    return short if len(set(short)) == len(names) and all(short) else list(names)


def _tidy(ax: 'Axes') -> None:
    ax.grid(color='0.92', linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ('top', 'right'):
        ax.spines[side].set_visible(False)
