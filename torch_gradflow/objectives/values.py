"""The values of a recorded program: which call made each of them, how often each is used, and what it amounts to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from torch_gradflow.objectives.calls import NotRecognised, call_name, does_nothing, is_plain
from torch_gradflow.objectives.polynomials import Expansion
from torch_gradflow.objectives.program import Call, Program, Slot
from torch_gradflow.objectives.trees import leaves_in, map_leaves

# What may write in place: the value before it is used by nothing else.
_IN_PLACE = frozenset({"relu", "leaky_relu", "elu", "celu", "selu", "silu", "mish", "tanh", "sigmoid"})


class Values:
    """The values of one program, by slot, looked at from the loss backwards.

    Calls that do nothing, such as dropout in evaluation mode, are left out: who uses their results uses their arguments.

    Args:
        program: The program.

    Attributes:
        n_parameters: The first so many slots are parameters.
    """

    def __init__(self, program: Program) -> None:
        self.n_parameters = program.n_inputs
        self._maker: dict[int, Call] = {}
        self._uses: dict[int, int] = {}
        self._same_as: dict[int, int] = {}
        for call in program.calls:
            self._add(self._renamed(call))
        for loss in program.losses:
            self._count(self.slot(loss.slot))

    def _add(self, call: Call) -> None:
        if does_nothing(call):
            self._same_as[call.outputs[0]] = call.inputs[0]
            return
        self._maker.update(dict.fromkeys(call.outputs, call))
        for slot in _slots_in(call):
            self._count(slot)

    def _count(self, slot: int) -> None:
        self._uses[slot] = self._uses.get(slot, 0) + 1

    def _renamed(self, call: Call) -> Call:
        """The call with arguments in place of the results of calls that do nothing."""
        if not any(slot in self._same_as for slot in call.inputs):
            return call

        def leaf(value: Any) -> Any:
            return Slot(self.slot(value.index)) if isinstance(value, Slot) else value

        args, kwargs = map_leaves(leaf, call.args), map_leaves(leaf, call.kwargs)
        return call._replace(args=args, kwargs=kwargs, inputs=tuple(map(self.slot, call.inputs)))

    def slot(self, recorded: int) -> int:
        """The slot under which a value is known here."""
        return self._same_as.get(recorded, recorded)

    def is_parameter(self, slot: int) -> bool:
        """Whether the value is a parameter itself."""
        return slot < self.n_parameters

    def uses(self, slot: int) -> int:
        """How often the value is used."""
        return self._uses.get(slot, 0)

    def maker(self, slot: int) -> Call | None:
        """The call that made the value, whatever it is; None for parameters."""
        return self._maker.get(slot)

    def made(self, slot: int, *, shared: bool = False) -> Call:
        """The call that made the value, which nothing else may use.

        Raises:
            NotRecognised: If something else does (and it may not be ``shared``), or the call is of another kind than those
                that make up perceptrons.
        """
        call = self._maker.get(slot)
        if call is None:
            raise NotRecognised("a parameter enters the loss by itself (a penalty)")
        if call.obstacle or not call.grad_enabled or call.autocast is not None or len(call.outputs) != 1:
            raise NotRecognised(f"{call_name(call)} runs under no_grad or autocast, or has several results")
        if call.in_place and call_name(call).strip("_") not in _IN_PLACE:
            raise NotRecognised(f"{call_name(call)} writes in place")
        if not shared and self.uses(slot) != 1:
            raise NotRecognised(f"the result of {call_name(call)} is used {self.uses(slot)} times")
        return call

    def operand(self, call: Call) -> int:
        """The one value among the arguments that depends on the parameters."""
        slots = _slots_in(call)
        if len(slots) != 1:
            raise NotRecognised(f"{call_name(call)} has {len(slots)} arguments that depend on the parameters")
        return slots[0]

    def used_once(self, slot: int) -> None:
        """Count what was seen to belong together, such as the slices of one layer, as one use of the value."""
        self._uses[slot] = 1

    def polynomial(self, slot: int) -> tuple[int, list[float]]:
        """The value as a polynomial of another one, by the coefficients, ascending; of itself where it is none."""
        expansion = Expansion(self._maker, self.n_parameters)
        base, coefficients = expansion.of(slot)
        if base == slot or not self._closed(slot, base, expansion.inside(slot, base)):
            return slot, [0.0, 1.0]
        self.used_once(base)
        return base, coefficients

    def argument_of(self, template: Program, slot: int) -> int | None:
        """The slot that stands for the template's input where the value was made by the template's calls, else None."""
        makers = {output: call for call in template.calls for output in call.outputs}
        pairs: dict[int, int] = {}
        if not self._equal(Slot(template.losses[0].slot), Slot(slot), makers, pairs) or 0 not in pairs:
            return None
        base = pairs[0]
        inner = {found for found in pairs.values() if found not in (base, slot)}
        if base in self._maker and self._closed(slot, base, inner):
            self.used_once(base)
            return base
        return None

    def _equal(self, wanted: Any, found: Any, makers: Mapping[int, Call], pairs: dict[int, int]) -> bool:
        """Whether a value of ours was made as one of a template, up to the names in ``pairs``, which it completes."""
        if not isinstance(wanted, Slot) or not isinstance(found, Slot):
            return type(wanted) is type(found) and not isinstance(wanted, Tensor) and bool(wanted == found)
        if wanted.index in pairs:
            return pairs[wanted.index] == found.index
        pairs[wanted.index] = found.index
        one, other = makers.get(wanted.index), self._maker.get(found.index)
        if one is None or other is None:
            return one is None  # the template's input may be anything
        if call_name(one) != call_name(other) or not is_plain(other):
            return False
        # 2.0 as the second argument is something else than 2.0 as threshold=.
        if len(one.args) != len(other.args) or list(one.kwargs) != list(other.kwargs):
            return False
        left, right = list(leaves_in((one.args, one.kwargs))), list(leaves_in((other.args, other.kwargs)))
        return len(left) == len(right) and all(self._equal(a, b, makers, pairs) for a, b in zip(left, right, strict=True))

    def _closed(self, slot: int, base: int, inner: Iterable[int]) -> bool:
        """Whether what lies between ``base`` and ``slot``, and the base, are used in between only."""
        inside = {*inner, slot}
        uses: dict[int, int] = {}
        for call in {id(c): c for s in inside if (c := self._maker.get(s)) is not None}.values():
            for used in _slots_in(call):
                uses[used] = uses.get(used, 0) + 1
        return all(uses.get(s, 0) == self.uses(s) for s in {*inside, base} - {slot})


def _slots_in(call: Call) -> list[int]:
    """The slots among a call's arguments, as often as they stand there."""
    return [leaf.index for leaf in leaves_in((call.args, call.kwargs)) if isinstance(leaf, Slot)]
