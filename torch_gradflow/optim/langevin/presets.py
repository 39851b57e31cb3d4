"""Named methods of the literature: settings of ``PartitionedLangevin``, with the papers' values as defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch

from torch_gradflow.optim.langevin.layers import partition
from torch_gradflow.optim.langevin.motions import Bounds
from torch_gradflow.optim.langevin.optimizer import PartitionedLangevin
from torch_gradflow.optim.langevin.sampler import Params


class Shared(TypedDict, total=False):
    """Arguments that all methods have in common; see ``PartitionedLangevin``."""

    weight_decay: float
    bounds: Bounds | None
    maximize: bool
    annealing: Callable[[int], float] | None
    generator: torch.Generator | None


class Langevin(PartitionedLangevin):
    """Langevin dynamics of all parameters by BAOAB.

    Leimkuhler, Matthews, Vlaar (2019); the defaults are those of its spirals. The orders of TATi's samplers are ``splitting``
    "BAO" (GLA1) and "BABO" (GLA2).

    Args:
        params: As for ``PartitionedLangevin``.
        lr: h, the step size.
        temperature: τ.
        friction: γ.
        splitting: Another order of A, B and O.
        **shared: As for ``PartitionedLangevin``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.25,
        *,
        temperature: float = 1e-4,
        friction: float = 0.1,
        splitting: str | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(params, lr, temperature=temperature, friction=friction, splitting=splitting, **shared)


class MultiLayerLangevin(PartitionedLangevin):
    """Langevin dynamics by BAOAB with temperature and friction of each layer's own (Leimkuhler, Matthews, Vlaar, 2019).

    Args:
        params: Groups, one per layer (``layer_groups(model)``), or ``model.parameters()``, which are cut into layers before
            each tensor with two dimensions or more.
        lr: h, the step size.
        temperature: τ of the layers in turn; the last serves all further ones.
        friction: γ of the layers in turn; the last serves all further ones.
        **shared: As for ``PartitionedLangevin``.

    Raises:
        ValueError: If there are fewer layers than temperatures or frictions.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.25,
        *,
        temperature: Sequence[float] = (1e-4,),
        friction: Sequence[float] = (0.1,),
        **shared: Unpack[Shared],
    ) -> None:
        n = max(len(temperature), len(friction))
        settings = [
            {"temperature": temperature[min(i, len(temperature) - 1)], "friction": friction[min(i, len(friction) - 1)]}
            for i in range(n)
        ]
        super().__init__(partition(params, *settings), lr, **shared)


class AdLaLa(PartitionedLangevin):
    """Adaptive Langevin dynamics of the first layer, Langevin dynamics of all others.

    Leimkuhler, Matthews, Vlaar (2019); the defaults are those of its spirals (batches of 25).

    Args:
        params: Groups, the first of which is the first part (``layer_groups(model)``), or ``model.parameters()``, whose first
            layer ends before the second tensor with two dimensions or more.
        lr: h, the step size.
        temperature: τ of both parts; groups may name their own.
        friction: γ of the second part, and where ξ of the first begins.
        noise: σ of the first part.
        coupling: ε of the first part.
        **shared: As for ``PartitionedLangevin``.

    Raises:
        ValueError: If there is only one layer.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.25,
        *,
        temperature: float = 1e-4,
        friction: float = 0.1,
        noise: float = 0.01,
        coupling: float = 0.05,
        **shared: Unpack[Shared],
    ) -> None:
        parts = partition(params, {"thermostat": "adaptive-langevin"}, {"thermostat": "langevin"})
        numbers: dict[str, Any] = {"temperature": temperature, "friction": friction, "noise": noise, "coupling": coupling}
        super().__init__(parts, lr, **numbers, **shared)


class LOL(PartitionedLangevin):
    """Langevin dynamics of the first layer, overdamped Langevin dynamics of all others (Leimkuhler, Matthews, Vlaar, 2019).

    The overdamped part is Euler's and Maruyama's method with the same step size, which is SGD with noise.

    Args:
        params: As for ``AdLaLa``.
        lr: h, the step size of both parts; groups may name their own.
        temperature: τ of both parts; groups may name their own.
        friction: γ of the first part.
        **shared: As for ``PartitionedLangevin``.

    Raises:
        ValueError: If there is only one layer.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.25,
        *,
        temperature: float = 1e-4,
        friction: float = 0.1,
        **shared: Unpack[Shared],
    ) -> None:
        parts = partition(params, {"thermostat": "langevin"}, {"thermostat": "overdamped"})
        super().__init__(parts, lr, temperature=temperature, friction=friction, **shared)


class SGLD(PartitionedLangevin):
    """Stochastic gradient Langevin dynamics: θ −= h∇L − √(2τh) R for all parameters.

    Source: M. Welling, Y. W. Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics, ICML.

    Args:
        params: As for ``PartitionedLangevin``.
        lr: h, the step size, that of SGD.
        temperature: τ.
        **shared: As for ``PartitionedLangevin``.
    """

    def __init__(self, params: Params, lr: float = 1e-2, *, temperature: float = 1e-4, **shared: Unpack[Shared]) -> None:
        super().__init__(params, lr, thermostat="overdamped", temperature=temperature, **shared)


class CCAdL(PartitionedLangevin):
    """Covariance-controlled adaptive Langevin dynamics of all parameters, with a diagonal covariance.

    X. Shang, Z. Zhu, B. Leimkuhler, A. Storkey (2015), NeurIPS 28. The paper takes the covariance from the gradients of
    the batch's samples; an optimizer sees their mean only, so here it comes from the differences of successive gradients. The
    defaults are those of ``AdLaLa``.

    Args:
        params: As for ``PartitionedLangevin``.
        lr: h, the step size.
        temperature: τ > 0.
        friction: Where ξ begins.
        noise: σ.
        coupling: ε.
        **shared: As for ``PartitionedLangevin``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.25,
        *,
        temperature: float = 1e-4,
        friction: float = 0.1,
        noise: float = 0.01,
        coupling: float = 0.05,
        **shared: Unpack[Shared],
    ) -> None:
        numbers: dict[str, Any] = {"temperature": temperature, "friction": friction, "noise": noise, "coupling": coupling}
        super().__init__(params, lr, thermostat="covariance-controlled", **numbers, **shared)
