"""Compare the fronts of searches in milliseconds: the fastest network of each front at equal accuracy.

    python recipes/latency/compare.py SEARCH [SEARCH ...]

A SEARCH is the output folder of `timm-mixpath search` with a --latency-table of this machine, with the error as
an objective: the latency of its front was measured at the end. The searches have to score the same supernet on the same
images.
"""

import argparse
import json
from pathlib import Path

from timm_mixpath.utils.tables import format_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('searches', type=Path, nargs='+')
    args = parser.parse_args()

    contents = [json.loads((folder / 'front.json').read_text()) for folder in args.searches]
    scored = {json.dumps({k: v for k, v in c['fingerprint'].items() if k.endswith('sha256')}) for c in contents}
    if len(scored) > 1:
        parser.error('the searches scored other weights or images')
    if any('error' not in c['config']['objectives'] for c in contents):
        parser.error('the front of a search without the error as an objective is not one of it')
    fronts = [
        [(c['error'], c['metrics']['latency_ms'], c['latency']) for c in content['front']] for content in contents
    ]

    # Levels that all fronts reach
    best = max(min(error for error, *_ in front) for front in fronts)
    levels = sorted({error for front in fronts for error, *_ in front if error >= best})
    rows = [('error up to (%)', *(f'{folder.name}: ms' for folder in args.searches))]
    for level in levels:
        fastest = [min(ms for error, ms, _ in front if error <= level) for front in fronts]
        rows.append((f'{level:.1f}', *(f'{ms:.2f}' for ms in fastest)))
    print(format_table(rows, '>'))
    for folder, front in zip(args.searches, fronts):
        errors = [abs(predicted / ms - 1) for _, ms, predicted in front]
        print(
            f'{folder.name}: {len(front)} networks on the front, predicted with a mean error of '
            f'{sum(errors) / len(errors):.1%}, at most {max(errors):.1%}'
        )


if __name__ == '__main__':
    main()
