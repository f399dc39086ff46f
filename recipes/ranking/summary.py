"""Tables and figures of README.md beside this file, from the runs that run.sh left.

    python recipes/ranking/summary.py output/ranking recipes/ranking/results

Writes a CSV and a PNG, and prints tables in Markdown. Intervals of single runs are bootstrap intervals over the archs;
those of differences hold the spread of the seeds, too, as in equal_cost.py.
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from equal_cost import SCORES, estimate, text
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_mixpath.analysis.rank_statistics import RankStatistics, rank_correlation

NORMS = {'sbn': ('#3b6fb5', 'SBN'), 'bn': ('#c1272d', 'one BN'), 'none': ('0.45', 'none')}
# Scores to draw, with their markers
WAYS = (
    ('top1', 'o', 'top-1, BN as trained'),
    ('top1_recalibrated', 's', 'top-1, recalibrated'),
    ('loss_recalibrated', 'D', 'loss, recalibrated'),
)
SPACES = {
    'nb201': 'NAS-Bench-201',
    'nb101': 'NAS-Bench-101 sub-space',
    'nb201at32': 'NAS-Bench-201, 32x32 pixels',
}


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """One row per run that has a ranking."""
    runs = []
    for path in sorted(folder.glob('*/rank/ranking.json')):
        name = path.parts[-3]
        space, norm, sampling, seed = name.split('-')
        ranking = json.loads(path.read_text())
        with open(path.with_name('ranking.csv'), newline='') as f:
            archs = list(csv.DictReader(f))
        runs.append(
            dict(
                space=space,
                norm=norm,
                sampling=sampling,
                seed=int(seed),
                ranking=ranking,
                losses=read_losses(folder / f'{name}.log'),
                archs=archs,
                statistics=statistics_of(archs),
                top1={k: mean(float(a[k]) for a in archs) for k in ('top1', 'top1_recalibrated')},
            )
        )
    return runs


def statistics_of(archs: list[dict[str, str]]) -> dict[str, RankStatistics]:
    """How each score of the supernet ranks the archs of a `ranking.csv`."""
    accuracies = [float(a['accuracy']) for a in archs]
    found = {}
    for score in SCORES:
        values = [float(a[score]) for a in archs]
        found[score] = rank_correlation(accuracies, [-v for v in values] if 'loss' in score else values, top_k=())
    return found


def read_losses(log: Path) -> list[float]:
    """Mean training loss of every epoch, from the last line of each; a resumed epoch counts once."""
    losses = {}
    for line in log.read_text().splitlines():
        if match := re.match(r'Train: (\d+) \[.*Loss: ([\d.]+)', line):
            losses[int(match[1])] = float(match[2])
    return [losses[epoch] for epoch in sorted(losses)]


def interval(statistic: dict[str, float]) -> str:
    """Value and bootstrap interval; an undefined value is null in ranking.json."""
    if None in statistic.values():
        return 'undefined'
    return f'{statistic["value"]:.2f} [{statistic["low"]:.2f}, {statistic["high"]:.2f}]'


def write_csv(runs: list[dict[str, Any]], path: Path) -> None:
    """One line per run and way of scoring."""
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f, lineterminator='\n')
        head = ['space', 'sum_norm', 'sampling', 'seed', 'score', 'part', 'n']
        for name in ('kendall_tau', 'spearman_rho', 'regret'):
            head += [name, f'{name}_low', f'{name}_high']
        writer.writerow([*head, 'top_k_overlap', 'mean_top1', 'train_loss'])
        for run in runs:
            for score, parts in run['ranking']['statistics'].items():
                for part, values in parts.items():
                    row = [run['space'], run['norm'], run['sampling'], run['seed'], score, part, values['n']]
                    for name in ('kendall_tau', 'spearman_rho', 'regret'):
                        row += [values[name][k] and round(values[name][k], 4) for k in ('value', 'low', 'high')]
                    overlap = ' '.join(f'{k}:{round(v["value"], 3)}' for k, v in values['top_k_overlap'].items())
                    top1 = run['top1'].get({'trained': 'top1', 'recalibrated': 'top1_recalibrated'}.get(score))
                    writer.writerow([*row, overlap, top1 and round(top1, 2), run['losses'][-1]])
            for score in ('loss', 'loss_recalibrated'):  # the others are those of `rank`, above
                found = run['statistics'][score]
                row = [run['space'], run['norm'], run['sampling'], run['seed'], score, 'all', found.n]
                for value in (found.kendall_tau, found.spearman_rho, found.regret):
                    row += [round(v, 4) for v in (value.value, value.low, value.high)]
                writer.writerow([*row, '', '', run['losses'][-1]])


def print_markdown(runs: list[dict[str, Any]]) -> None:
    """One row per setting: each seed's Kendall tau with its interval, and the mean over seeds."""
    groups = defaultdict(list)
    for run in runs:
        groups[run['space'], run['norm'], run['sampling']].append(run)
    print(
        '| space | norm | sampling | seeds | loss | top-1 | tau, BN as trained | mean | tau, BN recalibrated | mean |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    for (space, norm, sampling), members in sorted(
        groups.items(), key=lambda g: (list(SPACES).index(g[0][0]), g[0][2] != 'paths', list(NORMS).index(g[0][1]))
    ):
        members.sort(key=lambda run: run['seed'])
        cells = [space, norm, sampling, ' '.join(str(r['seed']) for r in members)]
        cells.append(f'{mean(r["losses"][-1] for r in members):.3f}')
        cells.append(f'{mean(r["top1_recalibrated"] for r in (m["top1"] for m in members)):.1f}')
        for score in ('trained', 'recalibrated'):
            taus = [r['ranking']['statistics'][score]['all']['kendall_tau'] for r in members]
            cells += ['; '.join(map(interval, taus)), f'**{mean(t["value"] for t in taus):.2f}**']
        print('| ' + ' | '.join(cells) + ' |')


