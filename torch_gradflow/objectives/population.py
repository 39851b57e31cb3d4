"""The loss of a student on infinite data: expectations over Gaussian input of what a teacher says, with all derivatives."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import mse_loss
from torch.overrides import handle_torch_function, has_torch_function

from torch_gradflow.checks import check_number
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.calls import NotRecognised
from torch_gradflow.objectives.contract import agree
from torch_gradflow.objectives.parameters import ParameterLayout, check_parameters
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.program import Program, Slot
from torch_gradflow.objectives.recognition import RecognisedPerceptron, recognise
from torch_gradflow.objectives.record import Recorder, Recording
from torch_gradflow.population.coordinates import Selection, Whitening
from torch_gradflow.population.network import HiddenLayer, PopulationLoss, PopulationLossName


class PopulationObjective(Objective):
    """L(θ) = E_x[(f_θ(x) − f*(x))²] or E_x[1 − f_θ(x) f*(x)] over x ~ N(μ, Σ), for networks with one hidden layer.

    The expectations of pairs of neurons are in closed form where both activations are erf or the normal cdf (Saad and Solla
    1995), ReLU (Cho and Saul 2009; with biases by Owen's T), or polynomials; smooth other ones, and mixed pairs, come from
    Hermite series whose number of terms adapts until they are exact up to rounding. Gradient, Hessian and products follow
    from pairs of derivatives (Price's theorem). All of it is computed in float64, on the parameters' device.

    A loss near zero is known to about 1e-16 E[f*²] only, as it is a difference. The second derivatives of ReLU lose digits
    where neurons become parallel (about ε over the sine of their angle), and have no limit there.

    Args:
        student: A module that is recognised as a perceptron with one hidden layer and one output, for instance
            ``nn.Sequential(nn.Linear(d, r), nn.ReLU(), nn.Linear(r, 1))``. θ are those of its parameters that require
            gradients, in their order. The module is not changed; see ``write``.
        teacher: Another one, with the same inputs. Its parameters are taken as they are now.
        loss: "mse", or "correlation" (in which neurons do not see one another).
        mean: μ, shape ``(d,)``; zero by default.
        covariance: Σ, shape ``(d, d)``; the identity by default.
        noise: The standard deviation of what is added to the teacher's output; it adds its square to "mse".

    Raises:
        ValueError: For modules that are not recognised, or do not fit together, and activations with kinks other than ReLU's.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        loss: PopulationLossName = "mse",
        mean: Tensor | None = None,
        covariance: Tensor | None = None,
        noise: float = 0.0,
    ) -> None:
        if loss not in ("mse", "correlation"):
            raise ValueError(f"loss must be 'mse' or 'correlation', not {loss!r}.")
        check_number("noise", noise, least=0.0)
        self._network = _Network.of("student", student)
        known = _Network.of("teacher", copy.deepcopy(teacher).requires_grad_(True))
        self.layer, n_inputs = self._network.layer, known.layer.n_inputs
        if self.layer.n_inputs != n_inputs:
            raise ValueError(f"student and teacher must have the same inputs, not {self.layer.n_inputs} and {n_inputs}.")
        layout = self._network.layout
        self.dtype, self.device = layout.dtype, layout.device
        self.resolution, self.counts = torch.finfo(self.dtype).eps, EvaluationCounts()
        self._whitening = Whitening(
            _checked("mean", mean, (n_inputs,), self.device),
            _checked("covariance", covariance, (n_inputs, n_inputs), self.device),
        )
        self._selection = self._network.selection
        self.n_parameters = self._selection.n_parameters
        white = self._whitening.to_white(known.layer, known.selection.point(known.theta().to(torch.float64)).to(self.device))
        self._loss = PopulationLoss(
            self._whitening.layer(self.layer), self._whitening.layer(known.layer), white, loss, float(noise)
        )
        self._name = loss
        self._hidden = (known.layer, self._whitening.changes)

    def kind(self) -> tuple[Any, ...]:
        """See ``Objective``."""
        return *super().kind(), self._name, self.layer, *self._hidden

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the student that θ stands for, in their order."""
        return self._network.parameters

    def initial_theta(self) -> Tensor:
        """The student's present parameters, shape ``(P,)``."""
        return self._network.theta()

    def write(self, theta: Tensor) -> None:
        """Put θ into the student."""
        self._network.layout.write(theta, self._network.parameters)

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ)."""
        self.counts.n_grad += 1
        loss, gradient = self._loss.loss_and_gradient(self._white(theta))
        return loss.to(self.dtype), self._pull_back(gradient).to(self.dtype)

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V."""
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.n_parameters:
            wanted = f"({self.n_parameters},) or ({self.n_parameters}, k)"
            raise ValueError(f"vectors must have the shape {wanted}, not {tuple(vectors.shape)}.")
        columns = vectors.detach().reshape(self.n_parameters, -1).to(torch.float64)
        self.counts.n_hvp += columns.shape[1]
        moved = self._whitening.to_white(self.layer, self._selection.push(columns))
        products = self._pull_back(self._loss.hvp(self._white(theta), moved))
        return products.reshape(vectors.shape).to(self.dtype)

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ)."""
        return self.loss_gradient_hessian(theta)[2]

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(θ), ∇L(θ) and H(θ) for the price of H(θ); counted as one Hessian."""
        self.counts.n_hessian += 1
        loss, gradient, hessian = self._loss.loss_gradient_hessian(self._white(theta))
        hessian = self._selection.pull_back_matrix(self._whitening.pull_back_matrix(self.layer, hessian))
        return loss.to(self.dtype), self._pull_back(gradient).to(self.dtype), hessian.to(self.dtype)

    def _white(self, theta: Tensor) -> Tensor:
        if theta.shape != (self.n_parameters,):
            raise ValueError(f"theta must have the shape ({self.n_parameters},), not {tuple(theta.shape)}.")
        return self._whitening.to_white(self.layer, self._selection.point(theta.detach().to(torch.float64)))

    def _pull_back(self, rows: Tensor) -> Tensor:
        return self._selection.pull_back(self._whitening.pull_back(self.layer, rows))


