"""A forward pass recorded once and replayed as a pure function of the parameters.

``Recorder`` is a ``torch.overrides.TorchFunctionMode``: while it is entered, it sees every torch function that is
called, and the calls of ``Tensor.backward``, which run as usual. What it keeps, a ``Program``, are the calls that depend
on the parameters, with *names* (slot numbers) in place of intermediate results, so that no activation outlives the pass;
tensors that do not depend on the parameters (data, targets, buffers) are kept as constants with their version counters.

A record can be wrong although every call was seen: numbers read with ``.item()`` freeze, custom autograd Functions are
seen from inside, hooks are not seen at all. So nothing here decides whether a program may be used. ``doubts`` names what
the recorder itself noticed; the rest shows in a comparison with ``.grad`` (see ``objectives.closure``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_gradflow.objectives.trees import leaves_in, map_leaves, same, storage_of, tensors_in, version_of

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
# Functions that normalise with batch statistics, with the argument that says whether they do.
_BATCH_STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
# Functions whose result has a shape that depends on values.
_SHAPED_BY_VALUES = frozenset({"nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "nonzero_static"})
_BOOKKEEPING = frozenset({"requires_grad_", "retain_grad"})
_GRAD_GETTER = torch.Tensor.grad.__get__  # type: ignore[union-attr]  # the stubs know not that it is a descriptor
_DATA_SETTER = torch.Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Slot:
    """The name of a value that depends on the parameters."""

    index: int


@dataclass(frozen=True)
class Call:
    """One recorded call, with the global modes under which it ran.

    A call whose ``obstacle`` is not "" cannot be replayed, for the reason that it gives; it stands for a value that the
    loss must not need.

    ``args`` and ``kwargs`` hold slots, constant tensors and plain values; ``outputs`` names the tensors of the result in
    the order of ``tensors_in``; ``autocast`` is the type to which autocast casts, or None where it is off.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    grad_enabled: bool
    autocast: torch.dtype | None
    in_place: bool
    obstacle: str = ""

    def same_as(self, other: Call) -> bool:
        """Whether both call the same function with equal arguments under the same modes."""
        fields = ("function", "outputs", "grad_enabled", "autocast", "args", "kwargs")
        return all(same(getattr(self, name), getattr(other, name)) for name in fields)


