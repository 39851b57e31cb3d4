"""A progress bar for long integrations: flow time on a logarithmic axis, loss, gradient norm, evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from tqdm.auto import tqdm

from torch_gradflow.flow.solution import FlowReport


class Progress(Protocol):
    """What an integration tells a display."""

    def update(self, report: FlowReport) -> None:
        """Called at every accepted point."""

    def close(self, message: str) -> None:
        """Called once at the end, with the reason."""


class NoProgress:
    """Shows nothing."""

    def update(self, report: FlowReport) -> None:
        """Nothing."""

    def close(self, message: str) -> None:
        """Nothing."""


class CallbackProgress:
    """Hands every report to a function."""

    def __init__(self, function: Callable[[FlowReport], Any]) -> None:
        self._function = function

    def update(self, report: FlowReport) -> None:
        """Call the function."""
        self._function(report)

    def close(self, message: str) -> None:
        """Nothing."""


class ProgressBar:
    """A tqdm bar (in a terminal or a notebook) whose length is the logarithm of flow time.

    Args:
        t_end: The end of the flow; with ``inf`` the bar shows figures but no length.
        interval: Least time between two refreshes, in seconds.
    """

    def __init__(self, t_end: float, interval: float = 0.2) -> None:
        self._t_end = t_end
        self._first: float | None = None
        known = math.isfinite(t_end)
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}]" if known else "{desc}: {postfix} [{elapsed}]"
        self._bar = tqdm(total=1.0 if known else None, desc="flow", bar_format=bar_format, mininterval=interval)

    def update(self, report: FlowReport) -> None:
        """Redraw, at most once per interval."""
        if report.t > 0 and self._first is None:
            self._first = report.t
        if math.isfinite(self._t_end) and self._first is not None:
            self._bar.update(log_position(report.t, self._first, self._t_end) - self._bar.n)
        elif not math.isfinite(self._t_end):
            self._bar.update(1)
        self._bar.set_postfix_str(
            f"t = {report.t:.3g}, loss = {report.loss:.4e}, |grad| = {report.grad_norm:.2e}, {report.n_grad} gradients",
            refresh=False,
        )

    def close(self, message: str) -> None:
        """Leave the bar as it is, with the reason of the end."""
        self._bar.set_description_str(message, refresh=False)
        self._bar.refresh()
        self._bar.close()


def log_position(t: float, start: float, end: float) -> float:
    """How far t is between ``start`` and ``end`` on a logarithmic axis, from 0 to 1."""
    if t >= end:
        return 1.0
    return max(0.0, math.log(t / start) / math.log(end / start)) if start < end else 0.0


def as_progress(progress: bool | Callable[[FlowReport], Any] | Progress | None, t_end: float) -> Progress:
    """A display from what users pass: True for a bar, a function of reports, an object with update and close, or nothing.

    Raises:
        TypeError: For anything else.
    """
    check_progress(progress)
    if progress is None or progress is False:
        return NoProgress()
    if progress is True:
        return ProgressBar(t_end)
    if hasattr(progress, "update") and hasattr(progress, "close"):
        return progress
    return CallbackProgress(progress)


def check_progress(progress: object) -> None:
    """Check what ``as_progress`` is given.

    Raises:
        TypeError: For anything that it does not know.
    """
    displays = hasattr(progress, "update") and hasattr(progress, "close")
    if not (progress is None or isinstance(progress, bool) or displays or callable(progress)):
        raise TypeError(
            f"progress must be True, False, a function of a FlowReport, or have update and close; not {progress!r}."
        )
