"""The YAML recipes that come with the package, found by name."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError
from .files import make_output_dir, write_atomic

__all__ = ['copy_recipe', 'find_recipe', 'list_recipes', 'model_recipes', 'recipe_dir']


def recipe_dir() -> Path:
    """Return the folder of the recipes: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / 'recipes'
    return installed if installed.is_dir() else package.parent / 'recipes'


def list_recipes() -> dict[str, str]:
    """Return name -> first line of the header, sorted by name."""
    recipes = {}
    for path in sorted(recipe_dir().glob('*.yaml')):
        first = path.read_text().splitlines()[0]
        recipes[path.stem] = first.lstrip('# ') if first.startswith('#') else ''
    return recipes


def find_recipe(name: str) -> Path:
    """Return the path of a recipe.

    Args:
        name: Path of a YAML file, or the name of a recipe of the package.

    Raises:
        UsageError: Neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = list_recipes()
    stem = path.name.removesuffix('.yaml')
    if stem in known and len(path.parts) <= 2 and path.parent.name in ('', 'recipes'):
        return recipe_dir() / f'{stem}.yaml'
    raise UsageError(f'recipe {name!r} is neither a file nor one of {", ".join(known)}')


def model_recipes(model: str) -> dict[str, dict[str, Any]]:
    """Return name -> options of the recipes for a model, sorted by name."""
    recipes = {name: yaml.safe_load((recipe_dir() / f'{name}.yaml').read_text()) for name in list_recipes()}
    return {name: options for name, options in recipes.items() if options.get('model') == model}


def copy_recipe(name: str, folder: str) -> Path:
    """Copy a recipe into a folder and return its new path.

    Raises:
        UsageError: Unknown recipe, or the file exists already.
    """
    source = find_recipe(name)
    target = make_output_dir(folder) / source.name
    if target.exists():
        raise UsageError(f'{str(target)!r} exists already and is not overwritten')
    with write_atomic(target) as path:
        shutil.copyfile(source, path)
    return target
