"""What all plots of lab share: no display, one style, atomic files."""

import os
import pathlib
from collections.abc import Iterable

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

matplotlib.use('Agg')

# matplotlib's ten colors, then a lighter shade of each
_PAIRS = matplotlib.color_sequences['tab20']
PALETTE = (*_PAIRS[0::2], *_PAIRS[1::2])
THEMES = {
  'light': {'text': '#1b1f24', 'faint': '#c8ccd2', 'back': '#ffffff'},
  'dark': {'text': '#e6e8eb', 'faint': '#4a5059', 'back': '#14171a'},
}


def make_figure(
  size: tuple[float, float], panels: int = 1, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
  """A figure of `size` inches and its panels in a row."""
  figure, axes = pyplot.subplots(
    1, panels, figsize=size, sharey=share_y, layout='constrained',
    squeeze=False,
  )  # fmt: skip
  return figure, list(axes[0])


def style_axes(axes: Axes) -> None:
  """Adds a faint grid and removes the top and right spines."""
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)


def mark_places(axes: Axes, places: Iterable[int], labels: list[str]) -> None:
  """Sets the ticks of the horizontal axis, without minor ones."""
  axes.set_xticks(list(places), labels)
  axes.xaxis.set_minor_locator(NullLocator())


def make_theme(theme: str) -> dict[str, str]:
  """matplotlib settings for one of THEMES, with a transparent background."""
  colors = THEMES[theme]
  text = 'text.color', 'axes.labelcolor', 'xtick.color', 'ytick.color'
  faint = 'axes.edgecolor', 'grid.color'
  return {
    **dict.fromkeys(text, colors['text']),
    **dict.fromkeys(faint, colors['faint']),
    'axes.facecolor': 'none',
  }


def save_figure(
  figure: Figure, path: pathlib.Path, facecolor: str = 'auto'
) -> None:
  """Writes the figure atomically and closes it."""
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    figure.savefig(
      temporary, format=path.suffix[1:], dpi=130, facecolor=facecolor
    )
    os.replace(temporary, path)
  finally:
    pyplot.close(figure)
    temporary.unlink(missing_ok=True)
