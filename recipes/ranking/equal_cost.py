"""Tables, numbers and figure of what warm_start.sh or nano.sh measured.

    python recipes/ranking/equal_cost.py output/rank_warm recipes/ranking/warm_start
    python recipes/ranking/equal_cost.py output/rank_nano recipes/ranking/nano --images 2000 --recalibration 512

Writes a CSV, a line per ranking and way of scoring, and a PNG, and prints tables in Markdown. Intervals in the CSV are
bootstrap intervals over the archs. Those of means over supernets and of differences have a standard error of two parts:
the bootstrap over the archs, and the spread of the supernets that were trained with other seeds, where there are
several. Differences are paired: the same archs, resamples and seeds on both sides. 'together' is the tau of the mean of
the scores of all seeds.
"""

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_mixpath.analysis.rank_statistics import RankStatistics, rank_correlation, seed_agreement

SCORES = ('top1', 'loss', 'top1_recalibrated', 'loss_recalibrated')
PRIMARY = 'loss_recalibrated'
RUNS = {
    'sbn': ('SBN', '#3b6fb5'),
    'bn': ('one BN', '#c1272d'),
    'm3': ('SBN, m = 3', '#5a9e6f'),
    'bn3': ('one BN, m = 3', '#c98a1b'),
    'long': ('SBN, a longer schedule', '#7a4fa3'),
    'kd': ('SBN, with a teacher', '#444444'),
}
PAIRS = (('sbn', 'bn'), ('m3', 'bn3'))  # what differs in the norm alone


@dataclass(frozen=True, eq=False)
class Table:
    """Archs with the accuracies that they reach on their own."""

    archs: list[str]
    accuracies: np.ndarray  # mean over the seeds
    by_seed: np.ndarray  # [seeds, archs]
    macs: np.ndarray
    params: np.ndarray

    @cache  # noqa: B019, a handful of tables for the whole process
    def _statistics(self, scores: tuple[float, ...]) -> RankStatistics:
        return rank_correlation(self.accuracies, scores, top_k=(5,))

    def statistics(self, scores: Sequence[float]) -> RankStatistics:
        return self._statistics(tuple(map(float, scores)))

    def tau(self, scores: Sequence[float]) -> tuple[float, np.ndarray]:
        found = self.statistics(scores)
        return found.kendall_tau.value, found.tau_samples


@dataclass(frozen=True, eq=False)
class Ranking:
    """What one supernet says of the archs of a table after some epochs, in the order of the table."""

    run: str
    seed: int
    epochs: int
    images: int
    recalibration: int
    scores: dict[str, np.ndarray]  # more is better
    top1: dict[str, float]

    @property
    def group(self) -> tuple[str, int, int, int]:
        return self.run, self.epochs, self.images, self.recalibration


def read_table(path: Path) -> Table:
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    by_seed = [[float(a) for a in row['accuracies'].split()] for row in rows]
    whole = min(map(len, by_seed))  # of a table that is still trained
    macs, params = (np.array([float(row[name]) for row in rows]) for name in ('macs', 'params'))
    accuracies = np.array([np.mean(a[:whole]) for a in by_seed])
    return Table([row['arch'] for row in rows], accuracies, np.array([a[:whole] for a in by_seed]).T, macs, params)


def read_rankings(folder: Path, name: str, table: Table, default: tuple[int, int]) -> list[Ranking]:
    rankings = []
    for path in sorted(folder.glob(f'rank-{name}-*/ranking.csv')):
        run, seed, epochs, *counts = path.parent.name.removeprefix(f'rank-{name}-').split('-')
        if run not in RUNS:
            print(f'{path.parent.name} is left out, known are runs called {", ".join(RUNS)}')
            continue
        images, recalibration = (*map(int, counts), *default[len(counts) :])
        with open(path, newline='') as f:
            rows = {row['arch']: row for row in csv.DictReader(f)}
        columns = {name: np.array([float(rows[arch][name] or 'nan') for arch in table.archs]) for name in SCORES}
        scores = {name: -column if name.startswith('loss') else column for name, column in columns.items()}
        top1 = {name: float(columns[name].mean()) for name in SCORES if name.startswith('top1')}
        rankings.append(Ranking(run, int(seed), int(epochs), images, recalibration, scores, top1))
    return rankings


def estimate(values: Sequence[float], samples: np.ndarray) -> tuple[float, float]:
    """Mean of a value per supernet, and half the width of its interval; `samples` are of the mean."""
    of_archs = np.nanvar(samples)
    of_seeds = np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0
    return float(np.mean(values)), 1.96 * math.sqrt(of_archs + of_seeds)


