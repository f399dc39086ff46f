"""Figures. They need `pip install 'timm-mixpath[plots]'`, which this module does not need to be imported.

Figures are drawn on matplotlib's objects, not through pyplot: no window system, no backend and no global state.
"""

import os
import statistics
from typing import TYPE_CHECKING

from .files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .ranking import RankResult
    from .search import SearchResult

__all__ = ['plot_pareto', 'plot_ranking']

_GREY = '0.72'
_ACCENT = '#c1272d'
_BLUE = '#3b6fb5'


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
    front, chosen = result.front, result.chosen
    figure = _new_figure(8.0, 5.0)
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
    _style(ax)
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
        median = statistics.median(accuracies)
        ax.axvline(median, color=_GREY, linewidth=1.0, zorder=1)
        ax.text(median, 0.01, ' median', transform=ax.get_xaxis_transform(), color='0.4', fontsize=8)
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
        _style(ax)
    _save(figure, path)


def _new_figure(width: float, height: float) -> 'Figure':
    """Make a figure, sizes in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(f"plots need matplotlib ({e}): pip install 'timm-mixpath[plots]'") from e
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _style(ax: 'Axes') -> None:
    ax.grid(color='0.92', linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ('top', 'right'):
        ax.spines[side].set_visible(False)


def _save(figure: 'Figure', path: str | os.PathLike) -> None:
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format='png')
