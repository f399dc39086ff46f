"""Folders that are made whole or not at all."""

from pathlib import Path

import pytest

from timm_mixpath.utils.errors import UsageError
from timm_mixpath.utils.files import write_dir_atomic


def write(path: Path | str) -> None:
    with write_dir_atomic(path) as folder:
        (folder / 'file').write_text('x')


@pytest.mark.parametrize('path', ['.', './', '../here', '{here}'])
def test_current_folder_is_not_replaced(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be gone for whoever stands in it."""
    here = tmp_path / 'here'
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(UsageError, match=r"is the current folder, .* choose one inside it, such as '.*model'"):
        write(path.format(here=here))
    assert list(here.iterdir()) == [] and list(tmp_path.iterdir()) == [here]
    write('model')
    assert (here / 'model' / 'file').read_text() == 'x'


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    for name, exists in (('there', True), ('not yet', False)):
        target, link = tmp_path / name, tmp_path / f'{name} link'
        if exists:
            target.mkdir()
        link.symlink_to(target)
        write(link)
        assert link.is_symlink() and (target / 'file').read_text() == 'x'
    with pytest.raises(UsageError, match='exists already and is not overwritten'):
        write(tmp_path / 'there link')
