"""What is observed while sampling: temperatures, averages, and how long correlations last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_count


class Observables:
    """Records the temperatures of each parameter group: ``optimizer.recorder = Observables()``.

    Both temperatures have the mean τ at stationarity. They are taken where the gradient is evaluated, and no more gradients
    are needed. The gradient is that of the step's batch, plus the prior's; where it has noise of variance s², the kinetic
    temperature is read h²s²/4 below the mean of those before and after the kick, since half a kick brings a quarter of its
    heat.

    Args:
        every: Record every so many steps.
    """

    def __init__(self, every: int = 1) -> None:
        self._every = check_count("every", every)
        self._n_seen = 0
        self._kinetic: list[list[Tensor]] = []
        self._virial: list[list[Tensor]] = []
        self._loss: list[list[Tensor]] = []

    def record(self, moving: Iterable[tuple[Mapping[str, Any], list[Tensor]]], state: Mapping[Tensor, Any], loss: Any) -> None:
        """Called by the optimizer at the beginning of each step.

        Args:
            moving: Parameter groups with their parameters that have gradients.
            state: The optimizer's.
            loss: What the closure returned, or None.
        """
        self._n_seen += 1
        if (self._n_seen - 1) % self._every:
            return
        readings = [temperatures(group, params, state) for group, params in moving]
        self._kinetic.append([kinetic for kinetic, _ in readings])
        self._virial.append([virial for _, virial in readings])
        self._loss.append([torch.as_tensor(math.nan if loss is None else loss).detach()])

    @property
    def kinetic_temperature(self) -> Tensor:
        """p·p/N, shape ``(records, groups)``; NaN for groups without momenta, and before they have any.

        The momenta are those after half a kick: at the end of the sweep, for splittings that begin and end with B.
        """
        return _stacked(self._kinetic)

    @property
    def virial_temperature(self) -> Tensor:
        """The configurational temperature θ·∇L/N, shape ``(records, groups)``, for losses that confine θ without bounds.

        Its mean is τ (equipartition) however the momenta are treated.
        """
        return _stacked(self._virial)

    @property
    def loss(self) -> Tensor:
        """What the closure returned, shape ``(records,)``; NaN in loops without a closure."""
        return _stacked(self._loss).flatten()


def temperatures(group: Mapping[str, Any], params: Iterable[Tensor], state: Mapping[Tensor, Any]) -> tuple[Tensor, Tensor]:
    """Kinetic and virial temperature of one group, 0-dimensional float64."""
    nothing = torch.tensor(math.nan, dtype=torch.float64)
    kinetic, virial, n = [], [], 0
    for p in params:
        assert p.grad is not None
        gradient = -p.grad if group["maximize"] else p.grad
        if group["weight_decay"] != 0.0:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        virial.append((p * gradient).sum(dtype=torch.float64))
        n += p.numel()
        if "momentum" in state.get(p, {}):
            half = state[p]["momentum"].sub(gradient, alpha=0.5 * float(group["lr"]))
            kinetic.append(half.square_().sum(dtype=torch.float64))
    return (
        torch.stack(kinetic).sum() / n if kinetic and len(kinetic) == len(virial) else nothing,
        torch.stack(virial).sum() / n if virial else nothing,
    )


def _stacked(records: list[list[Tensor]]) -> Tensor:
    """The readings on the CPU, one row per record; fetched from a device here, and not while it is at work."""
    return torch.tensor([[float(value) for value in row] for row in records], dtype=torch.float64)


@dataclass(frozen=True)
class Average:
    """A time average.

    Attributes:
        mean: Of the series.
        error: The standard error of the mean, correlations taken into account.
        autocorrelation_time: The integrated autocorrelation time, in records; see ``integrated_autocorrelation_time``.
        n_effective: How many independent values would have this error.
    """

    mean: float
    error: float
    autocorrelation_time: float
    n_effective: float


def time_average(series: Tensor, discard: int = 0) -> Average:
    """The average of a series of shape ``(n,)`` without its first ``discard`` values, with its error.

    Raises:
        ValueError: If fewer than four values are left, or not all are finite.
    """
    kept = series[discard:].double()
    time = integrated_autocorrelation_time(kept)
    n_effective = len(kept) / time
    return Average(float(kept.mean()), math.sqrt(float(kept.var()) / n_effective), time, n_effective)


def integrated_autocorrelation_time(series: Tensor, window: float = 5.0) -> float:
    """1 + 2 Σ ρ(k) over the lags k ≥ 1, ρ the autocorrelation: so many records count as one independent value.

    The sum ends at the first lag that is at least ``window`` times the sum so far (A. Sokal, 1997, Monte Carlo Methods in
    Statistical Mechanics, section 3); a series should be some 50 times longer than what is found.

    Args:
        series: Shape ``(n,)``, n >= 4.
        window: Larger ones cut off less of slow correlations, and let in more noise.

    Raises:
        ValueError: If the series is too short, not one-dimensional, or not finite.
    """
    if series.ndim != 1 or len(series) < 4 or not bool(torch.isfinite(series).all()):
        raise ValueError(f"series must be at least four finite numbers, shape (n,), not of shape {tuple(series.shape)}.")
    deviations = series.double() - series.double().mean()
    n = len(deviations)
    spectrum = torch.fft.rfft(deviations, 2 * n)  # zeros behind the series, so that its ends do not meet
    correlation = torch.fft.irfft(spectrum.abs().square(), 2 * n)[:n]
    if float(correlation[0]) == 0.0:
        return 1.0
    times = 2.0 * (correlation / correlation[0]).cumsum(0) - 1.0
    enough = torch.arange(n) >= window * times
    end = int(enough.to(torch.int8).argmax()) if bool(enough.any()) else n - 1
    return max(1.0, float(times[end]))
