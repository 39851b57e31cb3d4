"""What all figures share: Axes to draw into, styles, arguments by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch_gradflow.styles import STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = TypeVar("Value")


def axes_or_new(ax: Axes | None) -> Axes:
    """``ax``, or those of a new figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("torch_gradflow.plotting needs matplotlib: pip install 'torch-gradflow[plotting]'.") from None
    return plt.subplots(layout="constrained")[1]


def next_style(ax: Axes) -> dict[str, Any]:
    """Colour and dashes for one more line with a label; those that are there keep theirs."""
    n = sum(not str(line.get_label()).startswith("_") for line in ax.get_lines())
    color, dashes = STYLES[n % len(STYLES)]
    return {"color": color, "linestyle": dashes}


def by_name(argument: str, values: Value | Mapping[str, Value], kind: type | tuple[type, ...]) -> dict[str, Value]:
    """What is to be drawn, by the names that the legend gives it; one alone has the name "".

    Args:
        argument: How the user knows it.
        values: One value, or a dictionary of them.
        kind: What each must be.

    Raises:
        TypeError: If one is anything else.
        ValueError: If there is none.
    """
    named = dict(values) if isinstance(values, Mapping) else {"": values}
    if not named:
        raise ValueError(f"{argument} must hold at least one value by name, not {values!r}.")
    for value in named.values():
        if not isinstance(value, kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise TypeError(f"{argument} must be a {wanted}, or a dictionary of them by name, not {type(value).__name__}.")
    return named


def finish(ax: Axes, x: str, y: str) -> Axes:
    """Name the axes, and the lines where they have names."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    return ax
