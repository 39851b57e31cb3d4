"""What is computed from the parameters, recorded call by call.

``Recorder`` is a ``torch.overrides.TorchFunctionMode``: while it is entered, it sees every torch function that is
called, and the calls of ``Tensor.backward``, which run as usual, and tells its recordings. What a recording keeps, in
the end a ``Program``, are the calls that depend on the parameters, with *names* (slot numbers) in place of intermediate
results, so that no activation outlives the pass; tensors that do not depend on the parameters (data, targets, buffers)
are kept as constants with their version counters.

A record can be wrong although every call was seen: numbers read with ``.item()`` freeze, custom autograd Functions are
seen from inside, hooks are not seen at all. So nothing here decides whether a program may be used. ``doubts`` names what
the recording itself noticed; the rest shows in a comparison with ``.grad`` (see ``objectives.closure`` and
``objectives.loop``).
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_gradflow.objectives.program import Call, Program, RecordedLoss, Slot
from torch_gradflow.objectives.trees import map_leaves, storage_of, tensors_in, version_of

# Reading a number or a truth value out of a tensor: what Python does with it cannot be replayed.
_READS = frozenset({"item", "__float__", "__int__", "__index__", "__complex__", "tolist", "numpy", "__array__", "__dlpack__"})
_DECISIONS = frozenset({"__bool__", "is_nonzero", "equal", "allclose", "__contains__"})
_RANDOM = frozenset(
    {
        *("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "rrelu"),
        *("bernoulli", "bernoulli_", "multinomial", "poisson", "normal", "normal_", "uniform_", "gumbel_softmax"),
        *("rand_like", "randn_like", "randint_like", "dropout_", "feature_dropout", "lstm", "gru", "rnn_tanh", "rnn_relu"),
        *("scaled_dot_product_attention", "multi_head_attention_forward"),
    }
)
_READING = tuple(getattr(Tensor, name) for name in sorted(_READS | {"__bool__", "is_nonzero"}) if hasattr(Tensor, name))
# Of these, those that read many numbers at once.
_WHOLE = frozenset({"tolist", "numpy", "__array__", "__dlpack__"})
# Functions that normalise with batch statistics, with the argument that says whether they do.
_BATCH_STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
# Functions whose result has a shape that depends on values.
_SHAPED_BY_VALUES = frozenset(
    {
        *("nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "nonzero_static"),
        *("where", "__getitem__", "masked_select"),  # these with some arguments
    }
)
_BOOKKEEPING = frozenset({"requires_grad_", "retain_grad"})
_GRAD_GETTER = torch.Tensor.grad.__get__  # type: ignore[union-attr]  # the stubs know not that it is a descriptor
_DATA_SETTER = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_DATA_GETTER = torch.Tensor.data.__get__  # type: ignore[attr-defined]
# Names of values that are not replayed: made while recording, without the parameters; or from them, under no_grad; or
# without them, but after a number had been read out of something that depends on them.
_OTHER, _FIXED, _AFTER_READING = -1, -2, -3
# Nodes of an autograd graph that are searched for the parameters.
_MOST_NODES = 100_000
# What a recording may hold beyond what is alive before it looks for what can go.
_SPARE_CALLS, _SPARE_BYTES = 256, 64 * 2**20
# A forward pass of more calls than this is not recorded to its end.
MAX_CALLS = 200_000


@dataclass(frozen=True)
class Remark:
    """Something that makes a record doubtful.

    Attributes:
        reason: In words.
        before_backward: How many calls of ``backward`` had been seen.
        slot: The value that it concerns, or None where it concerns everything.
        passing: Whether it does harm only if what was read enters the loss (a number that may only have been logged).
    """

    reason: str
    before_backward: int
    slot: int | None
    passing: bool


class Recording:
    """What is computed from ``parameters``; a ``Recorder`` tells it of every call.

    Args:
        parameters: The tensors whose values the replay will replace.
        loop: Whether it follows a stretch of a training loop instead of one call of a closure. Then nothing that runs
            under ``no_grad`` is kept (where its results enter the loss they are constants); parameters of others are
            copied, because another optimizer may move them before the replay; losses from which no gradient reaches the
            parameters do not count; and what cannot enter a loss any more, because no living tensor was computed from
            it, is forgotten from time to time.

    Attributes:
        written: Tensors that existed before and were written to in place (BatchNorm's statistics, counters); a closure's
            only.
        n_backward: Calls of ``Tensor.backward``.
        loss: The sum of what ``backward`` was called on, or None.
        autocast: The type to which autocast cast, or None where it was off.
        parameter_versions: The parameters' version counters at the last ``backward``.
        normalises: Whether a normalisation used the statistics of the batch.
        reads_fixed: Whether a number was read under ``no_grad``.
        custom_function: Whether ``backward`` was called on a loss behind a custom autograd Function, which hides what it
            was computed from.
        paused: Calls are not told while it is set.
        n_calls: Calls that were kept, altogether.
        seconds: What recording cost.
    """

    def __init__(self, parameters: Sequence[Tensor], *, loop: bool = False) -> None:
        self.written: list[Tensor] = []
        self.n_backward = 0
        self.loss: Tensor | None = None
        self.autocast: torch.dtype | None = None
        self.parameter_versions: list[int] = []
        self.normalises = False
        self.custom_function = False
        self.reads_fixed = False
        self.paused = False
        self.n_calls = 0
        self.seconds = 0.0
        self._loop = loop
        self._parameters = parameters
        self._device_type = parameters[0].device.type
        self._names: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._calls: list[Call] = []
        self._losses: list[RecordedLoss] = []
        self._constants: dict[int, tuple[Tensor, int]] = {}
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._fixed: set[int] = set()
        # The names, and whether a gradient can flow from each to the parameters.
        self._slots: list[Slot] = []
        self._linked: list[bool] = []
        # Tensors that were there before, by the storage that they and their views share.
        self._outside: dict[int, Tensor] = {}
        self._own_storage = {storage_of(p) for p in parameters}
        self._remarks: list[Remark] = []
        self._n_at_backward = 0
        self._has_read = False
        # What the last backward left in .grad: the tensors and their version counters; whether they were changed before it.
        self._left: list[tuple[int, int]] = []
        self._changed = False
        self._after_reading: set[int] = set()
        self._most_calls, self._most_bytes, self._n_bytes = _SPARE_CALLS, _SPARE_BYTES, 0
        for parameter in parameters:
            self._name(parameter, self._new_slot(linked=True))

    def _name(self, tensor: Tensor, slot: int) -> None:
        key = id(tensor)
        names = self._names
        names[key] = (weakref.ref(tensor, lambda _: names.pop(key, None)), slot)

    def _slot(self, tensor: Tensor) -> int | None:
        entry = self._names.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _new_slot(self, linked: bool) -> int:
        self._linked.append(linked)
        self._slots.append(Slot(len(self._slots)))
        return len(self._slots) - 1

    def _remark(self, reason: str, slot: int | None = None, *, passing: bool = False) -> None:
        self._remarks.append(Remark(reason, self.n_backward, slot, passing))

    def _relevant(self) -> list[Remark]:
        """The remarks that concern the recorded losses; what came after the last backward does not matter."""
        remarks = [r for r in self._remarks if r.before_backward < max(self.n_backward, 1)]
        if not self._loop or not remarks:
            return remarks
        part_of = _parts(self._calls, len(self._linked), len(self._parameters))
        own = {part_of[loss.slot] for loss in self._losses}
        return [r for r in remarks if r.slot is None or part_of[r.slot] in own]

    def gradients_were_changed(self) -> bool:
        """Whether something wrote to ``.grad`` since the recorded calls of ``backward``, or between them."""
        return self._changed or (bool(self._left) and self._left != _versions_of_gradients(self._parameters))

    @property
    def doubts(self) -> list[str]:
        """Reasons, in words, why the record may not be the function it looks like."""
        return list(dict.fromkeys(r.reason for r in self._relevant() if not (self._loop and r.passing)))

    @property
    def suspicions(self) -> list[str]:
        """Readings of numbers and decisions by value in a loop: harmless where they do not enter the loss."""
        return list(dict.fromkeys(r.reason for r in self._relevant() if self._loop and r.passing))

    @property
    def readings(self) -> list[str]:
        """The same, also of what has nothing to do with the recorded losses."""
        return list(dict.fromkeys(r.reason for r in self._remarks if r.passing))

    def give_up(self, reason: str) -> None:
        """Keep nothing any more."""
        self.paused = True
        self._calls, self._losses, self._constants, self._copies = [], [], {}, {}
        self._n_at_backward = 0
        self._remarks = [Remark(reason, -1, None, False)]

    def note_backward(self, loss: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
        """A call of ``Tensor.backward``, before it runs."""
        self.n_backward += 1
        slot = self._slot(loss)
        known = slot is not None and slot >= 0
        if self._loop and not (known and self._linked[slot]):  # type: ignore[index]
            # Made under no_grad, yet with a gradient: the forward pass of a custom Function.
            self.custom_function = self.custom_function or (slot == _FIXED and loss.requires_grad)
            return
        versions = [version_of(p) for p in self._parameters]
        if self._losses and versions != self.parameter_versions:
            self.give_up("the parameters were changed between two calls of backward")
            return
        self._changed = self.gradients_were_changed()
        self._n_at_backward, self.parameter_versions = len(self._calls), versions
        value = loss.detach() if gradient is None else (loss.detach() * gradient).sum()
        self.loss = value.clone() if self.loss is None else self.loss + value
        if slot is None or slot < 0:
            reason = "backward was called on a tensor that was not computed from the parameters by torch functions"
            self._remarks.insert(0, Remark(reason, self.n_backward - 1, None, False))
            return
        self._losses.append(RecordedLoss(slot, None if gradient is None else gradient.detach().clone()))

    def note_compiled_reading(self, name: str) -> None:
        """A number was read in compiled code; of what is not known."""
        self._remark(f"it reads a number out of a tensor in compiled code ({name.strip('_')})")

    def note_backward_done(self) -> None:
        """The same after it ran."""
        self._left = _versions_of_gradients(self._parameters) if self._losses else []

    def note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        operands: list[Tensor],
        versions: list[int],
        result: Any,
        grad_enabled: bool,
    ) -> None:
        """A call of a torch function, after it ran.

        Args:
            func: The function.
            args: What it was called with.
            kwargs: What it was called with.
            operands: The tensors among these.
            versions: Their version counters before the call.
            result: What it returned.
            grad_enabled: Whether autograd was on.
        """
        try:
            self._note(func, args, kwargs, operands, versions, result, grad_enabled)
        except Exception as error:  # a tensor of a kind that we do not know: the user's own pass goes on
            name = getattr(func, "__name__", "")
            self.give_up(f"a call of {name} could not be recorded ({type(error).__name__}: {error})")

    def _note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        operands: list[Tensor],
        versions: list[int],
        result: Any,
        grad_enabled: bool,
    ) -> None:
        # This runs for every call of a torch function: what can be asked at once is.
        changed = [version_of(t) for t in operands] != versions
        if changed and self._loop and self._wrote_to_parameters(operands, versions):
            return
        names, fixed = self._names, False
        slots: list[int | None] = []
        template: dict[int, int] = {}
        for tensor in operands:
            entry = names.get(id(tensor))
            slot = None if entry is None or entry[0]() is not tensor else entry[1]
            slots.append(slot)
            if slot is not None:
                if slot >= 0:
                    template[id(tensor)] = slot
                fixed = fixed or slot == _FIXED
        depends = bool(template) and func != _GRAD_GETTER
        if self._loop and not depends:
            if fixed or self._has_read:
                self._note_made_apart(func, operands, versions, result, fixed)
            return
        name = getattr(func, "__name__", "")
        if name in _BOOKKEEPING:
            return
        results = [result] if isinstance(result, Tensor) else tensors_in(result)
        written: list[tuple[Tensor, int | None]] = []
        if changed:
            written = [(t, s) for t, s, v in zip(operands, slots, versions, strict=True) if version_of(t) != v]
        if func == _DATA_SETTER and slots[0] is not None and slots[0] >= 0:
            self._remark("it assigns to .data of a tensor that depends on the parameters")
        if name in _BATCH_STATISTICS:
            args, kwargs, statistics = _without_running_statistics(name, args, kwargs)
            self.normalises = self.normalises or bool(statistics)
            written = [(t, s) for t, s in written if all(t is not b for b in statistics)]
            self._note_outside_writes((t, self._slot(t)) for t in statistics)
        if not self._loop:
            for tensor, slot in zip(operands, slots, strict=True):
                if slot is None:
                    self._outside.setdefault(storage_of(tensor), tensor)
            self._note_outside_writes(written)
        if not depends:
            for tensor in results:
                if self._slot(tensor) is None:
                    self._name(tensor, _OTHER)
            return
        if name in _READS or name in _DECISIONS:
            if self._loop and not grad_enabled:
                self.reads_fixed = True
            else:
                self._note_reading(name, next(iter(template.values())))
        if not results and not written:
            return
        if written and any(storage_of(tensor) in self._own_storage for tensor, _ in written):
            self._remark("it writes to a parameter in place")
        if self._loop and not grad_enabled and not written:
            self._fix(results)
            return
        if any(slot is None or slot < 0 for _, slot in written):
            self._spoil([*(t for t, _ in written), *results])
            return
        self._keep(func, args, kwargs, template, results, bool(written), grad_enabled)
        if name in _SHAPED_BY_VALUES and _is_shaped_by_values(name, operands, slots):
            self._remark(f"the shape of a result depends on values ({name})", self._slot(results[0]) if results else None)
        if name in _RANDOM and _draws(name, args, kwargs, results):
            self._remark(f"it draws random numbers ({name})", self._slot(results[0]))
        if self._loop and (len(self._calls) > self._most_calls or self._n_bytes > self._most_bytes):
            self._forget_the_dead()

    def _note_made_apart(
        self, func: Callable[..., Any], operands: list[Tensor], versions: list[int], result: Any, fixed: bool
    ) -> None:
        """A call without the parameters, of values that were computed from them, or after a number was read."""
        if fixed and getattr(func, "__name__", "") in (_READS | _DECISIONS):
            self.reads_fixed = True
        if fixed:
            self._fix(tensors_in(result))
            return
        written = [t for t, v in zip(operands, versions, strict=True) if version_of(t) != v]
        for tensor in (*tensors_in(result), *written):
            if self._slot(tensor) is None:
                self._name(tensor, _AFTER_READING)

    def _note_reading(self, name: str, slot: int) -> None:
        # After a backward it is most likely its loss that is logged.
        self._has_read = self._has_read or self.n_backward == 0
        if name in _DECISIONS:
            self._remark(f"it decides by the value of a tensor ({name})", slot, passing=True)
            return
        how = f"{name.strip('_')}()" if name.startswith("_") else f".{name}()"
        reason = f"it reads a number out of a tensor that depends on the parameters ({how})"
        self._remark(reason, slot, passing=name not in _WHOLE)

    def _keep(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        template: Mapping[int, int],
        results: list[Tensor],
        in_place: bool,
        grad_enabled: bool,
    ) -> None:
        """Keep a call that depends on the parameters; ``template`` holds the slots of the tensors that do, by their id."""

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            slot = template.get(id(value))
            return self._constant(value) if slot is None else self._slots[slot]

        recorded_args, recorded_kwargs = map_leaves(leaf, args), map_leaves(leaf, kwargs) if kwargs else {}
        linked = grad_enabled and any(map(self._linked.__getitem__, template.values()))
        outputs = []
        for tensor in results:
            slot = self._new_slot(linked and tensor.requires_grad)
            self._name(tensor, slot)
            outputs.append(slot)
            if tensor.is_inference():
                self._remark("it runs under torch.inference_mode", slot)
        autocast = None
        if torch.is_autocast_enabled(self._device_type):
            autocast = self.autocast = torch.get_autocast_dtype(self._device_type)
        self._calls.append(
            Call(
                function=func,
                args=recorded_args,
                kwargs=recorded_kwargs,
                outputs=tuple(outputs),
                grad_enabled=grad_enabled,
                autocast=autocast,
                in_place=in_place,
                inputs=tuple(template.values()),
            )
        )
        self.n_calls += 1

    def _constant(self, tensor: Tensor) -> Tensor:
        """What stands in the record for a tensor that does not depend on the parameters."""
        if self._loop and tensor.requires_grad and tensor.is_leaf:
            original, version, copy = self._copies.get(id(tensor), (None, -1, tensor))
            if original is None or version != version_of(tensor):
                copy = tensor.detach().clone()
                with suppress(RuntimeError):  # within torch.func's transforms
                    copy.requires_grad_()  # the loss may contain its gradient
                self._copies[id(tensor)] = (tensor, version_of(tensor), copy)
            tensor = copy
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = (tensor, version_of(tensor))
            self._n_bytes += tensor.nbytes if tensor.layout == torch.strided else 0
            name = self._slot(tensor)
            if name == _FIXED:
                self._fixed.add(id(tensor))
            elif name == _AFTER_READING:
                self._after_reading.add(id(tensor))
        return tensor

    def _fix(self, results: list[Tensor]) -> None:
        for tensor in results:
            if self._slot(tensor) is None:
                self._name(tensor, _FIXED)

    def _wrote_to_parameters(self, operands: list[Tensor], versions: list[int]) -> bool:
        """Whether a call in a loop wrote to parameters; then what was computed from them before is of no use."""
        written = [t for t, v in zip(operands, versions, strict=True) if version_of(t) != v]
        if all(storage_of(t) not in self._own_storage for t in written):
            return False
        self._forget_the_dead()  # a write before the forward pass does not matter
        if any(call.function != _DATA_GETTER for call in self._calls):
            self.give_up("the parameters are written to in place after something was computed from them")
        return True

    def _note_outside_writes(self, written: Iterable[tuple[Tensor, int | None]]) -> None:
        for tensor, slot in written:
            base = tensor if slot is None else self._outside.get(storage_of(tensor))
            if base is not None and all(base is not known for known in self.written):
                self.written.append(base)

    def _spoil(self, tensors: list[Tensor]) -> None:
        """From now on these tensors, made without the parameters, hold values that cannot be replayed.

        The call that wrote them is not replayed either: it may write to what is not ours (a running mean).
        """
        obstacle = "it writes values that depend on the parameters into a tensor that was made without them"
        slots = tuple(self._new_slot(linked=True) for _ in tensors)
        for tensor, slot in zip(tensors, slots, strict=True):
            self._name(tensor, slot)
        self._calls.append(Call(torch.Tensor.copy_, (), {}, slots, True, None, False, (), obstacle))

    def _forget_the_dead(self) -> None:
        """Drop the calls from which no living tensor and no recorded loss was computed."""
        n_parameters = len(self._parameters)
        part_of = _parts(self._calls, len(self._linked), n_parameters)
        alive = {part_of[slot] for _, slot in self._names.values() if slot >= n_parameters}
        alive.update(part_of[loss.slot] for loss in self._losses)
        kept = [call for call in self._calls if any(part_of[slot] in alive for slot in (*call.outputs, *call.inputs))]
        self._most_calls = 2 * len(kept) + _SPARE_CALLS
        if len(kept) == len(self._calls) and len(kept) <= MAX_CALLS:
            self._most_bytes = 2 * self._n_bytes + _SPARE_BYTES
            return
        before = self._calls[: self._n_at_backward]
        self._n_at_backward = sum(any(part_of[slot] in alive for slot in (*call.outputs, *call.inputs)) for call in before)
        used = {id(t) for call in kept for t in tensors_in((call.args, call.kwargs))}
        self._remarks = [r for r in self._remarks if r.slot is None or part_of[r.slot] in alive]
        self._calls = self._renumber(kept)
        self._constants = {key: entry for key, entry in self._constants.items() if key in used}
        self._copies = {key: entry for key, entry in self._copies.items() if id(entry[2]) in used}
        self._fixed &= used
        self._after_reading &= used
        self._n_bytes = sum(t.nbytes for t, _ in self._constants.values() if t.layout == torch.strided)
        self._most_bytes = 2 * self._n_bytes + _SPARE_BYTES
        if len(kept) > MAX_CALLS:
            self.give_up(f"the forward pass makes more than {MAX_CALLS:,} calls of torch functions")

    def _renumber(self, kept: list[Call]) -> list[Call]:
        """The calls that are kept, with the first slots after the parameters', everywhere."""
        new, n = _new_numbers(kept, len(self._parameters))
        names = self._names
        for key, (reference, slot) in list(names.items()):
            if slot >= 0:
                names[key] = (reference, new[slot])
        self._losses = [loss._replace(slot=new[loss.slot]) for loss in self._losses]
        self._remarks = [r if r.slot is None else replace(r, slot=new[r.slot]) for r in self._remarks]
        self._linked = [linked for slot, linked in enumerate(self._linked) if slot in new]
        self._slots = self._slots[:n]
        return [_with_slots(call, new) for call in kept]

    def _comes_from_parameters(self, constant: Tensor) -> bool:
        """Whether a gradient flows from what is taken as a constant to the parameters."""
        if not constant.requires_grad or constant.is_leaf:
            return False
        return self._slot(constant) == _FIXED or _reaches(constant, self._parameters)

    def program(self, returned: Any = None) -> Program | None:
        """What was recorded, pruned to what L needs; None where no loss was seen.

        Where ``backward`` was called by other means than ``Tensor.backward`` (``torch.autograd.backward``), the
        tensor that the closure ``returned`` is taken as the loss; a comparison with ``.grad`` has to confirm it.
        """
        losses, calls = self._losses, self._calls[: self._n_at_backward]
        if self.n_backward == 0 and isinstance(returned, Tensor) and returned.numel() == 1:
            slot = self._slot(returned)
            if slot is not None and slot >= 0:
                losses, calls = [RecordedLoss(slot, None)], self._calls
        if not losses:
            return None
        if self._loop:
            part_of = _parts(calls, len(self._linked), len(self._parameters))
            own = {part_of[loss.slot] for loss in losses}
            calls = [call for call in calls if any(part_of[slot] in own for slot in (*call.outputs, *call.inputs))]
        needed = _needed(calls, losses)
        obstacles = [call.obstacle for call in needed if call.obstacle]
        # Where a call writes in place, aliases may hide what is needed: then nothing is left out.
        calls = list(calls) if any(call.in_place for call in calls) else needed
        # Equal passes are equal programs, whatever was computed before them.
        new, n_slots = _new_numbers(calls, len(self._parameters))
        calls = [call for call in calls if not call.obstacle]
        if n_slots < len(self._linked):
            calls = [_with_slots(call, new) for call in calls]
            losses = [loss._replace(slot=new[loss.slot]) for loss in losses]
        used = {id(t) for call in calls for t in tensors_in((call.args, call.kwargs))}
        constants = tuple(entry for key, entry in self._constants.items() if key in used)
        program = Program(
            n_inputs=len(self._parameters),
            n_slots=n_slots,
            calls=tuple(calls),
            losses=tuple(losses),
            constants=constants,
            device_type=self._device_type,
            follows_reading=bool(self._after_reading & used),
            holds_fixed=bool(self._fixed & used),
        )
        if any(self._comes_from_parameters(tensor) for tensor, _ in constants):
            obstacles.append(
                "something was computed from the parameters that is not seen (by a custom autograd Function, a scripted or "
                "traced module, a backward hook, another thread, or before zero_grad())"
            )
        if program.changed_constants():
            obstacles.append("a tensor that it uses was written to in place afterwards")
        for reason in obstacles:
            self._remarks.insert(0, Remark(reason, -1, None, False))
        return program


class _Traced:
    """A call in compiled code, and the one before it: an object that compiled code can make without reading others."""

    def __init__(
        self,
        before: _Traced | None,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        grad_enabled: bool,
    ) -> None:
        self.before = before
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.result = result
        self.grad_enabled = grad_enabled
        self.told = before is None


class _Chain:
    """The calls of compiled code, from the last one; what compiled code changes is this, not the mode itself.

    It ends, broken, where a number is read.
    """

    def __init__(self) -> None:
        self.broken = False
        self.last = _Traced(None, torch.Tensor.backward, (), {}, None, False)


class Recorder(TorchFunctionMode):
    """While entered, tells recordings of every torch function that is called.

    Code that ``torch.compile`` compiles calls this mode while it is traced, once; what it then does is part of the compiled
    code. So ``__torch_function__`` is kept such that it can be traced without a break of the graph, whatever was computed
    before: what a compiled function computes comes out as a chain of calls, of which the recordings are told before the next
    call.

    Args:
        recordings: Those to be told; they are referenced weakly.

    Attributes:
        listening: Whether there may be any to be told.
        interrupted: Whether an exception passed; its traceback may reference this mode.
    """

    def __init__(self, recordings: Iterable[Recording] = ()) -> None:
        super().__init__()
        self.listening = True
        self._recordings: list[weakref.ref[Recording]] = []
        self.interrupted = False
        self._traced = _Chain()
        self.listen_for([weakref.ref(r) for r in recordings])

    def listen_for(self, recordings: list[weakref.ref[Recording]]) -> None:
        """Tell these from now on."""
        self.tell_what_was_traced()
        self._recordings, self.listening = recordings, bool(recordings)
        self._process = os.getpid()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            if func in _READING:
                # What is computed from a number that was read cannot come out of compiled code (torch 2.13 then fails).
                if self.listening and not self._traced.broken:
                    self._traced.last = _Traced(self._traced.last, func, (), {}, None, torch.is_grad_enabled())
                self._traced.broken = True
                return func(*args, **kwargs)
            result = func(*args, **kwargs)
            if self.listening and not self._traced.broken:
                self._traced.last = _Traced(self._traced.last, func, args, kwargs, result, torch.is_grad_enabled())
            return result
        recordings = self._listeners() if self.listening else ()
        if self._traced.broken or not self._traced.last.told:
            self.tell_what_was_traced()
        if not recordings:
            return func(*args, **kwargs)
        began = time.perf_counter()
        backward = func is torch.Tensor.backward
        if backward:
            for recording in recordings:
                recording.note_backward(*args, **kwargs)
        operands = tensors_in((args, kwargs))
        versions = [version_of(t) for t in operands]
        called = time.perf_counter()
        try:
            result = func(*args, **kwargs)
        except BaseException:
            self.interrupted = True
            del self  # the traceback will keep this frame
            raise
        came_back = time.perf_counter()
        grad_enabled = torch.is_grad_enabled()
        for recording in recordings:
            if backward:
                recording.note_backward_done()
            else:
                recording.note(func, args, kwargs, operands, versions, result, grad_enabled)
            recording.seconds += (time.perf_counter() - came_back + called - began) / len(recordings)
        return result

    def _listeners(self) -> list[Recording]:
        """The recordings to tell: those alive and not paused; none in a forked process."""
        living = [r for reference in self._recordings if (r := reference()) is not None and not r.paused]
        return living if os.getpid() == self._process else []

    def tell_what_was_traced(self) -> None:
        """Tell of what compiled functions computed since the last call."""
        self._traced.broken = False
        traced, call = [], self._traced.last
        while not call.told:
            traced.append(call)
            call.told = True
            assert call.before is not None
            call = call.before
        for call in reversed(traced):
            func, args, kwargs, result, grad_enabled = call.func, call.args, call.kwargs, call.result, call.grad_enabled
            call.before, call.args, call.kwargs, call.result = None, (), {}, None
            name = getattr(func, "__name__", "")
            in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
            operands = tensors_in((args, kwargs))
            versions = [version_of(t) for t in operands]
            if in_place and versions:
                versions[0] -= 1  # what it was before the call is not known
            for recording in self._listeners():
                if func is torch.Tensor.backward:
                    recording.note_backward(*args, **kwargs)
                    recording.note_backward_done()
                elif func in _READING:
                    recording.note_compiled_reading(name)
                else:
                    recording.note(func, args, kwargs, operands, versions, result, grad_enabled)


def _new_numbers(calls: Sequence[Call], n_parameters: int) -> tuple[dict[int, int], int]:
    """Numbers without gaps for the slots of the parameters and of the calls' results, and how many there are."""
    slots = [*range(n_parameters), *(slot for call in calls for slot in call.outputs)]
    return {slot: number for number, slot in enumerate(slots)}, len(slots)


def _with_slots(call: Call, new: Mapping[int, int]) -> Call:
    """The call with other numbers for its slots."""

    def leaf(value: Any) -> Any:
        return Slot(new[value.index]) if isinstance(value, Slot) else value

    args, kwargs = map_leaves(leaf, call.args), map_leaves(leaf, call.kwargs)
    inputs, outputs = (tuple(new[slot] for slot in slots) for slots in (call.inputs, call.outputs))
    return call._replace(args=args, kwargs=kwargs, inputs=inputs, outputs=outputs)


def _parts(calls: Sequence[Call], n_slots: int, n_parameters: int) -> list[int]:
    """For each slot the number of the part of the record in which it lies.

    Two values lie in the same part where one was computed from the other, or both from or into a third; sharing a
    parameter or a constant does not connect them. A write in place reaches only what lies in the same part.
    """
    part_of = list(range(n_slots))

    def root(slot: int) -> int:
        while part_of[slot] != slot:
            part_of[slot] = part_of[part_of[slot]]
            slot = part_of[slot]
        return slot

    for call in calls:
        together = [slot for slot in (*call.outputs, *call.inputs) if slot >= n_parameters]
        for slot in together[1:]:
            part_of[root(slot)] = root(together[0])
    return [root(slot) for slot in range(n_slots)]


def _needed(calls: Sequence[Call], losses: Sequence[RecordedLoss]) -> list[Call]:
    """The calls from whose results the losses are computed."""
    needed = {loss.slot for loss in losses}
    kept = []
    for call in reversed(calls):
        if needed.intersection(call.outputs):
            kept.append(call)
            needed.update(call.inputs)
    return kept[::-1]


def _versions_of_gradients(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Which tensors stand in ``.grad``, and how often they were written to."""
    gradients = [p.grad for p in parameters]
    return [(0, 0) if g is None else (id(g), version_of(g)) for g in gradients]


def _reaches(tensor: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether a backward pass from ``tensor`` would reach one of ``parameters``."""
    pending, seen = [tensor.grad_fn], {tensor.grad_fn}
    while pending and len(seen) < _MOST_NODES:
        node = pending.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and any(leaf is p for p in parameters):
            return True
        following = {n for n, _ in node.next_functions} - seen
        seen |= following
        pending.extend(following)
    return False


def _is_shaped_by_values(name: str, operands: list[Tensor], slots: list[int | None]) -> bool:
    """Whether the shape of the result depends on values that depend on the parameters."""
    if name in ("__getitem__", "masked_select"):
        masks = (t for t, s in zip(operands[1:], slots[1:], strict=True) if s is not None and s >= 0)
        return any(t.dtype in (torch.bool, torch.uint8) for t in masks)
    return name != "where" or len(operands) == 1


def _without_running_statistics(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any], tuple[Tensor, ...]]:
    """A normalisation's arguments without the running statistics, if it writes them, and those statistics.

    With batch statistics the result does not depend on the running ones, so a replay can do without writing them.
    """
    names = ("input", "running_mean", "running_var", "weight", "bias", _BATCH_STATISTICS[name])
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    statistics = tuple(t for t in (given.get("running_mean"), given.get("running_var")) if isinstance(t, Tensor))
    if not given.get(names[-1], name == "instance_norm") or not statistics:
        return args, kwargs, ()
    return (args[0], None, None, *args[3:]), {k: v for k, v in kwargs.items() if k not in names[1:3]}, statistics


def _draws(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: list[Tensor]) -> bool:
    """Whether a call of a function that can be random is random with these arguments."""
    if name in {"dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "rrelu"}:
        names = ("input", "p", "training")
        given = {"training": name not in {"alpha_dropout", "feature_alpha_dropout", "rrelu"}}
        given |= dict(zip(names, args, strict=False)) | dict(kwargs)
        return bool(given["training"]) and given.get("p", 0.5) != 0
    if name == "scaled_dot_product_attention":
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if name == "multi_head_attention_forward":
        return bool(kwargs.get("training", True)) and bool(args[10] if len(args) > 10 else kwargs.get("dropout_p"))
    if name in {"lstm", "gru", "rnn_tanh", "rnn_relu"}:
        # (input, hidden, weights, has_biases, num_layers, dropout, train, ...) or (input, batch_sizes, hidden, ...)
        floats = [a for a in args if isinstance(a, float)]
        return bool(floats and floats[0] > 0 and any(a is True for a in args[6:8]))
    return bool(results)
