"""One loss whose data are divided among several processes: L(θ) = Σ_r n_r L_r(θ) / Σ_r n_r, or the sum of the L_r.

Each process opens its own closure or loop (``objectives.closure``, ``objectives.loop``); what these compare with ``.grad`` or
with what they expect are the numbers of the whole loss, which all processes compute together (``Processes.meet``,
``.whole``). Then process 0 alone integrates or minimises, and tells the others what to evaluate (``Processes.lead``): so they
cannot disagree on what is accepted, on the method, or on when to stop, whatever their clocks say and in whatever order their
libraries add. At the end all processes have its result.

Loss, gradient, and whether a process failed travel in one all-reduce. A failure in one process is therefore one in all of
them at the same evaluation: each raises an error that says where it was, and none waits for another.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, distributed

from torch_gradflow.checks import check_count
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.interrupts import Interrupts
from torch_gradflow.objectives.processes import ALONE, OneProcess, Pass, ProcessError, Processes, Reached

_T = TypeVar("_T")
_P = TypeVar("_P", bound="Pass")
LossReduction = Literal["mean", "sum"]
# What process 0 asks the others to evaluate, by the names of an objective's methods; the last one is the end of its work.
_REQUESTS = ("loss_and_gradient", "hvp", "hessian", "loss_gradient_hessian", "")
# So many flags a pass may have.
_MOST_FLAGS = 4


class Lost(ProcessError):
    """Another process is not there any more, or does not answer in time."""


@contextmanager
def lost_is_said(own: BaseException | None = None) -> Iterator[None]:
    """Turn errors of torch.distributed into ``Lost``; into the process's own exception, where it failed before.

    Raises:
        Lost: With the reason.
    """
    try:
        yield
    except RuntimeError as error:
        if own is not None:
            raise own from error
        raise Lost(
            "another process was lost, or does something else (a collective call of torch.distributed failed: "
            f"{str(error).splitlines()[0]}). The parameters are those at the start of the step."
        ) from error


class SeveralProcesses(Processes):
    """Those of a torch.distributed process group.

    Args:
        group: The group; process 0 is its rank 0.
        shard_size: n_r; None for equal weights.
        reduction: "mean" or "sum", see the module.
    """

    def __init__(self, group: distributed.ProcessGroup, shard_size: int | None, reduction: LossReduction) -> None:
        self._group, self._shard_size, self._reduction = group, shard_size, reduction
        self.size, self._rank = distributed.get_world_size(group), distributed.get_rank(group)
        # NCCL takes tensors on GPUs only, gloo and MPI those of CPUs.
        nccl = "nccl" in str(distributed.get_backend(group))
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._interrupts: Interrupts | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SeveralProcesses:
        return SeveralProcesses(self._group, self._shard_size, self._reduction)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer with a process_group cannot be pickled, as the group belongs to running processes. Save "
            "optimizer.state_dict(), and load it into an optimizer that was made with a process_group."
        )

    def check_world(self, name: str) -> None:
        """See ``Processes``."""

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """See ``Processes``."""
        try:
            with Interrupts() as self._interrupts:
                yield
        finally:
            self._interrupts = None

    def check(self, work: Callable[[], _T]) -> _T:
        """See ``Processes``."""
        results: list[_T] = []

        def nothing() -> Tensor:
            results.append(work())
            return torch.empty(0)

        self._exchange(nothing, 0)
        return results[0]

    def all(self, flag: bool) -> bool:
        """See ``Processes``."""
        return bool(self._shown(float(flag)).all())

    def _shown(self, number: float) -> Tensor:
        """One number of each process."""
        return self._exchange(lambda: torch.empty(0), 0, lambda: [number], 1)[1][:, 0]

    def meet(self, run: Callable[[], _P], theta: Tensor, settings: str) -> _P:
        """See ``Processes``."""
        passes: list[_P] = []

        def values() -> Tensor:
            passes.append(run())
            return torch.cat([passes[0].loss[None], passes[0].gradient])

        def marks() -> list[float]:
            own, size = passes[0], self._shard_size or 0
            gradient = _digest(own.gradient) if bool((own.gradient != 0).any()) else (float(self._rank), -1.0)
            return [*_digest(theta), float(zlib.crc32(settings.encode())), float(size), *gradient, *map(float, own.flags)]

        total, table = self._exchange(values, 1 + len(theta), marks, 6 + _MOST_FLAGS)
        self._check_agreement(table)
        total, n_flags = total.to(theta), len(passes[0].flags)
        flags = tuple(bool(column.all()) for column in table[:, 6 : 6 + n_flags].T)
        return replace(passes[0], loss=total[0], gradient=total[1:], flags=flags)

    def _check_agreement(self, table: Tensor) -> None:
        """Refuse processes that are not about to do the same; the columns are those of ``meet``."""
        differs = (table != table[0]).any(dim=0)
        if bool(differs[0] | differs[1]):
            other = int((table[:, :2] != table[0, :2]).any(dim=1).nonzero()[0])
            raise ProcessError(
                f"the parameters of process {other} are others than those of process 0. All processes have to start at the "
                "same point, and to change parameters in the same way: set the same seed before the model is made, wrap it "
                "into DistributedDataParallel, or call torch.distributed.broadcast(p.data, 0) for each parameter p."
            )
        if bool(differs[2]):
            raise ProcessError(
                "the processes do not do the same: closure or loop, lr, weight_decay, maximize and flow_time, and the "
                "optimizer's arguments (but shard_size) have to be the same in all of them."
            )
        sizes = [int(n) for n in table[:, 3]]
        if min(sizes) == 0 and max(sizes) > 0:
            raise ValueError(f"shard_size must be given in all processes or in none; given were {_listed(sizes)} (0: none).")
        if bool(differs[3]) and not bool(differs[4] | differs[5]):
            raise ValueError(
                f"shard_size is {_listed(sizes)} in the processes, but the gradients in .grad are already averaged, with "
                "equal weights, as DistributedDataParallel does it. Use the model that it wraps (model.module) in the loop, "
                "or a closure: the optimizer combines the gradients itself. Or give all processes equally many samples."
            )

    def whole(self, evaluate: Callable[[], tuple[Tensor, Tensor]], theta: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Processes``."""
        loss, gradient = self.total(evaluate, theta, [torch.Size([]), theta.shape])
        return loss, gradient

    def total(self, evaluate: Callable[[], tuple[Tensor, ...]], theta: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Tensors of the whole, in θ's type and on its device, from those of one's own data."""
        lengths = [shape.numel() for shape in shapes]
        values, _ = self._exchange(lambda: torch.cat([part.reshape(-1) for part in evaluate()]), sum(lengths))
        return [part.view(shape) for part, shape in zip(values.to(theta).split(lengths), shapes, strict=True)]

    def joint(self, objective: Objective) -> Objective:
        """See ``Processes``."""
        return DistributedObjective(objective, self)

    def check_sizes(self, n_samples: int) -> None:
        """See ``Processes``."""
        sizes = [int(n) for n in self._shown(float(n_samples))]
        if self._shard_size is None and self._reduction == "mean" and min(sizes) < max(sizes):
            raise ValueError(
                f"the processes hold {_listed(sizes)} samples, but their losses are weighted equally: pass shard_size=, the "
                "number of samples of each process. (shard_size=1 in all of them if that is what you want; reduction='sum' "
                "if their losses are to be added.)"
            )

    def lead(self, objective: Objective, reached: Reached, work: Callable[[Objective], _T]) -> _T:
        """See ``Processes``."""
        start = replace(reached)
        try:
            if self._rank == 0:
                return self._lead(objective, reached, work)
            failure = self._serve(objective)
            result, error, reached.theta, reached.t, reached.result = self._receive(objective.device)
        except Lost:
            # The only point that all processes know of.
            reached.theta, reached.t, reached.result = start.theta, start.t, start.result
            raise
        if error:
            raise _unpacked(error) from failure
        return cast(_T, result)

    def _lead(self, objective: Objective, reached: Reached, work: Callable[[Objective], _T]) -> _T:
        result: _T | None = None
        error: BaseException | None = None
        try:
            result = work(DistributedObjective(objective, self, leads=True))
        except Lost:
            raise
        except BaseException as raised:  # it is raised in all processes, here too
            error = raised
        told = b"" if error is None else _packed_error(error)
        try:
            data = _packed((result, told, reached.theta, reached.t, reached.result))
        except Exception as raised:  # the others wait for something
            error = raised
            data = _packed((None, _packed_error(raised), reached.theta, reached.t, None))
        self.request("", reached.theta)
        self._send(data)
        if error is not None:
            raise error
        return cast(_T, result)

    def _serve(self, objective: Objective) -> BaseException | None:
        """Evaluate what process 0 asks for, until it is done; the exception of the last evaluation is returned."""
        joint, failure = DistributedObjective(objective, self), None
        while True:
            name, theta, vectors = self._requested(objective)
            if not name:
                return failure
            try:
                getattr(joint, name)(theta, *vectors)
                failure = None
            except Lost:
                raise
            except (Exception, KeyboardInterrupt) as error:  # process 0 has it too, and decides what becomes of it
                failure = error

    def request(self, name: str, theta: Tensor, *vectors: Tensor) -> None:
        """Ask the others, in process 0, for an evaluation."""
        columns = vectors[0].shape[1] if vectors else 0
        head = theta.new_tensor([_REQUESTS.index(name), columns], dtype=torch.float64)
        self._broadcast(torch.cat([head, theta.to(torch.float64)]))
        for matrix in vectors:
            self._broadcast(matrix.to(torch.float64))

    def _requested(self, objective: Objective) -> tuple[str, Tensor, list[Tensor]]:
        buffer = self._broadcast(torch.zeros(2 + objective.n_parameters, dtype=torch.float64))
        columns = int(buffer[1])
        vectors = [self._broadcast(buffer.new_zeros(objective.n_parameters, columns))] if columns else []
        theta, *vectors = [part.to(objective.device, objective.dtype) for part in (buffer[2:], *vectors)]
        return _REQUESTS[int(buffer[0])], theta, vectors

    def share(self, value: _T, device: torch.device) -> _T:
        """See ``Processes``."""
        if self._rank == 0:
            self._send(_packed(value))
            return value
        return cast(_T, self._receive(device))

    def _send(self, data: bytes) -> None:
        self._broadcast(torch.tensor([len(data)]))
        self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _receive(self, device: torch.device) -> Any:
        length = int(self._broadcast(torch.zeros(1, dtype=torch.int64)))
        data = self._broadcast(torch.zeros(length, dtype=torch.uint8))
        return _unpacked(data.cpu().numpy().tobytes(), device)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of process 0."""
        tensor = tensor.to(self._device).contiguous()
        with lost_is_said():
            distributed.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def _exchange(
        self,
        compute: Callable[[], Tensor],
        length: int,
        mark: Callable[[], list[float]] = list,
        n_marks: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Add up vectors of ``length`` numbers, with their weights, and show up to ``n_marks`` numbers, in one all-reduce.

        Returns:
            The (weighted) sum or mean, in float64, and the marks, a row per process.

        Raises:
            BaseException: What ``compute`` or ``mark`` raised in any process; that of the first one, if there are several.
        """
        error: BaseException | None = None
        values, rows = torch.zeros(length), torch.zeros(self.size, 1 + n_marks, dtype=torch.float64)
        try:
            if self._interrupts is not None:
                self._interrupts.deliver()
            values, marks = compute().detach(), torch.tensor(mark(), dtype=torch.float64)
            rows[self._rank, 1 : 1 + len(marks)] = marks
        except BaseException as raised:  # it is raised below, in all processes
            error = raised
            rows[self._rank, 0] = 1.0
        weight = float(self._shard_size or 1) if self._reduction == "mean" else 1.0
        head = torch.cat([torch.tensor([weight], dtype=torch.float64), rows.flatten()])
        buffer = torch.cat([head.to(self._device), weight * values.to(self._device, torch.float64)])
        with lost_is_said(error):
            distributed.all_reduce(buffer, group=self._group)
        rows, total = buffer[1 : len(head)].view_as(rows).cpu(), buffer[len(head) :]
        failed = rows[:, 0].nonzero()
        if len(failed):
            self._raise(int(failed[0]), error)
        return (total / buffer[0] if self._reduction == "mean" else total), rows[:, 1:]

    def _raise(self, first: int, own: BaseException | None) -> None:
        """Raise the exception of the process ``first``, of which all are told."""
        told: list[Any] = [None] * self.size
        with lost_is_said(own):
            distributed.all_gather_object(told, b"" if own is None else _packed_error(own), group=self._group)
        error = _unpacked(told[first])
        if isinstance(error, KeyboardInterrupt) and self._interrupts is not None:
            self._interrupts.delivered = True
        if own is not None and self._rank == first:
            raise own
        raise _elsewhere(error, first) from own


class DistributedObjective(Objective):
    """The whole loss, from that of one's own data.

    Residuals are not offered.

    Args:
        base: The loss of one's own data.
        processes: The processes.
        leads: Whether process 0 alone calls it, and the others wait to be told; else all call it at the same time.

    Attributes:
        base: As given.
    """

    def __init__(self, base: Objective, processes: SeveralProcesses, *, leads: bool = False) -> None:
        self.n_parameters, self.dtype, self.device = base.n_parameters, base.dtype, base.device
        self.resolution = base.resolution
        self.counts: EvaluationCounts = base.counts
        self.base, self._processes, self._leads = base, processes, leads
        self._vector, self._matrix = torch.Size([base.n_parameters]), torch.Size([base.n_parameters] * 2)

    def kind(self) -> tuple[Any, ...]:
        """See ``Objective``."""
        return "distributed", self._processes.size, *self.base.kind()

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ)."""
        loss, gradient = self._total("loss_and_gradient", [torch.Size([]), self._vector], theta)
        return loss, gradient

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V."""
        columns = vectors.reshape(self.n_parameters, -1)
        return self._total("hvp", [columns.shape], theta, columns)[0].reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ)."""
        return self._total("hessian", [self._matrix], theta)[0]

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(θ), ∇L(θ) and H(θ)."""
        shapes = [torch.Size([]), self._vector, self._matrix]
        loss, gradient, hessian = self._total("loss_gradient_hessian", shapes, theta)
        return loss, gradient, hessian

    def _total(self, name: str, shapes: Sequence[torch.Size], theta: Tensor, *vectors: Tensor) -> list[Tensor]:
        def evaluate() -> tuple[Tensor, ...]:
            found = getattr(self.base, name)(theta, *vectors)
            return found if isinstance(found, tuple) else (found,)

        if self._leads:
            self._processes.request(name, theta, *vectors)
        return self._processes.total(evaluate, theta, shapes)


def find_processes(process_group: Any, shard_size: Any, reduction: Any) -> Processes:
    """The processes that an optimizer's arguments name.

    Args:
        process_group: A torch.distributed process group, or None for this process alone.
        shard_size: n_r, the number of samples in this process; None for equal weights.
        reduction: "mean" if each process's loss is a mean over its samples, "sum" if it is a sum.

    Raises:
        TypeError, ValueError: For arguments that make no sense, naming them.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}.")
    if shard_size is not None:
        check_count("shard_size", shard_size)
        if reduction == "sum":
            raise ValueError(f"shard_size={shard_size} weights means; with reduction='sum' losses are added. Drop one.")
    if process_group is None:
        return ALONE
    if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            "process_group must be a group of torch.distributed that contains this process, such as "
            f"torch.distributed.group.WORLD after init_process_group(), or None; not {process_group!r}."
        )
    if distributed.get_world_size(process_group) == 1:
        return OneProcess(chosen=True)
    return SeveralProcesses(process_group, shard_size, reduction)


