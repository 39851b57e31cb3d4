"""The flow with one gradient per call, for loops whose gradient cannot be evaluated elsewhere: which method, and its state.

Both methods are state machines of the same form: a state proposes a point, the caller evaluates ∇L there, ``advance`` judges
the proposal and makes the next one. "bdf-secant" (``bdf_secant``) learns what is stiff from the gradients that it is given;
"adams-bashforth" (``adams``) is explicit, and its steps stay short for ever where the flow is stiff, but it keeps four vectors
only.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from torch_gradflow.flow import adams, bdf_secant
from torch_gradflow.flow.adams import AdamsState, Packed
from torch_gradflow.flow.bdf_secant import SecantState, Verdict

StepwiseMethod = Literal["bdf-secant", "adams-bashforth"]
StepwiseState = AdamsState | SecantState

NAMES: tuple[StepwiseMethod, ...] = ("bdf-secant", "adams-bashforth")
# bdf-secant keeps 40 to 280 vectors; beyond so many parameters they would take more than 400 MB in float64.
MOST_PARAMETERS = 2**20


def choose(n_parameters: int) -> StepwiseMethod:
    """The method that suits so many parameters."""
    return "bdf-secant" if n_parameters <= MOST_PARAMETERS else "adams-bashforth"


def name_of(state: StepwiseState) -> StepwiseMethod:
    """The method to which a state belongs."""
    return "adams-bashforth" if isinstance(state, AdamsState) else "bdf-secant"


def order_of(state: StepwiseState) -> int:
    """The order of the proposed step."""
    return state.order if isinstance(state, AdamsState) else state.step.order


def begin(
    name: StepwiseMethod, t: float, theta: Tensor, gradient: Tensor, *, cap: float, rtol: float, atol: float
) -> StepwiseState:
    """The flow at its first point, with the proposal of a first step; see ``adams.begin``."""
    if name == "adams-bashforth":
        return adams.begin(t, theta, gradient, cap=cap, rtol=rtol, atol=atol)
    return bdf_secant.begin(t, theta, gradient, cap=cap, rtol=rtol, atol=atol)


def advance(state: StepwiseState, gradient: Tensor, *, cap: float, rtol: float, atol: float) -> tuple[StepwiseState, Verdict]:
    """Judge the proposal by the gradient there, and make the next one; see ``bdf_secant.advance``."""
    if isinstance(state, AdamsState):
        return adams.advance(state, gradient, cap=cap, rtol=rtol, atol=atol)
    return bdf_secant.advance(state, gradient, cap=cap, rtol=rtol, atol=atol)


def pack(state: StepwiseState) -> Packed:
    """Everything in the state as rows of length P and numbers."""
    return adams.pack(state) if isinstance(state, AdamsState) else bdf_secant.pack(state)


def unpack(name: StepwiseMethod, packed: Packed, *, rtol: float, atol: float) -> StepwiseState:
    """The inverse of ``pack``, bit for bit as long as the tolerances are the same."""
    if name == "adams-bashforth":
        return adams.unpack(packed)
    return bdf_secant.unpack(packed, rtol=rtol, atol=atol)
