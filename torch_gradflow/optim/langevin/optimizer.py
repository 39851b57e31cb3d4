"""PartitionedLangevin: each parameter group moves by the splitting of its own thermostat, with one gradient per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_number
from torch_gradflow.optim.langevin.motions import MOTIONS, Bounds, Coefficients, Moving
from torch_gradflow.optim.langevin.observables import Observables
from torch_gradflow.optim.langevin.sampler import Params, Sampler, check_shared
from torch_gradflow.optim.langevin.splitting import SPLITTINGS, Program, program
from torch_gradflow.uncompiled import uncompiled


class PartitionedLangevin(Sampler):
    """Partitioned thermodynamic integrator: Langevin dynamics with a thermostat for each parameter group.

    It stands where Adam stood: one gradient per step, no closure needed. Each group is moved by a splitting of its thermostat
    (see ``splitting`` for the letters, and for what the parameters show between two steps). At stationarity the parameters
    are distributed as exp(−L(θ)/τ), up to errors that vanish with the step size; for a posterior of N samples let L be the
    mean negative log-likelihood, and τ = 1/N.

    - "langevin" (BAOAB): dθ = p dt, dp = −∇L dt − γp dt + √(2γτ) dW. On quadratic losses the variance of θ is exact for every
      stable step size. ``friction=inf`` draws new momenta in every step: the overdamped method of Leimkuhler and Matthews
      (2013) with step size h²/2.
    - "adaptive-langevin" (BACDEDCAB): dp = −∇L dt − ξp dt + σ dW, dξ = ε(p·p − Nτ) dt, with one ξ for each tensor: it keeps
      the temperature in spite of noise of unknown strength in the gradient. ``friction`` is where ξ begins. (The paper writes
      the friction as εξ; as in its authors' program, ξ is the friction itself.)
    - "covariance-controlled" (BACDEVEDCAB): the same with a friction that takes out the heat of the gradient's noise, element
      by element, by an estimate of its variance (half the mean square difference of successive gradients).
    - "overdamped" (GW): dθ = −∇L dt + √(2τ) dW by Euler and Maruyama; with ``temperature=0`` it is plain SGD.
    - "none" (BAB): dθ = p dt, dp = −∇L dt, by the leapfrog method.

    All momenta begin at zero. Parameters without gradient stay where they are. Sources: B. Leimkuhler, C. Matthews, T. Vlaar
    (2019), Partitioned integrators for thermodynamic parameterization of neural networks, Foundations of Data Science 1(4);
    B. Leimkuhler, C. Matthews (2013), Rational construction of stochastic numerical methods for molecular sampling, AMRX
    (BAOAB); A. Jones, B. Leimkuhler (2011), Adaptive stochastic methods for sampling driven molecular systems, Journal of
    Chemical Physics 135; X. Shang, Z. Zhu, B. Leimkuhler, A. Storkey (2015), Covariance-controlled adaptive Langevin
    thermostat, NeurIPS 28.

    Args:
        params: Tensors, named tensors or groups, as for any ``torch.optim.Optimizer``; float32 or float64. Everything below
            but ``annealing`` and ``generator`` may stand in a group. ``layer_groups`` makes one group per layer.
        lr: h, the step size; a change of it takes effect where the next gradient is evaluated.
        thermostat: "langevin", "adaptive-langevin", "covariance-controlled", "overdamped" or "none".
        splitting: Another order of the thermostat's letters, such as "ABOBA"; None for the thermostat's own.
        temperature: τ, in units of the loss.
        friction: γ, per unit of time; the first ξ of the adaptive thermostats.
        noise: σ of the adaptive thermostats.
        coupling: ε of the adaptive thermostats.
        weight_decay: λ of a Gaussian prior: λ/2 ‖θ‖² is added to L.
        bounds: (low, high): a flat prior between them; parameters are reflected there. None: no bounds.
        maximize: Climb L instead.
        annealing: Called with the number of steps (with lr > 0) that a group made so far; the temperature is multiplied by
            what it returns. Like the functions of torch's LambdaLR it is not part of ``state_dict``.
        generator: Of the noise. Its state is part of ``state_dict``; None: torch's global one.

    Attributes:
        recorder: An ``Observables`` that records at every step, or None.

    Raises:
        TypeError: For what is not a number, and for parameters that are sparse, complex, sharded, or of half precision.
        ValueError: For numbers out of range, an unknown thermostat, or a splitting that cannot be run.
    """

    recorder: Observables | None = None

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        *,
        thermostat: str = "langevin",
        splitting: str | None = None,
        temperature: float = 1e-4,
        friction: float = 0.1,
        noise: float = 0.01,
        coupling: float = 0.05,
        weight_decay: float = 0.0,
        bounds: Bounds | None = None,
        maximize: bool = False,
        annealing: Callable[[int], float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if annealing is not None and not callable(annealing):
            raise TypeError(f"annealing must be a function of the number of steps, or None, not {annealing!r}.")
        self._annealing = annealing
        defaults = {
            "lr": lr,
            "thermostat": thermostat,
            "splitting": splitting,
            "temperature": temperature,
            "friction": friction,
            "noise": noise,
            "coupling": coupling,
            "weight_decay": weight_decay,
            "bounds": bounds,
            "maximize": maximize,
            "n_steps": 0,
        }
        self._check_group(defaults, "")
        super().__init__(params, defaults, generator)

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_shared(group, where)
        check_number(f"{where}friction", group["friction"], least=0.0, infinite=group["thermostat"] == "langevin")
        for key in ("noise", "coupling"):
            check_number(f"{where}{key}", group[key], least=0.0)
        check_temperature(f"{where}temperature", group["temperature"], splitting_of(group, where))
        bounds = group["bounds"]
        if bounds is not None and not (isinstance(bounds, tuple | list) and len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ValueError(f"{where}bounds must be (low, high) with low < high, or None, not {bounds!r}.")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_annealing": self._annealing}

    def _plan(self, group: Mapping[str, Any], where: str) -> tuple[Program, Coefficients]:
        """What a group's tensors do in this step, its numbers being what schedulers made of them."""
        annealing = 1.0 if self._annealing is None else float(self._annealing(group["n_steps"]))
        scheme, numbers = splitting_of(group, where), Coefficients.of(group, annealing, self._generator)
        check_number(f"{where}lr", numbers.lr, least=0.0)
        check_temperature(f"{where}temperature", numbers.temperature, scheme)
        return scheme, numbers

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One sweep of every group's splitting, with the gradients in ``.grad``.

        Args:
            closure: Optional; evaluated once, before anything moves.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: For sparse gradients; nothing was changed.
            ValueError: If a scheduler or the annealing made a group's numbers unusable; nothing was changed.
        """
        loss = None if closure is None else self._evaluate(closure)
        moving = self._moving()
        plans = [self._plan(group, f"params group {i}: ") for i, (group, _) in enumerate(moving)]
        if self.recorder is not None:
            self.recorder.record(moving, self.state, loss)
        for (group, params), (scheme, numbers) in zip(moving, plans, strict=True):
            for p in params:
                run(scheme, p, self.state[p], numbers, first=group["n_steps"] == 0)
            group["n_steps"] += numbers.lr != 0.0
        return loss


def splitting_of(group: Mapping[str, Any], where: str) -> Program:
    """The program of a group's splitting.

    Raises:
        ValueError: For an unknown thermostat, or a splitting that is none of its own or cannot be run.
    """
    own = SPLITTINGS.get(group["thermostat"])
    if own is None:
        raise ValueError(f"{where}thermostat must be one of {', '.join(SPLITTINGS)}, not {group['thermostat']!r}.")
    word = group["splitting"]
    if word is None:
        return program(own)
    if not isinstance(word, str) or set(word) != set(own):
        raise ValueError(
            f"{where}splitting of thermostat {group['thermostat']!r} must be a word of all of its letters "
            f"{', '.join(sorted(set(own)))}, such as {own!r}, not {word!r}."
        )
    return program(word)


def check_temperature(name: str, value: Any, scheme: Program) -> None:
    """Refuse negative temperatures, and zero where the splitting divides by it."""
    if "V" in scheme.letters:
        check_number(f"{name} of the covariance-controlled thermostat", value, above=0.0)
    else:
        check_number(name, value, least=0.0)


def run(scheme: Program, p: Tensor, state: dict[str, Any], numbers: Coefficients, first: bool) -> None:
    """One step of one tensor of parameters, the opening one if it is the group's first, or the tensor's.

    With lr = 0 it only initialises the state, which is what torch.distributed.checkpoint expects of it.
    """
    assert p.grad is not None
    parts = scheme.opening if first or not state else scheme.cycle
    initialise(state, p, scheme.letters, numbers)
    if numbers.lr == 0.0:
        return
    if "V" in scheme.letters:
        update_variance(state, p.grad)
    at = Moving(p, p.grad, state, numbers)
    for letter, fraction in parts:
        MOTIONS[letter](at, fraction * numbers.lr)


def initialise(state: dict[str, Any], p: Tensor, letters: frozenset[str], numbers: Coefficients) -> None:
    """Give ``state`` the entries that the letters need, where it lacks them."""
    if "A" in letters and "momentum" not in state:
        state["momentum"] = torch.zeros_like(p)
    if "E" in letters and "xi" not in state:
        state["xi"] = torch.full((), numbers.friction, dtype=p.dtype, device=p.device)
    if "V" in letters and "variance" not in state:
        state.update(step=torch.zeros(()), last_gradient=torch.zeros_like(p), variance=torch.zeros_like(p))


def update_variance(state: dict[str, Any], gradient: Tensor) -> None:
    """The mean of (g − g_last)²/2 over all steps: the variance of the noise in g, where its mean changes little in a step."""
    n = int(state["step"])
    if n > 0:
        difference = gradient - state["last_gradient"]
        state["variance"].mul_(1.0 - 1.0 / n).addcmul_(difference, difference, value=0.5 / n)
    state["last_gradient"].copy_(gradient)
    state["step"] += 1
