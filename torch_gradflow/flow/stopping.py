"""Stopping rules: small objects that name themselves in ``FlowSolution.message``.

A rule is immutable; ``begin`` returns a fresh check, so one rule may serve many integrations. Checks see every accepted
point and return a sentence when it is time to stop, else None.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch_gradflow.checks import check_count, check_number
from torch_gradflow.flow.solution import FlowReport

Check = Callable[[FlowReport], str | None]


class StoppingRule(ABC):
    """When an integration should end before its end time."""

    @abstractmethod
    def begin(self) -> Check:
        """A check for one integration."""


@dataclass(frozen=True)
class FlowTime(StoppingRule):
    """Stop at the first accepted point at or after flow time ``t``."""

    t: float

    def __post_init__(self) -> None:
        check_number("t", self.t, above=0.0)

    def begin(self) -> Check:
        """See the class."""
        return lambda r: f"Stopped by FlowTime: t = {r.t:.6g} reached {self.t:.6g}." if r.t >= self.t else None


@dataclass(frozen=True)
class WallTime(StoppingRule):
    """Stop after ``seconds`` of wall time (at the next accepted point)."""

    seconds: float

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, above=0.0)

    def begin(self) -> Check:
        """See the class."""
        return lambda r: (
            f"Stopped by WallTime: {r.elapsed:.3g} s reached {self.seconds:.3g} s." if r.elapsed >= self.seconds else None
        )


@dataclass(frozen=True)
class Evaluations(StoppingRule):
    """Stop after ``n_grad`` gradient evaluations (at the next accepted point)."""

    n_grad: int

    def __post_init__(self) -> None:
        check_count("n_grad", self.n_grad)

    def begin(self) -> Check:
        """See the class."""
        return lambda r: f"Stopped by Evaluations: {r.n_grad} gradients." if r.n_grad >= self.n_grad else None


@dataclass(frozen=True)
class GradientNorm(StoppingRule):
    """Stop when ‖∇L‖ in the infinity norm is at most ``below``.

    Explicit methods on a stiff flow run at their stability limit, where stiff modes jitter at the size of the tolerance
    and hold the gradient norm up, by about ``rtol`` times the largest curvature: a smaller bound is never met. Hand over
    to ``NewtonPolish`` instead.
    """

    below: float

    def __post_init__(self) -> None:
        check_number("below", self.below, above=0.0)

    def begin(self) -> Check:
        """See the class."""
        return lambda r: (
            f"Stopped by GradientNorm: {r.grad_norm:.3e} is at most {self.below:.3e}." if r.grad_norm <= self.below else None
        )


@dataclass(frozen=True)
class LossValue(StoppingRule):
    """Stop when the loss is at most ``below``."""

    below: float

    def __post_init__(self) -> None:
        check_number("below", self.below)

    def begin(self) -> Check:
        """See the class."""
        return lambda r: f"Stopped by LossValue: {r.loss:.6e} is at most {self.below:.6e}." if r.loss <= self.below else None


@dataclass(frozen=True)
class LossPlateau(StoppingRule):
    """Stop when the loss fell by less than ``relative`` while flow time grew by ``factor``.

    Flows slow down algebraically, so the window is a factor of time, not a length: by default a decade. A saddle is a
    plateau too: a flow may stop there although it would leave it later.
    """

    relative: float = 1e-3
    factor: float = 10.0

    def __post_init__(self) -> None:
        check_number("relative", self.relative, above=0.0)
        check_number("factor", self.factor, above=1.0)

    def begin(self) -> Check:
        """See the class."""
        since: list[tuple[float, float]] = []

        def check(report: FlowReport) -> str | None:
            if report.t <= 0:
                return None
            since.append((report.t, report.loss))
            while len(since) > 1 and since[1][0] <= report.t / self.factor:
                since.pop(0)
            t, loss = since[0]
            if t <= report.t / self.factor and loss - report.loss < self.relative * abs(loss):
                return (
                    f"Stopped by LossPlateau: from t = {t:.3g} to {report.t:.3g} the loss only fell from {loss:.6e} to "
                    f"{report.loss:.6e}."
                )
            return None

        return check


def begin_all(stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None) -> Check:
    """One check that asks each rule of ``stop``.

    Raises:
        TypeError: If ``stop`` is not a rule or a list of rules.
    """
    rules = list(stop) if isinstance(stop, list | tuple) else [] if stop is None else [stop]
    for rule in rules:
        if not isinstance(rule, StoppingRule):
            raise TypeError(f"stop must be a stopping rule or a list of them, not {rule!r}; for instance WallTime(60).")
    checks = [rule.begin() for rule in rules]

    def check(report: FlowReport) -> str | None:
        answers = [answer for answer in (c(report) for c in checks) if answer is not None]
        return answers[0] if answers else None

    return check
