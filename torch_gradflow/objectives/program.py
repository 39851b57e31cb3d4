"""A recorded computation as a pure function of the parameters: torch calls with names in place of their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_gradflow.objectives.trees import leaves_in, map_leaves, same, tensors_in, version_of


@dataclass(frozen=True)
class Slot:
    """The name of a value that depends on the parameters."""

    index: int


class Call(NamedTuple):
    """One recorded call, with the global modes under which it ran.

    A call whose ``obstacle`` is not "" cannot be replayed, for the reason that it gives; it stands for a value that the
    loss must not need.

    ``args`` and ``kwargs`` hold slots, constant tensors and plain values; ``inputs`` are the slots among them; ``outputs``
    names the tensors of the result in the order of ``tensors_in``; ``autocast`` is the type to which autocast casts, or None
    where it is off.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    grad_enabled: bool
    autocast: torch.dtype | None
    in_place: bool
    inputs: tuple[int, ...]
    obstacle: str = ""

    def same_as(self, other: Call) -> bool:
        """Whether both call the same function with equal arguments under the same modes."""
        fields = ("function", "outputs", "grad_enabled", "autocast", "args", "kwargs")
        return all(same(getattr(self, name), getattr(other, name)) for name in fields)


class RecordedLoss(NamedTuple):
    """A tensor on which ``backward`` was called; ``weight`` is the ``gradient`` argument of that call."""

    slot: int
    weight: Tensor | None


