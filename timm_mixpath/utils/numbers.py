"""Numbers as people write them on a command line."""

import math
import operator
import re
from argparse import ArgumentTypeError
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from .errors import UsageError

__all__ = [
    'as_int',
    'as_whole',
    'check_at_least',
    'parse_count',
    'parse_epochs',
    'parse_float',
    'parse_milliseconds',
    'parse_share',
]

_PLAIN = r'\d+(?:\.\d*)?|\.\d+'
_GROUPED = r'\d{1,3}(?:_\d{3})+(?:\.\d*)?|\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:_\d+)+'
_UNITS = {
    '': 1, 'k': 10**3, 'thousand': 10**3, 'm': 10**6, 'million': 10**6, 'g': 10**9, 'b': 10**9, 'billion': 10**9,
}  # fmt: skip
_COUNT = re.compile(
    rf'(?P<number>-?(?:{_GROUPED}|{_PLAIN})(?:e[+-]?\d{{1,2}})?)\s*(?P<unit>thousand|million|billion|[kmgb])?'
    r'\s*(?P<what>macs?|madds?|params?|parameters|images|archs)?',
    re.IGNORECASE,
)


def as_int(value: Any) -> Any:
    """Return an integer of NumPy or torch as one of Python, and anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def as_whole(value: Any) -> Any:
    """Return a float of a whole number as an integer, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_at_least(options: Any, bounds: Mapping[str, int]) -> None:
    """Check numbers among options before anything is done that a wrong one would end hours later.

    Args:
        options: Their attributes are the options.
        bounds: The least value by the name of the option; None, where an option has it, is no number.

    Raises:
        UsageError: One is below.
    """
    for name, least in bounds.items():
        if (number := getattr(options, name)) is not None and number < least:
            raise UsageError(f'--{name.replace("_", "-")} {number} must be at least {least}')


def parse_count(text: str) -> int:
    """Parse a number of MACs, parameters, images or archs: 15000000, 15_000_000, 15,000,000, 15e6, 15M, 15 MMACs.

    Raises:
        ArgumentTypeError: It is none, no whole number, or may mean two: FLOPs are one or two a multiply-add.
    """
    stripped = text.strip()
    if re.search(r'flops?\b', stripped, re.IGNORECASE):
        raise ArgumentTypeError(f'{text!r} is in FLOPs, which some count once and some twice per MAC; give MACs')
    match = _COUNT.fullmatch(stripped) if stripped.isascii() else None
    if match is None:
        raise ArgumentTypeError(f'{text!r} is not a number such as 5M, 1.2G, 15e6, 350000 or 350_000')
    value = Decimal(re.sub('[_,]', '', match['number'])) * _UNITS[(match['unit'] or '').lower()]
    if value != value.to_integral_value():
        raise ArgumentTypeError(f'{text!r} is not a whole number; with a unit it would be, such as 1.5M')
    return int(value)


def parse_share(text: str) -> float:
    """Parse a share: 0.1, .1, 10%.

    Raises:
        ArgumentTypeError: It is none.
    """
    number = text.strip().removesuffix('%')
    try:
        value = parse_float(number)
    except ArgumentTypeError:
        raise ArgumentTypeError(f'{text!r} is not a share such as 0.1 or 10%') from None
    return value / 100 if text.strip().endswith('%') else value


def parse_float(text: str) -> float:
    """Parse a finite number. `float` would take nan and inf, too, with which nothing can be computed.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f'{text!r} is not a finite number such as 0.1 or 1e-3')
    return value


def parse_epochs(text: str) -> float:
    """Parse a number of epochs, an int if it is a whole one: 5, 0.2.

    Raises:
        ArgumentTypeError: It is none.
    """
    value = parse_float(text)
    return int(value) if value == int(value) else value


def parse_milliseconds(text: str) -> float:
    """Parse a time, in milliseconds if it has no unit: 8, 8ms, 0.008s, 800us.

    Raises:
        ArgumentTypeError: It is none, or not positive.
    """
    number = text.strip().lower()
    factor = 1.0
    for unit, milliseconds in (('ms', 1.0), ('us', 1e-3), ('\u00b5s', 1e-3), ('s', 1e3)):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), milliseconds
            break
    try:
        value = parse_float(number) * factor
    except ArgumentTypeError:
        value = 0.0
    if value <= 0:
        raise ArgumentTypeError(f'{text!r} is not a time such as 8ms, 8 (milliseconds) or 0.5s')
    return value
