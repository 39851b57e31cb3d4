"""A model, a loss function and data as an Objective: in closed form where they are known, else through torch.func."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_gradflow.checks import check_count
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.calls import NotRecognised
from torch_gradflow.objectives.contract import agree, only_rounding
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.least_squares import LeastSquares
from torch_gradflow.objectives.parameters import ParameterLayout, check_parameters
from torch_gradflow.objectives.perceptron import WIDE, PerceptronObjective
from torch_gradflow.objectives.recognition import joined, recognise
from torch_gradflow.objectives.record import Recorder, Recording
from torch_gradflow.objectives.trees import tensors_in, version_of
from torch_gradflow.perceptron.kernels import is_wide

Batch = tuple[Any, Any]
LossFunction = Callable[[Any, Any], Tensor]
ModuleEngine = Literal["auto", "perceptron", "torch.func"]


class ModuleObjective(FunctionObjective):
    """L(θ) = loss_fn(model_θ(x), y) over all data, accumulated chunk by chunk.

    Where model and loss are recognised as those of a multi-layer perceptron, and the data are tensors, loss and derivatives
    come in closed form (``torch_gradflow.objectives.perceptron``). Data, buffers, frozen parameters and weights in the loss
    that torch writes to afterwards are read anew; what numpy writes into a tensor's memory is not noticed.

    θ are the model's parameters that require gradients, in the order of ``model.named_parameters()``. The model is not
    changed; it computes in the mode (training or evaluation) in which it is.

    Args:
        model: Any module whose output for one chunk of inputs does not depend on the other chunks.
        loss_fn: ``loss_fn(prediction, target)``, a scalar, averaged (or summed) over the samples of a chunk.
        data: ``(x, y)`` as tensors, or an iterable of such pairs that gives the same pairs every time, such as a
            DataLoader without shuffling. Chunks go to the parameters' device as they are used.
        reduction: How ``loss_fn`` combines samples. "mean": chunks are weighted by their share of the samples, so that
            L is the mean over all of them. "sum": chunks are added. None takes ``loss_fn.reduction``, or "mean".
        chunk_size: Splits tensors into chunks of that many samples; None keeps them whole.
        dtype: The type of θ; None takes the parameters' own.
        engine: "auto"; "perceptron" (an error, with the reason, where that is not recognised); "torch.func".

    Attributes:
        engine: "perceptron" or "torch.func": which serves.
        engine_reason: Why it is not "perceptron", or "".

    Raises:
        TypeError, ValueError: For what ``check_parameters`` refuses, no data, or a shuffling DataLoader.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: tuple[Tensor, Tensor] | Iterable[Batch],
        *,
        reduction: Literal["mean", "sum"] | None = None,
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
        engine: ModuleEngine = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, not {model!r}.")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of prediction and target, not {loss_fn!r}.")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float64, torch.float32 or None, not {dtype!r}.")
        if engine not in ("auto", "perceptron", "torch.func"):
            raise ValueError(f"engine must be 'auto', 'perceptron' or 'torch.func', not {engine!r}.")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("model has no parameter that requires gradients; nothing can be differentiated.")
        check_parameters(list(named.values()))
        self.layout = ParameterLayout.of(list(named.values()), dtype)
        self.reduction = _reduction(loss_fn, reduction)
        self._model, self._loss_fn = model, loss_fn
        self._names = tuple(named)
        self._owners = _owners(model, named)
        self._chunks = _chunks(data, chunk_size)
        sizes = [_samples(x) for x, _ in self._chunks()]
        if self.reduction == "mean" and len(sizes) > 1:
            _check_mean(loss_fn, self._chunks())
        if not sizes or sum(sizes) == 0:
            raise ValueError("data holds no samples; give tensors (x, y) or an iterable of such pairs.")
        self._n_samples = sum(sizes)
        super().__init__(
            self._losses, self.layout.n_parameters, self.layout.dtype, self.layout.device, counts=EvaluationCounts()
        )
        theta = self.initial_theta()
        with torch.no_grad():
            first, second = (float(next(iter(self._losses()))(theta)) for _ in range(2))
        if abs(first - second) > 1e3 * self.resolution * abs(first):
            raise ValueError(
                f"model or loss_fn is stochastic: the same parameters and data gave the losses {first:.8g} and {second:.8g}. "
                "Switch dropout off (model.eval())."
            )
        self._parameters = list(named.values())
        self._in_memory = isinstance(data, tuple)
        self._asked = engine
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self._given = [*(tensors_in(data) if self._in_memory else ()), *model.buffers(), *frozen]
        self._watched = self._given
        self._state: list[Any] = []
        self._perceptron: PerceptronObjective | None = None
        self.engine, self.engine_reason = "torch.func", "engine='torch.func' was asked for"
        if engine != "torch.func":
            self._recognise()

    def kind(self) -> tuple[Any, ...]:
        """See ``Objective``."""
        return *super().kind(), self.engine, self._n_samples

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ)."""
        fast = self._fast()
        return super().loss_and_gradient(theta) if fast is None else fast.loss_and_gradient(theta)

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V; V of shape ``(P,)`` or ``(P, k)``."""
        fast = self._fast()
        return super().hvp(theta, vectors) if fast is None else fast.hvp(theta, vectors)

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ)."""
        fast = self._fast()
        return super().hessian(theta) if fast is None else fast.hessian(theta)

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(θ), ∇L(θ) and H(θ)."""
        fast = self._fast()
        return super().loss_gradient_hessian(theta) if fast is None else fast.loss_gradient_hessian(theta)

    def loss_and_gradient_many(self, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L at many points."""
        fast = self._fast()
        return super().loss_and_gradient_many(thetas) if fast is None else fast.loss_and_gradient_many(thetas)

    def loss_gradient_hessian_many(self, thetas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H at many points."""
        fast = self._fast()
        return super().loss_gradient_hessian_many(thetas) if fast is None else fast.loss_gradient_hessian_many(thetas)

    @property
    def has_residuals(self) -> bool:
        """Whether it is the squared error of a perceptron."""
        fast = self._fast()
        return fast is not None and fast.has_residuals

    def residuals(self, theta: Tensor) -> Tensor:
        """r(θ)."""
        fast = self._fast()
        return super().residuals(theta) if fast is None else fast.residuals(theta)

    def pull_back(self, theta: Tensor, cotangent: Tensor) -> Tensor:
        """J(θ)ᵀu."""
        fast = self._fast()
        return super().pull_back(theta, cotangent) if fast is None else fast.pull_back(theta, cotangent)

    def least_squares(self, theta: Tensor) -> LeastSquares:
        """L(θ), ∇L(θ) and the factor of J(θ)."""
        fast = self._fast()
        return super().least_squares(theta) if fast is None else fast.least_squares(theta)

    def compensated(self) -> Objective:
        """The closed form with loss and gradient compensated, for the data as they are now."""
        fast = self._fast()
        return super().compensated() if fast is None else fast.compensated()

    @property
    def perceptron(self) -> PerceptronObjective | None:
        """The closed form, for the data as they are now; None where it is not known."""
        return self._fast()

    def _fast(self) -> PerceptronObjective | None:
        """The closed form, for the data as they are now."""
        if self._perceptron is not None and self._state != self._present():
            self._recognise()
        return self._perceptron

    def _present(self) -> list[Any]:
        """What the closed form was made from: the model's parts, and how often the tensors that it used were written to."""
        return [*((m, m.training) for m in self._model.modules()), *(version_of(t) for t in self._watched)]

    def _recognise(self) -> None:
        """Look for the closed form, and compare it with torch's loss and gradient."""
        self._perceptron = None
        try:
            objective, used = self._closed_form()
            # Those alive are the user's (weights of the loss, say): what was only made in between, nobody writes to.
            self._watched = [*self._given, *(tensor for reference in used if (tensor := reference()) is not None)]
            self._state = self._present()
            theta = self.initial_theta()
            found, wanted = objective.loss_and_gradient(theta), super().loss_and_gradient(theta)
            self.counts.n_grad -= 2
            if not agree(found, wanted, self.layout) and not only_rounding(objective, theta, found, wanted, self.layout):
                raise NotRecognised("as that of a perceptron, the loss or its gradient differs")
        except NotRecognised as why:
            self.engine, self.engine_reason = "torch.func", str(why)
            if self._asked == "perceptron":
                raise ValueError(
                    "engine='perceptron' was asked for, but model and loss_fn are not recognised as those of a multi-layer "
                    f"perceptron: {why}."
                ) from None
            return
        self._perceptron, self.engine, self.engine_reason = objective, "perceptron", ""

    def _closed_form(self) -> tuple[PerceptronObjective, list[weakref.ref[Tensor]]]:
        """The closed form, and the tensors that loss and model used, or of which they used views."""
        if not self._in_memory or any(dtype != self.layout.dtype for dtype in self.layout.dtypes):
            raise NotRecognised("the data are not tensors, or θ is wider than the parameters")
        parts, used = [], []
        for x, y in self._chunks():
            x, y = _to(x, self.layout.device), _to(y, self.layout.device)
            recording = Recording(self._parameters)
            with torch.enable_grad(), Recorder([recording]):
                value = self._loss_fn(self._model(x), y)
                value = value * (_samples(x) / self._n_samples if self.reduction == "mean" else 1.0)
            program = recording.program(value)
            if program is None or recording.doubts:
                raise NotRecognised("; ".join(recording.doubts) or "the loss does not depend on the parameters")
            parts.append(recognise(program, self.layout))
            used += [weakref.ref(t if t._base is None else t._base) for t, _ in program.constants]
        if self._asked == "auto" and is_wide(parts[0].network):
            raise NotRecognised(WIDE)
        return PerceptronObjective.of(joined(parts), self.layout.dtype, counts=self.counts), used

    def initial_theta(self) -> Tensor:
        """The model's present parameters, shape ``(P,)``."""
        parameters = dict(self._model.named_parameters())
        return self.layout.flatten([parameters[name] for name in self._names])

    def write(self, theta: Tensor) -> None:
        """Put θ into the model."""
        parameters = dict(self._model.named_parameters())
        self.layout.write(theta, [parameters[name] for name in self._names])

    def _losses(self) -> Iterator[Callable[[Tensor], Tensor]]:
        for x, y in self._chunks():
            x, y = _to(x, self.layout.device), _to(y, self.layout.device)
            weight = _samples(x) / self._n_samples if self.reduction == "mean" else 1.0
            yield lambda theta, x=x, y=y, weight=weight: weight * self._loss(theta, x, y)  # type: ignore[misc]

    def _loss(self, theta: Tensor, x: Any, y: Any) -> Tensor:
        parts = dict(zip(self._names, self.layout.split_as_parameters(theta), strict=True))
        values = {name: parts[known] for name, known in self._owners.items()}
        if self._model.training:  # what BatchNorm writes is written to copies
            values |= {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}
        return self._loss_fn(torch.func.functional_call(self._model, values, (x,), tie_weights=False), y).to(self.dtype)


def _owners(model: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, str]:
    """Every place in which a parameter stands, once per module, with the name that it has in ``named``.

    (``functional_call`` ties weights itself, but leaves a module that is used under two names with plain tensors.)
    """
    known = {id(parameter): name for name, parameter in named.items()}
    return {
        f"{prefix}.{name}" if prefix else name: known[id(parameter)]
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in known
    }


def _reduction(loss_fn: LossFunction, given: str | None) -> str:
    reduction = given if given is not None else getattr(loss_fn, "reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}: the loss must be a scalar.")
    return str(reduction)


def _chunks(data: Any, chunk_size: int | None) -> Callable[[], Iterable[Batch]]:
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be tensors (x, y) or an iterable of such pairs, not {data!r}.")
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        x, y = data
        if len(x) != len(y):
            raise ValueError(f"data must have as many targets as inputs, not {len(y)} and {len(x)}.")
        size = len(x) if chunk_size is None else chunk_size
        return partial(_pieces, x, y, max(size, 1))
    if chunk_size is not None:
        raise ValueError("chunk_size splits tensors; an iterable of batches brings its own chunks, so leave it None.")
    if iter(data) is data:
        raise TypeError("data is an iterator that can be read only once; give a list of batches or a DataLoader.")
    if [_checksum(batch) for batch in data] != [_checksum(batch) for batch in data]:
        raise ValueError(
            "the batches of data differ at each evaluation: it shuffles or augments. Use shuffle=False and fixed data; all "
            "batches are accumulated anyway."
        )
    return partial(_whole, data)


def _pieces(x: Tensor, y: Tensor, size: int) -> Iterator[Batch]:
    """The data in chunks; a function of the module, so that objectives can be pickled."""
    return ((x[i : i + size], y[i : i + size]) for i in range(0, len(x), size))


def _whole(data: Iterable[Batch]) -> Iterable[Batch]:
    return data


def _checksum(batch: Any) -> list[float]:
    return [float(t.double().sum()) for t in tensors_in(batch)]


def _check_mean(loss_fn: LossFunction, chunks: Iterable[Batch]) -> None:
    """Refuse means over something else than samples, which do not add up over chunks."""
    ignored = getattr(loss_fn, "ignore_index", None)
    what = "a weight per class" if getattr(loss_fn, "weight", None) is not None else ""
    if ignored is not None and any(bool((t == ignored).any()) for _, y in chunks for t in tensors_in(y)):
        what = f"ignore_index={ignored}"
    if what:
        raise ValueError(
            f"loss_fn averages with {what}, so that the mean over all data is not that of the chunks' means. Give the data "
            "as one chunk, or a loss_fn with reduction='sum'."
        )


def _samples(x: Any) -> int:
    return len(x) if not isinstance(x, tuple | list | dict) else len(next(iter(x.values() if isinstance(x, dict) else x)))


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, Tensor) else item


