"""The distance between trajectories is that of the paper: found anew by brute force, and known in simple cases."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_gradflow import integrate, trajectory_distance
from torch_gradflow.objectives.function import FunctionObjective


@dataclass(frozen=True)
class Curve:
    t: Tensor
    theta: Tensor


def brute_force(solution: Curve, reference: Curve) -> tuple[list[int], list[float]]:
    """The definition, one distance at a time."""
    n_parameters = reference.theta.shape[1]
    matches, distances, at = [], [], 0
    for point in solution.theta:
        best = math.inf
        for j in range(at, len(reference.theta)):
            d = float((reference.theta[j] - point).square().sum()) / (2 * n_parameters)
            if d > best:
                break
            best, at = d, j
        matches.append(at)
        distances.append(best)
        if at == len(reference.theta) - 1:
            break
    return matches, distances


def walk(seed: int, n: int, n_parameters: int, drift: float) -> Curve:
    """A random walk with a drift, with some points twice."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(n, n_parameters, generator=generator, dtype=torch.float64) + drift
    steps[torch.rand(n, generator=generator) < 0.1] = 0.0
    return Curve(torch.arange(n, dtype=torch.float64), steps.cumsum(0))


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    m=st.integers(1, 300),
    n_parameters=st.integers(1, 4),
    drift=st.sampled_from([0.0, 0.3, 3.0]),
    step=st.integers(1, 50),
)
@settings(max_examples=100, deadline=None)
def test_matches_are_those_of_the_definition(seed: int, n: int, m: int, n_parameters: int, drift: float, step: int) -> None:
    reference = walk(seed, m, n_parameters, drift)
    noise = torch.randn(m, n_parameters, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    solution = Curve(reference.t[::step][:n], (reference.theta + noise)[::step][:n])
    found = trajectory_distance(solution, reference)
    matches, distances = brute_force(solution, reference)
    assert found.matches.tolist() == matches
    assert found.distances.tolist() == pytest.approx(distances, rel=1e-12)
    assert found.distance == pytest.approx(sum(distances) / len(distances), rel=1e-12)
    assert found.matched_times.tolist() == [float(reference.t[i]) for i in matches]
    assert found.progress == float(reference.t[max(matches)])
    assert found.times.tolist() == solution.t[: len(matches)].tolist()
    assert found.complete == (len(matches) == len(solution.t))


def test_parallel_lines_are_their_distance_apart() -> None:
    """A line at height 0.3 above the reference, at half the speed: d_m = 0.3²/4, t_m half of the time."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    reference = Curve(t, torch.stack([t, 0 * t], 1))
    solution = Curve(t[::100], torch.stack([0.5 * t, 0 * t + 0.3], 1)[::100])
    found = trajectory_distance(solution, reference)
    assert found.distance == pytest.approx(0.09 / 4)
    assert found.progress == pytest.approx(0.5) and found.complete
    assert found.matched_times.tolist() == pytest.approx((0.5 * t[::100]).tolist())
    assert found.spacing == pytest.approx(0.0005**2 / 4)


def test_samples_that_differ_by_rounding_alone_do_not_end_the_descent() -> None:
    """A reference that stands still for some samples, up to rounding, before it goes on."""
    t = torch.arange(12, dtype=torch.float64)
    wobble = torch.tensor([0.0, 1, 0, 2, 1, 3]) * torch.finfo(torch.float64).eps
    steps = torch.cat([1 + wobble, 1 + 0.1 * torch.arange(1, 7, dtype=torch.float64)])
    reference = Curve(t, torch.stack([steps, torch.ones(12, dtype=torch.float64)], dim=1))
    point = Curve(t[:1], torch.tensor([[1.4, 1.0]], dtype=torch.float64))
    found = trajectory_distance(point, reference)
    assert found.matches.tolist() == [9]
    assert found.distance < 1e-20


def test_a_trajectory_that_goes_on_beyond_the_reference_is_cut() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = trajectory_distance(Curve(3 * t, 3 * t[:, None]), Curve(t, t[:, None]))
    assert not found.complete and len(found.times) == 35 and found.progress == 1.0
    assert trajectory_distance(Curve(t, t[:, None]), Curve(t, t[:, None])).complete


def test_solutions_of_the_flow() -> None:
    """Two runs of a quadratic flow differ by what their tolerances leave; the looser one came as far."""
    values = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
    objective = FunctionObjective(
        lambda: (lambda theta: 0.5 * (values * theta**2).sum(),), 3, torch.float64, torch.device("cpu")
    )
    start = torch.ones(3, dtype=torch.float64)
    dense = torch.linspace(0, 3, 3001).tolist()
    reference = integrate(objective, start, (0.0, 3.0), method="dopri5", rtol=1e-9, t_eval=dense)
    loose = integrate(objective, start, (0.0, 2.0), method="bosh3", rtol=1e-3, t_eval=torch.linspace(0, 2, 51).tolist())
    found = trajectory_distance(loose, reference)
    assert found.progress == pytest.approx(2.0, abs=0.01)
    assert 0 < found.distance < 1e-6
    half = trajectory_distance(integrate(objective, start, (0.0, 1.0), method="dopri5"), reference)
    assert half.progress == pytest.approx(1.0, abs=0.002)
    assert half.distance < 2 * half.spacing


def test_types_of_lower_precision_and_long_references() -> None:
    """1e5 samples of 33 parameters take a moment, and float32 samples are compared in float64."""
    t = torch.linspace(0, 100, 10**5, dtype=torch.float64)
    theta = torch.cos(t[:, None] / 50 + torch.arange(33) / 33)
    began = time.perf_counter()
    found = trajectory_distance(Curve(t[::100], theta[::100].float()), Curve(t, theta))
    assert time.perf_counter() - began < 5
    assert found.distance < 1e-9 and found.distances.dtype == torch.float64
    assert torch.equal(found.matched_times, found.times)


def test_bad_input_is_named() -> None:
    t = torch.arange(3.0)
    good = Curve(t, torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"solution must be a FlowSolution.*not \[1\]"):
        trajectory_distance([1], good)
    with pytest.raises(TypeError, match="reference must be"):
        trajectory_distance(good, t)
    with pytest.raises(ValueError, match="same parameters, not 2 and 5"):
        trajectory_distance(good, Curve(t, torch.zeros(3, 5)))
    with pytest.raises(ValueError, match=r"reference must have t of shape .* not \(3,\) and \(4, 2\)"):
        trajectory_distance(good, Curve(t, torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="not empty"):
        trajectory_distance(Curve(t[:0], torch.zeros(0, 2)), good)
    with pytest.raises(ValueError, match="solution holds numbers that are not finite"):
        trajectory_distance(Curve(t, torch.full((3, 2), torch.nan)), good)
    with pytest.raises(ValueError, match=r"reference.t must ascend"):
        trajectory_distance(good, Curve(-t, torch.zeros(3, 2)))
