"""Publishing to the Hugging Face Hub: a repo's files, and the one commit that brings them there."""

import logging
import os
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..models.backbone import BackboneNet, BackboneSupernet
from ..models.cellnet import CellNet
from ..models.mixpath import MixPath
from ..models.pretrained import HUB_ORG, OFFICIAL_ORG, check_packaged, packaged_weights
from ..train.checkpoint import load_model, set_img_size, state_dict_sha256
from ..utils.errors import UsageError
from ..utils.files import write_dir_atomic
from ..utils.hub_client import hub_errors
from ..version import __version__
from .card import CardDetails, make_card
from .export import write_model
from .records import PLOT, find_label_names, read_results, read_search, read_training

__all__ = ['PushResult', 'push', 'push_packaged', 'write_packaged_repo', 'write_repo']

_logger = logging.getLogger(__name__)


_AGAIN = 'run the same command again, it goes on where it can'


@dataclass
class PushResult:
    """What a push did.

    Attributes:
        url: Page of the repo.
        commit: Commit that holds the files.
        created: The push made that commit; otherwise the repo held the same content already.
        files: Names of the files.
    """

    url: str
    commit: str
    created: bool
    files: list[str]


def write_repo(
    checkpoint: str | os.PathLike,
    repo_id: str,
    folder: str | os.PathLike,
    *,
    details: CardDetails | None = None,
    search: str | os.PathLike | None = None,
    results: str | os.PathLike | None = None,
    dtype: str | None = None,
    img_size: int | None = None,
    revision: str | None = None,
    like: Namespace | None = None,
) -> list[str]:
    """Write the files of a Hub repo into a folder: config.json, model.safetensors, README.md, pareto.png.

    The same input gives the same bytes.

    Args:
        checkpoint: Training checkpoint (its averaged weights, if it has them), model folder or `hf-hub:ORG/NAME`.
        repo_id: `ORG/NAME`. What stands behind a dot in NAME is the tag of the weights.
        folder: Folder to make.
        details: What the card says that neither checkpoint nor search know. The licence that a model folder or Hub
            repo names stays if there is no other.
        search: Output folder of the search that found the arch, or that searched this supernet.
        results: What timm's validate.py measured of the weights as they are stored, see `hub.records.read_results`.
        dtype: What the weights are stored as, see `hub.export.export`.
        img_size: Size of the images that the model is for, see `hub.export.export`.
        revision: Branch of the repo, the main one if None.
        like: What `checkpoint` is of, if it holds weights alone, see `load_model`.

    Returns:
        Names of the files.

    Raises:
        UsageError: A value is out of range, or checkpoint, search and results do not belong together.
        RunError: The checkpoint can't be read or the folder not be written.
    """
    check_repo_id(repo_id)
    details = details or CardDetails()
    loaded = load_model(checkpoint, like=like)
    set_img_size(loaded, img_size)
    model = loaded.model
    known = model.pretrained_cfg.get('license')  # of a model folder or Hub repo, which may say anything
    if details.license is None and isinstance(known, str):
        details = replace(details, license=known)
    if not isinstance(model, MixPath | CellNet | BackboneNet | BackboneSupernet):
        raise UsageError(
            f'{str(checkpoint)!r} holds {type(model).__name__}, which is not of timm-mixpath; publish it with '
            'timm.models.push_to_hf_hub'
        )
    training = read_training(Path(checkpoint), loaded)
    searched = None
    if search is not None:
        searched = read_search(Path(search), model, state_dict_sha256(model.state_dict()))
    validated = read_results(results, model) if results is not None else None
    # The cfg that the model was created with says neither: it is that of untrained weights
    tag = repo_id.partition('/')[2].partition('.')[2] or None
    cfg = {'tag': tag, 'license': details.license}
    with write_dir_atomic(folder) as temporary:
        write_model(model, temporary, loaded.data_config, find_label_names(loaded), cfg, dtype)
        card = make_card(repo_id, loaded, details, training, searched, validated, dtype=dtype, revision=revision)
        card.save(temporary / 'README.md')
        if searched is not None and searched.plot is not None:
            shutil.copyfile(searched.plot, temporary / PLOT)
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes for one user only
    return sorted(path.name for path in Path(folder).iterdir())


