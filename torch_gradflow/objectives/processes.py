"""What processes that share one loss agree on; and the case of one process, which agrees with itself.

``objectives.closure`` and ``objectives.loop`` open one's own data, and look at loss and gradient of the whole. Where there are
several processes (``objectives.distributed``), each of the methods below is one that all of them call, in the same order; what
decides which one comes next has to be known to all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from torch_gradflow.objectives.base import Objective

_T = TypeVar("_T")
_P = TypeVar("_P", bound="Pass")


class ProcessError(RuntimeError):
    """Another process failed or was lost, or the processes do not agree on what they are to do together."""


@dataclass(frozen=True)
class Pass:
    """What a pass through one's own data gave, or, after ``Processes.meet``, through all of them.

    Attributes:
        loss: L_r, or L; 0-dimensional.
        gradient: What is in ``.grad``, or that of the whole; shape ``(P,)``.
        flags: What has to hold in all processes to be of use; afterwards, whether it does.
    """

    loss: Tensor
    gradient: Tensor
    flags: tuple[bool, ...]


@dataclass
class Reached:
    """How far a step in progress came: it survives failures, in all processes.

    Attributes:
        theta: The last accepted θ.
        t: The flow time there.
        result: What is known of the run so far.
    """

    theta: Tensor
    t: float = 0.0
    result: Any = None


class Processes(ABC):
    """The processes among which the data are divided; all of them call the same methods in the same order.

    Attributes:
        size: How many there are.
    """

    size: int

    @abstractmethod
    def check_world(self, name: str) -> None:
        """Refuse an optimizer, called ``name``, in one of several processes that was not told of the others.

        Raises:
            ValueError: Naming the argument.
        """

    @abstractmethod
    def interruptible(self) -> AbstractContextManager[None]:
        """A context for a step: within, Ctrl-C in one process interrupts all of them, at the same evaluation."""

    @abstractmethod
    def check(self, work: Callable[[], _T]) -> _T:
        """The result of ``work``, if it raises an exception in no process."""

    @abstractmethod
    def all(self, flag: bool) -> bool:
        """Whether ``flag`` is true in all processes."""

    @abstractmethod
    def meet(self, run: Callable[[], _P], theta: Tensor, settings: str) -> _P:
        """A pass through one's own data, with loss, gradient and flags of the whole.

        Raises:
            ProcessError: If θ or ``settings`` are not the same in all processes.
            ValueError: If the gradients are already averaged with other weights than those of the shards.
        """

    @abstractmethod
    def whole(self, evaluate: Callable[[], tuple[Tensor, Tensor]], theta: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the whole, from those of one's own data."""

    @abstractmethod
    def joint(self, objective: Objective) -> Objective:
        """The whole loss, which all processes evaluate at the same time, from that of one's own data."""

    @abstractmethod
    def check_sizes(self, n_samples: int) -> None:
        """Refuse shards that are weighted equally, but are seen to hold different numbers of samples.

        Raises:
            ValueError: With the numbers.
        """

    @abstractmethod
    def lead(self, objective: Objective, reached: Reached, work: Callable[[Objective], _T]) -> _T:
        """What ``work`` makes of the whole loss, done in process 0, which the others serve.

        Args:
            objective: The loss of one's own data.
            reached: What ``work`` changes besides; afterwards the same in all processes, also after an exception.
            work: What is to be done; its result has to be picklable.
        """

    @abstractmethod
    def share(self, value: _T, device: torch.device) -> _T:
        """The value that process 0 has; picklable, its tensors on ``device``."""


class OneProcess(Processes):
    """All data are here.

    Args:
        chosen: Whether the user said so, by a process group of one.
    """

    size = 1

    def __init__(self, *, chosen: bool = False) -> None:
        self._chosen = chosen

    def check_world(self, name: str) -> None:
        """See ``Processes``."""
        if self._chosen or not distributed.is_available() or not distributed.is_initialized():
            return
        n = distributed.get_world_size()
        if n > 1:
            raise ValueError(
                f"{name} was used in one of {n} processes without process_group: each would go its own way. Pass "
                "process_group=torch.distributed.group.WORLD to follow their common loss, with shard_size= if they hold "
                "different numbers of samples; or, for independent runs, a group of each process alone "
                "(torch.distributed.new_subgroups(1)[0])."
            )

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """See ``Processes``."""
        yield

    def check(self, work: Callable[[], _T]) -> _T:
        """See ``Processes``."""
        return work()

    def all(self, flag: bool) -> bool:
        """See ``Processes``."""
        return flag

    def meet(self, run: Callable[[], _P], theta: Tensor, settings: str) -> _P:
        """See ``Processes``."""
        return run()

    def whole(self, evaluate: Callable[[], tuple[Tensor, Tensor]], theta: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Processes``."""
        return evaluate()

    def joint(self, objective: Objective) -> Objective:
        """See ``Processes``."""
        return objective

    def check_sizes(self, n_samples: int) -> None:
        """See ``Processes``."""

    def lead(self, objective: Objective, reached: Reached, work: Callable[[Objective], _T]) -> _T:
        """See ``Processes``."""
        return work(objective)

    def share(self, value: _T, device: torch.device) -> _T:
        """See ``Processes``."""
        return value


ALONE = OneProcess()