def gradient(model: nn.Module, loss_fn: LossFunction, data: tuple[Tensor, Tensor] | Iterable[Batch], **options: Any) -> Tensor:
    """The gradient of a model's loss at its present parameters.

    Args:
        model: As for ``ModuleObjective``, in whose order of parameters the components stand.
        loss_fn: As for ``ModuleObjective``.
        data: As for ``ModuleObjective``.
        options: Further arguments of ``ModuleObjective``.

    Returns:
        A vector of shape ``(P,)``.
    """
    objective = ModuleObjective(model, loss_fn, data, **options)
    return objective.loss_and_gradient(objective.initial_theta())[1]


def hvp(
    model: nn.Module,
    loss_fn: LossFunction,
    data: tuple[Tensor, Tensor] | Iterable[Batch],
    vectors: Tensor,
    **options: Any,
) -> Tensor:
    """Products of the Hessian of a model's loss, at its present parameters, with one vector or several.

    Args:
        model: As for ``ModuleObjective``, in whose order of parameters the components stand.
        loss_fn: As for ``ModuleObjective``.
        data: As for ``ModuleObjective``.
        vectors: Of shape ``(P,)`` or ``(P, k)``.
        options: Further arguments of ``ModuleObjective``.

    Returns:
        H V, in the shape of ``vectors``.

    Raises:
        ValueError: For vectors of another length.
    """
    objective = ModuleObjective(model, loss_fn, data, **options)
    if vectors.dim() not in (1, 2) or vectors.shape[0] != objective.n_parameters:
        raise ValueError(
            f"vectors must have the shape ({objective.n_parameters},) or ({objective.n_parameters}, k), not "
            f"{tuple(vectors.shape)}."
        )
    return objective.hvp(objective.initial_theta(), vectors)


def hessian(model: nn.Module, loss_fn: LossFunction, data: tuple[Tensor, Tensor] | Iterable[Batch], **options: Any) -> Tensor:
    """The Hessian of a model's loss at its present parameters, confirmed against differences of the gradient.

    Args:
        model: As for ``ModuleObjective``, in whose order of parameters rows and columns stand.
        loss_fn: As for ``ModuleObjective``.
        data: As for ``ModuleObjective``.
        options: Further arguments of ``ModuleObjective``.

    Returns:
        A symmetric matrix of shape ``(P, P)``.
    """
    objective = ModuleObjective(model, loss_fn, data, **options)
    return objective.hessian(objective.initial_theta())


def hessian_spectrum(
    model: nn.Module, loss_fn: LossFunction, data: tuple[Tensor, Tensor] | Iterable[Batch], **options: Any
) -> Tensor:
    """The eigenvalues of ``hessian(...)``, ascending, shape ``(P,)``."""
    values: Tensor = torch.linalg.eigvalsh(hessian(model, loss_fn, data, **options))
    return values
