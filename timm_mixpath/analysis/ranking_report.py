"""A ranking as CSV, JSON, table and figure."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from statistics import median

from ..search.images import describe_images
from ..utils.figures import BLUE, GREY, new_figure, save_figure, tidy_axes
from ..utils.tables import format_table, write_csv, write_json
from .ranking import RankResult

__all__ = ['format_ranking', 'plot_ranking', 'print_ranking', 'write_ranking_csv', 'write_ranking_json']


# What ranks the archs, and how it is called in a table
LABELS = {
    'trained': 'supernet, BN as trained',
    'recalibrated': 'supernet, BN recalibrated',
    'macs': 'more MACs = better',
    'params': 'more params = better',
}

PARTS = {'all': 'all archs', 'top_half': 'top half by stand-alone accuracy'}


def write_ranking_csv(result: RankResult, path: str | os.PathLike) -> None:
    """Write the scored archs as CSV, whole or not at all.

    Columns are `arch`, `accuracy` (stand-alone, in percent), `top1` and `loss` of the supernet, the same with suffix
    `_recalibrated`, `macs` and `params`; empty where not known.
    """
    names = ('arch', 'accuracy', 'top1', 'loss', 'top1_recalibrated', 'loss_recalibrated', 'macs', 'params')
    write_csv(path, names, [[getattr(ranked, name) for name in names] for ranked in result.archs])


def write_ranking_json(result: RankResult, path: str | os.PathLike) -> None:
    """Write all statistics as JSON with what they depend on, whole or not at all; null is what is not defined."""
    table = result.table
    content = dict(
        table=dict(
            name=table.path.name,
            arch_column=table.arch_column,
            accuracy_column=table.accuracy_column,
            num_rows=table.num_rows,
            num_usable=len(table),
            left_out=[asdict(left_out) for left_out in table.left_out],
        ),
        config=asdict(result.config),
        fingerprint=result.fingerprint,
        num_archs=len(result.archs),
        statistics={
            name: {part: statistics.to_dict() for part, statistics in parts.items()}
            for name, parts in result.statistics.items()
        },
        tau_gains={
            name: {baseline: gain.to_dict() for baseline, gain in gains.items()}
            for name, gains in result.tau_gains.items()
        },
        partial_taus={
            name: {given: tau.to_dict() for given, tau in taus.items()} for name, taus in result.partial_taus.items()
        },
        equal_cost={name: tau.to_dict() for name, tau in result.equal_cost.items()},
        seeds={name: agreement.to_dict() for name, agreement in result.seeds.items()},
    )
    write_json(path, content)


def format_ranking(result: RankResult) -> str:
    """Return the statistics as tables for the terminal, one for all archs and one for the top half."""
    blocks: list[str] = []
    for part, title in PARTS.items():
        first = result.statistics['trained'][part]
        overlaps = (f'top-{k} overlap' for k in first.top_k_overlap)
        rows = [(f'{title} (n = {first.n})', 'Kendall tau', 'Spearman rho', *overlaps, 'regret (points)')]
        for name, parts in result.statistics.items():
            s = parts[part]
            overlaps = (estimate.text(2) for estimate in s.top_k_overlap.values())
            rows.append((LABELS[name], s.kendall_tau.text(3), s.spearman_rho.text(3), *overlaps, s.regret.text(2)))
        blocks.append(format_table(rows, '<'))
    gains = {name: by_baseline for name, by_baseline in result.tau_gains.items() if by_baseline}
    if gains:
        rows = [('Kendall tau above that of', *(LABELS[baseline] for baseline in next(iter(gains.values()))))]
        for name, by_baseline in gains.items():
            rows.append((LABELS[name], *(gain.text(3) for gain in by_baseline.values())))
        blocks.append(format_table(rows, '<'))
        given = next(iter(result.partial_taus.values()))
        rows = [('partial Kendall tau given', *('MACs' if name == 'macs' else name for name in given))]
        for name, taus in result.partial_taus.items():
            rows.append((LABELS[name], *(tau.text(3) for tau in taus.values())))
        blocks.append(format_table(rows, '<'))
    if result.equal_cost:
        cost, tolerance = result.config.band
        first = next(iter(result.equal_cost.values()))
        title = f'{first.num_pairs} pairs of archs within {tolerance:.3g} of each other in {cost}'
        rows = [(title, 'Kendall tau')]
        rows += [(LABELS[name], band.tau.text(3)) for name, band in result.equal_cost.items()]
        blocks.append(format_table(rows, '<'))
    notes = [
        f'{LABELS[name]} gives all {len(result.archs)} archs the same {result.config.score}, so correlations are '
        'undefined; is the supernet trained?'
        for name in ('trained', 'recalibrated')
        if name in result.statistics and math.isnan(result.statistics[name]['all'].kendall_tau.value)
    ]
    config = result.config
    if result.equal_cost and not first.num_pairs:
        notes.append(f'no two archs are of equal {cost}, so there is nothing to rank there; widen --band')
    for name, agreement in result.seeds.items():
        if math.isnan(agreement.tau):
            continue
        notes.append(
            f'Kendall tau between single seeds of the table{", at equal cost" if name == "equal_cost" else ""}: '
            f'{agreement.tau:.3f}; a ranking without error would have about {agreement.ceiling:.3f} with the mean of '
            f'its {agreement.num_seeds}'
        )
    notes.append(
        f'[low, high]: {100 * config.level:g} % bootstrap interval over the archs, {config.num_resamples} resamples; '
        f'score of the supernet: {config.score}'
    )
    blocks.append('\n'.join(notes))
    return '\n\n'.join(blocks)


def print_ranking(result: RankResult, output: str | os.PathLike | None = None) -> None:
    """Print the statistics and where they were written."""
    table, fingerprint = result.table, result.fingerprint
    print(
        f'{len(result.archs)} archs of {table.path.name}, column {table.accuracy_column!r}; supernet scored on '
        f'{describe_images(fingerprint)}\n\n{format_ranking(result)}'
    )
    if output is not None:
        print(f'scores, statistics and plot are in {Path(output)}')


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
    figure = new_figure(5.2 * len(names), 4.8)
    accuracies = [r.accuracy for r in result.archs]
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        scores = [getattr(r, result.score_name(name)) for r in result.archs]
        # Many archs have the same accuracy on few images, so points are translucent
        ax.scatter(accuracies, scores, s=16, color=BLUE, alpha=0.45, linewidths=0, zorder=2)
        middle = median(accuracies)
        ax.axvline(middle, color=GREY, linewidth=1.0, zorder=1)
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
        tidy_axes(ax)
    save_figure(figure, path)
