"""Files that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from .errors import RunError, UsageError, concise

__all__ = [
    'lock_file',
    'make_output_dir',
    'needs_room',
    'new_output_dir',
    'write_atomic',
    'write_dir_atomic',
    'write_text',
]


@contextmanager
def write_atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place at the end, and is removed after an exception.

    Args:
        path: File to write.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}.tmp{path.suffix}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def needs_room(what: str, advice: str = 'make room on the disk') -> Iterator[None]:
    """Turn what is raised where a file can't be written to its end into one sentence.

    Python raises an OSError there, torch a RuntimeError and safetensors an error of its own.

    Args:
        what: What is written.
        advice: What to do then.

    Raises:
        RunError: The block raised one of these; the cause is chained.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        raise RunError(f'{what} can not be written ({concise(e)}); {advice}') from e


def write_text(path: str | os.PathLike, content: str) -> None:
    """Write text as UTF-8, whole or not at all, and wait until it is on the disk.

    Args:
        path: File to write.
        content: The text, whose line ends are kept as they are.
    """
    with write_atomic(path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def lock_file(file: IO, *, inherited: bool = True) -> bool:
    """Lock an open file until it is closed or the process ends.

    Args:
        file: File that is open for writing.
        inherited: Child processes hold the lock, too. Without, closing any other handle of the file loses it.

    Returns:
        False if another process has locked it. True also where there are no locks: on Windows, on some file systems.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def write_dir_atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end, and is removed after an exception.

    Args:
        path: Folder to make; it may exist if it is empty.

    Raises:
        UsageError: The folder exists and holds something, which is never overwritten; or it is one that no other can
            take the place of.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f'{str(path)!r} exists already and is not overwritten; choose another folder or remove it')
    if path.is_dir():
        problem = 'the current folder' if path.samefile(os.curdir) else 'a mount point' if path.is_mount() else ''
        if problem:
            raise UsageError(
                f'{str(path)!r} is {problem}, which no other folder can take the place of; choose one inside it, such '
                f'as {str(path / "model")!r}'
            )
    if path.is_symlink():  # which stays, and what it leads to is made
        path = path.resolve()
    make_output_dir(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's own mode is for one user only
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_output_dir(path: str | os.PathLike) -> Path:
    """Make a folder and its parents.

    Raises:
        RunError: It can't be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise RunError(f'output folder {str(path)!r} can not be written: {e.strerror}; choose another one') from None
    return path


@contextmanager
def new_output_dir(path: str | os.PathLike) -> Iterator[Path]:
    """Make a folder and its parents; after an exception those that it made are removed, as far as they are empty.

    Args:
        path: Folder to make; it may exist.

    Raises:
        RunError: It can't be made or written to.
    """
    path = Path(path)
    # Path.exists would raise in a folder that can not be entered, of which make_output_dir tells
    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        yield make_output_dir(path)
    except BaseException:
        with suppress(OSError):  # it holds something
            for folder in missing:
                folder.rmdir()
        raise
