"""The front of a search as CSV, JSON, table and figure."""

import os
from pathlib import Path

from ..utils.figures import ACCENT, BLUE, GREY, new_figure, save_figure, tidy_axes
from ..utils.tables import format_table, write_csv, write_json
from .result import Candidate, SearchResult, has_latency, hypervolume, is_predicted, make_record

__all__ = ['format_front', 'plot_pareto', 'print_result', 'write_front_csv', 'write_front_json']


def write_front_csv(result: SearchResult, path: str | os.PathLike) -> None:
    """Write the front as CSV, whole or not at all.

    Columns are `chosen` (1 or 0), `top1` and `error` in percent, `loss`, `macs`, `params`, `index` and `generation` of
    the evaluation, and `arch`; behind `chosen` `latency_ms` if it was measured. With a latency table `latency`, the
    predicted one in milliseconds, is behind `params`.
    """
    predicted = ('latency',) if is_predicted(result) else ()
    names = ('top1', 'error', 'loss', 'macs', 'params', *predicted, 'index', 'generation', 'arch')
    latency = ('latency_ms',) if has_latency(result) else ()
    rows = [
        (int(c is result.chosen), *(c.extra.get(name) for name in latency), *(getattr(c, name) for name in names))
        for c in result.front
    ]
    write_csv(path, ('chosen', *latency, *names), rows)


def write_front_json(result: SearchResult, path: str | os.PathLike) -> None:
    """Write the front as JSON with all that is known of it, whole or not at all.

    `front` has an entry per candidate: what stands in the archive, the integer `vector` of the arch, its `error` in
    percent, and whether it is the `chosen` one. `hypervolume` is null where pymoo is not installed.
    """
    content = dict(
        space=result.space.name,
        max_paths=result.space.max_paths,
        config=result.config.to_dict(),
        fingerprint=result.fingerprint,
        num_evaluations=len(result.evaluations),
        hypervolume=hypervolume(result),
        front=[
            dict(
                make_record(c),
                vector=list(result.space.encode(c.arch)),
                error=c.error,
                chosen=c is result.chosen,
            )
            for c in result.front
        ],
    )
    write_json(path, content)


def format_front(result: SearchResult) -> str:
    """Return the front as a table for the terminal, the chosen candidate marked with `*`."""
    latency, predicted = has_latency(result), is_predicted(result)
    times = [*(['predicted ms'] * predicted), *(['ms'] * latency)]
    header = ('', 'top-1 (%)', 'error (%)', 'loss', 'MACs (M)', 'params (M)', *times, 'arch')
    rows = [
        (
            '*' if c is result.chosen else '',
            f'{c.top1:.2f}',
            f'{c.error:.2f}',
            f'{c.loss:.4f}',
            f'{c.macs / 1e6:.2f}',
            f'{c.params / 1e6:.3f}',
            *([f'{c.latency:.2f}'] if predicted else []),
            *([f'{c.extra["latency_ms"]:.2f}'] if latency else []),
            str(c.arch),
        )
        for c in result.front
    ]
    return format_table([header, *rows], '>' * (len(header) - 1) + '<')


def print_result(result: SearchResult, output: str | os.PathLike) -> None:
    """Print the front and where it was written."""
    print(format_front(result))
    chosen = result.chosen
    loss = f'loss {chosen.loss:.4f}, ' if result.config.score == 'loss' else ''
    print(
        f'\nchosen (*): {loss}error {chosen.error:.2f} % on the search split, {_costs(chosen)}, '
        f'{chosen.params / 1e6:.3f} M params\n{chosen.arch}\n'
        f'{len(result.evaluations)} evaluations and the front are in {Path(output)}'
    )


def _costs(candidate: Candidate) -> str:
    macs = f'{candidate.macs / 1e6:.2f} M MACs'
    return macs if candidate.latency is None else f'{_latency(candidate)}, {macs}'


def _latency(candidate: Candidate) -> str:
    measured = candidate.extra.get('latency_ms')
    return f'{candidate.latency:.2f} ms predicted' + (f' ({measured:.2f} measured)' if measured else '')


