"""Any of torch's learning-rate schedulers as a schedule of the temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer


class TemperatureScheduler:
    """Lets a learning-rate scheduler move the groups' ``temperature`` instead of their ``lr``.

    ``TemperatureScheduler(optimizer, lambda stand_in: CosineAnnealingLR(stand_in, 100))``, then ``step()`` as with any
    scheduler. The scheduler works on a stand-in, an optimizer without parameters to speak of whose lrs are the temperatures.

    Args:
        optimizer: A sampler.
        make: Makes the scheduler of the optimizer that it is given.
    """

    def __init__(self, optimizer: Optimizer, make: Callable[[Optimizer], LRScheduler]) -> None:
        self._optimizer = optimizer
        groups = [{"params": [torch.zeros(())], "lr": float(group["temperature"])} for group in optimizer.param_groups]
        self._stand_in = torch.optim.SGD(groups)
        self._scheduler = make(self._stand_in)
        self._write()

    def step(self) -> None:
        """The next temperatures."""
        self._stand_in.step()  # schedulers warn where the optimizer's step was left out
        self._scheduler.step()
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's."""
        return self._scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._scheduler.load_state_dict(state_dict)
        for group, temperature in zip(self._stand_in.param_groups, self._scheduler.get_last_lr(), strict=True):
            group["lr"] = temperature
        self._write()

    def _write(self) -> None:
        for group, stand_in in zip(self._optimizer.param_groups, self._stand_in.param_groups, strict=True):
            group["temperature"] = stand_in["lr"]
