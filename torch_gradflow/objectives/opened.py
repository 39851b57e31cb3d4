"""An objective for one step: where it came from, what is known of it at the start, what is remembered of the last one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.calls import NotRecognised
from torch_gradflow.objectives.contract import agree, only_rounding
from torch_gradflow.objectives.function import FunctionObjective, SecondDerivatives
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.perceptron import WIDE, PerceptronObjective
from torch_gradflow.objectives.population import PopulationObjective, population_of
from torch_gradflow.objectives.processes import Processes
from torch_gradflow.objectives.program import Program
from torch_gradflow.objectives.recognition import recognise
from torch_gradflow.perceptron.kernels import is_wide

Engine = Literal["auto", "perceptron", "replay", "closure"]
NOT_A_GRADIENT = (
    "what backward leaves in .grad is not the gradient of the loss: {}. (A detached or no_grad target, a straight-through "
    "estimator, clipping or a hook?) The flow follows .grad."
)


class GradientFlowWarning(UserWarning):
    """Something works, but not quite as its user may think."""


@dataclass
class Memory:
    """What stays known of a closure or a loop from one step to the next.

    Attributes:
        check: Whether the contract is to be checked on first use.
        checked: Whether it was.
        program: The last program whose replay was confirmed.
        perceptron: The same on closed-form derivatives, if it was recognised as the loss of a perceptron.
        no_perceptrons: Structures of programs that look like it, but are not.
        structure: The structure of the program that was replayed last.
        second_derivatives: The confirmed path to second derivatives of programs of that structure.
        not_a_gradient: How the gradients were seen not to be those of the loss, or "".
        distrusted: Structures of programs that were seen not to be the closure, each with the reason.
        behaved: Structures of programs whose gradients were seen to be those of the loss.
        previous: What a loop's last record held, whether it served or not.
        trusting: Whether the last step took a number that was read out of a tensor as one that is only logged.
        reads_matter: Whether such a number was seen to enter the loss.
        said: Warnings already given.
    """

    check: bool = True
    checked: bool = False
    program: Program | None = None
    perceptron: PerceptronObjective | None = None
    no_perceptrons: set[tuple[Any, ...]] = field(default_factory=set)
    structure: tuple[Any, ...] = ()
    second_derivatives: SecondDerivatives | None = None
    not_a_gradient: str = ""
    distrusted: dict[tuple[Any, ...], str] = field(default_factory=dict)
    behaved: set[tuple[Any, ...]] = field(default_factory=set)
    previous: Program | None = None
    trusting: bool = False
    reads_matter: bool = False
    said: set[str] = field(default_factory=set)

    def warn_once(self, message: str) -> None:
        """Warn with ``message`` unless that was done before."""
        if message not in self.said:
            self.said.add(message)
            warnings.warn(message, GradientFlowWarning, stacklevel=5)


@dataclass
class Opened:
    """One step's objective, see ``open_closure`` and ``open_loop``.

    Attributes:
        objective: L(θ); of several processes that of this one's own data.
        returned: What the closure returned at the start, or the recorded loss.
        theta: θ at the start.
        loss: L at the start, of all processes.
        gradient: ∇L at the start, as the user's own backward left it in ``.grad``, of all processes.
        engine: Which engine serves, "perceptron", "population", "replay" or "closure".
        reason: Why the replay does not serve, or "".
        unchanged: Whether loss and gradient at the start are those that were expected.
    """

    objective: Objective
    returned: Any
    theta: Tensor
    loss: Tensor
    gradient: Tensor
    engine: str
    reason: str
    unchanged: bool
    _parameters: Sequence[Tensor]
    _layout: ParameterLayout
    _gradients: Sequence[tuple[Tensor, Tensor | None]]

    def finish(self, theta: Tensor) -> None:
        """Put θ into the parameters and the gradient at the start back into ``.grad``."""
        self._layout.write(theta, self._parameters)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient


def gradients_left(
    own: Sequence[Tensor | None], gradient: Tensor, layout: ParameterLayout, processes: Processes
) -> Sequence[Tensor | None]:
    """What stands in ``.grad`` after a step: the gradient at its start, of several processes that of the whole loss.

    Args:
        own: What the pass left there.
        gradient: The same of the whole, as a flat vector.
        layout: How the parameters lie in it.
        processes: Those that took part.
    """
    return own if processes.size == 1 else [part.clone() for part in layout.split_as_parameters(gradient)]


def replayed(
    program: Program,
    layout: ParameterLayout,
    counts: EvaluationCounts,
    resolution: float,
    second_derivatives: SecondDerivatives | None = None,
) -> FunctionObjective:
    """The program as an Objective; computed in ``layout.dtype`` where that is wider than the parameters' types."""
    wide = layout.dtype == torch.float64 and any(dtype != torch.float64 for dtype in layout.dtypes)
    all_wide = wide and torch.float64 not in layout.dtypes
    if all_wide:
        program, resolution = program.in_float64(), torch.finfo(torch.float64).eps

    def term(part: Program, theta: Tensor) -> Tensor:
        if all_wide:
            return part.evaluate(layout.split(theta))
        return part.evaluate(layout.split_as_parameters(theta)).to(layout.dtype)

    terms = tuple(partial(term, part) for part in program.parts())
    return FunctionObjective(
        lambda: terms,
        layout.n_parameters,
        layout.dtype,
        layout.device,
        counts=counts,
        second_derivatives=second_derivatives,
        resolution=resolution,
    )


