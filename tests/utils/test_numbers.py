from argparse import ArgumentTypeError
from decimal import Decimal

import pytest
from commands import fails
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_mixpath.utils.numbers import parse_count, parse_epochs, parse_float, parse_milliseconds, parse_share

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=200)


@pytest.mark.parametrize(
    'text',
    [
        '15000000', '15_000_000', '15,000,000', '15e6', '1.5E+7', '1.5e7', '15M', '15 M', '15m', ' 15M ', '15MMACs',
        '15 MMac', '15M params', '0.015G', '.015G', '15000k', '15 million', '0.015B', '1_5_000_000', '15.0M',
        '15,000.0k',
    ],
)  # fmt: skip
def test_fifteen_millions(text: str) -> None:
    assert parse_count(text) == 15_000_000


@pytest.mark.parametrize(
    'text, reason',
    [
        ('', 'not a number'), ('M', 'not a number'), ('1,5M', 'not a number'),
        ('15,00', 'not a number'), ('nan', 'not a number'), ('inf', 'not a number'), ('1e400', 'not a number'),
        ('1T5', 'not a number'), ('5MB', 'not a number'), ('\u0661\u0665', 'not a number'), ('0x10', 'not a number'),
        ('1.5', 'not a whole number'), ('1e-3', 'not a whole number'), ('300 MFLOPs', 'twice per MAC'),
        ('1 GFLOP', 'twice per MAC'), ('_15', 'not a number'), ('15__0', 'not a number'),
    ],
)  # fmt: skip
def test_what_is_none(text: str, reason: str) -> None:
    with pytest.raises(ArgumentTypeError, match=reason):
        parse_count(text)


@fixed
@given(st.integers(-10, 10**12))
def test_every_spelling_of_a_count(count: int) -> None:
    for text in (str(count), f'{count:,}', f'{count:_}', f'{Decimal(count) / 10**6}M', f'{count:.15e}'):
        assert parse_count(text) == count, text


@fixed
@given(st.text(max_size=12))
def test_any_text_is_a_number_or_one_sentence(text: str) -> None:
    for parse in (parse_count, parse_epochs, parse_float, parse_share):
        try:
            assert parse(text) >= 0 or '-' in text
        except ArgumentTypeError as e:
            assert repr(text) in str(e)


def test_epochs() -> None:
    assert [parse_epochs(t) for t in ('5', '0', '5.0', '0.2')] == [5, 0, 5, 0.2]
    assert isinstance(parse_epochs('5.0'), int)  # timm counts steps with it


def test_shares() -> None:
    assert parse_share('0.1') == parse_share('10%') == parse_share(' 10 %') == 0.1
    for text in ('', '%', 'ten', 'nan', '10%%', 'inf%'):
        with pytest.raises(ArgumentTypeError, match=r'not a share such as 0\.1 or 10%'):
            parse_share(text)


@pytest.mark.parametrize(
    'words, text',
    [
        (['search', '--checkpoint', 'x', '--output', 'y', '--max-macs', '1,5M'], "--max-macs: '1,5M' is not a number"),
        (['search', '--checkpoint', 'x', '--output', 'y', '--num-images', '1.5'], 'not a whole number'),
        (['search', '--checkpoint', 'x', '--output', 'y', '--search-holdout', 'x%'], 'not a share'),
        (['train', '--lr', 'nan'], "--lr: 'nan' is not a finite number"),
        (['train', '--weight-decay', 'inf'], "--weight-decay: 'inf' is not a finite number"),
        (['train', '--search-holdout', '10'], 'no model'),
        (['rank', '--checkpoint', 'x', '--table', 'y', '--level', '95%'], "'x' does not exist"),
        (['rank', '--checkpoint', 'x', '--table', 'y', '--num-archs', '1e3'], "'x' does not exist"),
        (['table', '--table-dir', 'x', '--num-archs', '0.5k', '--model', 'nothing'], "'nothing'"),
    ],
)
def test_on_the_command_line(capsys: pytest.CaptureFixture, words: list[str], text: str) -> None:
    status, line = fails(capsys, words)
    assert status == 2 and text in line


@pytest.mark.parametrize(
    'value, text', [('.nan', 'expected float'), ('[1]', 'single value'), ('true', 'expected float')]
)
def test_in_a_recipe(capsys: pytest.CaptureFixture, tmp_path, value: str, text: str) -> None:
    (tmp_path / 'r.yaml').write_text(f'model: mixpath_nano\nlr: {value}\n')
    status, line = fails(capsys, ['train', '-c', str(tmp_path / 'r.yaml')])
    assert status == 2 and text in line and 'lr' in line
    (tmp_path / 's.yaml').write_text('model: mixpath_nano\nsearch_holdout: 10%\nlr: 1e-3\n')
    assert 'pass --data-dir' in fails(capsys, ['train', '-c', str(tmp_path / 's.yaml')])[1]


@pytest.mark.parametrize('text', ['8', '8ms', ' 8 ms ', '8.0MS', '0.008s', '8000us', '8000 \u00b5s', '8e0ms'])
def test_eight_milliseconds(text: str) -> None:
    assert parse_milliseconds(text) == pytest.approx(8.0)


@pytest.mark.parametrize('text', ['', 'ms', '8m', '8 min', 'nan', 'inf', '-8ms', '0', '8ms8', '1,5ms'])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match='is not a time such as 8ms'):
        parse_milliseconds(text)


@fixed
@given(st.floats(1e-3, 1e6), st.sampled_from([('', 1), ('ms', 1), ('us', 1000), ('s', 1e-3)]))
def test_times_round_trip(ms: float, unit: tuple[str, float]) -> None:
    assert parse_milliseconds(f'{ms * unit[1]!r}{unit[0]}') == pytest.approx(ms)