def text(value: float, half: float) -> str:
    return f'{value:.2f} [{value - half:.2f}, {value + half:.2f}]'


class Rankings:
    """The rankings of one table, by supernet, epochs and images."""

    def __init__(self, table: Table, rankings: list[Ranking], default: tuple[int, int]) -> None:
        self.table, self.default = table, default
        self.groups: dict[tuple, dict[int, Ranking]] = defaultdict(dict)
        for r in sorted(rankings, key=lambda r: (list(RUNS).index(r.run), r.group, r.seed)):
            self.groups[r.group][r.seed] = r

    def mean(self, group: tuple, score: str) -> tuple[float, float]:
        values, samples = zip(*(self.table.tau(r.scores[score]) for r in self.groups[group].values()))
        return estimate(values, np.mean(samples, axis=0))

    def difference(
        self, group: tuple, score: str, other: tuple | str, other_score: str = ''
    ) -> tuple[float, float, list[float]] | None:
        """Tau of a group above that of another, or of the attribute of the table that is named: paired by seed.

        A group of seed 0 alone, as the warm start itself is, is compared with every seed.
        """
        members, others = self.groups.get(group, {}), self.groups.get(other, {}) if other != 'params' else {}
        values, samples = [], []
        for seed, member in members.items():
            if other == 'params':
                against = self.table.params
            elif other[1] == 0 and others:
                against = others[0].scores[other_score or score]
            elif seed in others:
                against = others[seed].scores[other_score or score]
            else:
                continue
            (a, a_samples), (b, b_samples) = (self.table.tau(s) for s in (member.scores[score], against))
            values.append(a - b)
            samples.append(a_samples - b_samples)
        return (*estimate(values, np.mean(samples, axis=0)), values) if values else None


def write_csv(tables: dict[str, Rankings], path: Path) -> None:
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f, lineterminator='\n')
        head = (
            'table run seed epochs images recalibration score n kendall_tau low high spearman_rho regret top5_overlap'
        )
        writer.writerow([*head.split(), 'mean_top1'])
        for name, rankings in tables.items():
            rows = [(('', '', '', '', ''), n, getattr(rankings.table, n), '') for n in ('macs', 'params')]
            for group, members in rankings.groups.items():
                for r in members.values():
                    of = (r.run, r.seed, *group[1:])
                    rows += [(of, s, r.scores[s], r.top1.get(s, '')) for s in SCORES]
            for of, score, scores, top1 in rows:
                found = rankings.table.statistics(scores)
                tau = found.kendall_tau
                values = (tau.value, tau.low, tau.high, found.spearman_rho.value, found.regret.value)
                values = [f'{v:.4f}' for v in (*values, found.top_k_overlap[5].value)]
                writer.writerow([name, *of, score, found.n, *values, top1 and f'{top1:.2f}'])


def ceiling(table: Table) -> tuple[float, float, float]:
    """Tau that scores without error would have with the table, estimated from its two seeds, and an interval."""
    best = seed_agreement(table.by_seed).ceiling
    samples = [rank_correlation(a, b, top_k=()).tau_samples for a, b in combinations(table.by_seed, 2)]
    r, seeds = np.clip(np.sin(np.pi / 2 * np.mean(samples, axis=0)), 0, 1), len(table.by_seed)
    low, high = np.quantile(2 / np.pi * np.arcsin(np.sqrt(seeds * r / (1 + (seeds - 1) * r))), [0.025, 0.975])
    return best, float(low), float(high)


