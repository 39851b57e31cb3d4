"""What the samplers share: checked parameter groups, and a random generator that belongs to the optimizer's state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_gradflow.checks import check_number
from torch_gradflow.objectives.parameters import check_parameters

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Sampler(Optimizer):
    """An optimizer that draws random numbers.

    Args:
        params: As for any ``torch.optim.Optimizer``: float32 or float64, dense, on one device.
        defaults: The numbers of groups that do not name their own.
        generator: Where the noise comes from; on the parameters' device. Its state is part of ``state_dict``. None: torch's
            global generator, whose state is the caller's to keep. In several processes (DistributedDataParallel) all must
            begin with the same state, or their parameters part.
    """

    def __init__(self, params: Params, defaults: dict[str, Any], generator: torch.Generator | None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, not {generator!r}.")
        self._generator = generator
        super().__init__(params, defaults)

    @abstractmethod
    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Refuse what a group may not say."""

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which join the motion at the next step."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1], f"params group {len(self.param_groups) - 1}: ")
            tensors = [p for group in self.param_groups for p in group["params"]]
            check_parameters(tensors)
            for i, p in enumerate(tensors):
                if p.dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"params[{i}] is of type {p.dtype}, too coarse for the steps of a sampler: keep the parameters in "
                        "torch.float32 (with torch.autocast, if you like) or torch.float64."
                    )
            if self._generator is not None and self._generator.device.type != tensors[0].device.type:
                raise ValueError(
                    f"generator is on {self._generator.device}, the parameters are on {tensors[0].device}: "
                    f"make it with torch.Generator(device={tensors[0].device.type!r})."
                )
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; the generator's state is "generator_state" of the first group."""
        found = super().state_dict()
        if self._generator is not None:
            found["param_groups"][0]["generator_state"] = self._generator.get_state()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; a generator that was saved continues from there.

        Raises:
            ValueError: If it comes from another kind of optimizer; nothing was changed.
        """
        own = self.param_groups[0]
        missing = {key for group in state_dict["param_groups"] for key in own if key not in group} - {"params", "param_names"}
        if missing:
            raise ValueError(
                f"state_dict is not one of {type(self).__name__}: its groups have no {', '.join(map(repr, sorted(missing)))}. "
                "Load the model's state_dict only, and start the optimizer anew."
            )
        super().load_state_dict(state_dict)
        kept = self.param_groups[0].pop("generator_state", None)
        if kept is not None:
            if self._generator is None:
                self._generator = torch.Generator(device=self.param_groups[0]["params"][0].device)
            self._generator.set_state(kept.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_generator": self._generator}

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The loss, with the gradients at the present parameters."""
        if not callable(closure):
            raise TypeError(f"closure must be a function without arguments that returns the loss, not {closure!r}.")
        with torch.enable_grad():
            return closure()

    def _moving(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The groups, with those of their parameters that have gradients.

        Raises:
            RuntimeError: For sparse gradients.
        """
        found = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if any(p.grad.is_sparse for _, params in found for p in params):
            raise RuntimeError(
                f"{type(self).__name__} needs dense gradients: make the embedding with sparse=False. Nothing was changed."
            )
        return found


def check_shared(group: Mapping[str, Any], where: str) -> None:
    """Check the numbers that groups of all samplers have."""
    for key in ("lr", "temperature", "weight_decay"):
        check_number(f"{where}{key}", group[key], least=0.0)
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"{where}maximize must be True or False, not {group['maximize']!r}.")