def plot_pareto(result: 'SearchResult', path: str | os.PathLike, *, title: str | None = None) -> None:
    """Draw what a search evaluated and its front as PNG, whole or not at all.

    MACs (in millions), or the predicted latency (in milliseconds) if it is an objective, lie on the x axis, and on the
    y axis what archs are ranked by on the search split: the top-1 error (in percent) or the loss (in nats). Evaluated
    candidates are small and grey, those of the front are large and, if parameters are an objective, coloured by them.
    The line joins the candidates of the front that nothing beats in it and this cost alone; with parameters as third
    objective the front has others too, which lie above the line because they have fewer parameters.

    Args:
        result: Result of a search.
        path: PNG file to write.
        title: Title, the space and the numbers of evaluations and of candidates on the front if None.

    Raises:
        ImportError: matplotlib is not installed.
    """
    by_latency = 'latency' in result.config.objective_names
    axis = 'predicted latency (ms)' if by_latency else 'MACs (M)'

    score = result.config.score

    def cost(candidate: Candidate) -> float:
        return candidate.latency if by_latency else candidate.macs / 1e6

    def scored(candidate: Candidate) -> float:
        return getattr(candidate, score)

    figure = new_figure(8.0, 5.0)
    front, chosen = result.front, result.chosen
    ax = figure.add_subplot()

    ax.scatter(
        [cost(c) for c in result.evaluations],
        [scored(c) for c in result.evaluations],
        s=12,
        color=GREY,
        linewidths=0,
        label='evaluated',
        zorder=1,
    )
    # The front is sorted by this cost, so each candidate has to be better than all before it
    line = [c for i, c in enumerate(front) if all(scored(c) < scored(earlier) for earlier in front[:i])]
    ax.plot(
        [cost(c) for c in line],
        [scored(c) for c in line],
        color='0.35',
        linewidth=1.0,
        label=f'best {score} up to {"this latency" if by_latency else "these MACs"}',
        zorder=2,
    )
    x, y = [cost(c) for c in front], [scored(c) for c in front]
    label = f'front ({", ".join("MACs" if n == "macs" else n for n in result.config.objective_names)})'
    style = dict(s=34, edgecolors='0.2', linewidths=0.5, label=label, zorder=3)
    if 'params' in result.config.objective_names:
        points = ax.scatter(x, y, c=[c.params / 1e6 for c in front], cmap='viridis', **style)
        figure.colorbar(points, ax=ax, label='parameters (M)', pad=0.02)
    else:
        ax.scatter(x, y, color=BLUE, **style)

    at = (cost(chosen), scored(chosen))
    # No longer than half of the figure
    text = f'{chosen.macs / 1e6:.1f} M MACs, {chosen.params / 1e6:.2f} M parameters'
    if by_latency:
        text = _latency(chosen)
    ax.scatter(*at, s=190, marker='o', facecolors='none', edgecolors=ACCENT, linewidths=1.8, label='chosen', zorder=4)
    # The chosen one has the lowest, so there are no points below it
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.1 * (high - low), high)
    left, right = ax.get_xlim()
    to_the_right = at[0] < (left + right) / 2
    ax.annotate(
        f'{chosen.top1:.2f} % top-1, {text}',
        at,
        xytext=(-8 if to_the_right else 8, -14),
        textcoords='offset points',
        ha='left' if to_the_right else 'right',
        va='top',
        color=ACCENT,
        fontsize=9,
    )

    ax.set_xlabel(axis)
    ax.set_ylabel('top-1 error on the search split (%)' if score == 'error' else 'loss on the search split (nats)')
    if title is None:
        counts = f'archs evaluated: {len(result.evaluations)}, on the Pareto front: {len(front)}'
        title = f'Search in {result.space.name}, {counts}'
    ax.set_title(title, fontsize=11)
    tidy_axes(ax)
    legend = ax.legend(loc='upper right', fontsize=9, frameon=True, framealpha=0.9, edgecolor='none')
    for handle in legend.legend_handles:
        if hasattr(handle, 'set_sizes'):
            handle.set_sizes([40])  # the ring of the chosen one would be larger than the line of text

    save_figure(figure, path)
