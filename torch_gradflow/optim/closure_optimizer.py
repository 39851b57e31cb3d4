"""What GradientFlow and NewtonPolish share: parameters, settings, and a closure or a loop opened as one step's objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_gradflow.checks import check_number
from torch_gradflow.objectives.base import EvaluationCounts
from torch_gradflow.objectives.closure import NoClosure, open_closure
from torch_gradflow.objectives.loop import NOT_ZEROED_BEFORE, open_loop
from torch_gradflow.objectives.opened import Engine, Memory, Opened
from torch_gradflow.objectives.parameters import ParameterLayout, check_memory_apart, check_parameters, working_dtype
from torch_gradflow.objectives.processes import Processes, Reached
from torch_gradflow.objectives.record import Recording
from torch_gradflow.objectives.regularized import Penalties
from torch_gradflow.objectives.tape import tape
from torch_gradflow.uncompiled import uncompiled

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class ObjectiveSettings:
    """How a closure or a loop becomes an objective; see ``GradientFlow`` for the meaning of each."""

    max_norm: float | None
    dtype: torch.dtype | None
    engine: Engine
    check: bool
    record: bool
    processes: Processes

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm, least=0.0)
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float64, torch.float32 or None, not {self.dtype!r}.")
        if self.engine not in ("auto", "perceptron", "replay", "closure"):
            raise ValueError(f"engine must be 'auto', 'perceptron', 'replay' or 'closure', not {self.engine!r}.")
        for name in ("check", "record"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        if self.engine in ("perceptron", "replay") and not self.record:
            raise ValueError(
                f"record=False leaves engine={self.engine!r} nothing to replay in a loop without a closure; drop one."
            )


@dataclass
class ActiveParameters:
    """The parameters that move, and what their groups say about them.

    Attributes:
        tensors: Those that require gradients, in groups whose lr is not zero.
        groups: The group of each.
        layout: How they lie in θ.
    """

    tensors: list[Tensor]
    groups: list[dict[str, Any]]
    layout: ParameterLayout

    def expand(self, key: str) -> Tensor:
        """A group's number for each element of θ, shape ``(P,)``."""
        return self.layout.expand([float(group[key]) for group in self.groups])


