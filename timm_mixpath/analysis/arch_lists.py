"""Which archs a table of accuracies is made of: drawn, or read from a file."""

import logging
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm

from ..models.cost import cost_table
from ..spaces.sampling import check_strategy, sample
from ..spaces.space import Space
from ..train.checkpoint import check_model_name, create_model
from ..utils.errors import UsageError, as_usage_error
from .accuracy_table import ARCH_COLUMNS, read_rows

__all__ = ['arch_space', 'check_archs', 'draw_archs', 'read_archs']

_logger = logging.getLogger(__name__)


_SAMPLING_PATIENCE = 100_000  # draws without a new arch after which a space counts as drawn empty


def arch_space(args: Namespace) -> Space:
    """Return the space of the sub-network model that training options describe.

    Raises:
        UsageError: The model is none that takes an `arch`, or one is given already.
    """
    if not args.model:
        raise UsageError('no model: pass --model NAME, a sub-network model such as mixpath_nano, or a recipe with -c')
    check_model_name(args.model)
    base = _base_name(args.model)
    if base.endswith('_supernet'):
        raise UsageError(
            f'{args.model!r} is a supernet, a table is of its sub-networks: pass --model '
            f'{base.removesuffix("_supernet")}'
        )
    if 'arch' in args.model_kwargs:
        raise UsageError(
            f'--model-kwargs arch={args.model_kwargs["arch"]} is one arch, a table trains those of its list; leave it '
            'out'
        )
    model = create_model(args, device='meta')
    space, arch = getattr(model, 'space', None), getattr(model, 'arch', None)
    if space is None or arch is None:
        raise UsageError(f'model {args.model!r} takes no arch; pass --model mixpath_nano or that of another space')
    try:
        create_model(args, device='meta', arch=str(arch))
    except UsageError:
        of_any_arch = f'mixpath_{space.name}'
        if not timm.is_model(of_any_arch):  # a space around a backbone
            of_any_arch = f'mixpath --model-kwargs backbone={space.name}'
        raise UsageError(f'model {args.model!r} has a fixed arch; pass --model {of_any_arch}') from None
    if args.pretrained and base != 'mixpath':
        raise UsageError(
            f'--pretrained can not be used for a table of {args.model!r}: such weights are of one arch; start from '
            'other weights with --warm-start, or from nothing'
        )
    return space


def _base_name(model: str) -> str:
    return model.partition('.')[0]  # without the tag of pretrained weights


def draw_archs(
    model: str,
    num_archs: int,
    *,
    seed: int = 0,
    m: int | None = None,
    sampling: str = 'paths',
    macs: tuple[float, float] | None = None,
    input_size: tuple[int, int, int] | None = None,
    **model_kwargs: Any,
) -> list[str]:
    """Draw distinct archs of a space, by default as the training of its supernet does.

    Args:
        model: Sub-network model of the space, for example `mixpath_nano`.
        num_archs: Number of archs. Fewer of the same seed are a beginning of more.
        seed: Seed of the sequence.
        m: Largest number of paths, the default of the supernet if None.
        sampling: One of `timm_mixpath.spaces.sampling.STRATEGIES`. 'paths' does not reach all archs of every space: in
            nb201 none with a node that has no inputs.
        macs: Smallest and largest multiply-adds of an arch that is taken, all if None.
        input_size: Input (channels, height, width) that they are counted for, the space's own if None.
        **model_kwargs: Arguments of the model, such as `backbone` of `mixpath`, or those that change what it costs.

    Raises:
        UsageError: A value is out of range, or the sampling does not find as many archs.
    """
    if num_archs < 1:
        raise UsageError(f'number of archs {num_archs} must be at least 1')
    # A sub-network may have more paths than the m its supernet is trained for, which could not rank it then
    supernet = f'{_base_name(model)}_supernet'
    with as_usage_error(f'archs of {model!r} can not be drawn'):
        if m is not None:
            model_kwargs['m'] = m
        network = timm.create_model(supernet if timm.is_model(supernet) else model, device='meta', **model_kwargs)
        space = network.space
        check_strategy(sampling)
    cost = cost_table(network, input_size) if macs is not None else None
    if cost is not None:
        low, high = cost.bounds('macs')
        if macs[0] > high or macs[1] < low:
            raise UsageError(
                f'no arch has {macs[0]:.0f} to {macs[1]:.0f} MACs, the smallest of the space has {low} and the largest '
                f'{high}'
            )
    archs: dict[str, None] = {}
    step = last_new = 0
    while len(archs) < num_archs:
        arch = str(sample(space, seed=seed, step=step, strategy=sampling))
        if arch not in archs and (cost is None or macs[0] <= cost.macs(arch) <= macs[1]):
            archs[arch], last_new = None, step
        if step - last_new > _SAMPLING_PATIENCE:
            raise UsageError(
                f'{num_archs} archs are too many, only {len(archs)} distinct ones were found with sampling '
                f'{sampling!r} in a space of {space.size}' + (' inside the band of MACs' if macs else '')
            )
        step += 1
    return list(archs)


def read_archs(path: str | os.PathLike, space: Space) -> list[str]:
    """Read a list of archs.

    Args:
        path: Text file with one arch per line, without blank lines and lines that start with `#`; or a `.csv`
            or `.tsv` file with a column `arch`, `cell` or `ops`.
        space: The space they are of.

    Returns:
        The archs in canonical text, each once.

    Raises:
        UsageError: The file can't be read, holds no archs, or one that the space does not.
    """
    path = Path(path)
    if path.suffix.lower() in ('.csv', '.tsv'):
        rows = read_rows(path, 'list of archs')
        names = [cell.strip() for cell in next(rows)[1]]
        column = next((names.index(name) for name in ARCH_COLUMNS if name in names), None)
        if column is None:
            raise UsageError(f'{str(path)!r} has no column {", ".join(ARCH_COLUMNS)}; it has {", ".join(names)}')
        lines = [(f'line {line}', row[column].strip() if column < len(row) else '') for line, row in rows]
    else:
        try:
            text = path.read_text(encoding='utf-8-sig')
        except (OSError, UnicodeError) as e:
            reason = getattr(e, 'strerror', None) or e
            raise UsageError(f'list of archs {str(path)!r} can not be read: {reason}') from None
        lines = [(f'line {number}', line.strip()) for number, line in enumerate(text.split('\n'), 1)]
        lines = [(where, line) for where, line in lines if line and not line.startswith('#')]
    if not lines:
        raise UsageError(f'list of archs {str(path)!r} is empty')
    return check_archs(lines, space, str(path))


def check_archs(lines: Iterable[tuple[str, str]], space: Space, source: str) -> list[str]:
    """Bring (where, text) into canonical text, each once."""
    archs: dict[str, str] = {}
    problems: list[str] = []
    duplicates: list[str] = []
    count = 0
    for where, text in lines:
        count += 1
        try:
            arch = str(space.arch(text))
        except ValueError as e:
            problems.append(f'{where}: {e}')
            continue
        if arch in archs:
            duplicates.append(where)
        archs.setdefault(arch, where)
    if problems:
        first = problems[0] if len(problems) == 1 else f'the first is {problems[0]}'
        raise UsageError(f'{source}: {len(problems)} of {count} archs can not be used, {first}')
    if duplicates:
        _logger.info(f'{source}: {len(duplicates)} duplicate archs are left out ({", ".join(duplicates[:10])})')
    return list(archs)
