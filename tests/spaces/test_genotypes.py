"""The registered genotypes are those that the recorded searches chose."""

import json
import re
from pathlib import Path

import pytest
import timm

from timm_mixpath import get_space
from timm_mixpath.models.cost import CostTable, cost_table
from timm_mixpath.spaces import genotypes

RECORDS = Path(__file__).parents[2] / 'recipes' / 'genotypes'
SPACES = {'a': ('s3', 1), 'b': ('s2', 2), 'c': ('s1', 4)}


@pytest.mark.parametrize('letter', SPACES)
def test_genotype_is_what_the_recorded_search_chose(letter):
    folder = RECORDS / f'mixpath_{letter}'
    front = json.loads((folder / 'front.json').read_text())
    header, *lines = map(json.loads, (folder / 'archive.jsonl').read_text().splitlines())
    genotype = getattr(genotypes, f'MIXPATH_{letter.upper()}')
    name, m = SPACES[letter]
    assert (front['space'], front['max_paths']) == (name, m)
    (chosen,) = [c for c in front['front'] if c['chosen']]
    assert chosen['arch'] == genotype
    assert get_space(name, m).arch(genotype) == genotype

    # The front belongs to the archive: same search, all evaluations, the lowest error was chosen
    assert front['fingerprint'] == header['fingerprint']
    assert front['config'] == header['config']
    assert [line['index'] for line in lines] == list(range(front['num_evaluations']))
    assert lines[chosen['index']]['arch'] == genotype
    assert chosen['metrics']['top1'] == max(line['metrics']['top1'] for line in lines)
    assert header['fingerprint']['holdout'] > 0

    # Costs are those of the model that is registered
    table = CostTable(get_space(name, m).scaled(0.25 if letter == 'c' else 1.0))
    for line in lines[:: len(lines) // 10]:
        assert (line['macs'], line['params']) == (table.macs(line['arch']), table.params(line['arch']))
    assert (folder / 'pareto.png').read_bytes()[:4] == b'\x89PNG'


def test_genotype_around_a_backbone_is_what_the_recorded_search_chose():
    folder = RECORDS / 'mixpath_lite0'
    front = json.loads((folder / 'front.json').read_text())
    header, *lines = map(json.loads, (folder / 'archive.jsonl').read_text().splitlines())
    supernet = timm.create_model('mixpath_supernet', backbone='tf_efficientnet_lite0', num_classes=10, device='meta')
    assert (front['space'], front['max_paths']) == (supernet.space.name, supernet.space.max_paths)
    (chosen,) = [c for c in front['front'] if c['chosen']]
    assert chosen['arch'] == genotypes.MIXPATH_LITE0
    assert lines[chosen['index']]['arch'] == genotypes.MIXPATH_LITE0
    assert front['fingerprint'] == header['fingerprint'] and front['config'] == header['config']
    assert len(lines) == front['num_evaluations']
    assert chosen['metrics']['top1'] == max(line['metrics']['top1'] for line in lines)
    table = cost_table(supernet, tuple(header['fingerprint']['cost_input_size']))
    for line in lines[:: len(lines) // 10]:
        assert (line['macs'], line['params']) == (table.macs(line['arch']), table.params(line['arch']))
    assert chosen['macs'] <= table.macs(supernet.space.default_arch)


@pytest.mark.parametrize('letter', [*SPACES, 'lite0'])
def test_record_tells_the_genotype(letter):
    text = (RECORDS / 'README.md').read_text()
    assert getattr(genotypes, f'MIXPATH_{letter.upper()}') in text
    assert re.search(rf'## mixpath_{letter}\b', text)
    assert f'mixpath_{letter}/pareto.png' in text
