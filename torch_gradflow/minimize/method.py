"""What the driver and "auto" see of a minimiser: a name, what it needs, and points one after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from torch_gradflow.objectives.base import Objective

Need = Literal["gradient", "hvp", "hessian", "residuals"]


@dataclass(frozen=True)
class Iterate:
    """A point of the iteration.

    Attributes:
        theta: The best point so far, shape ``(P,)``.
        loss: L there, a 0-dimensional tensor.
        gradient: ∇L there, shape ``(P,)``.
        smallest_eigenvalue: Of the Hessian at the point from which the step was made; nan where it is not known.
        radius: Of the trust region for the next step, or the length of the step for methods without one.
        stuck: Whether no further progress is to be had: rounding errors hide it, or the method gave up (``note`` says why).
        note: Why the method changed, or gave up, as half a sentence; "" where nothing happened.
        method: The minimiser that took the step; "" for the one that was asked for.
    """

    theta: Tensor
    loss: Tensor
    gradient: Tensor
    smallest_eigenvalue: float
    radius: float
    stuck: bool
    note: str = ""
    method: str = ""


class Minimiser(ABC):
    """A minimisation method.

    Attributes:
        name: By which users choose it.
        needs: What it evaluates: "gradient", "hvp" (Hessian–vector products), "hessian" (dense Hessians), "residuals" (the
            objective's least-squares form).
        matrices: Dense matrices of shape ``(P, P)`` that it holds at once; 0 for methods that scale to large P.
    """

    name: str
    needs: frozenset[Need]
    matrices: int = 0

    @abstractmethod
    def iterate(self, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Iterator[Iterate]:
        """Yield one iterate per trial step, without end (the driver stops asking).

        Args:
            objective: L.
            theta: The start, shape ``(P,)``.
            loss: L there.
            gradient: ∇L there.

        Yields:
            The best point so far after each trial step: where the step was rejected, the point before it.
        """