def _digest(tensor: Tensor) -> tuple[float, float]:
    """The bits of a floating-point tensor as two numbers, by arithmetic modulo 2^64, the same in any order of summation."""
    bits = tensor.detach().contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32).to(torch.int64)
    odd = torch.arange(1, 2 * len(bits), 2, device=bits.device) * 0x9E3779B97F4A7C1
    code = int((bits * odd).sum()) % 2**64
    return float(code >> 32), float(code & 0xFFFFFFFF)


def _packed(value: Any) -> bytes:
    """Any picklable value with tensors as bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes, device: torch.device | None = None) -> Any:
    """The inverse of ``_packed``."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)


def _packed_error(error: BaseException) -> bytes:
    """As ``_packed``; of what cannot be pickled the text."""
    try:
        data = _packed(error)
        _unpacked(data)
    except Exception:
        return _packed(ProcessError(f"{type(error).__name__}: {error}"))
    return data


def _elsewhere(error: BaseException, process: int) -> BaseException:
    """An exception of another process, of the same type where that can be made of a text."""
    text = f"process {process}: {error}" if str(error) else f"process {process}: {type(error).__name__}"
    try:
        made = type(error)(text)
    except Exception:
        return ProcessError(f"process {process}: {type(error).__name__}: {error}")
    made.__dict__.update(error.__dict__)
    return made


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join([", ".join(map(str, sizes[:-1])), str(sizes[-1])])