def print_table(name: str, rankings: Rankings) -> None:
    table = rankings.table
    a, macs = table.accuracies, table.macs / 1e6
    print(f'\n## {name}: {len(a)} archs of {macs.min():.2f} to {macs.max():.2f} M, {len(table.by_seed)} seeds\n')
    print(f'accuracy {a.mean():.2f}, standard deviation {a.std(ddof=1):.2f}, {a.min():.2f} to {a.max():.2f}')
    if len(table.by_seed) > 1:
        noise = (table.by_seed[0] - table.by_seed[1]).std(ddof=1) / 2**0.5
        best, low, high = ceiling(table)
        print(f'standard deviation of the seeds {noise:.2f}, tau between them {seed_agreement(table.by_seed).tau:.2f}')
        print(f'scores without error: {best:.2f} [{low:.2f}, {high:.2f}]')
    for cost in ('macs', 'params'):
        found = table.statistics(getattr(table, cost))
        overlap = found.top_k_overlap[5].value
        print(f'counting {cost}: {found.kendall_tau.text(2)}, regret {found.regret.value:.2f}, top 5 {overlap:.2f}')
    head = ['supernet', 'epochs', 'images', 'recalibration', 'score', 'top-1']
    head += ['tau', 'of each seed', 'together', 'regret', 'top 5']
    print(f'\n| {" | ".join(head)} |\n|{"---|" * len(head)}')
    for group, members in rankings.groups.items():
        for score in SCORES:
            found = [table.statistics(r.scores[score]) for r in members.values()]
            top1 = np.mean([r.top1[score.replace('loss', 'top1')] for r in members.values()])
            cells = [RUNS[group[0]][0], *group[1:], score.replace('_', ', '), f'{top1:.1f}']
            cells += [text(*rankings.mean(group, score)), ' '.join(f'{s.kendall_tau.value:.2f}' for s in found)]
            together = table.statistics(np.mean([r.scores[score] for r in members.values()], axis=0)).kendall_tau
            cells += [together.text(2) if len(members) > 1 else '']
            cells += [f'{np.mean([s.regret.value for s in found]):.2f}']
            cells += [f'{np.mean([s.top_k_overlap[5].value for s in found]):.2f}']
            print('| ' + ' | '.join(map(str, cells)) + ' |')


def print_differences(rankings: Rankings) -> None:
    """What the questions of README.md rest on."""

    default = rankings.default

    def of(run: str, epochs: int, *counts: int) -> tuple:
        return run, epochs, *counts, *default[len(counts) :]

    rows = []
    for sbn, bn in PAIRS:
        epochs = sorted({group[1] for group in rankings.groups if group[0] == sbn}, reverse=True)
        for e in epochs:
            for s in (PRIMARY, 'loss'):
                rows.append((f'{RUNS[sbn][0]} - {RUNS[bn][0]}', e, s, of(sbn, e), s, of(bn, e), s))
        for run in (sbn, bn) if epochs else ():
            label, last = RUNS[run][0], epochs[0]
            group = of(run, last)
            rows += [
                (f'{label}: recalibrated - as trained', last, 'loss', group, PRIMARY, group, 'loss'),
                (f'{label}: loss - top-1', last, 'recalibrated', group, PRIMARY, group, 'top1_recalibrated'),
                (f'{label} - counting parameters', last, PRIMARY, group, PRIMARY, 'params', ''),
            ]
            for before in epochs[1:]:
                first = of(sbn if before == 0 else run, before)
                rows.append((f'{label}: {last} epochs - {before}', last, PRIMARY, group, PRIMARY, first, PRIMARY))
    last = max((group[1] for group in rankings.groups if group[0] == 'sbn'), default=0)
    sbn = of('sbn', last)
    for longer in sorted({group[1] for group in rankings.groups if group[0] == 'long'}):
        rows.append(
            (f'a longer schedule, {longer} epochs - {last}', longer, PRIMARY, of('long', longer), PRIMARY, sbn, PRIMARY)
        )
    rows.append(('m = 3 - m = 2', last, PRIMARY, of('m3', last), PRIMARY, sbn, PRIMARY))
    images = sorted({group[2] for group in rankings.groups if group[:2] == sbn[:2]} - {default[0]})
    rows += [(f'{default[0]} images - {n}', last, PRIMARY, sbn, PRIMARY, of('sbn', last, n), PRIMARY) for n in images]
    for n in sorted({group[3] for group in rankings.groups if group[:3] == sbn[:3]} - {default[1]}):
        other = of('sbn', last, default[0], n)
        rows.append((f'recalibrated with {default[1]} - {n}', last, PRIMARY, sbn, PRIMARY, other, PRIMARY))
    print('\n| difference of tau | epochs | score | | of each seed |\n|---|---|---|---|---|')
    for label, epochs, score, *groups in rows:
        if found := rankings.difference(*groups):
            value, half, each = found
            values = ' '.join(f'{v:+.2f}' for v in each)
            print(f'| {label} | {epochs} | {score.replace("_", ", ")} | {text(value, half)} | {values} |')


