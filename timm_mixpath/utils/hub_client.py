"""Files of a Hub repo, checked, and the errors of its client in one sentence each.

`huggingface_hub` checks the size of a download, not its content. Here a file has to have the hash under which the Hub
lists it.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..version import __version__
from .errors import RunError, UsageError, concise

__all__ = ['CONFIG_NAME', 'WEIGHTS_NAME', 'fetch_model', 'hub_errors']

_logger = logging.getLogger(__name__)


CONFIG_NAME = 'config.json'

WEIGHTS_NAME = 'model.safetensors'


def fetch_model(
    hub_id: str,
    weights: str | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    config_is_cached: bool = False,
) -> Path:
    """Bring config.json and weights of a Hub repo into the cache, both of the same commit, and check them.

    Args:
        hub_id: `ORG/NAME`, or `ORG/NAME@REVISION`.
        weights: File with the weights.
        cache_dir: Cache, that of huggingface_hub if None.
        config_is_cached: config.json has just been downloaded, so the commit is known without asking the Hub.

    Returns:
        Folder of the cache that holds them; its name is the commit.

    Raises:
        RunError: The repo or a file can't be had, or is not what the Hub says it is.
    """
    repo_id, _, revision = hub_id.partition('@')
    with hub_errors(hub_id):
        known = None
        if config_is_cached:
            known = try_to_load_from_cache(repo_id, CONFIG_NAME, cache_dir=cache_dir, revision=revision or None)
        if isinstance(known, str):
            if not _is_intact(Path(known), repo_id):
                # timm has parsed it already, so it can't be replaced any more
                _remove(Path(known))
                raise RunError(
                    f'{CONFIG_NAME} of {hub_id!r} was damaged in the cache or on the way and has been removed there; '
                    'load the model again'
                )
            config = Path(known)
        else:
            config = _fetch(repo_id, CONFIG_NAME, revision or None, cache_dir)
        return _fetch(repo_id, weights or WEIGHTS_NAME, config.parent.name, cache_dir).parent


def _fetch(repo_id: str, filename: str, revision: str | None, cache_dir: str | os.PathLike | None) -> Path:
    """Download a file into the cache, or find it there; damaged ones are removed and loaded once more."""

    def download() -> Path:
        path = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            library_name='timm-mixpath',
            library_version=__version__,
        )
        return Path(path)

    path = download()
    if _is_intact(path, repo_id):
        return path
    _remove(path)
    _logger.warning(f'{filename} of {repo_id!r} was damaged in the cache or on the way, loading it again')
    path = download()
    if _is_intact(path, repo_id):
        return path
    _remove(path)
    raise RunError(
        f'{filename} of {repo_id!r} arrived twice with another content than the Hub lists (its hash differs), and was '
        'not kept; try later or over another network, and tell the owner of the repo if it stays so'
    )


def _is_intact(path: Path, repo_id: str) -> bool:
    """Whether a file of the cache has the content that the Hub lists: its ETag is a hash of the content."""
    if path.is_symlink():
        etag = Path(os.readlink(path)).name
    else:  # no symbolic links on this file system; the Hub knows, if it can be asked
        try:
            url = hf_hub_url(repo_id, path.name, revision=path.parent.name)
            etag = get_hf_file_metadata(url, token=get_token()).etag or ''
        except (HTTPError, OSError):
            return True
    with open(path, 'rb') as f:
        if re.fullmatch('[0-9a-f]{64}', etag):
            return sha_fileobj(f).hex() == etag
        if re.fullmatch('[0-9a-f]{40}', etag):
            return git_hash(f.read()) == etag
    return True  # a mirror with ETags of its own


def _remove(path: Path) -> None:
    """Take a file out of the cache, with the blob behind it."""
    if path.is_symlink():
        path.parent.joinpath(os.readlink(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def hub_errors(hub_id: str, action: str = 'load', hint: str = 'try again later') -> Iterator[None]:
    """Turn the errors of huggingface_hub into one sentence each.

    Args:
        hub_id: Repo, with `@REVISION` where there is one.
        action: What is tried: 'load' or 'push to'.
        hint: What to do after an error that may pass.

    Raises:
        UsageError: The name can't be that of a repo.
        RunError: Anything else went wrong.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except HFValidationError:
        raise UsageError(f'{hub_id!r} is not the name of a Hub repo, which is ORG/NAME') from None
    except ValueError as e:  # before HTTPError: the Hub's validation of a card; a refused request is both
        if isinstance(e, HTTPError):
            raise RunError(f'can not {action} {hub_id!r}: {_reason(e, hint)}') from e
        raise UsageError(f'can not {action} {hub_id!r}: {" ".join(str(e).split())}') from e
    except (HTTPError, OSError, EntryNotFoundError, RuntimeError) as e:
        raise RunError(f'can not {action} {hub_id!r}: {_reason(e, hint)}') from e


def _reason(error: BaseException, hint: str) -> str:
    login = 'log in with `hf auth login` or set HF_TOKEN'
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # an upload in a thread
    cause: BaseException | None = error
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, OfflineModeIsEnabled):
            return 'offline mode is on (HF_HUB_OFFLINE) and it is not in the cache; load it once with a connection'
    if isinstance(cause, GatedRepoError):
        return f'the repo is gated; ask for access on its page, then {login} with a token of that account'
    if isinstance(cause, RepositoryNotFoundError):
        token = 'your token can not see it' if get_token() else f'it is private; {login}'
        return f'there is no such repo, or {token}'
    if isinstance(cause, RevisionNotFoundError):
        return 'the repo has no such revision'
    if isinstance(cause, EntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        name = str(getattr(cause.response, 'url', '')).rpartition('/')[2]
        return f'the repo has no {name}; other files than {CONFIG_NAME} and safetensors are not loaded'
    if isinstance(cause, OfflineModeIsEnabled):
        return 'offline mode is on (HF_HUB_OFFLINE)'
    if isinstance(cause, HfHubHTTPError):
        return _status_reason(cause, login, hint)
    if isinstance(cause, HTTPError) or isinstance(error, LocalEntryNotFoundError):
        return f'the Hub can not be reached ({concise(cause)}); check the connection and HF_ENDPOINT, or {hint}'
    if isinstance(cause, OSError) and 'onsistency check failed' in str(cause):
        return f'the file arrived incomplete and was not kept; {hint}'
    return f'{concise(cause)}; {hint}'


def _status_reason(error: HfHubHTTPError, login: str, hint: str) -> str:
    status = error.response.status_code
    said = getattr(error, 'server_message', None) or error.response.reason_phrase
    said = ' '.join(str(said).split()).rstrip('.')
    reasons: dict[int, Callable[[], str]] = {
        401: lambda: f'the Hub does not accept your token ({said}); {login} with a valid one',
        403: lambda: f'your token is not allowed to ({said}); {login} with a token that has this right',
        409: lambda: f'it is being changed by somebody else ({said}); {hint}',
        412: lambda: f'it was changed by somebody else in the meantime ({said}); {hint}',
        429: lambda: (
            f'too many requests; wait {error.response.headers.get("Retry-After", "some")} seconds, then {hint}'
        ),
    }
    if status in reasons:
        return reasons[status]()
    return f'the Hub answered {status} ({said}); {hint}'