class TeacherStudent:
    """A student that learns a teacher on infinite data, for training loops.

    ``loss()`` is a tensor like any other loss, for ``backward()`` and any optimizer. Where it is all that a loop or a closure
    computes, ``GradientFlow`` and ``NewtonPolish`` recognise it, and run on ``objective``'s second derivatives.

    Args:
        student: See ``PopulationObjective``.
        teacher: See ``PopulationObjective``.
        options: Further arguments of ``PopulationObjective``.

    Attributes:
        objective: The same loss, for ``integrate``, ``minimize`` and ``certify``.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, **options: Any) -> None:
        self.objective = PopulationObjective(student, teacher, **options)

    def loss(self) -> Tensor:
        """L at the student's present parameters, differentiable twice; 0-dimensional."""
        return population_loss(self.objective, *self.objective.parameters)


def population_loss(objective: PopulationObjective, *parameters: Tensor) -> Tensor:
    """L(θ) for θ made of these tensors, as one function of torch, which modes and records of functions see as one call."""
    if has_torch_function(parameters):
        result: Tensor = handle_torch_function(population_loss, parameters, objective, *parameters)
        return result
    theta = torch.cat([parameter.reshape(-1).to(objective.dtype) for parameter in parameters])
    value: Tensor = _Loss.apply(objective, theta)  # type: ignore[no-untyped-call]
    return value


def population_of(program: Program, layout: ParameterLayout, counts: EvaluationCounts) -> PopulationObjective | None:
    """The objective whose ``population_loss``, and nothing else, a program computes of all its parameters; or None."""
    if len(program.calls) != 1 or len(program.losses) != 1:
        return None
    (call,), (loss,) = program.calls, program.losses
    whole = call.function is population_loss and loss.slot == call.outputs[0] and loss.weight is None
    if not whole or call.args[1:] != tuple(map(Slot, range(program.n_inputs))) or call.autocast is not None:
        return None
    found = copy.copy(call.args[0])
    assert isinstance(found, PopulationObjective)
    found.counts, found.dtype = counts, layout.dtype
    return found