def print_long(tables: dict[str, Rankings], long: Table) -> None:
    """Is what an arch has after one epoch what it has after more?"""
    short = tables['band'].table
    first = [short.accuracies[short.archs.index(arch)] for arch in long.archs]
    a = long.accuracies
    print(f'\n{len(a)} archs of the band after more epochs: {a.mean():.2f}, {a.min():.2f} to {a.max():.2f}')
    print(f'standard deviation {a.std(ddof=1):.2f}, before {np.std(first, ddof=1):.2f}')
    print(f'tau with one epoch {long.statistics(first).kendall_tau.text(2)}')
    for group, members in tables['band'].groups.items():
        taus = []
        for r in members.values():
            taus.append(long.tau([r.scores[PRIMARY][short.archs.index(arch)] for arch in long.archs])[0])
        print(f'{group}: {np.mean(taus):.2f} ({" ".join(f"{t:.2f}" for t in taus)})')


def draw(rankings: Rankings, path: Path) -> None:
    """Kendall's tau at equal MACs against the epochs, and what the supernet says beside what the archs reach."""
    figure = Figure(figsize=(10, 5), dpi=130, layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    table = rankings.table
    for index, (run, (label, color)) in enumerate(RUNS.items()):
        shift = 0.06 * index - 0.12
        for score, style, marker in ((PRIMARY, '-', 's'), ('loss', ':', 'o')):
            points = [
                (group[1] + shift + (0.02 if score == 'loss' else 0), *rankings.mean(group, score))
                for group in rankings.groups
                if group[0] == run and group[2:] == rankings.default
            ]
            if points:
                x, y, half = np.array(sorted(points)).T
                left.vlines(x, y - half, y + half, color=color, linewidth=1, alpha=0.35)
                how = 'recalibrated' if score == PRIMARY else 'as trained'
                left.plot(x, y, style, marker=marker, markersize=4, color=color, label=f'{label}, {how}')
    params = table.tau(table.params)[0]
    left.axhline(params, color='0.5', linestyle='--', linewidth=1, label='counting parameters')
    if len(table.by_seed) > 1:
        best, low, high = ceiling(table)
        left.axhspan(low, high, color='0.5', alpha=0.12, linewidth=0)
        left.axhline(best, color='0.3', linewidth=1, label='scores without error (noise of the table, estimated)')
    left.axhline(0, color='0.8', linewidth=0.8)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = left.get_xlim()
    left.set_xlim(min(low, high - 2), max(high, low + 2))  # also where all are of the same epoch
    has_start = any(group[1] == 0 for group in rankings.groups)
    left.set(
        title=f'{len(table.archs)} archs, {table.macs.min() / 1e6:.2f} to {table.macs.max() / 1e6:.2f} M multiply-adds',
        xlabel='epochs of the supernet' + (', 0: the warm start' if has_start else ''),
        ylabel="Kendall's tau, archs ranked by the loss",
        ylim=(-0.45, 1.05),
    )
    left.legend(frameon=False, fontsize=7, loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=2)
    pair = next((p for p in PAIRS if any(group[0] == p[0] for group in rankings.groups)), PAIRS[0])
    last = max((group[1] for group in rankings.groups if group[0] == pair[0]), default=0)
    for run, marker in zip(pair, 'ox'):
        if members := rankings.groups.get((run, last, *rankings.default)):
            losses = -np.mean([r.scores[PRIMARY] for r in members.values()], axis=0)
            label, color = RUNS[run]
            right.plot(losses, table.accuracies, marker, color=color, markersize=4, label=label)
    right.set(
        title=f'mean of the supernets, recalibrated, {last} epochs',
        xlabel='loss in the supernet (nats)',
        ylabel='top-1 on its own (%)',
    )
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[['top', 'right']].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, help='OUTPUT of warm_start.sh or nano.sh')
    parser.add_argument('output', type=Path, help='path of CSV and PNG, without .csv and .png')
    parser.add_argument('--images', type=int, default=500, help='of rankings whose folder does not say it')
    parser.add_argument('--recalibration', type=int, default=256, help='likewise')
    args = parser.parse_args()
    read: dict[str, Table] = {}
    for name in ('band', 'random', 'long'):
        path = args.runs / f'table-{name}' / 'table.csv'
        if path.exists():
            read[name] = read_table(path)
    if 'band' not in read:
        parser.error(f'no table-band/table.csv below {args.runs}, run warm_start.sh or nano.sh first')
    long = read.pop('long', None)
    default = args.images, args.recalibration
    tables = {
        name: Rankings(table, read_rankings(args.runs, name, table, default), default) for name, table in read.items()
    }
    write_csv(tables, args.output.with_suffix('.csv'))
    draw(tables['band'], args.output.with_suffix('.png'))
    for name, rankings in tables.items():
        print_table(name, rankings)
    print_differences(tables['band'])
    if long is not None:
        print_long(tables, long)


if __name__ == '__main__':
    main()
