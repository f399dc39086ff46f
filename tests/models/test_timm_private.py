import ast
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / 'timm_mixpath'
GATHERED = PACKAGE / 'models' / '_timm.py'


def _imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of what a file imports from timm by `from`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return [(n.module, a.name) for n in nodes if not n.level and n.module.split('.')[0] == 'timm' for a in n.names]


@pytest.mark.parametrize('module, name', _imports(GATHERED))
def test_names_are_where_they_were(module: str, name: str) -> None:
    assert hasattr(import_module(module), name), (
        f'this timm has no {name} in {module}: change timm_mixpath/models/_timm.py, the one place that imports it'
    )


def test_no_other_file_imports_private_names() -> None:
    private = [
        f'{path.relative_to(PACKAGE)}: from {module} import {name}'
        for path in PACKAGE.glob('**/*.py')
        if path != GATHERED
        for module, name in _imports(path)
        if any(part.startswith('_') for part in [*module.split('.'), name])
    ]
    assert not private, f'private names of timm belong into models/_timm.py: {private}'
