"""Tables of stand-alone accuracies: what is read, what is left out and said, and what is refused."""

import csv
import io
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_mixpath import get_space, sample
from timm_mixpath.analysis.accuracy_table import read_table
from timm_mixpath.analysis.arch_lists import read_archs
from timm_mixpath.utils.errors import UsageError

NANO = get_space('nano')
ARCHS = [str(sample(NANO, seed=1, step=i)) for i in range(40)]


class Letters:
    """A space whose archs hold all that a CSV file gives a meaning to, and more: a benchmark may spell them so."""

    name = 'letters'
    known = tuple(f'|a~{i}|+|b,"c"~{i}|' for i in range(200))

    def arch(self, text: str) -> str:
        if text not in self.known:
            raise ValueError(f'unknown arch {text!r}')
        return text


def write(path: Path, rows: list, header: tuple = ('arch', 'accuracy')) -> Path:
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows([header, *rows])
    return path


def rows(num: int = 20) -> list[tuple[str, float]]:
    return [(arch, 50 + i / 4) for i, arch in enumerate(ARCHS[:num])]


def error(path: Path, **kwargs) -> str:
    with pytest.raises(UsageError) as e:
        read_table(path, NANO, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_read(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / 't.csv', rows()), NANO)
    assert list(zip(table.archs, table.accuracies)) == rows()
    assert (table.arch_column, table.accuracy_column, table.num_rows, table.left_out) == ('arch', 'accuracy', 20, ())
    assert len(table) == 20
    # the same archs and accuracies in another file, spelled in another way
    text = '\ufeff id , arch , accuracy \r\n\r\n' + ''.join(
        f'{i}," {a} ",{v:.3f}\r\n' for i, (a, v) in enumerate(rows())
    )
    (tmp_path / 'u.csv').write_text(text, encoding='utf-8', newline='')
    assert read_table(tmp_path / 'u.csv', NANO).sha256 == table.sha256
    other = [*rows()[:-1], (ARCHS[19], 1)]
    assert read_table(write(tmp_path / 'v.csv', other), NANO).sha256 != table.sha256


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / 't.csv'
    header = ('val_acc_36', 'ops', 'val_acc_108', 'mine', 'cell')
    write(path, [(1, a, v, v + 1, a) for a, v in rows()], header)
    table = read_table(path, NANO)
    assert (table.arch_column, table.accuracy_column) == ('cell', 'val_acc_108')
    table = read_table(path, NANO, arch_column='ops', accuracy_column='mine')
    assert (table.arch_column, table.accuracy_column, table.accuracies[0]) == ('ops', 'mine', 51)
    assert "no column 'genotype' to take the arch from, its first line names 'val_acc_36', 'ops'" in error(
        path, arch_column='genotype'
    )
    assert error(path, accuracy_column='x').endswith("'mine', 'cell'; choose one with --accuracy-column")
    assert 'is named as the column of the archs and of the accuracies' in error(path, accuracy_column='cell')
    write(path, rows(), ('arch', 'error'))
    assert 'none of the columns accuracy, cifar10_val_200ep, ' in error(path)
    write(path, [(*row, 1) for row in rows()], ('arch', 'accuracy', 'accuracy'))
    assert "has 2 columns named 'accuracy', rename one" in error(path)


def test_shares_become_percentages(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / 't.csv', [(a, v / 100) for a, v in rows()]), NANO)
    assert list(table.accuracies) == [v for _, v in rows()]
    # one value above 1 tells that they are percentages
    table = read_table(write(tmp_path / 't.csv', [(a, 0.5 + i / 10) for i, a in enumerate(ARCHS)]), NANO)
    assert table.accuracies[0] == 0.5


def test_left_out(tmp_path: Path) -> None:
    a = ARCHS[30]
    bad = [(a, ''), (a, ' NaN '), ('', 50), ('k3_e6', 50), (a, 'best'), (a, '1_0'), (a, 101), (a, '-1'), (a, 'inf'),
           (ARCHS[0], 50), (ARCHS[1], 77), (a, 60, 61)]  # fmt: skip
    table = read_table(write(tmp_path / 't.csv', [*rows(), *bad]), NANO)
    assert list(zip(table.archs, table.accuracies)) == rows()
    assert table.num_rows == 32
    assert {left_out.reason: (left_out.count, left_out.line) for left_out in table.left_out} == {
        'no accuracy': (2, 22),
        'no arch': (1, 24),
        'an arch that is not in the space': (1, 25),
        'an accuracy that is not a number': (2, 26),
        'an accuracy outside 0..100': (3, 28),
        'the arch and accuracy of an earlier row': (1, 31),
        'the arch of an earlier row and another accuracy, the earlier one counts': (1, 32),
        'more cells than the header': (1, 33),
    }
    lines = [str(left_out) for left_out in table.left_out]
    assert f'2 rows with no accuracy (first: line 22, arch {a!r})' in lines
    assert any(line.endswith(f'first: line 32, {ARCHS[1]!r}: 77 after 50.25)') for line in lines)
    assert "2 rows with an accuracy that is not a number (first: line 26, 'best')" in lines


