"""Figures are checked by their files and by what matplotlib was asked to draw; how they look was looked at."""

import math
import sys

import numpy as np
import pytest
from tables import make_result as make_ranking

from timm_mixpath import get_space
from timm_mixpath.analysis.path_report import _short_names, plot_stats
from timm_mixpath.analysis.path_statistics import PathStatistics, ShadowStatistics, StatsResult
from timm_mixpath.analysis.ranking_report import plot_ranking
from timm_mixpath.search.config import SearchConfig
from timm_mixpath.search.front import plot_pareto
from timm_mixpath.search.result import Candidate, SearchResult


def make_result(num: int = 60, objectives: tuple = (('error', 1), ('macs', 1), ('params', 1))) -> SearchResult:
    from timm_mixpath.search.result import make_front
    from timm_mixpath.spaces.sampling import sample

    space = get_space('nano')
    config = SearchConfig(objectives=objectives)
    rng = np.random.default_rng(0)
    evaluations = [
        Candidate(
            arch=sample(space, seed=0, step=i),
            top1=float(50 + 20 * rng.random()),
            loss=1.0,
            macs=int(1e7 * (1 + rng.random())),
            params=int(3e5 * (1 + rng.random())),
            index=i,
        )
        for i in range(num)
    ]
    front = make_front(evaluations, config.objective_names)
    return SearchResult(space, config, {}, evaluations, front, {'error': (0, 100), 'macs': (0, 1), 'params': (0, 1)})


@pytest.mark.parametrize('num', [1, 2, 60])
@pytest.mark.parametrize('objectives', [(('error', 1),), (('error', 1), ('macs', 1)), (('error', 1), ('params', 1))])
def test_plot_pareto(tmp_path, num, objectives):
    plot_pareto(make_result(num, objectives), tmp_path / 'front.png')
    assert (tmp_path / 'front.png').read_bytes().startswith(b'\x89PNG')
    assert [p.name for p in tmp_path.iterdir()] == ['front.png']


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


@pytest.fixture
def figure(tmp_path, figures):
    """What `plot_pareto` drew for a result with three objectives, and that result."""
    result = make_result()
    plot_pareto(result, tmp_path / 'front.png')
    return figures[0], result


def test_what_is_drawn(figure):
    figure, result = figure
    ax, colorbar = figure.axes
    assert 'MACs (M)' in ax.get_xlabel() and '(%)' in ax.get_ylabel() and 'parameters (M)' in colorbar.get_ylabel()
    assert 'nano' in ax.get_title() and '60' in ax.get_title()
    assert len(ax.get_legend().get_texts()) == 4

    evaluated, front, chosen = ax.collections
    assert evaluated.get_offsets().tolist() == [[c.macs / 1e6, c.error] for c in result.evaluations]
    assert front.get_offsets().tolist() == [[c.macs / 1e6, c.error] for c in result.front]
    assert front.get_array().tolist() == [c.params / 1e6 for c in result.front]
    assert chosen.get_offsets().tolist() == [[result.chosen.macs / 1e6, result.chosen.error]]
    assert f'{result.chosen.top1:.2f} % top-1' in ax.texts[0].get_text()

    x, y = ax.lines[0].get_data()
    assert (np.diff(x) > 0).all() and (np.diff(y) < 0).all()
    assert (x[-1], y[-1]) == (result.chosen.macs / 1e6, result.chosen.error)


def test_no_global_state(tmp_path):
    sys.modules.pop('matplotlib.pyplot', None)
    plot_pareto(make_result(), tmp_path / 'front.png')
    assert 'matplotlib.pyplot' not in sys.modules


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **kwargs):
        path.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(Figure, 'savefig', fail)
    (tmp_path / 'front.png').write_text('old')
    with pytest.raises(OSError, match='disk full'):
        plot_pareto(make_result(), tmp_path / 'front.png')
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('front.png', 'old')]


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-mixpath\[plots\]'"):
        plot_pareto(make_result(), tmp_path / 'front.png')


def make_stats(num_sites: int, max_paths: int = 3, num_paths: int = 3, shadows: bool = True) -> StatsResult:
    rng = np.random.default_rng(0)
    sites, sbns = [], []
    for i in range(num_sites):
        similar = rng.uniform(0.3, 0.9, (num_paths, num_paths))
        corr = rng.uniform(0.2, 0.9)
        ks = range(1, min(max_paths, num_paths) + 1)
        sites.append(
            PathStatistics(
                f'blocks.{i // 4}.{i % 4}.e6.paths', tuple(f'k{3 + 2 * p}' for p in range(num_paths)), 8, 16, 2,
                tuple(tuple(row) for row in np.where(np.eye(num_paths) > 0, 1, (similar + similar.T) / 2).tolist()),
                corr, tuple(map(float, ks)), tuple(k + k * (k - 1) * corr for k in ks),
            )
        )  # fmt: skip
        var = tuple(float(k**1.7) for k in ks)
        sbns.append(ShadowStatistics(f'blocks.{i // 4}.{i % 4}.e6.bn3', 8, (5,) * len(ks), var, var, var, var))
    return StatsResult('s1', max_paths, 16, sites, sbns if shadows else [], {})