class _Loss(torch.autograd.Function):
    """L(θ)."""

    @staticmethod
    def forward(ctx: Any, objective: PopulationObjective, theta: Tensor) -> Tensor:
        ctx.objective = objective
        ctx.save_for_backward(theta)
        return objective.loss_and_gradient(theta)[0]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor]:
        (theta,) = ctx.saved_tensors
        gradient: Tensor = _Gradient.apply(ctx.objective, theta)  # type: ignore[no-untyped-call]
        return None, outer[0] * gradient


class _Gradient(torch.autograd.Function):
    """∇L(θ)."""

    @staticmethod
    def forward(ctx: Any, objective: PopulationObjective, theta: Tensor) -> Tensor:
        ctx.objective = objective
        ctx.save_for_backward(theta)
        return objective.loss_and_gradient(theta)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor]:
        (theta,) = ctx.saved_tensors
        return None, ctx.objective.hvp(theta, outer[0])


@dataclass(frozen=True)
class _Network:
    """A module as a network with one hidden layer.

    Attributes:
        layer: Its shape.
        selection: How its parameters come from θ.
        layout: How those that are trained lie in θ.
        parameters: Those.
    """

    layer: HiddenLayer
    selection: Selection
    layout: ParameterLayout
    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Network:
        """Read the module.

        Raises:
            TypeError, ValueError: Naming it.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, not {module!r}.")
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"{name} has no parameter that requires gradients; nothing can be differentiated.")
        check_parameters(parameters)
        layout = ParameterLayout.of(parameters)
        try:
            found = _recognised(module, parameters, layout)
        except NotRecognised as why:
            raise ValueError(f"{name} must be a perceptron with one hidden layer and one output: {why}.") from None
        network = found.network
        layer = HiddenLayer(network.sizes[0], network.activations[0], *network.biases)
        index, frozen, scale = (None if t is None else t.to(layout.device) for t in (found.index, found.frozen, found.scale))
        assert index is not None
        double = (None if t is None else t.to(torch.float64) for t in (frozen, scale))
        return cls(layer, Selection(index, *double), layout, parameters)

    def theta(self) -> Tensor:
        """The present parameters."""
        return self.layout.flatten(self.parameters)


def _recognised(module: nn.Module, parameters: list[nn.Parameter], layout: ParameterLayout) -> RecognisedPerceptron:
    """The module as a perceptron with one hidden layer, compared with itself on three inputs."""
    widths = {m.in_features for m in module.modules() if isinstance(m, nn.Linear)}
    x = next((x for x in (_inputs(d, layout) for d in widths) if _has_one_output(module, x)), None)
    if x is None:
        raise NotRecognised("none of its nn.Linear takes as many inputs as the module, or it has not one output")
    recording = Recording(parameters)
    with torch.enable_grad(), Recorder([recording]):
        loss = mse_loss(module(x), x.new_zeros(len(x), 1))
    program = recording.program(loss)
    if program is None or recording.doubts:
        raise NotRecognised("; ".join(recording.doubts) or "its output does not depend on its parameters")
    found = recognise(program, layout)
    sizes, output = found.network.sizes, found.network.activations[-1]
    if len(sizes) != 3 or not all(kind.is_identity for _, kind in output):
        raise NotRecognised(f"its layers have {' - '.join(map(str, sizes))} neurons, or its output an activation")
    gradient = torch.autograd.grad(loss, parameters)
    read = PerceptronObjective.of(found, layout.dtype, kernel="torch").loss_and_gradient(layout.flatten(parameters))
    if not agree(read, (loss.detach(), layout.flatten(gradient)), layout):
        raise NotRecognised("as one, its output differs")
    return found


def _inputs(d: int, layout: ParameterLayout) -> Tensor:
    """Three of them."""
    return torch.linspace(-1.0, 1.0, 3 * d, dtype=layout.dtype, device=layout.device).reshape(3, d)


def _has_one_output(module: nn.Module, x: Tensor) -> bool:
    """Whether the module takes x, and gives one number for each row."""
    try:
        with torch.no_grad():
            output = module(x)
    except RuntimeError:  # shapes that do not fit
        return False
    return isinstance(output, Tensor) and output.shape == (len(x), 1)


def _checked(name: str, value: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != shape:
        raise ValueError(f"{name} must be a tensor of shape {shape}, not {value!r}.")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, not {value!r}.")
    return value.detach().to(device, torch.float64)
