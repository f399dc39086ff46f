"""Rows as CSV and as text, values as JSON: written whole or not at all."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .files import write_text

__all__ = ['format_size', 'format_table', 'read_csv', 'write_csv', 'write_json']


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON for people to read, whole or not at all.

    Raises:
        ValueError: A number is not finite, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + '\n')


def format_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows((header, *rows))
    return text.getvalue()


def write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV, whole or not at all; None is an empty cell."""
    write_text(path, format_csv(header, rows))


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """Read a CSV file that a program wrote, a dict of text per row."""
    with open(Path(path), newline='') as f:
        return list(csv.DictReader(f))


def format_size(input_size: Iterable[int]) -> str:
    """Return an input as text, such as 3x224x224."""
    return 'x'.join(map(str, input_size))


def format_table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Return rows as text in columns that are two spaces apart.

    Args:
        rows: The header and the cells below it.
        align: `<` for a column that is aligned left, `>` for one that is aligned right, the last one for all further
            columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = align.ljust(len(widths), align[-1])
    lines = (
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    )
    return '\n'.join(line.rstrip() for line in lines)