@dataclass(frozen=True)
class Replay:
    """What came of the attempt to replay a program.

    Attributes:
        objective: The replay, or the loss of the perceptron, or of infinite data, as which it was recognised; None where it
            does not serve.
        reason: Why it does not, or "".
        loss: L at the start; that of the replay where it computes in a wider type.
        gradient: ∇L at the start, likewise.
        unchanged: Whether it is the function of the last step, too.
        found: The gradient of the replay at the start where it was computed, else None.
    """

    objective: FunctionObjective | PerceptronObjective | PopulationObjective | None
    reason: str
    loss: Tensor
    gradient: Tensor
    unchanged: bool
    found: Tensor | None = None

    @property
    def engine(self) -> str:
        """Which engine serves."""
        if isinstance(self.objective, PopulationObjective):
            return "population"
        return "perceptron" if isinstance(self.objective, PerceptronObjective) else "replay"


def try_replay(
    program: Program,
    theta: Tensor,
    loss: Tensor,
    gradient: Tensor,
    layout: ParameterLayout,
    memory: Memory,
    counts: EvaluationCounts,
    resolution: float,
    unchanged: bool,
    processes: Processes,
    engine: Engine = "auto",
) -> Replay:
    """Replay ``program``, on closed-form derivatives where they are known, if it gives ``loss`` and ``gradient`` at θ.

    Where it is the program of the last step, whose replay predicted both (``unchanged``), they need not be computed again.
    With several processes all of them replay their own, and loss and gradient of the whole are compared.
    """
    if program.structure != memory.structure:
        memory.structure, memory.second_derivatives = program.structure, None
    # Without a program in memory (after a restart) loss and gradient alone have to tell.
    unchanged = processes.all(unchanged and (memory.program is None or memory.program.same_function_as(program)))
    wide = any(dtype != layout.dtype for dtype in layout.dtypes)
    known = memory.program is not None and unchanged and not wide
    plain = Replay(None, "", loss, gradient, unchanged)
    population = population_of(program, layout, counts) if engine == "auto" and processes.size == 1 else None
    if population is not None and agree(population.loss_and_gradient(theta), (loss, gradient), layout):
        return replace(plain, objective=population)
    differs = ""
    if engine != "replay" and not (known and memory.perceptron is None):
        tried = _try_perceptron(program, theta, plain, layout, memory, counts, known, processes, engine)
        if tried.objective is not None:
            return tried
        if engine == "perceptron":
            how = tried.reason if tried.found is None else f"as one, it differs: {tried.reason}"
            return replace(tried, reason=f"it is not recognised as the loss of a multi-layer perceptron: {how}")
        differs = tried.reason if tried.found is not None else ""
    memory.perceptron = None
    replay = replayed(program, layout, counts, resolution, memory.second_derivatives)
    if known:
        return replace(plain, objective=replay)
    joint = processes.joint(replay)
    try:
        found = joint.loss_and_gradient(theta)
    except Exception as error:  # a replay can fail in any way that user code can: that only means it is not used
        text = str(error).splitlines()[0] if str(error) else ""
        return replace(plain, reason=f"its record cannot be replayed ({type(error).__name__}: {text})")
    reason = _difference(found, (loss, gradient), layout)
    if reason and not (wide and only_rounding(joint, theta, found, (loss, gradient), layout)):
        return replace(plain, reason=reason, found=found[1])
    if differs:
        memory.no_perceptrons.add(program.structure)
        memory.warn_once(
            f"the loss looks like that of a multi-layer perceptron, but as such it differs: {differs}. Closed-form "
            "derivatives are not used. This should not happen; please report it."
        )
    # The user's own loss and gradient are those of narrower numbers, at the rounded θ.
    loss, gradient = found if wide else (loss, gradient)
    return Replay(replay, "", loss, gradient, unchanged, found[1])


