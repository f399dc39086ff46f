"""What all figures share.

They need `pip install 'timm-mixpath[plots]'`; to import this module does not.

Figures are drawn on matplotlib's objects, not through pyplot: no window system, no backend and no global state.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import needs
from .files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['ACCENT', 'BLUE', 'GREY', 'new_figure', 'plot_or_warn', 'save_figure', 'tidy_axes']

_logger = logging.getLogger(__name__)


GREY = '0.72'

ACCENT = '#c1272d'

BLUE = '#3b6fb5'


def new_figure(width: float, height: float) -> 'Figure':
    """A figure of a size in inches that can be saved as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with needs('plots need matplotlib', 'plots'):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def plot_or_warn(plot: Callable[[Any, Path], None], result: Any, path: Path) -> None:
    """Draw a figure, or say why there is none: matplotlib is an extra, and what was computed stands without it.

    Args:
        plot: Draws a result into a file.
        result: What it draws.
        path: PNG file to write.
    """
    try:
        plot(result, path)
    except ImportError as e:
        _logger.warning(f'no {path.name}: {e}')


def save_figure(figure: 'Figure', path: str | os.PathLike) -> None:
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format='png')


def tidy_axes(ax: 'Axes') -> None:
    ax.grid(color='0.92', linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ('top', 'right'):
        ax.spines[side].set_visible(False)
