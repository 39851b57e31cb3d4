"""Minimisers of scipy and NLopt, by name: "scipy:SLSQP", "nlopt:LD_SLSQP".

They take the objective as a function that they call. Here each gradient that they ask for is a trial step that the driver
asks for, so that its limits, its progress display and Ctrl-C hold for them too: the package runs in a thread of its own, which
waits while the driver's thread evaluates what it wants to know. The best point seen is what is kept, wherever the package
itself would end.
"""

from __future__ import annotations

import importlib
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_gradflow.minimize.acceptance import Point, improves
from torch_gradflow.minimize.method import Iterate, Minimiser, Need
from torch_gradflow.objectives.base import Objective

Array = npt.NDArray[np.float64]
# (L, ∇L) at x; H(x)v; H(x).
Answer = Any
Ask = Callable[["Question"], Answer]
# A run ends when the driver says so: options of scipy's that would end it earlier are switched off.
FOREVER = 10**9
SCIPY: dict[str, tuple[Need, dict[str, float]]] = {
    "CG": ("gradient", {"gtol": 0.0, "maxiter": FOREVER}),
    "BFGS": ("gradient", {"gtol": 0.0, "maxiter": FOREVER}),
    "L-BFGS-B": ("gradient", {"gtol": 0.0, "ftol": 0.0, "maxiter": FOREVER, "maxfun": FOREVER}),
    "TNC": ("gradient", {"gtol": 0.0, "ftol": 0.0, "xtol": 0.0, "maxfun": FOREVER}),
    "SLSQP": ("gradient", {"ftol": 0.0, "maxiter": FOREVER}),
    "Newton-CG": ("hvp", {"xtol": 0.0, "maxiter": FOREVER}),
    "trust-ncg": ("hvp", {"gtol": 0.0, "maxiter": FOREVER}),
    "trust-krylov": ("hvp", {"gtol": 0.0, "maxiter": FOREVER}),
    "dogleg": ("hessian", {"gtol": 0.0, "maxiter": FOREVER}),
    "trust-exact": ("hessian", {"gtol": 0.0, "maxiter": FOREVER}),
}
"""scipy's methods that use derivatives: the highest one, and the options."""
NLOPT = ("LD_SLSQP", "LD_LBFGS", "LD_VAR1", "LD_VAR2", "LD_TNEWTON_PRECOND_RESTART", "LD_MMA", "LD_CCSAQ")
"""NLopt's local methods that use gradients."""
# Those that hold dense matrices, and how many.
MATRICES = {"BFGS": 3, "SLSQP": 3, "LD_SLSQP": 3, "dogleg": 4, "trust-exact": 4}


@dataclass(frozen=True)
class Question:
    """What a package wants to know.

    Attributes:
        what: Which derivative.
        at: Where, shape ``(P,)``.
        vector: v of H v, shape ``(P,)``.
    """

    what: Literal["gradient", "hvp", "hessian"]
    at: Array
    vector: Array | None = None