def _try_perceptron(
    program: Program,
    theta: Tensor,
    plain: Replay,
    layout: ParameterLayout,
    memory: Memory,
    counts: EvaluationCounts,
    known: bool,
    processes: Processes,
    engine: Engine,
) -> Replay:
    """The program on closed-form derivatives, if it is the loss of a perceptron, and these give loss and gradient at θ."""
    if known and memory.perceptron is not None:
        return replace(plain, objective=memory.perceptron)

    def as_perceptron() -> PerceptronObjective:
        if program.structure in memory.no_perceptrons:
            raise NotRecognised("as one, it differed before")
        found = recognise(program, layout)
        if engine == "auto" and is_wide(found.network):
            raise NotRecognised(WIDE)
        return PerceptronObjective.of(found, layout.dtype, counts=counts)

    try:
        objective = processes.check(as_perceptron)
    except NotRecognised as why:
        return replace(plain, reason=str(why))
    processes.check_sizes(objective.recognised.samples.x.shape[1])
    wide = any(dtype != layout.dtype for dtype in layout.dtypes)
    joint = processes.joint(objective)
    start = joint.loss_and_gradient(theta)
    reason = _difference(start, (plain.loss, plain.gradient), layout)
    if reason and not only_rounding(joint, theta, start, (plain.loss, plain.gradient), layout):
        return replace(plain, reason=reason, found=start[1])
    memory.perceptron = objective
    loss, gradient = start if wide else (plain.loss, plain.gradient)
    return replace(plain, objective=objective, loss=loss, gradient=gradient, found=start[1])


def _difference(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], layout: ParameterLayout) -> str:
    """How the replay's loss and gradient differ from the user's own, or ""."""
    if agree(found, wanted, layout):
        return ""
    (loss, replayed), (_, gradient) = found, wanted
    if not agree((loss, gradient), wanted, layout):
        return "the replayed loss is not the closure's (data changed outside of torch, or a function that is not recorded)"
    if agree((loss, (gradient @ replayed) / (replayed @ replayed) * replayed), wanted, layout):
        return (
            "the gradient in .grad is not that of the recorded loss but a multiple of it (clipping or scaling after backward)"
        )
    return (
        "the gradient in .grad is not that of the recorded loss (a custom autograd Function such as a straight-through "
        "estimator, a hook on a gradient, a second loss that was not recorded, or gradients changed after backward such as "
        "by clipping)"
    )