def print_scores(runs: list[dict[str, Any]]) -> None:
    """Kendall's tau of every score, mean over seeds, and how much higher it is with SBN, paired by seed."""
    taus: dict[tuple, dict[int, dict[str, tuple[float, np.ndarray]]]] = defaultdict(dict)
    for run in runs:
        of = {score: (s.kendall_tau.value, s.tau_samples) for score, s in run['statistics'].items()}
        taus[run['space'], run['norm'], run['sampling']][run['seed']] = of
    print(f'\n| space | norm | sampling | {" | ".join(s.replace("_", ", ") for s in SCORES)} |')
    print('|---|---|---|' + '---|' * len(SCORES))

    def row(cells: tuple[str, ...], pairs: dict[str, list[tuple[float, np.ndarray]]]) -> None:
        means = [text(*estimate([v for v, _ in p], np.mean([s for _, s in p], axis=0))) for p in pairs.values()]
        print(f'| {" | ".join([*cells, *means])} |')

    for of, seeds in taus.items():
        row(of, {score: [found[score] for found in seeds.values()] for score in SCORES})
    for (space, norm, sampling), seeds in taus.items():
        sbn = taus.get((space, 'sbn', sampling), {})
        if both := sorted(seeds.keys() & sbn.keys()) if norm != 'sbn' else []:
            gains = {
                score: [tuple(a - b for a, b in zip(sbn[seed][score], seeds[seed][score])) for seed in both]
                for score in SCORES
            }
            row((space, f'sbn - {norm}', sampling), gains)


