"""timm's own tests/test_models.py, unmodified, for every MixPath model.

The file comes from the sdist of the installed timm, which pip fetches into the user's cache once.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import timm
from commands import environment
from timm_suite import ON_BACKBONES, SUPERNET_SKIPS

from timm_mixpath.models.pretrained import PACKAGED

EVERY_TEST = {
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs',
    'test_model_forward_torchscript',
    'test_model_forward_features',
    'test_model_forward_intermediates_features',
    'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}


@pytest.fixture(scope='module')
def timm_sdist() -> Path:
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_mixpath'
    sdist = cache / f'timm-{timm.__version__}.tar.gz'
    if sdist.exists():
        return sdist
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', 'timm', '--dest', folder]
        command += ['--quiet', '--disable-pip-version-check', '--timeout', '5', '--retries', '0']
        command += [f'timm=={timm.__version__}']
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip(f'pip does not get the sdist of timm {timm.__version__} within two minutes')
        files = list(Path(folder).glob('timm-*.tar.gz'))
        if not files:
            reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
            pytest.skip(f'needs the sdist of timm {timm.__version__}, which pip could not get: {reason}')
        files[0].replace(sdist)
    return sdist


def run_timm_tests(sdist: Path, folder: Path, select: str) -> dict[str, dict[str, str]]:
    """Outcome (passed, failed or skipped) per test per model."""
    with tarfile.open(sdist) as tar:
        for name in ('pyproject.toml', 'tests/test_models.py'):  # timm itself stays the installed one
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(tar.extractfile(f'timm-{timm.__version__}/{name}').read())
    command = [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-p', 'timm_suite', '-k', select]
    command += ['-q', '--tb=short', '-W', 'ignore', '-p', 'no:cacheprovider', '--junit-xml=results.xml']
    env = environment()
    for name in ('PYTEST_ADDOPTS', 'GITHUB_ACTIONS'):  # timm's file leaves tests out on its own CI
        env.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-10_000:]
    outcomes: dict[str, dict[str, str]] = {}
    for case in ET.parse(folder / 'results.xml').iter('testcase'):
        test, model = re.fullmatch(r'(\w+)\[(?:\d+-)?(\w+)(?:\.\w+)?\]', case.get('name')).groups()
        outcome = 'passed'
        if len(case):
            outcome = 'skipped' if case.find('skipped') is not None else 'failed'
        outcomes.setdefault(model, {})[test] = outcome
    return outcomes


def check(outcomes: dict[str, dict[str, str]]) -> None:
    print(f'\n{"":24}{"passed":>8}{"failed":>8}{"skipped":>8}   timm {timm.__version__}, tests/test_models.py')
    for model, results in outcomes.items():
        counts = Counter(results.values())
        print(f'{model:24}' + ''.join(f'{counts[key]:8}' for key in ('passed', 'failed', 'skipped')))
    for model, results in outcomes.items():
        skips = set(SUPERNET_SKIPS) if model.endswith('_supernet') else set()
        expected = {test: 'skipped' if test in skips else 'passed' for test in EVERY_TEST}
        if model in {name.partition('.')[0] for name in PACKAGED}:
            expected |= dict.fromkeys(('test_model_load_pretrained', 'test_model_features_pretrained'), 'passed')
        assert results == expected, model


def test_timm_tests_of_the_small_models(timm_sdist: Path, tmp_path: Path) -> None:
    outcomes = run_timm_tests(timm_sdist, tmp_path, 'mixpath_nano')
    assert set(outcomes) == {'mixpath_nano', 'mixpath_nano_supernet'}
    check(outcomes)


@pytest.mark.slow
def test_timm_tests_of_every_model(timm_sdist: Path, tmp_path: Path) -> None:
    outcomes = run_timm_tests(timm_sdist, tmp_path, 'mixpath')
    spaces = ('s1', 's2', 's3', 'nano', 'nb101', 'nb201')
    names = {f'mixpath_{space}{suffix}' for space in spaces for suffix in ('', '_supernet')}
    names |= {'mixpath_a', 'mixpath_b', 'mixpath_c', 'mixpath_lite0', 'mixpath', 'mixpath_supernet'}
    assert set(outcomes) >= names | set(ON_BACKBONES)
    check(outcomes)