def test_a_short_row_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / 't.csv', [(v, a) for a, v in rows()] + [(50,), (50, ARCHS[30])], ('accuracy', 'arch'))
    assert [left_out.reason for left_out in read_table(path, NANO).left_out] == ['no arch']


def test_too_few_rows(tmp_path: Path) -> None:
    path = write(tmp_path / 't.csv', [*rows(9), *[(a, '') for a in ARCHS[10:30]]])
    message = error(path)
    assert 'has 29 rows of which 9 can be used, a ranking needs 10: 20 rows with no accuracy (first: line 11' in message
    assert 'has 0 rows of which 0 can be used, a ranking needs 10: none was left out' in error(write(path, []))
    # commas in archs that are not quoted
    path.write_text('arch,accuracy\n' + ''.join(f'{a},{v}\n' for a, v in rows()))
    assert 'of which 0 can be used, a ranking needs 10: 20 rows with more cells than the header' in error(path)


def test_table_of_another_space(tmp_path: Path) -> None:
    path = write(tmp_path / 't.csv', [('|none~0|+|none~0|none~1|', 50), ('', 1), *[(f'k3_e{i}', i) for i in range(20)]])
    message = error(path)
    assert message.startswith("none of the 21 archs in column 'arch' of ")
    assert "is in space 'nano', the table seems to be of another space: line 2, '|none~0|+|none~0|none~1|': " in message


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is empty'),
        (b'\n , \n', 'is empty'),
        (b'\x89PNG\r\n\x1a\n\xff', 'is not text in UTF-8'),
        ('arch,accuracy\nä,1\n'.encode('latin-1'), 'is not text in UTF-8'),
        (b'arch|accuracy\nx|1\n', "its first line names 'arch|accuracy'"),
        (b'arch,accuracy\n"k3_e6,50\nk3_e6,51\n', 'is not CSV, line 3: unexpected end of data'),
        (b'arch,accuracy\n"a"b,50\n', 'is not CSV, line 2: '),
        (b'arch,accuracy\n' + b'x' * 200_000, 'is not CSV, line 2: field larger'),
    ],
)
def test_no_csv(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / 't.csv').write_bytes(content)
    assert message in error(tmp_path / 't.csv')


def test_no_file(tmp_path: Path) -> None:
    assert error(tmp_path / 't.csv').endswith("t.csv' does not exist")
    assert 'can not be read' in error(tmp_path)


def test_thousands_of_rows_are_read_fast(tmp_path: Path) -> None:
    space = Letters()
    space.known = frozenset(f'|a~{i}|+|b,"c"~{i}|' for i in range(15_625))
    path = write(tmp_path / 't.csv', [(arch, i % 90) for i, arch in enumerate(space.known)])
    start = time.process_time()
    assert len(read_table(path, space)) == 15_625
    assert time.process_time() - start < 2  # 0.1 s on an idle core


# ---- Properties

cells = st.one_of(
    st.sampled_from(['', 'nan', 'x', '101', '-0.5', '1e400', '50']),
    st.floats(0, 100).map(repr),
    st.integers(0, 100).map(str),
)


@given(
    st.lists(st.tuples(st.one_of(st.sampled_from(Letters.known), st.text(max_size=5)), cells), max_size=15),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_every_row_is_used_or_counted(
    tmp_path_factory: pytest.TempPathFactory, found: list, rng: random.Random
) -> None:
    usable = [(arch, str(50 + i)) for i, arch in enumerate(Letters.known[:10])]
    found = [(arch, cell) for arch, cell in found if (arch.strip() or cell.strip()) and '\0' not in arch]
    mixed = [*found, *usable]
    rng.shuffle(mixed)
    text = io.StringIO(newline='')
    csv.writer(text).writerows([('arch', 'accuracy'), *mixed])
    path = tmp_path_factory.getbasetemp() / 'property.csv'
    path.write_bytes(text.getvalue().encode(errors='surrogatepass'))
    table = read_table(path, Letters())
    assert table.num_rows == len(mixed) == len(table) + sum(left_out.count for left_out in table.left_out)
    assert len(set(table.archs)) == len(table) >= 10
    # what stays is the first usable value of each arch
    for arch, accuracy in zip(table.archs, table.accuracies):
        values = [float(cell) for a, cell in mixed if a.strip() == arch and cell not in ('', 'nan', 'x')]
        assert accuracy == next(v for v in values if 0 <= v <= 100)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_table_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / 'any.csv'
    path.write_bytes(text.encode(errors='replace'))
    with pytest.raises(UsageError):
        read_table(path, NANO)


# ---- Choice


def test_choose(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / 't.csv', rows(40)), NANO)
    whole = table.choose()
    assert sorted(whole) == sorted(rows(40)) and whole != rows(40)
    assert table.choose(15) == whole[:15] and table.choose(100) == whole == table.choose(40)
    assert table.choose(15, seed=1) != whole[:15]
    # the same on every machine and in every version of Python
    assert [ARCHS.index(arch) for arch, _ in table.choose(10, seed=3)] == [39, 36, 27, 6, 25, 17, 29, 32, 37, 15]
    with pytest.raises(UsageError, match='number of archs 9 must be at least 10'):
        table.choose(9)
    same = read_table(write(tmp_path / 't.csv', [(a, 50) for a in ARCHS]), NANO)
    with pytest.raises(
        UsageError, match=r"all 10 archs of .* have accuracy 50 in column 'accuracy', there is nothing to"
    ):
        same.choose(10)


