"""Tables of stand-alone accuracies, such as those of NAS benchmarks: which arch reaches which accuracy alone."""

import csv
import hashlib
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..utils.errors import UsageError, concise

if TYPE_CHECKING:
    from ..spaces.space import Space

__all__ = ['ARCH_COLUMNS', 'MIN_ARCHS', 'AccuracyTable', 'LeftOut', 'read_rows', 'read_table']


# A rank correlation of fewer says nothing
MIN_ARCHS = 10

ARCH_COLUMNS = ('arch', 'cell', 'ops')

# Those of NAS-Bench-201 (200 epochs before 12) and of NAS-Bench-101 (108 epochs before 36); validation before test,
# because a supernet is scored on images that are held out from training, too
ACCURACY_COLUMNS = (
    'accuracy',
    'cifar10_val_200ep',
    'cifar10_val_12ep',
    'val_acc_108',
    'val_acc_36',
    'val_acc',
    'top1',
)

_MISSING = frozenset(('', '-', 'n/a', 'na', 'nan', 'none', 'null'))


@dataclass(frozen=True)
class LeftOut:
    """Rows of a table that can not be used, of one kind.

    Attributes:
        reason: What is wrong with them, worded for behind 'rows with'.
        count: How many there are.
        line: Line of the first in the file, from 1.
        example: What is wrong with the first.
    """

    reason: str
    count: int
    line: int
    example: str

    def __str__(self) -> str:
        rows = 'row' if self.count == 1 else 'rows'
        return f'{self.count} {rows} with {self.reason} (first: line {self.line}, {self.example})'


