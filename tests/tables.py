"""Tables of stand-alone accuracies, the benchmarks' and a made one with its ranking, and made ones of latencies."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from timm_mixpath.analysis.accuracy_table import AccuracyTable
from timm_mixpath.analysis.ranking import RankConfig, RankedArch, RankResult, summarize
from timm_mixpath.models.cost import CostTable
from timm_mixpath.models.latency_table import LatencyTable, space_digest

NASBENCH = Path(__file__).parents[2] / 'shared' / 'data' / 'nasbench'


def rows(name: str) -> list[dict[str, str]]:
    if not (NASBENCH / name).exists():
        pytest.skip(f'{name} is not there')
    with open(NASBENCH / name, newline='') as f:
        return list(csv.DictReader(f))


def make_result(num: int = 40, score: str = 'top1', recalibrated: bool = True, equal: bool = False) -> RankResult:
    """Scores that follow the accuracies, of archs whose text holds all that CSV gives a meaning to."""
    rng = np.random.default_rng(0)
    archs = []
    for i in range(num):
        accuracy = float(50 + 40 * rng.random())
        top1 = 10.0 if equal else float(np.clip(accuracy - 30 + 8 * rng.normal(), 0, 100))
        archs.append(
            RankedArch(
                arch=f'|a~{i}|+|b,"c"|',
                accuracy=accuracy,
                top1=top1,
                loss=1.0 if equal else math.nan if i == 3 else 3 - top1 / 50,
                top1_recalibrated=float(accuracy / 2 + rng.normal()) if recalibrated else None,
                loss_recalibrated=float(3 - accuracy / 50) if recalibrated else None,
                macs=int(1e6 * (1 + rng.random())),
                params=int(1e4 * (1 + rng.random())),
                index=i,
            )
        )
    table = AccuracyTable(
        Path('nb.csv'), 'arch', 'accuracy', tuple(r.arch for r in archs), tuple(r.accuracy for r in archs), num
    )
    config = RankConfig(score=score, top_k=(10, 30), num_resamples=50)
    return summarize(table, config, dict(num_images=20, split='train'), archs)


def table_for(cost: CostTable, base: float, parts: dict, **kwargs: Any) -> LatencyTable:
    """A latency table of made prices, of a space and input as a cost table has them."""
    return LatencyTable(
        **{
            **dict(
                space=cost.space.name,
                max_paths=cost.space.max_paths,
                input_size=cost.input_size,
                num_classes=cost.num_classes,
                digest=space_digest(cost),
                batch_size=1,
                runtime='torch',
                device='cpu',
                device_name='a device of tests',
                threads=2,
                versions={},
                protocol={},
                measured=[],
                base=base,
                parts=[[*part, ms] for part, ms in parts.items()],
            ),
            **kwargs,
        }
    )