class ClosureOptimizer(Optimizer):
    """An optimizer that evaluates the objective behind a closure or a loop at parameters of its own choice."""

    def __init__(self, params: Params, defaults: dict[str, Any], settings: ObjectiveSettings) -> None:
        check_group({**defaults}, "")
        self._settings = settings
        self._forget()
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which join the flow at the next step."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_group(group, f"params group {len(self.param_groups) - 1}: ")
            tensors = [p for g in self.param_groups for p in g["params"]]
            check_parameters(tensors)
            wide, given = working_dtype(tensors), self._settings.dtype
            if given is not None and torch.promote_types(wide, given) != given:
                raise ValueError(f"dtype={given} is narrower than the parameters' {wide}; leave it None.")
            if len({bool(g["maximize"]) for g in self.param_groups}) > 1:
                raise ValueError("maximize must be the same in all groups: one flow descends or ascends one objective.")
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def _processes(self) -> Processes:
        return self._settings.processes

    @property
    def max_norm(self) -> float | None:
        """The c of the barrier that is added to L, or None."""
        return self._settings.max_norm

    def _forget(self) -> None:
        """What need not survive copying, pickling and loading."""
        self._memory = Memory(check=self._settings.check)
        self._counts = EvaluationCounts()
        self._loop = LoopState()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``, but floating-point state keeps its own type.

        (The base class casts it to the parameters' type, which would round a float64 master copy.)
        """
        given = state_dict

        def look(_: Optimizer, changed: dict[str, Any]) -> None:  # after all other hooks before loading
            nonlocal given
            given = changed
            known, own = given["param_groups"], self.param_groups[0]
            missing = [key for group in known for key in own if key not in group and key not in ("params", "param_names")]
            if missing:
                raise ValueError(
                    f"state_dict is not one of {type(self).__name__}: its groups have no {', '.join(map(repr, missing))}. "
                    "Load the model's state_dict only, and start the optimizer anew."
                )

        def uncast(_: Optimizer) -> None:  # before all other hooks after loading
            numbers = [i for group in given["param_groups"] for i in group["params"]]
            tensors = [p for group in self.param_groups for p in group["params"]]
            for number, parameter in zip(numbers, tensors, strict=True):
                for key, value in given["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.detach().clone().to(parameter.device)

        hooks = (
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(uncast, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._forget()

    @abstractmethod
    def _initialise_state(self) -> None:
        """Give every parameter the state entries that it will have after a step."""

    def _active(self) -> ActiveParameters | None:
        """The parameters that move, or None if none does."""
        for i, group in enumerate(self.param_groups):
            check_group(group, f"params group {i}: ")
        pairs = [(p, g) for g in self.param_groups if float(g["lr"]) != 0.0 for p in g["params"] if p.requires_grad]
        if not pairs:
            return None
        tensors = [p for p, _ in pairs]
        check_memory_apart(tensors)
        return ActiveParameters(tensors, [g for _, g in pairs], ParameterLayout.of(tensors, self._working_dtype()))

    def _working_dtype(self) -> torch.dtype:
        return working_dtype([p for group in self.param_groups for p in group["params"]], self._settings.dtype)

    def _without_motion(self, closure: Callable[[], Any] | None) -> Any:
        """A step in which nothing moves: all lrs are zero, or all parameters frozen."""
        self._initialise_state()
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``; in a loop without a closure it also begins the record of the next pass.

        The record ends with the next ``step``; it holds what is computed from the parameters in this thread, except under
        ``no_grad`` and within ``recording_paused``.
        """
        super().zero_grad(set_to_none)
        if self._loop.stepping:
            return
        self._loop.zeroed = True
        self._end_recording()
        moving = [p for g in self.param_groups if float(g["lr"]) != 0.0 for p in g["params"] if p.requires_grad]
        # Under no_grad there is no forward pass to come, as in a hook of a backward pass, whose modes end with it.
        if moving and self._settings.record and self._settings.engine != "closure" and torch.is_grad_enabled():
            self._loop.recording = Recording(moving, loop=True)
            tape().begin(self._loop.recording)

    @contextmanager
    def recording_paused(self) -> Iterator[None]:
        """Record nothing within: for evaluations between ``zero_grad()`` and ``step()`` that do not belong to the loss."""
        recording = self._loop.recording
        if recording is None or recording.paused:
            yield
            return
        with tape().paused(recording):
            yield

    def _end_recording(self) -> Recording | None:
        recording, self._loop.recording = self._loop.recording, None
        if recording is not None:
            tape().end(recording)
            self._loop.n_recorded = recording.n_calls
            self._loop.seconds += recording.seconds
        return recording

    @contextmanager
    def _step_begun(self) -> Iterator[Recording | None]:
        """A step, with what was recorded for it; nothing is recorded within, not by other optimizers either."""
        recording, self._loop.stepping = self._end_recording(), True
        try:
            with tape().silenced(), self._processes.interruptible():
                yield recording
        finally:
            self._loop.stepping = False

    def _check_closure(self, closure: Callable[[], Any] | None) -> None:
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be a function without arguments that returns the loss, not {closure!r}.")
        self._processes.check_world(type(self).__name__)

    @contextmanager
    def _open(
        self,
        closure: Callable[[], Any] | None,
        recording: Recording | None,
        active: ActiveParameters,
        *,
        theta: Tensor | None = None,
        expected: Callable[[Tensor, Tensor, Tensor], bool] | None = None,
    ) -> Iterator[tuple[Opened, Reached]]:
        """Closure or loop opened for one step; at the end, also after a failure, the parameters are the θ that was reached.

        Raises:
            NoRecord: If there is no closure, and no record that serves.
        """
        opened = None
        others = [p for g in self.param_groups for p in g["params"] if all(p is not t for t in active.tensors)]
        settings = self._common_settings(closure)
        if closure is not None:
            with suppress(NoClosure):
                opened = open_closure(
                    closure,
                    active.tensors,
                    active.layout,
                    self._memory,
                    self._counts,
                    engine=self._settings.engine,
                    theta=theta,
                    expected=expected,
                    bystanders=others,
                    processes=self._processes,
                    settings=settings,
                )
        if opened is None:
            self._counts.n_grad += 1  # the loop's own
            opened = open_loop(
                recording,
                active.tensors,
                active.layout,
                self._memory,
                self._counts,
                engine=self._settings.engine,
                why_not=self._why_no_recording(),
                theta=theta,
                expected=expected,
                processes=self._processes,
                settings=settings,
            )
        reached = Reached(opened.theta)
        try:
            yield opened, reached
        finally:
            opened.finish(reached.theta)
            objective = opened.objective
            self._memory.second_derivatives = getattr(objective, "second_derivatives", None)

    def _common_settings(self, closure: Callable[[], Any] | None) -> str:
        """What has to be the same in all processes."""
        settings, keys = self._settings, ("lr", "weight_decay", "maximize", "flow_time")
        groups = [[len(group["params"]), *(group.get(key) for key in keys)] for group in self.param_groups]
        own = (settings.max_norm, settings.dtype, settings.engine, settings.check, settings.record)
        return f"{type(self).__name__}, {closure is None}, {groups}, {own}"

    def _why_no_recording(self) -> str:
        if not self._settings.record:
            return "record=False was asked for"
        if self._settings.engine == "closure":
            return "engine='closure' was asked for, and there is no closure"
        return NOT_ZEROED_BEFORE

    def _penalties(self, active: ActiveParameters) -> Penalties | None:
        """What is added to L, or None where the objective is L itself."""
        decays = any(float(group["weight_decay"]) != 0.0 for group in active.groups)
        maximize = bool(active.groups[0]["maximize"])
        if not decays and not maximize and self._settings.max_norm is None:
            return None
        return Penalties(active.expand("weight_decay") if decays else None, self._settings.max_norm, -1.0 if maximize else 1.0)

    def _known_theta(self, active: ActiveParameters) -> Tensor | None:
        """θ as the last step left it, if the parameters are still its (rounded) values."""
        kept = [self.state[p].get("theta") for p in active.tensors]
        if any(k is None or not torch.equal(k.to(p.dtype), p) for k, p in zip(kept, active.tensors, strict=True)):
            return None
        return active.layout.flatten(kept)

    def _keep_theta(self, active: ActiveParameters, theta: Tensor) -> None:
        """Keep θ in its own type, to recognise it, and because the parameters may be narrower."""
        for parameter, part in zip(active.tensors, active.layout.split(theta), strict=True):
            self.state[parameter]["theta"] = part.clone()


@dataclass
class LoopState:
    """What is going on in a loop; one object, which wrappers that copy an optimizer's attributes (Lightning's) share.

    Attributes:
        recording: What is being recorded.
        zeroed: Whether ``zero_grad()`` was ever called outside of a step.
        stepping: Whether a step is under way.
        n_recorded: Calls kept in the last record.
        seconds: What recording took so far.
    """

    recording: Recording | None = None
    zeroed: bool = False
    stepping: bool = False
    n_recorded: int = 0
    seconds: float = 0.0


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Check the numbers of a parameter group.

    Raises:
        ValueError: For a negative or infinite lr or weight_decay.
        TypeError: For something that is not a number.
    """
    for key in ("lr", "weight_decay"):
        check_number(f"{where}{key}", group[key], least=0.0)
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"{where}maximize must be True or False, not {group['maximize']!r}.")
