"""Checks of what users pass, with errors that name the argument, the value and the remedy."""

from __future__ import annotations

import math
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """``value`` as a float, if it is a number with above < value, least <= value and value < below.

    Args:
        name: How the user knows it.
        value: What the user passed.
        above: A bound that itself is not allowed.
        least: A bound that itself is allowed.
        below: A bound that itself is not allowed.
        infinite: Whether inf is allowed.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range, or NaN.
    """
    if isinstance(value, bool | str) or value is None:
        raise TypeError(f"{name} must be a number, not {value!r}.")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, not {value!r}.") from None
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
    bounds += [f"< {below:g}"] * (below < math.inf)
    if not infinite:
        bounds.append("finite")
    inside = number > above and number >= least and (number < below or (infinite and below == math.inf))
    if math.isnan(number) or not inside or (math.isinf(number) and not infinite):
        raise ValueError(f"{name} must be a number {', '.join(bounds)}, not {value!r}.")
    return number


def check_count(name: str, value: Any) -> int:
    """``value`` if it is a positive integer.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}.")
    return value