def test_plot_stats_draws_similarities_ratios_and_yardsticks(tmp_path, figures):
    result = make_stats(24)
    plot_stats(result, tmp_path / 'stats.png')
    assert [p.name for p in tmp_path.iterdir()] == ['stats.png']
    (figure,) = figures
    cosines, mean, var, running = figure.axes
    assert 's1' in figure.get_suptitle() and 'not published' in figure.get_supxlabel()
    assert cosines.lines[0].get_ydata().tolist() == [s.cosine_mean for s in result.sites]
    ranges = [segment[:, 1].tolist() for segment in cosines.collections[0].get_segments()]
    assert ranges == [[s.cosine_min, s.cosine_max] for s in result.sites]
    assert [t.get_text() for t in cosines.get_xticklabels()][:2] == ['0.0', '0.1']
    for ax, lines, yardsticks in (
        (mean, [s.mean_ratio for s in result.sites], [[1, 2, 3]]),
        (var, [s.var_ratio for s in result.sites], [[1, 4, 9], [1, 2, 3]]),
        (running, [s.var_ratio for s in result.shadows], [[1, 4, 9], [1, 2, 3]]),
    ):
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert drawn[:24] == [list(line) for line in lines]
        assert drawn[24] == pytest.approx(np.median(lines, axis=0).tolist())
        assert drawn[25:] == yardsticks
        assert len(ax.get_legend().get_texts()) == 2 + len(yardsticks)


@pytest.mark.parametrize(
    ('kwargs', 'panels'),
    [
        (dict(num_sites=1, max_paths=2, num_paths=2), 4),
        (dict(num_sites=90), 4),
        (dict(num_sites=3, max_paths=2, shadows=False), 3),
        (dict(num_sites=3, max_paths=1), 1),
        (dict(num_sites=0), 1),
    ],
)
def test_plot_stats_leaves_out_what_there_is_not(tmp_path, figures, kwargs, panels):
    plot_stats(make_stats(**kwargs), tmp_path / 'stats.png', title='Title')
    assert len(figures[0].axes) == panels and figures[0].get_suptitle() == 'Title'


def test_plot_stats_without_trained_shadows_and_with_sums_that_are_undefined(tmp_path, figures):
    result = make_stats(2)
    for site in result.sites:
        object.__setattr__(site, 'var_ratio', (math.nan,) * 3)
    for sbn in result.shadows:
        object.__setattr__(sbn, 'num_batches', (0, 0, 0))
    plot_stats(result, tmp_path / 'stats.png')
    assert len(figures[0].axes) == 3


def test_short_names_stay_different():
    assert _short_names(['blocks.0.0.e3.paths', 'blocks.1.0.e3.paths']) == ['0.0', '1.0']
    assert _short_names(['blocks.1.0.e6.paths.g0', 'blocks.1.0.e3.paths.g1']) == ['1.0.e6.g0', '1.0.e3.g1']
    assert _short_names(['a.b', 'b.a']) == ['a.b', 'b.a']
    assert _short_names(['only.one']) == ['only.one'] and _short_names([]) == []


@pytest.mark.parametrize('kwargs', [{}, dict(score='loss'), dict(recalibrated=False), dict(equal=True)], ids=str)
def test_plot_ranking(tmp_path, monkeypatch, kwargs):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    result = make_ranking(**kwargs)
    plot_ranking(result, tmp_path / 'ranking.png')
    assert [p.name for p in tmp_path.iterdir()] == ['ranking.png']
    axes = figures[0].axes
    assert len(axes) == (1 if kwargs.get('recalibrated') is False else 2)
    for ax, name in zip(axes, result.statistics):
        scores = [getattr(r, result.score_name(name)) for r in result.archs]
        points = np.array([[r.accuracy, score] for r, score in zip(result.archs, scores)])
        drawn = np.ma.filled(ax.collections[0].get_offsets(), np.nan)  # a loss that is NaN masks its point
        np.testing.assert_array_equal(drawn[np.isfinite(drawn).all(axis=1)], points[np.isfinite(points).all(axis=1)])
        assert result.statistics[name]['all'].kendall_tau.text(2) in ax.get_title()
        assert ax.yaxis_inverted() == (result.config.score == 'loss')  # better is up