def push(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    details: CardDetails | None = None,
    search: str | os.PathLike | None = None,
    results: str | os.PathLike | None = None,
    dtype: str | None = None,
    img_size: int | None = None,
    message: str | None = None,
    token: str | None = None,
    like: Namespace | None = None,
) -> PushResult:
    """Publish a model or a supernet as a Hub repo, in one commit.

    The repo is made if it does not exist. A push that is cut off leaves it as it was and can be repeated; pushing
    what it holds already makes no commit. Files of other names stay, an existing card is replaced.

    Args:
        checkpoint: See `write_repo`.
        repo_id: `ORG/NAME`.
        private: Make a new repo private.
        revision: Branch, made if it does not exist; the main one if None.
        details: See `write_repo`.
        search: See `write_repo`.
        results: See `write_repo`.
        dtype: See `write_repo`.
        img_size: See `write_repo`.
        message: Commit message.
        token: Token with write access, that of `hf auth login` or of HF_TOKEN if None.
        like: See `write_repo`.

    Raises:
        UsageError: See `write_repo`; or there is no token, or `private` is asked of a repo that is public.
        RunError: See `write_repo`; or the Hub refused, or can't be reached.
    """
    check_repo_id(repo_id)
    token = _require_token(token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / 'repo'
        write_repo(
            checkpoint,
            repo_id,
            folder,
            details=details,
            search=search,
            results=results,
            dtype=dtype,
            img_size=img_size,
            revision=revision,
            like=like,
        )
        return _commit(folder, repo_id, private=private, revision=revision, message=message, token=token)


def write_packaged_repo(name: str, repo_id: str, folder: str | os.PathLike) -> list[str]:
    """Write the files of a Hub repo of weights that ship inside the package into a folder.

    Args:
        name: `<model>.<tag>`, a key of `models.pretrained.packaged_weights`.
        repo_id: `ORG/NAME`, which the card names.
        folder: Folder to make; one that holds these very files is left as it is.

    Returns:
        Names of the files.

    Raises:
        UsageError: The folder exists and holds something else.
        RunError: The weights are missing or damaged, or the folder can't be written.
    """
    source, folder = check_packaged(name), Path(folder)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files['README.md'] = files['README.md'].replace(f'{OFFICIAL_ORG}/{name}'.encode(), repo_id.encode())
    if not (folder.is_dir() and files == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}):
        with write_dir_atomic(folder) as temporary:
            for file, content in files.items():
                (temporary / file).write_bytes(content)
    return sorted(files)


def push_packaged(
    org: str = HUB_ORG, *, private: bool = False, message: str | None = None, token: str | None = None
) -> Iterator[PushResult]:
    """Publish all weights that ship inside the package, one repo `ORG/<model>.<tag>` each, in one commit each.

    Where it is cut off, repos are whole or untouched; the same call goes on, as what a repo holds makes no commit.

    Args:
        org: Organisation or user.
        private: See `push`.
        message: See `push`.
        token: See `push`.

    Returns:
        What was done with each repo, made as it is iterated.

    Raises:
        UsageError: See `push`.
        RunError: See `push`; or weights of this installation are missing or damaged. Then nothing is pushed.
    """
    names = packaged_weights()
    for name in names:
        check_repo_id(f'{org}/{name}')
        check_packaged(name)
    token = _require_token(token)

    def push_all() -> Iterator[PushResult]:
        for name in names:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / 'repo'
                write_packaged_repo(name, f'{org}/{name}', folder)
                yield _commit(folder, f'{org}/{name}', private=private, revision=None, message=message, token=token)

    return push_all()


def _require_token(token: str | None) -> str:
    token = token or get_token()
    if token is None:
        raise UsageError('a push needs a token with write access: `hf auth login`, or set HF_TOKEN')
    return token


def _commit(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str | None, token: str
) -> PushResult:
    """Bring the files of a folder into a repo, in one commit."""
    target = repo_id + (f'@{revision}' if revision else '')
    files = sorted(path.name for path in folder.iterdir())
    api = HfApi(token=token, library_name='timm-mixpath', library_version=__version__)
    with hub_errors(target, 'push to', _AGAIN):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise UsageError(
                f'{repo_id!r} exists and is public, so --private can not hold; make it private in its settings '
                'first, or choose another name'
            )
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision).sha
        # The parent makes the Hub refuse the commit if somebody else has pushed in the meantime
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message or f'Push with timm-mixpath {__version__}',
            parent_commit=head,
        )
    return PushResult(f'{api.endpoint}/{repo_id}', commit.oid, commit.oid != head, files)


def check_repo_id(repo_id: str) -> None:
    """Raise UsageError for what is not `ORG/NAME`."""
    try:
        validate_repo_id(repo_id)
        if '/' in repo_id:
            return
        problem = 'it has no organisation or user in front'
    except HFValidationError as e:
        problem = re.split(r"[:.] (?=')|: '", str(e))[0].rstrip('.')
    raise UsageError(f'{repo_id!r} is not the name of a Hub repo, ORG/NAME: {problem}')
