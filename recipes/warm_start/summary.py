"""Print the table of README.md beside this file from what measure.py wrote.

    python recipes/warm_start/summary.py OUTPUT/measure.jsonl

Runs are called KIND-SEED. Random archs: the mean over the seeds of the mean over the archs, the range of the seeds'
means where there are several, and the range of all archs.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from timm_mixpath.utils.tables import format_table


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit('usage: python summary.py MEASURE.jsonl')
    scores: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[bool, list[float]] = defaultdict(list)
    for row in map(json.loads, Path(sys.argv[1]).read_text().splitlines()):
        kind, _, seed = row['run'].rpartition('-')
        name = 'random' if row['arch_name'].startswith('random') else row['arch_name']
        scores[kind, row['epoch'], name, row['recalibrated']][seed].append(row['top1'])
        seconds[row['recalibrated']].append(row['seconds'])
    header = ('', 'epoch', 'seeds', *(f'{name}{text}' for name in ('own', 'largest') for text in ('', ', recal.')))
    cells = [(*header, 'random', 'random, recal.')]
    for kind, epoch in dict.fromkeys(key[:2] for key in sorted(scores)):
        columns = [
            scores[kind, epoch, name, recalibrated]
            for name in ('own', 'largest', 'random')
            for recalibrated in (False, True)
        ]
        cells.append((kind, str(epoch), str(len(columns[0])), *map(_text, columns)))
    print(format_table(cells, '<>>'))
    for recalibrated, values in seconds.items():
        print(f'{"recalibrated" if recalibrated else "as trained"}: {mean(values):.1f} s per arch')


def _text(by_seed: dict[str, list[float]]) -> str:
    means = [mean(values) for values in by_seed.values()]
    if not means:
        return '-'
    text = f'{mean(means):.1f}'
    if len(means) > 1:
        text += f' [{min(means):.1f}, {max(means):.1f}]'
    archs = [value for values in by_seed.values() for value in values]
    return text if len(archs) == len(means) else f'{text} ({min(archs):.1f} to {max(archs):.1f})'


if __name__ == '__main__':
    main()
