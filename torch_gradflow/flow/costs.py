"""What calls of an objective cost, and what steps of backward differentiation are expected to cost in each of its ways."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from torch_gradflow.flow.bdf import VERIFY_ABOVE
from torch_gradflow.flow.bdf_cg import DENSE_LIMIT
from torch_gradflow.flow.bdf_secant import DENSE_LIMIT as MATRIX_LIMIT
from torch_gradflow.flow.bdf_secant import RANK
from torch_gradflow.objectives.base import DerivativeError, EvaluationCounts, Objective

_T = TypeVar("_T")

# Calls that take so many seconds are timed once.
SLOW = 0.02
# Gradients per step of "bdf-secant"; and seconds per gradient, and per gradient and number kept of the Hessian, that its own
# arithmetic takes beyond that of a step of other methods.
SECANT_GRADIENTS, SECANT_CALL, SECANT_ENTRY = 4.0, 1e-5, 2e-9
# Seconds per product that "bdf-cg" spends itself.
PRODUCT_CALL = 1e-4


@dataclass(frozen=True)
class Costs:
    """Seconds per call on one objective; ``nan`` for what was not measured.

    Attributes:
        gradient: Loss and gradient.
        hvp: One Hessian–vector product.
        hessian: Loss, gradient and Hessian.
        cholesky: A Cholesky factorisation of the Hessian.
        eigh: An eigendecomposition.
    """

    gradient: float
    hvp: float = math.nan
    hessian: float = math.nan
    cholesky: float = math.nan
    eigh: float = math.nan

    @classmethod
    def measure(cls, objective: Objective, theta: Tensor) -> Costs:
        """Each called at least twice, so that compilation does not count.

        A Hessian only up to ``DENSE_LIMIT``, and second derivatives only where there are any.
        """
        gradient, (_, g) = _seconds(lambda: objective.loss_and_gradient(theta))
        try:
            hvp, _ = _seconds(lambda: objective.hvp(theta, g))
            if objective.n_parameters > DENSE_LIMIT:
                return cls(gradient, hvp)
            hessian, (_, _, h) = _seconds(lambda: objective.loss_gradient_hessian(theta))
        except (DerivativeError, NotImplementedError):
            return cls(gradient)
        h = h + torch.eye(len(g), dtype=h.dtype, device=h.device) * float(h.abs().sum(1).max())
        return cls(
            gradient, hvp, hessian, _seconds(lambda: torch.linalg.cholesky_ex(h))[0], _seconds(lambda: torch.linalg.eigh(h))[0]
        )

    @classmethod
    def nominal(cls, n_parameters: int) -> Costs:
        """What calls take about, as measured on perceptrons of 33 to 601 parameters on one core; nothing is timed.

        Args:
            n_parameters: P.
        """
        gradient, cubic = 1e-4, 1e-10 * n_parameters**3
        if n_parameters > DENSE_LIMIT:
            return cls(gradient, 2 * gradient)
        return cls(gradient, 2 * gradient, (1 + n_parameters / 16) * gradient, cubic / 3, 10 * cubic)

    def of(self, counts: EvaluationCounts, before: EvaluationCounts, factorisation: float) -> float:
        """What was spent between two states of the counts."""
        n_hessian = counts.n_hessian - before.n_hessian
        spent = (counts.n_grad - before.n_grad) * self.gradient
        if counts.n_hvp > before.n_hvp:
            spent += (counts.n_hvp - before.n_hvp) * self.hvp
        return spent + n_hessian * (self.hessian + factorisation) if n_hessian else spent

    def factorisation(self, method: str) -> float:
        """What a method does with a Hessian."""
        return self.cholesky if method == "bdf" else self.eigh


def secant_arithmetic(n_parameters: int) -> float:
    """Seconds per gradient that "bdf-secant" spends itself."""
    return SECANT_CALL + SECANT_ENTRY * n_parameters * (n_parameters if n_parameters <= MATRIX_LIMIT else 4 * RANK)


def differentiations(costs: Costs, n_parameters: int, known: Sequence[str], rtol: float) -> dict[str, float]:
    """What a step of backward differentiation is expected to cost in each of its ways, the cheapest first.

    Their steps are the same. Per step, "bdf" takes one Hessian and its factorisation (and a gradient at loose tolerances),
    "bdf-cg" a gradient, about 4 products and every sixth time a Hessian and its eigendecomposition (about 25 products and no
    Hessian beyond ``DENSE_LIMIT``), and "bdf-secant" about 4 gradients, as measured on networks of 33 to 601 parameters.

    Args:
        costs: What was measured.
        n_parameters: P.
        known: The methods that may serve.
        rtol: The relative tolerance.

    Returns:
        Seconds per step, of the known methods that are possible.
    """
    dense = not math.isnan(costs.hessian)
    per_step = {"bdf-secant": SECANT_GRADIENTS * (costs.gradient + secant_arithmetic(n_parameters))}
    if not math.isnan(costs.hvp):
        products = (4 if dense else 25) * (costs.hvp + PRODUCT_CALL) + ((costs.hessian + costs.eigh) / 6 if dense else 0.0)
        per_step["bdf-cg"] = costs.gradient + products
    if dense:
        per_step["bdf"] = costs.hessian + costs.cholesky + (costs.gradient if rtol > VERIFY_ABOVE else 0.0)
    return {name: cost for name, cost in sorted(per_step.items(), key=lambda item: item[1]) if name in known}


def _seconds(call: Callable[[], _T]) -> tuple[float, _T]:
    """The least time of three calls after a first one; of one where that takes long."""
    result = call()
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        result = call()
        if isinstance(result, tuple) and isinstance(result[0], Tensor):
            float(result[0].flatten()[0])  # waits for a device
        best = min(best, time.perf_counter() - began)
        if best > SLOW:
            break
    return best, result
