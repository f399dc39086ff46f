"""What was chosen in every block of a search space: the genotype of a sub-network.

The text form follows timm's own notation. One block reads `k3+7_e6`: depthwise kernels 3 and 7 in parallel, their
outputs summed, behind an expansion of 6. `.` separates channel groups (`k3.5_e6`: 3x3 on the first half of the
channels, 5x5 on the second) and `,` joins blocks. An expansion may be a decimal number (`k3_e4.5`), and a block that is
left out, of which the identity remains, reads `skip`. There is nothing in it that a shell or `ast.literal_eval` would
touch, so an arch passes unquoted through `--model-kwargs arch=...`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any

from ..utils.numbers import as_whole

__all__ = ['SKIP', 'Arch', 'BlockChoice', 'cached_choice', 'check_expand_ratio', 'check_vector']


_BLOCK_RE = re.compile(r'k(?P<kernels>[^_]*)_e(?P<expand>[^_]*)')

_SKIP = 'skip'

_MAX_DECIMALS = 4  # of an expansion

_EXAMPLE = "for example 'k3_e6', 'k3+7_e3' or 'k3.5+7_e6'"


@dataclass(frozen=True)
class BlockChoice:
    """The paths of one choice block.

    Attributes:
        groups: Kernel sizes of the active paths, one ascending tuple per channel group. The paths of a group are
            summed, groups are concatenated. Empty for a block that is skipped, as in `SKIP`.
        expand_ratio: Expansion of the inverted bottleneck, 0 for a block that is skipped.

    Raises:
        ValueError: A kernel is not an odd positive integer or stands twice in a group, a group is empty, or the
            expansion is not a positive number of at most four decimals.
    """

    groups: tuple[tuple[int, ...], ...]
    expand_ratio: int | float

    def __post_init__(self) -> None:
        if self.is_skip and self.expand_ratio == 0:
            return
        if not self.groups or not all(self.groups):
            raise ValueError('every channel group needs at least one kernel')
        for group in self.groups:
            for kernel_size in group:
                if type(kernel_size) is not int or kernel_size < 1 or kernel_size % 2 == 0:
                    raise ValueError(f'kernel {kernel_size!r} is not an odd positive integer')
                if group.count(kernel_size) > 1:
                    raise ValueError(f'kernel {kernel_size} is given twice, a path can be active once')
        object.__setattr__(self, 'expand_ratio', check_expand_ratio(self.expand_ratio))
        # The sum does not depend on the order of its paths, so neither do equality and hash.
        object.__setattr__(self, 'groups', tuple(tuple(sorted(group)) for group in self.groups))

    @property
    def num_paths(self) -> tuple[int, ...]:
        """Number of active paths, per channel group."""
        return tuple(len(group) for group in self.groups)

    @property
    def is_skip(self) -> bool:
        """Whether the block is left out: no path at all, only the residual connection."""
        return not self.groups

    @cached_property
    def _text(self) -> str:
        if self.is_skip:
            return _SKIP
        kernels = '.'.join('+'.join(str(k) for k in group) for group in self.groups)
        return f'k{kernels}_e{self.expand_ratio}'

    def __str__(self) -> str:
        return self._text

    @classmethod
    def parse(cls, text: str) -> 'BlockChoice':
        """Parse the text form of one block.

        Raises:
            ValueError: The text is neither `skip` nor of the form `k<kernels>_e<expansion>`.
        """
        if text.strip() == _SKIP:
            return SKIP
        match = _BLOCK_RE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text.strip()!r} is not of the form 'k<kernels>_e<expansion>', {_EXAMPLE}")
        groups = tuple(
            tuple(_parse_int(token, 'kernel') for token in group.split('+')) for group in match['kernels'].split('.')
        )
        expand = match['expand']
        if '.' in expand:
            if not re.fullmatch(f'[0-9]{{1,4}}\\.[0-9]{{1,{_MAX_DECIMALS}}}', expand):
                raise ValueError(f'expansion {expand!r} is not a number of 1 to 4 digits and up to 4 decimals')
            return cls(groups, float(expand))
        return cls(groups, _parse_int(expand, 'expansion'))


SKIP = BlockChoice((), 0)


# For what makes choices by the thousand, such as sampling and a search: checking and formatting one is what takes time
cached_choice = lru_cache(maxsize=100_000)(BlockChoice)


def check_expand_ratio(value: int | float) -> int | float:
    """Return an expansion in its one form: an int where it is whole.

    Raises:
        ValueError: It is not positive, not a number, or has too many decimals to be written in an arch.
    """
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 10_000 and round(value, _MAX_DECIMALS) == value:
        return as_whole(float(value))
    raise ValueError(f'expansion {value!r} is not a positive integer, nor a positive number of at most 4 decimals')


def _parse_int(token: str, what: str) -> int:
    # int() would also take '+3', ' 3', '1_0' and digits of other scripts, which do not round-trip
    if not re.fullmatch('[0-9]{1,4}', token):
        raise ValueError(f'{what} {token!r} is not a number of 1 to 4 digits')
    return int(token)


def check_vector(vector: Sequence[int], sizes: Sequence[int], space_name: str) -> None:
    """Check that an integer vector has an entry per gene of a space, and every entry one of its values.

    Raises:
        ValueError: Wrong length, or an entry out of range.
    """
    if len(vector) != len(sizes):
        raise ValueError(f'vector has {len(vector)} entries, space {space_name!r} needs {len(sizes)}')
    for position, (value, size) in enumerate(zip(vector, sizes)):
        if not isinstance(value, Integral) or not 0 <= value < size:
            raise ValueError(f'entry {position} of the vector is {value!r}, allowed are 0 to {size - 1}')


class Arch(str):
    """An architecture: one `BlockChoice` per block.

    An `Arch` is its own canonical text. That makes it hashable, comparable with text, and lets it travel wherever
    timm lets a string travel: `create_model(..., arch=arch)`, `config.json`, a command line.

    Args:
        text: Text form, blocks joined by `,`.

    Raises:
        ValueError: The text is malformed; the message names the block, the token and what is allowed.

    Examples:

        ```python
        >>> arch = Arch.parse('k7+3_e6,k5_e3')
        >>> str(arch)
        'k3+7_e6,k5_e3'
        >>> arch.blocks[0].groups, arch.blocks[0].num_paths
        (((3, 7),), (2,))
        ```
    """

    blocks: tuple[BlockChoice, ...]

    def __new__(cls, text: str) -> 'Arch':
        if isinstance(text, Arch):
            return text
        if not isinstance(text, str):
            raise ValueError(f'an arch is text, {_EXAMPLE}, not {type(text).__name__}')
        choices: list[BlockChoice] = []
        for index, block in enumerate(text.split(',')):
            try:
                choices.append(BlockChoice.parse(block))
            except ValueError as e:
                raise ValueError(f'arch block {index} ({block.strip()!r}): {e}') from None
        return cls.from_blocks(choices)

    @classmethod
    def from_blocks(cls, blocks: Iterable[BlockChoice]) -> 'Arch':
        """Make an arch of block choices."""
        blocks = tuple(blocks)
        if not blocks:
            raise ValueError('an arch needs at least one block')
        arch = str.__new__(cls, ','.join(str(block) for block in blocks))
        arch.blocks = blocks
        return arch

    @classmethod
    def parse(cls, text: str) -> 'Arch':
        """Parse the text form, see the class."""
        return cls(text)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, the inverse of `from_dict`."""
        return {
            'blocks': [
                {'kernel_sizes': [list(group) for group in block.groups], 'expand_ratio': block.expand_ratio}
                for block in self.blocks
            ]
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> 'Arch':
        """Make an arch of the dict that `to_dict` gives.

        Raises:
            ValueError: A key is missing or a value is out of range.
        """
        try:
            blocks = [
                BlockChoice(tuple(tuple(group) for group in block['kernel_sizes']), block['expand_ratio'])
                for block in config['blocks']
            ]
        except (KeyError, TypeError) as e:
            raise ValueError(
                f"an arch dict looks like {{'blocks': [{{'kernel_sizes': [[3, 7]], 'expand_ratio': 6}}]}}: {e!r}"
            ) from None
        return cls.from_blocks(blocks)

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> 'Arch':
        """Parse the text that `to_json` gives."""
        return cls.from_dict(json.loads(text))

    def __getnewargs__(self) -> tuple[str]:
        return (str(self),)

    def __str__(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return f'Arch({str(self)!r})'
