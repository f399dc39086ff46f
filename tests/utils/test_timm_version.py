import subprocess
import sys
from pathlib import Path

import pytest
import timm
from commands import HUNG

from timm_mixpath.utils.timm_version import check_timm


@pytest.mark.parametrize('version', ['1.0.31', '1.0.32.dev0', '1.1.0', '2.0'])
def test_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, '__version__', version)
    check_timm()


@pytest.mark.parametrize('version', ['1.0.30', '1.0.9', '0.9.16', '1.0.16.dev0'])
def test_folder_of_an_older_clone_beside_train_py(version: str, tmp_path: Path) -> None:
    """`python train.py` finds the clone's timm first; it is not the installed one, and lacks what is imported here."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text(f'__version__ = {version!r}\n')
    (tmp_path / 'train.py').write_text('try:\n    import timm_mixpath.hook\nexcept ImportError as e:\n    print(e)\n')
    run = subprocess.run([sys.executable, 'train.py'], cwd=tmp_path, capture_output=True, text=True, timeout=HUNG)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    assert line.startswith(f'timm_mixpath needs timm 1.0.31 or later, but Python found {version} in ')
    assert str(tmp_path / 'timm') in line and 'copy its train.py' in line
