"""The evaluations of a run on disk, such that a run that was cut off anywhere goes on where it stopped."""

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from ..utils.distributed import Ranks
from ..utils.errors import RunError, UsageError
from ..utils.files import lock_file, write_text

__all__ = ['Archive', 'evaluate_all', 'plain_metrics', 'read_config']


_VERSION = 1

# Entries of the fingerprint that archives of earlier versions do not have
_ADDED = ('mean', 'std', 'layers')

_T = TypeVar('_T')


class Archive:
    """Evaluations on disk: a header line, then one line of JSON per evaluation.

    The header tells what the evaluations depend on, so that those of one run are never taken for those of another.

    Args:
        path: The file, JSON lines.
        kind: What kind of run writes it, 'search' for example.
        config: What was asked for, JSON-ready.
        fingerprint: All that the evaluations depend on beside that (checkpoint, data, ...), JSON-ready.
        versions: Versions of what the run depends on, which are told and not compared.
        grows: Entry of `config` that may be larger than it was when the file was written, none if None.

    Attributes:
        path: The file.
        header: Its first line.

    Raises:
        UsageError: The fingerprint is not JSON-ready.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        kind: str,
        *,
        config: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
        versions: Mapping[str, str],
        grows: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._kind = kind
        self._grows = grows
        header = dict(
            format=f'timm-mixpath {kind} archive',
            version=_VERSION,
            fingerprint=dict(fingerprint),
            config=dict(config),
            versions=dict(versions),
        )
        try:
            # What comes back from disk has lists for tuples and text for keys
            self.header: dict[str, Any] = json.loads(json.dumps(header, allow_nan=False))
        except (TypeError, ValueError) as e:
            raise UsageError(f'the fingerprint can not be saved as JSON: {e}') from None
        self._file: io.TextIOWrapper | None = None

    def open(self) -> list[dict[str, Any]]:
        """Make the file if there is none, make it ready to be appended to, and return the records in it.

        Raises:
            UsageError: The file is no archive or of another run, or another process writes to it.
            RunError: It is damaged elsewhere than at its end.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()  # and lock, before anything is read
        text = self.path.read_bytes().decode(errors='replace')
        *lines, torn = text.split('\n')  # what is written last ends with a newline unless it was cut off
        if not lines and torn and not json.dumps(self.header).startswith(torn):
            raise self._no_archive()
        records: list[dict[str, Any]] = []
        header = self.header
        if lines:
            header = self._check_header(lines[0])
            for number, line in enumerate(lines[1:], 2):
                record = _parse(line)
                if record is None or not isinstance(record.get('metrics'), dict):
                    if number == len(lines):
                        torn = line  # a crash of the machine can leave rubbish of the full length
                        break
                    raise RunError(
                        f'archive {str(self.path)!r} is damaged in line {number}, delete that and later lines'
                    )
                records.append(record)
        if not lines or torn or header != self.header:
            content = ''.join(json.dumps(entry) + '\n' for entry in (self.header, *records))
            write_text(self.path, content)
            self.close()
            self._open()  # it is a new file
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, which has an entry `metrics`; it is on the disk when this returns."""
        self._file.write(json.dumps(record, allow_nan=False) + '\n')
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and end its lock."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self._file = open(self.path, 'a', encoding='utf-8', newline='\n')  # noqa: SIM115, closed by `close`
        self._lock()

    def _lock(self) -> None:
        """Refuse a second run on an archive; the lock ends with the process."""
        if not lock_file(self._file):
            raise UsageError(
                f'another {self._kind} is writing to {str(self.path)!r}, wait for it or choose another output'
            )

    def _no_archive(self) -> UsageError:
        return UsageError(f'{str(self.path)!r} is not a {self._kind} archive, choose another output')

    def _check_header(self, line: str) -> dict[str, Any]:
        header = _parse(line)
        if header is None or header.get('format') != self.header['format']:
            raise self._no_archive()
        remedy = f'choose another output or delete {str(self.path)!r}'
        if header.get('version') != _VERSION:
            raise UsageError(f'archive has format version {header.get("version")}, this is {_VERSION}: {remedy}')
        for part in ('fingerprint', 'config'):
            old, new = header.get(part) or {}, self.header[part]
            # What a digest is of often stands beside it, and says more
            for name in sorted(dict.fromkeys([*old, *new]), key=lambda name: name.endswith('_sha256')):
                before, now = (json.dumps(d[name]) if name in d else 'not given' for d in (old, new))
                if before == now or (name in _ADDED and name not in old):
                    continue
                if name == self._grows and part == 'config':
                    if new[name] > old[name]:
                        continue
                    raise UsageError(
                        f'the archive is of a {self._kind} with {before} {name.removeprefix("num_")}, now it is {now}, '
                        f'but the number can only grow: {remedy}'
                    )
                raise UsageError(f'{part} entry {name!r} was {before} in the archive and is {now} now: {remedy}')
        # Versions are told, not compared: most new versions change nothing here, and a change that does is noticed
        self.header['versions'] = header.get('versions')
        return header


def evaluate_all(
    todo: Sequence[_T],
    evaluate: Callable[[str], Mapping[str, Any]],
    *,
    records: Sequence[Mapping[str, Any]],
    restore: Callable[[_T, Mapping[str, Any]], _T],
    complete: Callable[[_T, Mapping[str, Any]], _T],
    keep: Callable[[_T], None],
    ranks: Ranks,
) -> list[_T]:
    """Evaluate archs in their order, those that an archive holds by reading its records.

    Args:
        todo: What is to be evaluated, with an attribute `arch`.
        evaluate: Returns the metrics of an arch.
        records: Records of the archive, of the first of `todo`; there may be more of them.
        restore: Completes one of `todo` with its record.
        complete: Completes one of `todo` with its metrics.
        keep: Keeps what was evaluated; called in rank 0, in order, before more is evaluated.
        ranks: Processes that share the evaluations.

    Returns:
        The completed ones, the same in all ranks.
    """
    done = [restore(one, record) for one, record in zip(todo, records)]
    for start in range(len(done), len(todo), ranks.num_at_once):
        chunk = todo[start : start + ranks.num_at_once]
        metrics = ranks.map(evaluate, [one.arch for one in chunk])
        found = [complete(one, m) for one, m in zip(chunk, metrics)]
        ranks.from_first(lambda found=found: [keep(one) for one in found])
        done += found
    return done


def plain_metrics(metrics: Mapping[str, Any], arch: str) -> dict[str, float | int | str | None]:
    """Return the metrics of an arch as an archive can hold them, None where a number is not finite.

    Args:
        metrics: Metrics by name, at least `top1` in percent and `loss`: numbers, text or None.
        arch: The arch, for messages.

    Raises:
        UsageError: A metric is of another type, `top1` or `loss` is missing, or `top1` is not a percentage.
    """
    values: dict[str, Any] = {}
    for name, value in metrics.items():
        if hasattr(value, 'item'):  # numpy and torch scalars
            value = value.item()
        if isinstance(value, Real) and not math.isfinite(value):
            value = None  # JSON has no NaN
        if not isinstance(value, (int, float, str, type(None))):
            raise UsageError(f'metric {name!r} of arch {str(arch)!r} is {value!r}, not a number or text')
        values[name] = value
    if missing := {'top1', 'loss'} - values.keys():
        raise UsageError(f'evaluate returned no {" and no ".join(sorted(missing))} for arch {str(arch)!r}')
    if values['top1'] is None or not 0 <= values['top1'] <= 100:
        raise UsageError(f'top1 of arch {str(arch)!r} is {metrics["top1"]!r}, not a percentage')
    return values


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Return what the run was asked for that an archive is of, nothing where there is none yet."""
    try:
        with open(path, encoding='utf-8') as f:
            header = _parse(f.readline()) or {}
    except (OSError, ValueError):
        return {}
    config = header.get('config')
    return config if isinstance(config, dict) else {}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