def print_operations(runs: list[dict[str, Any]]) -> None:
    """What an edge of each operation of NAS-Bench-201 is worth, by least squares on their counts, mean over seeds.

    In points of accuracy, relative to an edge that is `none`.
    """
    ops = ('nor_conv_3x3', 'nor_conv_1x1', 'skip_connect', 'avg_pool_3x3')
    print(f'\n| points per edge | {" | ".join(ops)} |\n|---|---|---|---|---|')
    rows = defaultdict(list)
    for run in runs:
        if run['space'] == 'nb101':
            continue
        counts = np.array([[a['arch'].count(op) for op in ops] + [1] for a in run['archs']], dtype=float)
        for column, label in (
            ('accuracy', 'the benchmark'),
            ('top1', 'BN as trained'),
            ('top1_recalibrated', 'BN recalibrated'),
        ):
            key = (label,) if column == 'accuracy' else (run['space'], run['sampling'], run['norm'], label)
            values = np.array([float(a[column]) for a in run['archs']])
            rows[key].append(np.linalg.lstsq(counts, values, rcond=None)[0][:-1])
    for key, found in sorted(rows.items(), key=lambda r: (len(r[0]), r[0])):
        print(f'| {", ".join(key)} | ' + ' | '.join(f'{v:+.2f}' for v in np.mean(found, axis=0)) + ' |')


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Training loss and Kendall tau of every seed of each space, below one another if there are several spaces."""
    spaces = {space: title for space, title in SPACES.items() if any(r['space'] == space for r in runs)}
    shape = (2, len(spaces)) if len(spaces) > 1 else (1, 2)
    figure = Figure(figsize=(5 * shape[1], 3.5 * shape[0]), dpi=130, layout='constrained')
    FigureCanvasAgg(figure)
    axes = np.reshape(figure.subplots(*shape), (2, len(spaces)))
    for column, (space, title) in enumerate(spaces.items()):
        of_space = sorted((r for r in runs if r['space'] == space), key=lambda r: list(NORMS).index(r['norm']))
        loss, tau = axes[0][column], axes[1][column]
        seen = set()
        for run in of_space:
            if run['sampling'] != 'paths':
                continue
            color, label = NORMS[run['norm']]
            epochs = range(1, len(run['losses']) + 1)
            loss.plot(epochs, run['losses'], color=color, linewidth=1.2, label=None if label in seen else label)
            seen.add(label)
        loss.set(title=title, xlabel='epoch', ylabel='training loss (nats)')
        loss.xaxis.set_major_locator(MaxNLocator(integer=True))
        loss.legend(frameon=False)

        settings = sorted({(r['sampling'] != 'paths', r['sampling'], list(NORMS).index(r['norm'])) for r in of_space})
        labels = []
        for x, (_, sampling, index) in enumerate(settings):
            norm = list(NORMS)[index]
            color, label = NORMS[norm]
            labels.append(label if sampling == 'paths' else f'{label},\n{sampling} sampling')
            members = [r for r in of_space if r['norm'] == norm and r['sampling'] == sampling]
            for place, (score, marker, _) in enumerate(WAYS):
                for i, run in enumerate(members):
                    value = run['statistics'][score].kendall_tau
                    at = x + 0.25 * (place - 1) + 0.06 * (i - (len(members) - 1) / 2)
                    tau.plot([at, at], [value.low, value.high], color=color, linewidth=1, alpha=0.5)
                    tau.plot(at, value.value, marker=marker, color=color, markersize=4)
        yardstick = of_space[0]['ranking']['statistics']['params']['all']['kendall_tau']['value']
        tau.axhline(yardstick, color='0.5', linestyle='--', linewidth=1)
        tau.text(len(settings) - 0.5, yardstick, 'more parameters = better', ha='right', va='bottom', fontsize=8)
        tau.axhline(0, color='0.8', linewidth=0.8)
        n = of_space[0]['ranking']['num_archs']
        tau.set(
            ylabel=f'Kendall tau over {n} archs',
            xticks=range(len(settings)),
            xticklabels=labels,
            xlim=(-0.5, len(settings) - 0.5),
            ylim=(-0.65, 1.1),
        )
        for _, marker, label in WAYS:
            tau.plot([], [], marker, color='0.3', markersize=4, label=label)
        tau.legend(frameon=False, loc='upper left', fontsize=7, ncols=3, columnspacing=1, handletextpad=0)
        for ax in (loss, tau):
            ax.spines[['top', 'right']].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, help='OUTPUT of run.sh')
    parser.add_argument('output', type=Path, help='path of CSV and PNG, without .csv and .png')
    args = parser.parse_args()
    runs = read_runs(args.runs)
    if not runs:
        parser.error(f'no ranking.json below {args.runs}, run run.sh first')
    write_csv(runs, args.output.with_suffix('.csv'))
    draw(runs, args.output.with_suffix('.png'))
    print_markdown(runs)
    print_scores(runs)
    print_operations(runs)


if __name__ == '__main__':
    main()