@dataclass(frozen=True)
class RecordedLoss:
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
    """

    n_inputs: int
    n_slots: int
    calls: tuple[Call, ...]
    losses: tuple[RecordedLoss, ...]
    constants: tuple[tuple[Tensor, int], ...]
    device_type: str

    def evaluate(self, values: Sequence[Tensor]) -> Tensor:
        """L, a 0-dimensional tensor, for parameters ``values``; any torch.func transform may be applied to it."""
        environment: list[Any] = [None] * self.n_slots
        environment[: self.n_inputs] = values

        def value_of(leaf: Any) -> Any:
            return environment[leaf.index] if isinstance(leaf, Slot) else leaf

        for call in self.calls:
            args = map_leaves(value_of, call.args)
            kwargs = map_leaves(value_of, call.kwargs)
            if call.grad_enabled and call.autocast is None:
                result = call.function(*args, **kwargs)
            else:
                with ExitStack() as stack:
                    if not call.grad_enabled:
                        stack.enter_context(torch.no_grad())
                    if call.autocast is not None:
                        stack.enter_context(torch.autocast(self.device_type, call.autocast, cache_enabled=False))
                    result = call.function(*args, **kwargs)
            for slot, tensor in zip(call.outputs, tensors_in(result), strict=True):
                environment[slot] = tensor
        terms = [
            environment[loss.slot] if loss.weight is None else (environment[loss.slot] * loss.weight).sum()
            for loss in self.losses
        ]
        return torch.stack([term.reshape(()) for term in terms]).sum() if len(terms) > 1 else terms[0].reshape(())

    def changed_constants(self) -> bool:
        """Whether a constant was written to in place after the record used it."""
        return any(version_of(tensor) != version for tensor, version in self.constants)

    def same_function_as(self, other: Program) -> bool:
        """Whether both are the same calls on equal constants, none of which was written to since."""
        if len(self.calls) != len(other.calls) or self.losses != other.losses or self.n_inputs != other.n_inputs:
            return False
        if self.changed_constants() or other.changed_constants():
            return False
        return all(a.same_as(b) for a, b in zip(self.calls, other.calls, strict=True))

    def structure(self) -> tuple[Any, ...]:
        """The names of the called functions, their flags, and how values flow between them; without numbers and data."""

        def flags(call: Call) -> tuple[Any, ...]:
            return tuple(leaf for leaf in leaves_in((call.args, call.kwargs)) if isinstance(leaf, bool | Slot))

        return tuple(
            (getattr(c.function, "__name__", ""), flags(c), c.outputs, c.grad_enabled, c.autocast) for c in self.calls
        )

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
            return replace(call, function=function, args=map_leaves(widen, call.args), kwargs=map_leaves(widen, call.kwargs))

        calls = tuple(widen_call(call) for call in self.calls)
        losses = tuple(replace(loss, weight=widen(loss.weight)) for loss in self.losses)
        return replace(self, calls=calls, losses=losses)


class Recorder(TorchFunctionMode):
    """Records, while entered, what is computed from ``parameters``.

    Attributes:
        written: Tensors that existed before and were written to in place (BatchNorm's statistics, counters).
        n_backward: Calls of ``Tensor.backward``.
        loss: The sum of what ``backward`` was called on, or None.
        autocast: The type to which autocast cast, or None where it was off.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.written: list[Tensor] = []
        self.n_backward = 0
        self.loss: Tensor | None = None
        self.autocast: torch.dtype | None = None
        self._parameters = parameters
        self._device_type = parameters[0].device.type
        self._names: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._calls: list[Call] = []
        self._losses: list[RecordedLoss] = []
        self._constants: dict[int, tuple[Tensor, int]] = {}
        # Tensors that were there before, by the storage that they and their views share.
        self._outside: dict[int, Tensor] = {}
        self._own_storage = {storage_of(p) for p in parameters}
        # What was noticed; what came after the last backward does not matter.
        self._doubts: list[str] = []
        self._n_doubts = 0
        self._n_slots = 0
        self._n_calls = 0
        for parameter in parameters:
            self._name(parameter, self._new_slot())

    # A value's name is -1 when it was made while recording but does not depend on the parameters.
    def _name(self, tensor: Tensor, slot: int) -> None:
        key = id(tensor)
        names = self._names
        names[key] = (weakref.ref(tensor, lambda _: names.pop(key, None)), slot)

    def _slot(self, tensor: Tensor) -> int | None:
        entry = self._names.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _new_slot(self) -> int:
        self._n_slots += 1
        return self._n_slots - 1

    def _doubt_now(self, reason: str) -> None:
        self._doubts.insert(0, reason)
        self._n_doubts += 1

    @property
    def doubts(self) -> list[str]:
        """Reasons, in words, why the record may not be the function it looks like."""
        return list(dict.fromkeys(self._doubts[: self._n_doubts] if self.n_backward else self._doubts))

    def _doubt(self, reason: str) -> None:
        self._doubts.append(reason)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            self._record_backward(*args, **kwargs)
            return func(*args, **kwargs)
        operands = tensors_in((args, kwargs))
        versions = [version_of(t) for t in operands]
        slots = [self._slot(t) for t in operands]
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, operands, slots, versions, result)
        return result

    def _record_backward(self, loss: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
        self.n_backward += 1
        self._n_calls, self._n_doubts = len(self._calls), len(self._doubts)
        value = loss.detach() if gradient is None else (loss.detach() * gradient).sum()
        self.loss = value.clone() if self.loss is None else self.loss + value
        slot = self._slot(loss)
        if slot is None or slot < 0:
            self._doubt_now("backward was called on a tensor that was not computed from the parameters by torch functions")
            return
        self._losses.append(RecordedLoss(slot, None if gradient is None else gradient.detach().clone()))

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        operands: list[Tensor],
        slots: list[int | None],
        versions: list[int],
        result: Any,
    ) -> None:
        name = getattr(func, "__name__", "")
        if name in _BOOKKEEPING:
            return
        written = [(t, s) for t, s, v in zip(operands, slots, versions, strict=True) if version_of(t) != v]
        depends = any(slot is not None and slot >= 0 for slot in slots) and func != _GRAD_GETTER
        results = tensors_in(result)
        if func == _DATA_SETTER and slots[0] is not None and slots[0] >= 0:
            self._doubt("it assigns to .data of a tensor that depends on the parameters")
        if name in _BATCH_STATISTICS:
            args, kwargs, statistics = _without_running_statistics(name, args, kwargs)
            written = [(t, s) for t, s in written if all(t is not b for b in statistics)]
            self._note_outside_writes((t, self._slot(t)) for t in statistics)
        for tensor, slot in zip(operands, slots, strict=True):
            if slot is None:
                self._outside.setdefault(storage_of(tensor), tensor)
        self._note_outside_writes(written)
        if not depends:
            for tensor in results:
                if self._slot(tensor) is None:
                    self._name(tensor, -1)
            return
        if name in _DECISIONS:
            self._doubt(f"it decides by the value of a tensor ({name})")
        if name in _READS:
            how = f"{name.strip('_')}()" if name.startswith("_") else f".{name}()"
            self._doubt(f"it reads a number out of a tensor that depends on the parameters ({how})")
        if not results and not written:
            return
        if any(storage_of(tensor) in self._own_storage for tensor, _ in written):
            self._doubt("it writes to a parameter in place")
        if any(slot is None or slot < 0 for _, slot in written):
            self._spoil([*(t for t, _ in written), *results])
            return
        if self._is_shaped_by_values(name, operands, slots):
            self._doubt(f"the shape of a result depends on values ({name})")
        if name in _RANDOM and _draws(name, args, kwargs, results):
            self._doubt(f"it draws random numbers ({name})")
        if any(t.is_inference() for t in results):
            self._doubt("it runs under torch.inference_mode")
        template = {id(t): Slot(s) for t, s in zip(operands, slots, strict=True) if s is not None and s >= 0}

        def leaf(value: Any) -> Any:
            if isinstance(value, Tensor):
                slot = template.get(id(value))
                if slot is not None:
                    return slot
                self._constants.setdefault(id(value), (value, version_of(value)))
            return value

        recorded_args, recorded_kwargs = map_leaves(leaf, args), map_leaves(leaf, dict(kwargs))
        outputs = tuple(self._new_slot() for _ in results)
        for tensor, slot in zip(results, outputs, strict=True):
            self._name(tensor, slot)
        autocast = None
        if torch.is_autocast_enabled(self._device_type):
            autocast = self.autocast = torch.get_autocast_dtype(self._device_type)
        self._calls.append(
            Call(
                function=func,
                args=recorded_args,
                kwargs=recorded_kwargs,
                outputs=outputs,
                grad_enabled=torch.is_grad_enabled(),
                autocast=autocast,
                in_place=bool(written),
            )
        )

    @staticmethod
    def _is_shaped_by_values(name: str, operands: list[Tensor], slots: list[int | None]) -> bool:
        masks = (t for t, s in zip(operands[1:], slots[1:], strict=True) if s is not None and s >= 0)
        if name in ("__getitem__", "masked_select"):
            return any(t.dtype in (torch.bool, torch.uint8) for t in masks)
        return name in _SHAPED_BY_VALUES or (name == "where" and len(operands) == 1)

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
        slots = tuple(self._new_slot() for _ in tensors)
        for tensor, slot in zip(tensors, slots, strict=True):
            self._name(tensor, slot)
        self._calls.append(Call(torch.Tensor.copy_, (), {}, slots, True, None, False, obstacle))

    def program(self, returned: Any = None) -> Program | None:
        """What was recorded, pruned to what L needs; None where no loss was seen.

        Where ``backward`` was called by other means than ``Tensor.backward`` (``torch.autograd.backward``), the
        tensor that the closure ``returned`` is taken as the loss; a comparison with ``.grad`` has to confirm it.
        """
        losses, calls = self._losses, self._calls[: self._n_calls]
        if self.n_backward == 0 and isinstance(returned, Tensor) and returned.numel() == 1:
            slot = self._slot(returned)
            if slot is not None and slot >= 0:
                losses, calls = [RecordedLoss(slot, None)], self._calls
        if not losses:
            return None
        needed = _needed(calls, losses)
        for call in needed:
            if call.obstacle:
                self._doubt_now(call.obstacle)
        # Where a call writes in place, aliases may hide what is needed: then nothing is left out.
        calls = [call for call in calls if not call.obstacle] if any(call.in_place for call in calls) else needed
        used = {id(t) for call in calls for t in tensors_in((call.args, call.kwargs))}
        constants = tuple(entry for key, entry in self._constants.items() if key in used)
        program = Program(
            n_inputs=len(self._parameters),
            n_slots=self._n_slots,
            calls=tuple(calls),
            losses=tuple(losses),
            constants=constants,
            device_type=self._device_type,
        )
        if program.changed_constants():
            self._doubt_now("a tensor that it uses was written to in place afterwards")
        return program


def _needed(calls: Sequence[Call], losses: Sequence[RecordedLoss]) -> list[Call]:
    """The calls from whose results the losses are computed."""
    needed = {loss.slot for loss in losses}
    kept = []
    for call in reversed(calls):
        if needed.intersection(call.outputs):
            kept.append(call)
            needed.update(leaf.index for leaf in leaves_in((call.args, call.kwargs)) if isinstance(leaf, Slot))
    return kept[::-1]


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