@dataclass(frozen=True)
class Program:
    """L as a sequence of torch calls: a pure function of the parameters, see ``evaluate``.

    Attributes:
        n_inputs: Number of parameter tensors; they are slots 0, 1, ...
        n_slots: Number of values altogether.
        calls: The calls, in their order.
        losses: The tensors whose (weighted) sum is L.
        constants: Tensors that do not depend on the parameters, each with its version counter when it was used.
        device_type: For autocast.
        follows_reading: Whether tensors are among the constants that were made after a number had been read out of a tensor
            that depends on the parameters, so that they may stem from it.
        holds_fixed: Whether values that were computed from the parameters under ``no_grad`` are among the constants.
    """

    n_inputs: int
    n_slots: int
    calls: tuple[Call, ...]
    losses: tuple[RecordedLoss, ...]
    constants: tuple[tuple[Tensor, int], ...]
    device_type: str
    follows_reading: bool = False
    holds_fixed: bool = False

    def evaluate(self, values: Sequence[Tensor]) -> Tensor:
        """L, a 0-dimensional tensor, for parameters ``values``; any torch.func transform may be applied to it."""
        environment: dict[int, Any] = dict(enumerate(values))

        def value_of(leaf: Any) -> Any:
            return environment[leaf.index] if isinstance(leaf, Slot) else leaf

        for call, places in self._plan:
            if places is None:
                args, kwargs = map_leaves(value_of, call.args), map_leaves(value_of, call.kwargs)
            else:
                args, kwargs = list(call.args), call.kwargs
                for place, slot in places:
                    args[place] = environment[slot]
            if call.grad_enabled and call.autocast is None:
                result = call.function(*args, **kwargs)
            else:
                with ExitStack() as stack:
                    if not call.grad_enabled:
                        stack.enter_context(torch.no_grad())
                    if call.autocast is not None:
                        stack.enter_context(torch.autocast(self.device_type, call.autocast, cache_enabled=False))
                    result = call.function(*args, **kwargs)
            if isinstance(result, Tensor):
                environment[call.outputs[0]] = result
            else:
                environment.update(zip(call.outputs, tensors_in(result), strict=True))
        terms = [
            environment[loss.slot] if loss.weight is None else (environment[loss.slot] * loss.weight).sum()
            for loss in self.losses
        ]
        return torch.stack([term.reshape(()) for term in terms]).sum() if len(terms) > 1 else terms[0].reshape(())

    def parts(self) -> tuple[Program, ...]:
        """Programs whose sum this is, one per loss, so that one's intermediate results can go before the next begins.

        Only itself where losses share so much that this would cost more than half as much again, or a call writes in place.
        """
        if len(self.losses) == 1 or any(call.in_place for call in self.calls):
            return (self,)
        made_by = {output: i for i, call in enumerate(self.calls) for output in call.outputs}
        needed = [_needed(loss.slot, self.calls, made_by) for loss in self.losses]
        if 2 * sum(map(len, needed)) > 3 * len(self.calls):
            return (self,)
        return tuple(
            replace(self, calls=tuple(self.calls[i] for i in sorted(indices)), losses=(loss,))
            for loss, indices in zip(self.losses, needed, strict=True)
        )

    @cached_property
    def _plan(self) -> list[tuple[Call, list[tuple[int, int]] | None]]:
        """Each call with the places of its arguments that are slots; None where slots lie deeper than that.

        A replay's own time is spent on filling them in, thousands of times.
        """
        plan: list[tuple[Call, list[tuple[int, int]] | None]] = []
        for call in self.calls:
            places = [(i, arg.index) for i, arg in enumerate(call.args) if isinstance(arg, Slot)]
            n_slots = sum(isinstance(leaf, Slot) for leaf in leaves_in((call.args, call.kwargs)))
            plan.append((call, places if len(places) == n_slots else None))
        return plan

    def changed_constants(self) -> bool:
        """Whether a constant was written to in place after the record used it."""
        return any(version_of(tensor) != version for tensor, version in self.constants)

    def same_function_as(self, other: Program) -> bool:
        """Whether both are the same calls on equal constants, none of which was written to since."""
        if len(self.calls) != len(other.calls) or not same(self.losses, other.losses) or self.n_inputs != other.n_inputs:
            return False
        if self.changed_constants() or other.changed_constants():
            return False
        return all(a.same_as(b) for a, b in zip(self.calls, other.calls, strict=True))

    @cached_property
    def structure(self) -> tuple[Any, ...]:
        """The names of the called functions, their flags, and how values flow between them; without numbers and data."""

        def flags(call: Call) -> tuple[Any, ...]:
            return tuple(leaf for leaf in leaves_in((call.args, call.kwargs)) if isinstance(leaf, bool | Slot))

        return tuple(
            (getattr(c.function, "__name__", ""), flags(c), c.outputs, c.grad_enabled, c.autocast) for c in self.calls
        )

    def numbers(self) -> tuple[Any, ...]:
        """The numbers among the arguments, those of one-element constants too."""
        leaves = leaves_in([(call.args, call.kwargs) for call in self.calls])
        plain = tuple(leaf for leaf in leaves if isinstance(leaf, int | float | complex))
        return plain, tuple(tensor.item() for tensor, _ in self.constants if tensor.numel() == 1)

    def in_float64(self) -> Program:
        """The same calls with floating-point constants and explicit type arguments in float64.

        Called with float64 parameters it is L to double precision for a model that computes in float32.
        """
        memory: dict[int, Tensor] = {}

        def widen(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                return memory.setdefault(id(leaf), leaf.detach().to(torch.float64))
            return torch.float64 if leaf is torch.float32 else leaf

        def widen_call(call: Call) -> Call:
            function = torch.Tensor.double if call.function is torch.Tensor.float else call.function
            return call._replace(function=function, args=map_leaves(widen, call.args), kwargs=map_leaves(widen, call.kwargs))

        calls = tuple(widen_call(call) for call in self.calls)
        losses = tuple(loss._replace(weight=widen(loss.weight)) for loss in self.losses)
        return replace(self, calls=calls, losses=losses)


def _needed(slot: int, calls: Sequence[Call], made_by: Mapping[int, int]) -> set[int]:
    """The indices of the calls on which a value depends."""
    found: set[int] = set()
    waiting = [slot]
    while waiting:
        index = made_by.get(waiting.pop())
        if index is not None and index not in found:
            found.add(index)
            waiting += calls[index].inputs
    return found
