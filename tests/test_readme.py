"""What the README shows is run as it is written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from commands import HUNG, environment

from timm_mixpath import get_space, list_spaces
from timm_mixpath.cli.entry import _build_parser
from timm_mixpath.models.pretrained import PACKAGED
from timm_mixpath.utils.recipes import find_recipe, list_recipes

README = Path(__file__).parents[1] / 'README.md'
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README.read_text(), re.DOTALL)


@pytest.mark.parametrize('mark', ["timm.list_models('mixpath*')", 'list_backbones', 'class TwoPaths', '# my_space.py'])
def test_python_block(mark: str) -> None:
    (block,) = [text for language, text in BLOCKS if language == 'python' and mark in text]
    scope: dict = {}
    exec(block, scope)
    if 'list_models' in mark:
        assert scope['subnet'].arch == scope['supernet'].active_arch
        shown = re.findall(r"'(mixpath\w*)'", block.split('# [')[1].split(']')[0])
        # in a process of its own, as other tests have registered spaces
        code = "import timm, timm_mixpath; print(*timm.list_models('mixpath*'))"
        known = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
        assert shown == known
    if 'my_space' in mark:
        assert 'mine' in list_spaces() and timm.is_model('mixpath_mine_supernet')


def test_job_in_python(digits: Path, tmp_path: Path) -> None:
    """The example of a training and a search, shorter and with other images."""
    (block,) = [text for language, text in BLOCKS if language == 'python' and 'search_checkpoint' in text]
    for shown, here in (
        ("'data'", repr(str(digits))),
        ('epochs=20, device=None', "epochs=1, device='cpu', batch_size=32"),
        ('generations=10', 'generations=1, population=4, offspring=2'),
    ):
        assert shown in block
        block = block.replace(shown, here)
    (tmp_path / 'job.py').write_text(block)
    done = subprocess.run(
        [sys.executable, 'job.py'], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr[-2000:]
    arch, error = done.stdout.splitlines()[-1].split()
    assert get_space('nano').arch(arch) and 0 <= float(error) <= 100
    assert (tmp_path / 'output' / 'search' / 'front.json').exists()


def test_example_of_a_photograph(capsys: pytest.CaptureFixture) -> None:
    """The first example prints what it says."""
    block = next(text for language, text in BLOCKS if language == 'python')
    exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed and [f'# {line}' for line in printed] == [line for line in block.splitlines() if line[:2] == '# ']


def test_list_of_pretrained_is_what_timm_lists() -> None:
    (block,) = [text for language, text in BLOCKS if language == 'python' and 'timm.list_pretrained(' in text]
    listed = re.search(r'(?:^# .*\n)+', block, re.MULTILINE)[0]
    shown = eval(listed.replace('# ', ''))
    assert shown == timm.list_pretrained('mixpath*')


def test_recipe_does_not_depend_on_what_the_packaged_weights_are_for() -> None:
    """The defaults of a model are those of its weights; a recipe says its own."""
    packaged = {name.partition('.')[0] for name in PACKAGED}
    for recipe in list_recipes():
        options = yaml.safe_load(find_recipe(recipe).read_text())
        if options['model'] in packaged:
            assert {'num_classes', 'img_size'} <= options.keys(), recipe


@pytest.mark.parametrize(
    'path', [README, *sorted(README.parent.glob('recipes/**/README.md'))], ids=lambda p: p.parent.name
)
def test_commands_parse(path: Path) -> None:
    """Every timm-mixpath line is accepted by the parser, up to running it."""
    blocks = re.findall(r'```(\w+)\n(.*?)```', path.read_text(), re.DOTALL)
    lines = '\n'.join(text for language, text in blocks if language == 'bash').replace('\\\n', ' ').splitlines()
    commands = [line.split('#')[0].split('timm-mixpath ')[-1] for line in lines if 'timm-mixpath ' in line]
    assert commands
    parser, _ = _build_parser()
    for command in commands:
        words = [w for w in shlex.split(command.replace('$algorithm', 'random').replace('$seed', '0')) if w != 'DATA']
        args = parser.parse_args(words)
        if getattr(args, 'config', None):
            assert args.config in list_recipes()
