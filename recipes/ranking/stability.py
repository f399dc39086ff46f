"""Table, numbers and figure of what stability.sh measured.

    python recipes/ranking/stability.py output/stability recipes/ranking/stability

Writes a CSV, a line per training, and a PNG, and prints a table in Markdown. The loss is the mean over the last half of
the steps, as the log tells it; 'diverged' is a training whose loss was not a finite number in the end.
"""

import argparse
import csv
import math
import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NORMS = {'sbn': ('SBN', '#3b6fb5', '-'), 'bn': ('one BN', '#c1272d', '--')}
GUESS = math.log(10)  # the loss of a network that gives ten classes the same probability

Losses = dict[tuple[str, int, float, str], float]


def read_losses(folder: Path) -> Losses:
    losses = {}
    for done in folder.glob('*/done'):
        run = done.parent.name
        norm, m, lr, clip = run.split('-')
        losses[norm, int(m), float(lr), clip] = late_loss(folder / f'{run}.log')
    return losses


def late_loss(log: Path) -> float:
    """Mean loss of the steps behind the last but one line of the log, each of which has the mean from the first on."""
    if not (log.with_suffix('') / 'summary.csv').exists():  # it came to no end
        return math.nan
    lines = re.findall(r'Train: 0 \[ *(\d+)/\d+\] +Loss: (\S+)', log.read_text())
    (*_, (before, mean_before), (last, mean)) = [(int(step) + 1, float(loss)) for step, loss in lines]
    return (last * mean - before * mean_before) / (last - before)


def clipping(clip: str) -> str:
    return 'gradients not clipped' if clip == 'none' else f'gradients clipped at {float(clip):g}'


def print_table(losses: Losses) -> None:
    rates = sorted({lr for _, _, lr, _ in losses})
    print('| gradients clipped at | m | norm | ' + ' | '.join(f'{lr:g}' for lr in rates) + ' |')
    print('|---' * (3 + len(rates)) + '|')
    for clip, m, norm in sorted(
        {(c, m, n) for n, m, _, c in losses}, key=lambda r: (r[0] != 'none', r[1], r[2] != 'sbn')
    ):
        cells = [losses.get((norm, m, lr, clip)) for lr in rates]
        written = ['' if c is None else 'diverged' if math.isnan(c) else f'{c:.3f}' for c in cells]
        print('| ' + ' | '.join([clip, str(m), NORMS[norm][0], *written]) + ' |')


def draw(losses: Losses, path: Path) -> None:
    panels = sorted({(clip, m) for _, m, _, clip in losses}, key=lambda panel: (panel[0] != 'none', panel[1]))
    rates = sorted({lr for _, _, lr, _ in losses})
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.0 * columns, 3.0 * rows), dpi=130, layout='constrained')
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(len(panels))]
    top = GUESS * 1.12
    for ax, (clip, m) in zip(axes, panels):
        if ax is not axes[0]:
            ax.sharey(axes[0])
        for shift, (norm, (label, color, style)) in enumerate(NORMS.items()):
            found = [losses.get((norm, m, lr, clip)) for lr in rates]
            x = [math.log2(lr) + (shift - 0.5) * 0.12 for lr in rates]
            measured = [math.nan if y is None else y for y in found]
            ax.plot(x, [min(y, top) for y in measured], style, marker='o', markersize=4, color=color, label=label)
            lost = [x_ for x_, y in zip(x, found) if y is not None and math.isnan(y)]
            ax.plot(lost, [top] * len(lost), 'x', color=color, markersize=6, linestyle='none')
        ax.axhline(GUESS, color='0.8', linewidth=0.8)
        ax.set_xticks([math.log2(lr) for lr in rates], [f'{lr:g}' for lr in rates])
        ax.set_title(f'm = {m}, {clipping(clip)}', fontsize=9)
        ax.spines[['top', 'right']].set_visible(False)
    figure.supxlabel('highest learning rate (SGD)', fontsize=9)
    figure.supylabel('loss, last half (nats)', fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, help='OUTPUT of stability.sh')
    parser.add_argument('output', type=Path, help='path of CSV and PNG, without .csv and .png')
    args = parser.parse_args()
    losses = read_losses(args.runs)
    if not losses:
        parser.error(f'no training below {args.runs} is done, run stability.sh first')
    with open(args.output.with_suffix('.csv'), 'w', newline='') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(['norm', 'm', 'lr', 'clip_grad', 'train_loss'])
        writer.writerows([*run, '' if math.isnan(loss) else f'{loss:.4f}'] for run, loss in sorted(losses.items()))
    draw(losses, args.output.with_suffix('.png'))
    print_table(losses)


if __name__ == '__main__':
    main()