@dataclass(frozen=True)
class AccuracyTable:
    """Stand-alone accuracies of archs.

    Attributes:
        path: The file.
        arch_column: Column that the archs were taken from.
        accuracy_column: Column that the accuracies were taken from.
        archs: Archs of a space, all different, in canonical text.
        accuracies: Their accuracies in percent, in the same order.
        num_rows: Rows of the file, without empty ones.
        left_out: Rows that are not among `archs`.
        by_seed: Accuracies of each arch, one per seed, where the table has a column `accuracies`; else empty.
    """

    path: Path
    arch_column: str
    accuracy_column: str
    archs: tuple[str, ...]
    accuracies: tuple[float, ...]
    num_rows: int
    left_out: tuple[LeftOut, ...] = ()
    by_seed: tuple[tuple[float, ...], ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the archs and their accuracies, whatever else is in the file."""
        digest = hashlib.sha256()
        for arch, accuracy in zip(self.archs, self.accuracies):
            digest.update(f'{str(arch)!r} {accuracy!r}\n'.encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.archs)

    def series(self, archs: Sequence[str]) -> list[tuple[float, ...]]:
        """Return the accuracies of archs of the table by seed, a series per seed.

        Args:
            archs: Archs of the table.

        Returns:
            Nothing if not all of them have the same number of seeds, two or more.
        """
        known = dict(zip(self.archs, self.by_seed))
        rows = [known.get(arch, ()) for arch in archs]
        if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
            return []
        return list(zip(*rows))

    def num_seeds(self, archs: Sequence[str]) -> dict[int, int]:
        """Return how many archs of the table have how many seeds, nothing if it does not tell."""
        known = dict(zip(self.archs, self.by_seed))
        return dict(Counter(len(known[arch]) for arch in archs)) if any(self.by_seed) else {}

    def choose(self, num_archs: int | None = None, *, seed: int = 0) -> list[tuple[str, float]]:
        """Draw archs at random.

        Args:
            num_archs: Number of archs, all if None or if there are fewer.
            seed: Seed of the order. The archs of a smaller number are the first of those of a larger one.

        Returns:
            Archs and their accuracies in percent, the same on every machine and Python version.

        Raises:
            UsageError: The number is too small, or all accuracies are equal.
        """
        if num_archs is not None and num_archs < MIN_ARCHS:
            raise UsageError(f'number of archs {num_archs} must be at least {MIN_ARCHS}')
        # Only random() is promised to give the same numbers in every Python version, see `sampling.sample`
        draw = random.Random(f'{seed}/table').random
        order = list(range(len(self.archs)))
        for last in range(len(order) - 1, 0, -1):
            other = int(draw() * (last + 1))
            order[last], order[other] = order[other], order[last]
        chosen = [(self.archs[i], self.accuracies[i]) for i in order[:num_archs]]
        if len({accuracy for _, accuracy in chosen}) == 1:
            raise UsageError(
                f'all {len(chosen)} archs of {str(self.path)!r} have accuracy {chosen[0][1]:g} in column '
                f'{self.accuracy_column!r}, there is nothing to rank; name another column or take more archs'
            )
        return chosen


class _LeftOutRows:
    """Counts rows that can not be used by what is wrong with them."""

    def __init__(self) -> None:
        self._found: dict[str, LeftOut] = {}

    def add(self, reason: str, line: int, example: str) -> None:
        first = self._found.get(reason)
        if first is None:
            self._found[reason] = LeftOut(reason, 1, line, example if len(example) <= 200 else f'{example[:200]}...')
        else:
            self._found[reason] = LeftOut(reason, first.count + 1, first.line, first.example)

    def get(self, reason: str) -> LeftOut | None:
        return self._found.get(reason)

    def all(self) -> tuple[LeftOut, ...]:
        return tuple(self._found.values())


_UNKNOWN = 'an arch that is not in the space'


def read_table(
    path: str | os.PathLike,
    space: 'Space',
    *,
    arch_column: str | None = None,
    accuracy_column: str | None = None,
) -> AccuracyTable:
    """Read a table of stand-alone accuracies: CSV, its first line names the columns.

    Cells are separated by commas, semicolons or tabs, whichever the first line has most of. Accuracies are percentages,
    with or without the sign, with a decimal point or comma. If none of them is above 1 and none has the sign they are
    taken for shares, and made percentages.

    Rows are left out, and counted in `left_out`, if their arch is missing or not in the space, if their accuracy is
    missing or not a percentage, and if an earlier row has the same arch.

    Args:
        path: The file, in UTF-8.
        space: Space that the archs are of.
        arch_column: Column of the archs; the first of 'arch', 'cell', 'ops' that is there if None.
        accuracy_column: Column of the accuracies; 'accuracy' or the first that is there of those that NAS-Bench-201
            and NAS-Bench-101 are known by, see `ACCURACY_COLUMNS`, if None.

    Raises:
        UsageError: The file can't be read or is not such a table, no arch is in the space, or fewer than 10 rows can
            be used.
    """
    path = Path(path)
    rows = read_rows(path)
    header = [cell.strip() for cell in next(rows)[1]]
    arch_at = _column(header, arch_column, ARCH_COLUMNS, 'arch', path)
    accuracy_at = _column(header, accuracy_column, ACCURACY_COLUMNS, 'accuracy', path)
    if arch_at == accuracy_at:
        raise UsageError(f'{header[arch_at]!r} is named as the column of the archs and of the accuracies')

    seeds_at = header.index('accuracies') if header.count('accuracies') == 1 else None
    by_seed: dict[str, tuple[float, ...]] = {}
    left_out = _LeftOutRows()
    found: dict[str, float] = {}
    num_rows = num_archs = 0
    has_percent = False
    for line, row in rows:
        num_rows += 1
        if len(row) > len(header):
            # An arch with commas that is not quoted would be taken for a shorter one
            left_out.add('more cells than the header', line, f'{len(row)} for {len(header)}; quote what has commas')
            continue
        text = row[arch_at].strip() if arch_at < len(row) else ''
        if not text:
            left_out.add('no arch', line, f'{",".join(row)!r}')
            continue
        num_archs += 1
        try:
            arch = space.arch(text)
        except ValueError as e:
            left_out.add(_UNKNOWN, line, f'{text!r}: {concise(e)}')
            continue
        cell = row[accuracy_at].strip() if accuracy_at < len(row) else ''
        if cell.lower() in _MISSING:
            left_out.add('no accuracy', line, f'arch {text!r}')
            continue
        accuracy = _number(cell)
        has_percent = has_percent or cell.endswith('%')
        if accuracy is None:
            left_out.add('an accuracy that is not a number', line, f'{cell!r}')
        elif not 0 <= accuracy <= 100:
            left_out.add('an accuracy outside 0..100', line, f'{cell!r}')
        elif arch not in found:
            found[arch] = accuracy
            if seeds_at is not None and seeds_at < len(row):
                values = [_number(value) for value in row[seeds_at].split()]
                by_seed[arch] = tuple(values) if all(v is not None and math.isfinite(v) for v in values) else ()
        elif found[arch] == accuracy:
            left_out.add('the arch and accuracy of an earlier row', line, f'{text!r}')
        else:
            left_out.add(
                'the arch of an earlier row and another accuracy, the earlier one counts',
                line,
                f'{text!r}: {accuracy:g} after {found[arch]:g}',
            )

    unknown = left_out.get(_UNKNOWN)
    if unknown is not None and unknown.count == num_archs:
        raise UsageError(
            f'none of the {num_archs} archs in column {header[arch_at]!r} of {str(path)!r} is in space {space.name!r}, '
            f'the table seems to be of another space: line {unknown.line}, {unknown.example}'
        )
    if len(found) < MIN_ARCHS:
        reasons = '; '.join(map(str, left_out.all())) or 'none was left out'
        raise UsageError(
            f'{str(path)!r} has {num_rows} rows of which {len(found)} can be used, a ranking needs {MIN_ARCHS}: '
            f'{reasons}'
        )
    if max(found.values()) <= 1 and not has_percent:
        # Rounded, so that 0.88111 is 88.111 and not 88.11099999999999
        found = {arch: round(100 * share, 10) for arch, share in found.items()}
    return AccuracyTable(
        path=path,
        arch_column=header[arch_at],
        accuracy_column=header[accuracy_at],
        archs=tuple(found),
        accuracies=tuple(found.values()),
        num_rows=num_rows,
        left_out=left_out.all(),
        by_seed=tuple(by_seed.get(arch, ()) for arch in found),
    )


def read_rows(path: Path, what: str = 'table') -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a CSV file that are not empty, at least one, separated by commas, semicolons or tabs.

    Args:
        path: The file, in UTF-8.
        what: What it is called in messages.

    Yields:
        The line that a row ends in, from 1, and its cells.

    Raises:
        UsageError: The file can't be read, is not CSV, or is empty.
    """
    name = f'{what} {str(path)!r}'
    empty = True
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            # Without strict a forgotten quote makes one cell of all that follows
            reader = csv.reader(f, delimiter=_find_delimiter(f), strict=True)
            for row in reader:
                if any(cell.strip() for cell in row):
                    empty = False
                    yield reader.line_num, row
    except FileNotFoundError:
        raise UsageError(f'{name} does not exist') from None
    except OSError as e:
        raise UsageError(f'{name} can not be read: {e.strerror}') from None
    except UnicodeDecodeError as e:
        raise UsageError(f'{name} is not text in UTF-8 ({e.reason}), save it as CSV in UTF-8') from None
    except csv.Error as e:
        raise UsageError(f'{name} is not CSV, line {reader.line_num}: {e}') from None
    if empty:
        raise UsageError(f'{name} is empty')


def _find_delimiter(file: TextIO) -> str:
    """Return what separates the cells of a table, by its header, and leave the file where the header begins.

    Spreadsheets of many countries write semicolons, and a first line `sep=;` that is none of the table.
    """
    start = file.tell()
    header = ''
    while not header.strip() and (line := file.readline()):
        if match := re.fullmatch(r'sep=(.)\s*', line, re.IGNORECASE):
            return match[1]
        header = line
    file.seek(start)
    unquoted = re.sub(r'"[^"]*"', '', header)
    return max(',;\t', key=unquoted.count)


def _column(header: Sequence[str], name: str | None, known: Sequence[str], what: str, path: Path) -> int:
    chosen = name.strip() if name is not None else next((c for c in known if c in header), None)
    if chosen not in header:
        missing = f'no column {name!r}' if name is not None else f'none of the columns {", ".join(known)}'
        kind = '; it looks like JSON, save it as CSV' if header[0][:1] in ('{', '[') else ''
        if any(_number(cell) is not None for cell in header):
            kind = '; the line with the names of the columns seems to be missing'
        listed = ', '.join(map(repr, header[:20])) + (', ...' if len(header) > 20 else '')
        raise UsageError(
            f'{str(path)!r} has {missing} to take the {what} from, its first line names {listed}; '
            f'choose one with --{what}-column{kind}'
        )
    if header.count(chosen) > 1:
        raise UsageError(f'{str(path)!r} has {header.count(chosen)} columns named {chosen!r}, rename one')
    return header.index(chosen)


def _number(text: str) -> float | None:
    """Parse a number or a percentage, None if it is none; float() would also take 1_0 and digits of other scripts."""
    text = text.removesuffix('%').rstrip()
    if not text.isascii() or '_' in text:
        return None
    if re.fullmatch(r'[+-]?\d+,\d+', text):  # a decimal comma, as accuracies are at most 100
        text = text.replace(',', '.')
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number
