"""Hamiltonian Monte Carlo: leapfrog trajectories with Metropolis's correction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_count
from torch_gradflow.optim.langevin.sampler import Params, Sampler, check_shared
from torch_gradflow.uncompiled import uncompiled


class HMC(Sampler):
    """Hamiltonian Monte Carlo (S. Duane, A. Kennedy, B. Pendleton, D. Roweth, 1987, Phys. Lett. B 195).

    Each step draws momenta, follows the Hamiltonian dynamics for ``n_leapfrog`` leapfrog steps, and accepts the end with
    probability min(1, exp(−ΔH/τ)), H = L + p·p/2, else stays. The parameters are distributed as exp(−L/τ) exactly, if the
    closure always computes the same loss: the whole data, not batches, and no dropout.

    Args:
        params: As for any ``torch.optim.Optimizer``; float32 or float64.
        lr: The leapfrog method's step size; it may differ from group to group.
        n_leapfrog: How many leapfrog steps one trajectory has.
        temperature: τ, the same in all groups.
        weight_decay: λ of a Gaussian prior: λ/2 ‖θ‖² is added to L.
        maximize: Sample exp(+L/τ).
        generator: Of momenta and decisions. Its state is part of ``state_dict``; None: torch's global one.

    Raises:
        TypeError: For what is not a number, and for parameters that are sparse, complex, sharded, or of half precision.
        ValueError: For numbers out of range, or temperatures that differ.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        n_leapfrog: int = 10,
        temperature: float = 1e-4,
        weight_decay: float = 0.0,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._n_leapfrog = check_count("n_leapfrog", n_leapfrog)
        defaults = {
            "lr": lr,
            "temperature": temperature,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "n_trajectories": 0,
            "n_rejected": 0,
        }
        check_shared(defaults, "")
        super().__init__(params, defaults, generator)

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_shared(group, where)
        for key in ("temperature", "maximize"):
            if group[key] != self.param_groups[0][key]:
                raise ValueError(
                    f"{where}{key} must be {self.param_groups[0][key]!r} as in group 0, not {group[key]!r}: "
                    "Metropolis's correction is that of one distribution."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_n_leapfrog": self._n_leapfrog}

    @property
    def rejection_rate(self) -> float:
        """The fraction of trajectories that were rejected, NaN before the first."""
        group = self.param_groups[0]
        return group["n_rejected"] / group["n_trajectories"] if group["n_trajectories"] else math.nan

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One trajectory, accepted or rejected.

        Args:
            closure: Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss; it is called
                ``n_leapfrog + 1`` times. If it raises, the parameters are what they were before the step.

        Returns:
            The loss at the start of the step.

        Raises:
            TypeError: If there is no closure.
        """
        if closure is None:
            raise TypeError("HMC.step needs a closure: it evaluates the loss at several parameters. Call step(closure).")
        loss = self._evaluate(closure)
        moving = [(group, p) for group, params in self._moving() for p in params]
        start = [p.clone() for _, p in moving]
        group = self.param_groups[0]
        temperature = float(group["temperature"])
        momenta = [self._draw(p, math.sqrt(temperature)) for _, p in moving]
        proposed, accepted = loss, False
        try:
            before = energy(loss, moving, momenta)
            kick(moving, momenta, 0.5)
            for i in range(self._n_leapfrog):
                for (g, p), momentum in zip(moving, momenta, strict=True):
                    p.add_(momentum, alpha=float(g["lr"]))
                proposed = self._evaluate(closure)
                kick(moving, momenta, 1.0 if i + 1 < self._n_leapfrog else 0.5)
            excess = energy(proposed, moving, momenta) - before
            accepted = self._accepts(excess, temperature)
        finally:
            if not accepted:
                for (_, p), value in zip(moving, start, strict=True):
                    p.copy_(value)
        group["n_trajectories"] += 1
        group["n_rejected"] += not accepted
        return loss

    def _draw(self, like: Tensor, scale: float) -> Tensor:
        drawn = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=self._generator)
        return drawn.mul_(scale)

    def _accepts(self, excess: float, temperature: float) -> bool:
        """Metropolis's decision; where H is not a number the answer is no."""
        device = self.param_groups[0]["params"][0].device
        threshold = float(torch.rand((), dtype=torch.float64, device=device, generator=self._generator))
        if temperature == 0.0:
            return excess <= 0.0
        return threshold < math.exp(min(0.0, -excess / temperature)) if math.isfinite(excess) else False


def kick(moving: list[tuple[dict[str, Any], Tensor]], momenta: list[Tensor], fraction: float) -> None:
    """Momenta follow the force for a fraction of the step size."""
    for (group, p), momentum in zip(moving, momenta, strict=True):
        assert p.grad is not None
        t = fraction * float(group["lr"])
        momentum.add_(p.grad, alpha=t if group["maximize"] else -t)
        momentum.add_(p, alpha=-t * float(group["weight_decay"]))


def energy(loss: Any, moving: list[tuple[dict[str, Any], Tensor]], momenta: list[Tensor]) -> float:
    """H = L + λ/2 ‖θ‖² + p·p/2, in float64."""
    potential = float(torch.as_tensor(loss).detach())
    if moving and moving[0][0]["maximize"]:
        potential = -potential
    parts = [m.square().sum(dtype=torch.float64) for m in momenta]
    parts += [float(g["weight_decay"]) * p.square().sum(dtype=torch.float64) for g, p in moving]
    return potential + 0.5 * float(torch.stack(parts).sum()) if parts else potential
