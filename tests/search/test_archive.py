"""What runs of any kind need of an archive; that a search can be cut off anywhere is in test_search.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from timm_mixpath.search.archive import Archive, plain_metrics
from timm_mixpath.utils.errors import UsageError


def make(path: Path, kind: str = 'ranking', *, num_archs: int = 3, grows: str | None = 'num_archs', **fingerprint):
    config = dict(seed=0, num_archs=num_archs)
    return Archive(path, kind, config=config, fingerprint=fingerprint, versions={'numpy': '2'}, grows=grows)


def fill(archive: Archive, *names: str) -> list[dict]:
    try:
        known = archive.open()
        for name in names:
            archive.append(dict(arch=name, metrics={'top1': 1.0}))
        return known
    finally:
        archive.close()


def test_append_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'a'
    assert fill(make(path, x=(1, 2)), 'one', 'two') == []
    archive = make(path, x=[1, 2])
    assert [r['arch'] for r in fill(archive, 'three')] == ['one', 'two']
    header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == archive.header and header['format'] == 'timm-mixpath ranking archive'
    assert [r['arch'] for r in records] == ['one', 'two', 'three']


def test_growth(tmp_path: Path) -> None:
    path = tmp_path / 'a'
    fill(make(path), 'one')
    with pytest.raises(UsageError, match="config entry 'num_archs' was 3 in the archive and is 5 now"):
        make(path, num_archs=5, grows=None).open()
    fill(make(path, num_archs=5), 'two')
    assert json.loads(path.read_text().splitlines()[0])['config']['num_archs'] == 5
    with pytest.raises(UsageError, match='archive is of a ranking with 5 archs, now it is 3, but the number can only'):
        make(path).open()


def test_entries_that_earlier_versions_did_not_have(tmp_path: Path) -> None:
    path = tmp_path / 'a'
    fill(make(path), 'one')
    assert [r['arch'] for r in fill(make(path, mean=[0.5] * 3), 'two')] == ['one']
    with pytest.raises(UsageError, match=r"entry 'mean' was \[0.5, 0.5, 0.5\] in the archive and is \[0.4, 0.5, 0.5\]"):
        make(path, mean=[0.4, 0.5, 0.5]).open()
    with pytest.raises(UsageError, match=r"'mean' was .* and is not given now"):
        make(path).open()
    with pytest.raises(UsageError, match="entry 'x' was not given in the archive"):
        make(path, mean=[0.5] * 3, x=1).open()


def test_one_kind_does_not_go_on_with_another(tmp_path: Path) -> None:
    path = tmp_path / 'a'
    fill(make(path, 'search'), 'one')
    content = path.read_bytes()
    with pytest.raises(UsageError, match='is not a ranking archive, choose another output'):
        make(path).open()
    assert path.read_bytes() == content


def test_second_writer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip('fcntl')
    first = make(tmp_path / 'a')
    first.open()
    with pytest.raises(UsageError, match='another ranking is writing to'):
        make(tmp_path / 'a').open()
    first.close()
    make(tmp_path / 'a').open()


def test_plain_metrics() -> None:
    metrics = plain_metrics({'top1': np.float32(50), 'loss': math.inf, 'note': 'x', 'other': np.int64(3)}, 'a')
    assert metrics == {'top1': 50.0, 'loss': None, 'note': 'x', 'other': 3}
    assert json.loads(json.dumps(metrics)) == metrics
