"""With which images `adapt` searches, and what for."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import timm

from ..models.backbone import BackboneSupernet
from ..models.cost import cost_table, count_macs
from ..models.latency_table import LatencyTable
from ..search.config import LIMITED, SearchConfig
from ..search.pool import ArchPool, check_limits
from ..spaces.backbone import BackboneSpace
from ..utils.errors import UsageError, as_usage_error

__all__ = ['SizedSearch', 'is_backbone_alone', 'plan_searches', 'share_evaluations']

_logger = logging.getLogger(__name__)

# Of a search that shares its generations with others
_MIN_GENERATIONS = 2


@dataclass(frozen=True)
class SizedSearch:
    """A search with images of one size.

    Attributes:
        img_size: The size, in pixels.
        config: What to search for.
        holds_backbone: The backbone itself is within the limits with these images.
    """

    img_size: int
    config: SearchConfig
    holds_backbone: bool


def plan_searches(
    supernet: BackboneSupernet,
    backbone: str,
    sizes: Sequence[int],
    config: SearchConfig,
    floor: float = 0.0,
    latency_table: LatencyTable | None = None,
    space: BackboneSpace | None = None,
) -> list[SizedSearch]:
    """Find the sizes of images with which there is something to search, in ascending order, and say what is there.

    Sizes are left out with which no network is within the limits, and those below one with which the backbone itself
    is: larger images cost nothing there, as they do where parameters alone are limited.

    Args:
        supernet: Supernet around the backbone, on any device.
        backbone: What the backbone is called.
        sizes: Sizes in pixels.
        config: What to search for.
        floor: Share of the only limit below which nothing is looked at, where the backbone is above it: NSGA-II keeps a
            whole front, and would spend half of its evaluations far below.
        latency_table: Table that a limit or an objective needs.
        space: Part of the supernet's space to search, all of it if None.

    Raises:
        UsageError: A size is out of range, the limits exclude every arch with all of them, or a latency table is of
            other images.
    """
    if latency_table is not None and len(sizes) > 1:
        shown = ' '.join(map(str, sizes))
        raise UsageError(f'a latency table is of images of one size, --img-size {shown} names {len(sizes)}; name one')
    limits = {metric: config.limits(metric)[1] for metric in LIMITED if config.limits(metric)[1] < math.inf}
    if set(limits) == {'params'} and len(sizes) > 1:
        _logger.info('The number of parameters does not depend on the images, so smaller ones are left out')
        sizes = [max(sizes)]
    own_arch = supernet.space.default_arch
    searches: list[SizedSearch] = []
    for img_size in sorted(sizes):
        with as_usage_error(f'image size {img_size} is out of range'):
            table = cost_table(supernet, (3, img_size, img_size))
        if latency_table is not None:
            latency_table.add_to(table)
        if space is not None:
            table = table.within(space)
        try:
            check_limits(config, table)
        except UsageError as e:
            if not searches:  # where everything costs the least
                if set(limits) == {'macs'}:
                    _advise_smaller_images(backbone, supernet.num_classes, sizes, limits['macs'])
                raise
            _logger.info(f'Images of {img_size}x{img_size} pixels are left out: {e}')
            continue
        low, high = table.bounds('macs')
        _logger.info(
            f'{backbone} has {table.macs(own_arch) / 1e6:.1f} M MACs at {img_size}x{img_size} pixels, the networks '
            f'around it {low / 1e6:.1f} to {high / 1e6:.1f} M'
        )
        holds_backbone = ArchPool(table.space, table, config).violation(own_arch) == 0
        if holds_backbone and searches:
            left_out = ', '.join(f'{s.img_size}x{s.img_size}' for s in searches)
            _logger.info(f'That is within the limits, so smaller images ({left_out}) are left out')
            searches = []
        searches.append(SizedSearch(img_size, config, holds_backbone))
    if floor and len(limits) == 1 and not searches[-1].holds_backbone:  # few archs use most of several limits
        ((metric, limit),) = limits.items()
        least = floor * limit if metric == 'latency' else int(floor * limit)
        _logger.info(f'Networks of less than {floor:g} times the limit are not looked at')
        focused = replace(config, **{f'min_{metric}': least})
        searches = [s if s.holds_backbone else replace(s, config=focused) for s in searches]
    if not searches[0].holds_backbone and set(limits) == {'macs'}:
        _advise_smaller_images(backbone, supernet.num_classes, sizes, limits['macs'])
    return searches


def is_backbone_alone(searches: Sequence[SizedSearch]) -> bool:
    """Whether the backbone itself is within the limits with the only size that is left."""
    return len(searches) == 1 and searches[0].holds_backbone


def share_evaluations(searches: Sequence[SizedSearch], is_trained: bool) -> list[SizedSearch]:
    """Share the generations of one search among several, so that more sizes don't take many times as long.

    Args:
        searches: Searches of the same configuration.
        is_trained: The supernet is trained. If not nothing is better than the backbone where it is within the limits,
            and nothing else is evaluated there.
    """
    if len(searches) == 1:
        return list(searches)
    alone = [s.holds_backbone and not is_trained for s in searches]
    generations = searches[0].config.generations
    shared = min(generations, max(_MIN_GENERATIONS, generations // (len(searches) - sum(alone))))
    return [
        replace(s, config=replace(s.config, population=1, generations=0))
        if is_alone
        else replace(s, config=replace(s.config, generations=shared))
        for s, is_alone in zip(searches, alone)
    ]


def _advise_smaller_images(backbone: str, num_classes: int, sizes: Sequence[int], max_macs: float) -> None:
    """Say with which images below all `sizes` a network is within a limit; nothing if there are none."""
    network = timm.create_model(backbone.partition('.')[0], num_classes=num_classes, device='meta').eval()
    least = min(sizes)
    for smaller in range((least - 1) // 16 * 16, 31, -16):
        if sum(count_macs(network, (3, smaller, smaller)).values()) <= max_macs:
            step = 16 * max(1, round((least - smaller) / 64))
            shown = ' '.join(map(str, sorted({*range(smaller, least, step), *sizes})))
            _logger.info(
                f'With images of {smaller}x{smaller} pixels the backbone itself is within {max_macs / 1e6:g} M MACs, '
                f'and in between there may be something better: --img-size {shown} tries them all'
            )
            return