@dataclass(frozen=True)
class External(Minimiser):
    """A method of another package.

    Attributes:
        algorithm: Its name there.
    """

    algorithm: str
    name: str
    needs: frozenset[Need]
    matrices: int

    @abstractmethod
    def find(self) -> Any:
        """The package.

        Raises:
            ImportError: If it is not installed.
        """

    @abstractmethod
    def minimise(self, package: Any, ask: Ask, start: Array) -> str:
        """Run to the package's own end; how it describes that."""

    def iterate(self, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Iterator[Iterate]:
        """See ``Minimiser``: one iterate per gradient that the package asks for.

        Raises:
            ImportError: If the package is not installed.
        """
        package, start = self.find(), to_array(theta)
        best, length = Point(theta, loss, gradient), 0.0
        conversation = Conversation(lambda ask: self.minimise(package, ask, start))
        try:
            for question in conversation:
                there = to_tensor(question.at, theta)
                if question.what == "hessian":
                    conversation.answer(to_array(objective.hessian(there)))
                elif question.vector is not None:
                    conversation.answer(to_array(objective.hvp(there, to_tensor(question.vector, theta))))
                else:
                    point = Point(there, *objective.loss_and_gradient(there))
                    length = float((there - best.theta).norm())
                    best = point if improves(best, point, objective.resolution) else best
                    yield Iterate(best.theta, best.loss, best.gradient, math.nan, length, False)
                    conversation.answer((float(point.loss), to_array(point.gradient)))
        finally:
            conversation.end()
        while True:
            note = f"{self.name} ended: {conversation.last_words}"
            yield Iterate(best.theta, best.loss, best.gradient, math.nan, length, True, note)


@dataclass(frozen=True)
class ScipyMinimiser(External):
    """A method of ``scipy.optimize.minimize``."""

    def find(self) -> Any:
        """See ``External``."""
        return find_package("scipy.optimize", self.name, "pip install scipy (or torch-gradflow[scipy])")

    def minimise(self, package: Any, ask: Ask, start: Array) -> str:
        """See ``External``."""
        highest, options = SCIPY[self.algorithm]
        derivatives: dict[str, Any] = {}
        if highest == "hvp":
            derivatives["hessp"] = lambda x, vector: ask(Question("hvp", np.array(x), np.array(vector)))
        if highest == "hessian":
            derivatives["hess"] = lambda x: ask(Question("hessian", np.array(x)))
        with np.errstate(all="ignore"):
            found = package.minimize(
                lambda x: ask(Question("gradient", np.array(x))),
                start,
                jac=True,
                method=self.algorithm,
                options=options,
                **derivatives,
            )
        return str(found.message)


@dataclass(frozen=True)
class NloptMinimiser(External):
    """A local method of NLopt that uses gradients."""

    def find(self) -> Any:
        """See ``External``."""
        return find_package("nlopt", self.name, "pip install nlopt")

    def minimise(self, package: Any, ask: Ask, start: Array) -> str:
        """See ``External``."""

        def value(x: Array, slope: Array) -> float:
            loss, gradient = ask(Question("gradient", np.array(x)))
            if slope.size:
                slope[:] = gradient
            return float(loss)

        optimizer = package.opt(getattr(package, self.algorithm), len(start))
        optimizer.set_min_objective(value)
        optimizer.optimize(start)
        return f"its result code is {optimizer.last_optimize_result()}"


METHODS: dict[str, External] = {
    method.name: method
    for method in (
        *(
            ScipyMinimiser(name, f"scipy:{name}", frozenset({need}), MATRICES.get(name, 0))
            for name, (need, _) in SCIPY.items()
        ),
        *(NloptMinimiser(name, f"nlopt:{name}", frozenset({"gradient"}), MATRICES.get(name, 0)) for name in NLOPT),
    )
}
"""All of them by name."""


def find_package(module: str, method: str, remedy: str) -> Any:
    """The module.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"method={method!r} is of the package {package}, which is not installed: {remedy}.") from error


class _EndedError(BaseException):
    """Raised within a package's function when nobody answers any more; no package catches it as an error of its own."""


class Conversation:
    """A function that asks, in a thread of its own, and who answers, in the present one: iterate over the questions.

    Args:
        speak: Called with a function that asks; returns its last words.

    Attributes:
        last_words: What it returned, or the error that it raised.
    """

    def __init__(self, speak: Callable[[Ask], str]) -> None:
        self.last_words = ""
        self._speak = speak
        self._questions: SimpleQueue[Question | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Answer] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Question]:
        while (question := self._questions.get()) is not None:
            yield question

    def answer(self, answer: Answer) -> None:
        """The last question."""
        self._answers.put((answer,))

    def end(self) -> None:
        """There are no more answers."""
        self._answers.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self.last_words = self._speak(self._ask)
        except _EndedError:
            pass
        except Exception as error:
            self.last_words = f"{type(error).__name__}: {error}"
        finally:
            self._questions.put(None)

    def _ask(self, question: Question) -> Answer:
        self._questions.put(question)
        answer = self._answers.get()
        if answer is None:
            raise _EndedError
        return answer[0]


def to_array(values: Tensor) -> Array:
    """A copy in float64 on the CPU."""
    return np.array(values.detach().cpu().to(torch.float64).numpy())


def to_tensor(values: Array, like: Tensor) -> Tensor:
    """A copy in the type and on the device of ``like``."""
    return torch.from_numpy(values).to(dtype=like.dtype).to(device=like.device)