# What spreadsheets and other tools write


def spelled(path: Path, delimiter: str, cell=str, prefix: str = '', quote: bool = False) -> Path:
    """The table of `rows` with another delimiter; archs have commas and are quoted where that is the delimiter."""
    lines = [delimiter.join(('id', 'arch', 'accuracy'))]
    for i, (arch, accuracy) in enumerate(rows()):
        text = f'"{arch}"' if quote or delimiter == ',' else arch
        lines.append(delimiter.join((str(i), text, cell(accuracy))))
    path.write_text(prefix + '\n'.join(lines) + '\n', encoding='utf-8')
    return path


def comma(value: float) -> str:
    return str(value).replace('.', ',')


@pytest.mark.parametrize('prefix', ['', '\ufeff', '\n\n', 'sep={}\n'], ids=['', 'bom', 'empty lines', 'sep'])
@pytest.mark.parametrize(
    'cell',
    [str, comma, lambda v: f'{v}%', lambda v: f'{comma(v)} %'],
    ids=['point', 'comma', 'percent', 'comma and percent'],
)
@pytest.mark.parametrize('delimiter', [';', '\t', ','])
def test_every_delimiter_and_spelling_of_numbers(tmp_path: Path, delimiter: str, cell, prefix: str) -> None:
    quoted = (lambda v: f'"{cell(v)}"') if delimiter == ',' else cell
    path = spelled(tmp_path / 't.csv', delimiter, quoted, prefix.format(delimiter))
    table = read_table(path, NANO)
    assert list(zip(table.archs, table.accuracies)) == rows() and not table.left_out
    assert read_archs(path, NANO) == list(table.archs)


@pytest.mark.parametrize('value', ['inf', '-inf', 'nan', '1e999'])
def test_numbers_are_finite(tmp_path: Path, value: str) -> None:
    path = tmp_path / 't.csv'
    cells = [(arch, f'{50 + i}', f'{49 + i} {51 + i}') for i, arch in enumerate(ARCHS[:12])]
    cells[0] = (ARCHS[0], '50', f'50 {value}')
    cells[1] = (ARCHS[1], value, '50 52')
    path.write_text('\n'.join(['arch;accuracy;accuracies', *map(';'.join, cells)]))
    table = read_table(path, NANO)
    assert table.archs == (ARCHS[0], *ARCHS[2:12])
    assert table.by_seed[0] == () and table.series(table.archs) == [] and len(table.series(table.archs[1:])) == 2
    assert table.num_seeds(table.archs) == {0: 1, 2: 10}


def test_percentages_below_one_are_no_shares(tmp_path: Path) -> None:
    few = [(arch, f'{i / 40}%') for i, arch in enumerate(ARCHS[:20])]
    assert max(read_table(write(tmp_path / 't.csv', few), NANO).accuracies) == 19 / 40
    shares = [(arch, i / 40) for i, arch in enumerate(ARCHS[:20])]
    assert max(read_table(write(tmp_path / 's.csv', shares), NANO).accuracies) == 47.5


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    headless = write(tmp_path / 'h.csv', rows()[1:], header=rows()[0])
    assert 'the line with the names of the columns seems to be missing' in error(headless)
    (tmp_path / 'j.json').write_text('[{"arch": "k3_e6", "accuracy": 1}]')
    assert 'it looks like JSON, save it as CSV' in error(tmp_path / 'j.json')
    (tmp_path / 'x.xlsx').write_bytes(b'PK\x03\x04\xff\xfe' + bytes(range(256)))
    assert 'save it as CSV in UTF-8' in error(tmp_path / 'x.xlsx')
    (tmp_path / 'u.csv').write_text('arch;accuracy\n', encoding='utf-16')
    assert 'save it as CSV in UTF-8' in error(tmp_path / 'u.csv')
