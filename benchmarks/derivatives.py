"""Gradients, Hessians and Hessian–vector products of perceptrons, side by side with torch's own and with jax.

All candidates run interleaved in one process; medians of the rounds. Ratios are against the fastest of torch's ways, and
against jax, which may be missing. Every result is compared with ours. What takes too long for one call is estimated from some
of the Hessian's rows, and marked with ~; what would take too long even so, and torch's loop over the rows never does, is left
out. With one thread, the process keeps to one core.

    python benchmarks/derivatives.py [--threads 1] [--quick] [--limit 3] [--budget 1.5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _environment import environment, settle
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from torch_gradflow import Activation, Loss, Perceptron, PerceptronObjective, Samples
from torch_gradflow.perceptron.kernels import CompiledKernel, KernelName

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

PACKAGES = ("torch", "numba", "numpy", "jax")
RESULTS = Path(__file__).parent / "results" / "derivatives.json"
WHOLE, BARE, PLAIN = "PerceptronObjective", "compiled kernel alone", "plain torch kernel"
OURS = (WHOLE, BARE, PLAIN)
EAGER, FUNC_GRAD, JAX = "eager", "torch.func.grad", "jax"
LOOPED, BATCHED = "autograd.functional.hessian", "the same, vectorize=True"
FORWARD = "torch.func.hessian"
FORWARD_PRODUCT, TWICE, TWICE_BATCHED = "jvp(grad)", "double backward", "double backward, batched"
# The Hessian's rows at a time from which its cost is estimated.
ROWS = 16
SAMPLE = 1e-3  # seconds; of what is faster, several calls are timed together
MANY = 16  # vectors at once
PEAK_SIZES, PEAK_SAMPLES = (2, 500, 1), 100_000  # 2001 parameters


class Erf(nn.Module):
    """The error function as a layer."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.erf(z)


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Activation]] = {
    "softplus": (nn.Softplus, Activation("softplus", (1.0, 20.0))),
    "tanh": (nn.Tanh, Activation("tanh")),
    "relu": (nn.ReLU, Activation("relu")),
    "gelu": (nn.GELU, Activation("gelu")),
    "erf": (Erf, Activation("erf")),
}


@dataclass(frozen=True)
class Network:
    """A perceptron with biases and a linear output, its loss (a mean) and its floating type."""

    sizes: tuple[int, ...]
    activation: str = "softplus"
    classes: bool = False  # cross-entropy instead of squared errors
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        parts = ["-".join(map(str, self.sizes))]
        parts += [] if self.activation == "softplus" else [self.activation]
        parts += ["cross-entropy"] if self.classes else []
        parts += ["float32"] if self.dtype == torch.float32 else []
        return " ".join(parts)


ONE_HIDDEN = [Network((2, k, 1)) for k in (10, 50, 100)]
DEEP = Network((2, 50, 50, 1))
OTHERS = [DEEP, Network((2, 20, 20, 1)), Network((2, 50, 8)), Network((10, 32, 32, 3), classes=True)]
KINDS = [Network((2, 50, 1), activation=kind) for kind in ("tanh", "relu", "gelu", "erf")]
KINDS.append(Network((2, 50, 1), dtype=torch.float32))
WIDE = [Network((784, 128, 10), classes=True), Network((64, 256, 256, 10), classes=True)]
NUMBERS = (10, 100, 1000, 10_000, 100_000)

Cell = tuple[Network, int]


def grid(networks: Sequence[Network], numbers: Sequence[int]) -> list[Cell]:
    return [(network, n) for network in networks for n in numbers]


CELLS: dict[str, list[Cell]] = {
    "gradient": grid(ONE_HIDDEN, NUMBERS) + grid(OTHERS + KINDS, (10, 100, 1000, 10_000)) + grid(WIDE, (1000,)),
    "Hessian": grid(ONE_HIDDEN, NUMBERS) + grid(OTHERS, (10, 100, 1000)) + grid(KINDS, (100, 1000)),
    "1 product": grid(ONE_HIDDEN, NUMBERS) + grid(OTHERS + KINDS + WIDE, (1000,)),
    f"{MANY} products": grid(ONE_HIDDEN, (10, 1000, 10_000)) + grid(OTHERS + KINDS + WIDE, (1000,)),
}
_FEW = [*grid([ONE_HIDDEN[0], ONE_HIDDEN[2]], (10, 1000)), (DEEP, 1000)]
QUICK: dict[str, list[Cell]] = {
    "gradient": [*grid(ONE_HIDDEN, (10, 1000, 10_000)), (DEEP, 1000), *grid(OTHERS[1:] + KINDS, (100,))],
    "Hessian": [*_FEW, (OTHERS[2], 100), (OTHERS[3], 100), (KINDS[2], 100), (KINDS[4], 100)],
    "1 product": [*_FEW, (OTHERS[3], 100), (KINDS[4], 100)],
    f"{MANY} products": [*_FEW, (OTHERS[3], 100), (KINDS[4], 100)],
}


class Problem:
    """A network and data, in the forms that the candidates need."""

    def __init__(self, network: Network, n: int) -> None:
        self.network, self.n = network, n
        torch.manual_seed(0)
        make, self.activation = ACTIVATIONS[network.activation]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(network.sizes, network.sizes[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out), make()]
        self.model = nn.Sequential(*layers[:-1]).to(network.dtype)
        self.x = torch.randn(n, network.sizes[0], dtype=network.dtype)
        self.y = self._targets()
        self.leaves = list(self.model.parameters())
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self.phi = nn.utils.parameters_to_vector(self.leaves).detach()

    def _targets(self) -> Tensor:
        size = self.network.sizes[-1]
        if self.network.classes:
            return torch.randint(size, (self.n,))
        return torch.sin(self.x.sum(1, keepdim=True) + torch.arange(size))

    def eager_loss(self) -> Tensor:
        """As everyone writes it."""
        loss = F.cross_entropy if self.network.classes else F.mse_loss
        return loss(self.model(self.x), self.y)

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        """As a function. Squared errors by hand: forward-mode derivatives of ``mse_loss`` fail in torch 2.13."""
        f = functional_call(self.model, parameters, (self.x,))
        return F.cross_entropy(f, self.y) if self.network.classes else ((f - self.y) ** 2).mean()

    def named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.parameters, values, strict=True))

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows of length P, as parts of the parameters' shapes."""
        parts = rows.split([p.numel() for p in self.leaves], dim=-1)
        return [part.reshape(*rows.shape[:-1], *p.shape) for part, p in zip(parts, self.leaves, strict=True)]

    def perceptron(self) -> tuple[Perceptron, Loss, Samples]:
        """In our terms."""
        network = Perceptron.of(self.network.sizes, self.activation, Activation("identity"))
        if self.network.classes:
            targets, n_terms = F.one_hot(self.y, self.network.sizes[-1]).T, self.n
        else:
            targets, n_terms = self.y.T, self.y.numel()
        weights = torch.full((self.n,), 1 / n_terms, dtype=torch.float64)
        return network, Loss("cross entropy" if self.network.classes else "squared error"), Samples(self.x.T, targets, weights)

    def objective(self, kernel: KernelName) -> PerceptronObjective:
        return PerceptronObjective(*self.perceptron(), dtype=self.network.dtype, kernel=kernel)


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        call: What is timed.
        read: Its result as rows of length P.
        part: If given, the call computes only some of the rows that are wanted, and all take so many times as long.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Tensor]
    part: float | None = None


Candidates = dict[str, Candidate]


def flat(parts: Sequence[Tensor]) -> Tensor:
    """One row of length P from parts of the parameters' shapes."""
    return torch.cat([p.reshape(-1) for p in parts])[None]


def flat_rows(parts: Sequence[Tensor]) -> Tensor:
    """As ``flat``, with the rows' dimension in front of each part."""
    return torch.cat([p.flatten(1) for p in parts], 1)


def stacked(blocks: Sequence[Sequence[Tensor]], leaves: Sequence[Tensor]) -> Tensor:
    """The Hessian from its blocks."""
    return torch.cat([flat_rows([b.reshape(p.numel(), -1) for b in row]) for row, p in zip(blocks, leaves, strict=True)])


def gradients(problem: Problem) -> Candidates:
    found: Candidates = {}
    for name, kernel in ((WHOLE, "auto"), (PLAIN, "torch")):
        objective = problem.objective(kernel)
        found[name] = Candidate(lambda o=objective: o.loss_and_gradient(problem.phi), lambda result: result[1][None])
    bare = compiled_alone(problem)
    if bare is not None:
        found[BARE] = bare

    def eager() -> None:
        problem.model.zero_grad()
        problem.eager_loss().backward()

    found[EAGER] = Candidate(eager, lambda _: flat([p.grad for p in problem.leaves]))
    found[FUNC_GRAD] = Candidate(
        lambda: torch.func.grad(problem.loss)(problem.parameters), lambda result: flat(list(result.values()))
    )
    if jax is not None:
        derivatives = JaxDerivatives(problem)
        found[JAX] = Candidate(derivatives.gradient, derivatives.read)
    return found


def compiled_alone(problem: Problem) -> Candidate | None:
    """The compiled gradient without the objective, into tensors that exist; None where it does not serve."""
    kernel = problem.objective("auto")._kernel
    if not isinstance(kernel, CompiledKernel):
        return None
    phi, call = problem.phi.double(), kernel._kernel.loss_and_gradient
    loss, gradient = torch.empty((), dtype=torch.float64), torch.empty_like(phi)
    return Candidate(lambda: call(phi, gradient, loss), lambda _: gradient[None].to(problem.network.dtype))


def hessians(problem: Problem, limit: float) -> Candidates:
    found: Candidates = {}
    for name, kernel in ((WHOLE, "auto"), (PLAIN, "torch")):
        objective = problem.objective(kernel)
        found[name] = Candidate(lambda o=objective: o.hessian(problem.phi), lambda result: result)
    n = problem.phi.numel()
    functional, tensors = torch.autograd.functional.hessian, tuple(problem.parameters.values())

    def loss(*values: Tensor) -> Tensor:
        return problem.loss(problem.named(values))

    def read(blocks: Sequence[Sequence[Tensor]]) -> Tensor:
        return stacked(blocks, problem.leaves)

    row = torch.eye(1, n, dtype=problem.network.dtype)
    rows = torch.eye(min(ROWS, n), n, dtype=problem.network.dtype)
    one = Candidate(double_backward(problem, row, retained=True), flat_rows, n)
    found[LOOPED], seconds = affordable(Candidate(lambda: functional(loss, tensors), read), one, limit)
    if seconds / n * len(rows) > limit:
        return found
    parts = len(rows), n / len(rows)
    wanted = {
        BATCHED: (
            Candidate(lambda: functional(loss, tensors, vectorize=True), read),
            Candidate(double_backward(problem, rows, batched=True), flat_rows, parts[1]),
        ),
        FORWARD: (
            Candidate(
                lambda: torch.func.hessian(problem.loss)(problem.parameters),
                lambda result: read([list(blocks.values()) for blocks in result.values()]),
            ),
            Candidate(forward_over_reverse(problem, rows), flat_rows, parts[1]),
        ),
    }
    if jax is not None:
        derivatives = JaxDerivatives(problem)
        wanted[JAX] = (
            Candidate(derivatives.hessian, derivatives.read),
            Candidate(derivatives.products(rows), derivatives.read, parts[1]),
        )
    return found | {name: affordable(whole, part, limit)[0] for name, (whole, part) in wanted.items()}


def affordable(whole: Candidate, part: Candidate, limit: float) -> tuple[Candidate, float]:
    """The whole, or the part if the whole may take longer than the limit; and how long the whole may take."""
    part.call()
    seconds = min(timed(part.call), timed(part.call)) * (part.part or 1.0)
    return (whole if seconds < limit else part), seconds


def products(problem: Problem, count: int) -> Candidates:
    found: Candidates = {}
    rows = torch.randn(count, problem.phi.numel(), dtype=problem.network.dtype)
    columns = rows.T.contiguous()
    for name, kernel in ((WHOLE, "auto"), (PLAIN, "torch")):
        objective = problem.objective(kernel)
        found[name] = Candidate(lambda o=objective: o.hvp(problem.phi, columns), lambda result: result.T)
    found[FORWARD_PRODUCT] = Candidate(forward_over_reverse(problem, rows), flat_rows)
    found[TWICE] = Candidate(double_backward(problem, rows), flat_rows)
    if count > 1:
        found[TWICE_BATCHED] = Candidate(double_backward(problem, rows, batched=True), flat_rows)
    if jax is not None:
        derivatives = JaxDerivatives(problem)
        found[JAX] = Candidate(derivatives.products(rows), derivatives.read)
    return found


def forward_over_reverse(problem: Problem, rows: Tensor) -> Callable[[], list[Tensor]]:
    """H v for each row: the gradient's derivative along v."""
    gradient = torch.func.grad(problem.loss)

    def along(tangent: dict[str, Tensor]) -> dict[str, Tensor]:
        return jvp(gradient, (problem.parameters,), (tangent,))[1]

    if len(rows) == 1:
        single = problem.named([v[0] for v in problem.split(rows)])
        return lambda: [v[None] for v in along(single).values()]
    several = problem.named(problem.split(rows))
    return lambda: list(vmap(along)(several).values())


def double_backward(
    problem: Problem, rows: Tensor, *, batched: bool = False, retained: bool = False
) -> Callable[[], Sequence[Tensor]]:
    """H v for each row: the derivative of the gradient times v; one row after the other, or batched.

    ``retained``: the gradient is not computed anew with each call, as if there were many more rows.
    """
    leaves, vectors = problem.leaves, problem.split(rows)

    def gradient() -> Sequence[Tensor]:
        return torch.autograd.grad(problem.loss(problem.named(leaves)), leaves, create_graph=True)

    def times(slopes: Sequence[Tensor], vectors: Sequence[Tensor], *, batched: bool = False) -> Sequence[Tensor]:
        found = torch.autograd.grad(slopes, leaves, vectors, retain_graph=True, allow_unused=True, is_grads_batched=batched)
        return [torch.zeros_like(v) if h is None else h for v, h in zip(vectors, found, strict=True)]

    kept = gradient() if retained else None

    def call() -> Sequence[Tensor]:
        slopes = gradient() if kept is None else kept
        if batched:
            return times(slopes, vectors, batched=True)
        each = [times(slopes, [v[i] for v in vectors]) for i in range(len(rows))]
        return [torch.stack(column) for column in zip(*each, strict=True)]

    return call


class JaxDerivatives:
    """Compiled derivatives by jax. Of one vector of parameters, with which it is faster than with a list of arrays."""

    def __init__(self, problem: Problem) -> None:
        self._shapes = [p.shape for p in problem.leaves]
        self._classes, self._activation = problem.network.classes, problem.network.activation
        targets = problem.y if not self._classes else F.one_hot(problem.y, problem.network.sizes[-1]).to(problem.network.dtype)
        self._data = jnp.asarray(problem.x.numpy()), jnp.asarray(targets.numpy())
        self._phi = jnp.asarray(problem.phi.numpy())
        self._gradient, self._hessian = jax.jit(jax.grad(self._loss)), jax.jit(jax.hessian(self._loss))
        self._product = jax.jit(self._along)
        self._products = jax.jit(jax.vmap(self._along, in_axes=(None, 0, None, None)))

    def _loss(self, phi: Any, x: Any, y: Any) -> Any:
        activation = {
            "softplus": jax.nn.softplus,
            "tanh": jnp.tanh,
            "relu": jax.nn.relu,
            "gelu": lambda z: jax.nn.gelu(z, approximate=False),
            "erf": jax.scipy.special.erf,
        }[self._activation]
        start, a = 0, x
        for i, shape in enumerate(self._shapes):
            parameter = phi[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
            a = (activation(a) if i else a) @ parameter.T if len(shape) == 2 else a + parameter
        return -(y * jax.nn.log_softmax(a)).sum(1).mean() if self._classes else ((a - y) ** 2).mean()

    def _along(self, phi: Any, tangent: Any, x: Any, y: Any) -> Any:
        return jax.jvp(lambda p: jax.grad(self._loss)(p, x, y), (phi,), (tangent,))[1]

    def gradient(self) -> Any:
        return jax.block_until_ready(self._gradient(self._phi, *self._data))

    def hessian(self) -> Any:
        return jax.block_until_ready(self._hessian(self._phi, *self._data))

    def products(self, rows: Tensor) -> Callable[[], Any]:
        """H v for each row; a function, so that the rows are in jax's hands before."""
        run, tangents = (self._product, rows[0]) if len(rows) == 1 else (self._products, rows)
        given = jnp.asarray(tangents.numpy())
        return lambda: jax.block_until_ready(run(self._phi, given, *self._data))

    def read(self, result: Any) -> Tensor:
        return torch.from_dlpack(result).reshape(-1, self._phi.size)


def candidates_of(table: str, problem: Problem, limit: float) -> Candidates:
    if table == "gradient":
        return gradients(problem)
    return hessians(problem, limit) if table == "Hessian" else products(problem, int(table.split()[0]))


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def check(candidates: Candidates, dtype: torch.dtype, where: str) -> None:
    """Call each once, and compare it with ours, the first."""
    ours: Tensor | None = None
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for name, candidate in candidates.items():
        rows = candidate.read(candidate.call())
        if ours is None:
            ours = rows
        apart = float((rows - ours[: len(rows)]).abs().max() / ours.abs().max())
        if not apart <= tolerance:
            raise ArithmeticError(f"{where}: {name} and {next(iter(candidates))} are {apart:.1e} apart.")


def measure(candidates: Candidates, budget: float) -> dict[str, list[float]]:
    """Seconds of each, which has been called before; in interleaved rounds, in which slow ones sit out most."""
    seconds = {name: timed(candidate.call) for name, candidate in candidates.items()}
    samples = {name: [s] if s > 1 else [] for name, s in seconds.items()}
    repeats = {name: max(1, int(SAMPLE / s)) for name, s in seconds.items()}
    turns = {name: int(budget / len(seconds) / (repeats[name] * s)) for name, s in seconds.items()}
    turns = {name: min(50, max(3 if seconds[name] < 0.3 else seconds[name] < 2, n)) for name, n in turns.items()}
    rounds, shuffle = max(turns.values()), random.Random(0).shuffle
    for i in range(rounds):
        order = [name for name, n in turns.items() if i * n % rounds < n]
        shuffle(order)  # none comes after the same one each time
        for name in order:
            samples[name].append(sample(candidates[name].call, seconds[name], repeats[name]))
    return {name: [s * (candidates[name].part or 1.0) for s in each] for name, each in samples.items()}


def sample(call: Callable[[], object], seconds: float, repeats: int) -> float:
    """Seconds of one call, which takes about so many."""
    if seconds < 0.02:
        call()  # what came before has cleared the caches
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def compare(table: str, cell: Cell, limit: float, budget: float) -> dict[str, Any]:
    """One line of a table."""
    network, n = cell
    problem = Problem(network, n)
    candidates = candidates_of(table, problem, limit)
    check(candidates, network.dtype, f"{table} of {network.name}, N={n}")
    samples = measure(candidates, budget)
    seconds = {name: statistics.median(s) for name, s in samples.items()}
    torch_ways = {name: s for name, s in seconds.items() if name not in (*OURS, JAX)}
    fastest = min(torch_ways, key=lambda name: torch_ways[name])
    return {
        "network": network.name,
        "N": n,
        "kernel": problem.objective("auto").kernel,
        "microseconds": {name: round(1e6 * s, 2) for name, s in seconds.items()},
        "least microseconds": {name: round(1e6 * min(s), 2) for name, s in samples.items()},
        "estimated": [name for name, candidate in candidates.items() if candidate.part is not None],
        "samples": {name: len(each) for name, each in samples.items()},
        "fastest of torch": fastest,
        "over torch": {name: seconds[fastest] / seconds[name] for name in OURS if name in seconds},
        "over jax": {name: seconds[JAX] / seconds[name] for name in OURS if name in seconds and JAX in seconds},
    }


def readable(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}" if microseconds < 1e3 * size else f"{microseconds / size:.0f} {unit}"
    return f"{microseconds:.3g} us"


def heading(table: str, names: Sequence[str]) -> None:
    print(f"\n{table}: time; ratios of {WHOLE} (|, and of the compiled kernel alone) over torch's fastest, and over jax")
    for i, name in enumerate(names):
        print(f"  [{i}] {name}")
    columns = "".join(f"{f'[{i}]':>11s}" for i in range(len(names)))
    print(f"{'network':28s}{'N':>7s}{columns}   {'over torch':>16s}{'over jax':>16s}")


def show(line: dict[str, Any], names: Sequence[str]) -> None:
    """Print one line of a table."""
    times = ""
    for name in names:
        value = line["microseconds"].get(name)
        mark = "~" if name in line["estimated"] else ""
        times += f"{'-' if value is None else mark + readable(value):>11s}"
    ratios = ""
    for over in ("over torch", "over jax"):
        both = [f"{line[over][name]:.3g}" for name in (WHOLE, BARE) if name in line[over]]
        ratios += f"{' | '.join(both) or '-':>16s}"
    print(f"{line['network']:28s}{line['N']:>7d}{times}   {ratios}", flush=True)


NAMES = {
    "gradient": (WHOLE, BARE, PLAIN, EAGER, FUNC_GRAD, JAX),
    "Hessian": (WHOLE, PLAIN, LOOPED, BATCHED, FORWARD, JAX),
    "1 product": (WHOLE, PLAIN, FORWARD_PRODUCT, TWICE, JAX),
    f"{MANY} products": (WHOLE, PLAIN, FORWARD_PRODUCT, TWICE, TWICE_BATCHED, JAX),
}

Tables = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Goal:
    """How many times as fast a derivative is to be as some way, at each of some cells."""

    text: str
    table: str
    over: str
    floor: float
    goal: float
    networks: Sequence[str] | None = None
    numbers: Sequence[int] | None = None

    def ratios(self, tables: Tables, ours: str) -> Iterator[tuple[float, str]]:
        """The ratio at each cell, with the cell's name."""
        for line in tables[self.table]:
            inside = self.networks is None or line["network"] in self.networks
            if not inside or (self.numbers is not None and line["N"] not in self.numbers):
                continue
            ratio = self._ratio(line, ours)
            if ratio is not None:
                yield ratio, f"{line['network']}, N={line['N']}"

    def _ratio(self, line: dict[str, Any], ours: str) -> float | None:
        if self.over in ("over torch", "over jax"):
            return line[self.over].get(ours)
        times = line["microseconds"]
        return times[self.over] / times[ours] if ours in times and self.over in times else None


_SMALL, _NARROW, _WIDE = ([network.name for network in networks] for networks in (ONE_HIDDEN, OTHERS + KINDS, WIDE))
GOALS = [
    Goal("2-10-1, N=10", "gradient", "over torch", 100, 150, ["2-10-1"], [10]),
    Goal("2-100-1, N=10", "gradient", "over torch", 25, 40, ["2-100-1"], [10]),
    Goal("2-k-1, N >= 1000", "gradient", "over torch", 3.5, 6, _SMALL, NUMBERS[2:]),
    Goal("2-50-50-1, N=1000", "gradient", "over torch", 2.5, 4, ["2-50-50-1"], [1000]),
    Goal("everywhere, over eager", "gradient", EAGER, 1, 1),
    Goal("everywhere, over jax", "gradient", "over jax", 1, 1),
    Goal("2-k-1, N=100, ..., 1e4", "Hessian", "over torch", 40, 60, _SMALL, NUMBERS[1:4]),
    Goal("2-100-1, N >= 1000", "Hessian", "over torch", 100, 200, ["2-100-1"], NUMBERS[2:]),
    Goal("2-50-50-1, N=1000", "Hessian", "over torch", 30, 60, ["2-50-50-1"], [1000]),
    Goal("everywhere, over jax", "Hessian", "over jax", 1, 1),
    Goal("2-k-1, over jvp(grad)", "1 product", FORWARD_PRODUCT, 10, 20, _SMALL),
    Goal("the other narrow ones, over jvp(grad)", "1 product", FORWARD_PRODUCT, 10, 20, _NARROW),
    Goal("wide ones, over jvp(grad)", "1 product", FORWARD_PRODUCT, 10, 20, _WIDE),
]


def judge(tables: Tables) -> list[dict[str, Any]]:
    """Each goal with the worst of its cells."""
    found = []
    for goal in GOALS:
        for ours in (WHOLE, BARE) if goal.table == "gradient" else (WHOLE,):
            ratios = list(goal.ratios(tables, ours))
            if ratios:
                worst, where = min(ratios)
                found.append(judgement(f"{goal.table}, {goal.text}", ours, worst, where, (goal.floor, goal.goal)))
    single = {(line["network"], line["N"]): line["microseconds"][WHOLE] for line in tables["1 product"]}
    for group, networks in (("2-k-1", _SMALL), ("the other narrow ones", _NARROW), ("wide ones", _WIDE)):
        gains = [
            (MANY * single[line["network"], line["N"]] / line["microseconds"][WHOLE], f"{line['network']}, N={line['N']}")
            for line in tables[f"{MANY} products"]
            if line["network"] in networks
        ]
        if gains:
            text = f"{MANY} products, {group}, one by one over all at once"
            found.append(judgement(text, WHOLE, *min(gains), (MANY / 10, MANY / 10)))
    return found


def judgement(text: str, ours: str, worst: float, where: str, bounds: tuple[float, float]) -> dict[str, Any]:
    verdict = "goal met" if worst >= bounds[1] else "floor met" if worst >= bounds[0] else "MISSED"
    return {"what": text, "of": ours, "worst": worst, "at": where, "floor": bounds[0], "goal": bounds[1], "verdict": verdict}


def show_goals(goals: list[dict[str, Any]]) -> None:
    print("\nFloors and goals, at the worst cell of each")
    for goal in goals:
        line = f"{goal['what']:72s}{goal['of']:23s}{goal['worst']:8.2f}  ({goal['floor']:g} | {goal['goal']:g})"
        print(f"  {line:122s}  {goal['verdict']}, at {goal['at']}")


def show_slower(tables: Tables) -> None:
    """Print where something is ahead of the PerceptronObjective."""
    print(f"\nFaster than {WHOLE}")
    for table, lines in tables.items():
        for line in lines:
            times = line["microseconds"]
            ahead = [f"{name} ({times[WHOLE] / times[name]:.2f}x)" for name in times if times[name] < 0.97 * times[WHOLE]]
            ahead = [text for text in ahead if not text.startswith(BARE)]
            if ahead:
                print(f"  {table} of {line['network']}, N={line['N']}: {', '.join(ahead)}")


def peak_memory() -> dict[str, float]:
    """Peak memory in MB of a process that computes one large Hessian, and before it does."""
    output = subprocess.run([sys.executable, __file__, "--peak"], capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def report_peak() -> None:
    """In that process: measure it."""
    problem = Problem(Network(PEAK_SIZES), PEAK_SAMPLES)
    objective, before = problem.objective("auto"), high_water()
    began = time.perf_counter()
    objective.hessian(problem.phi)
    seconds = time.perf_counter() - began
    print(json.dumps({"P": problem.phi.numel(), "N": problem.n, "MB": high_water(), "before": before, "seconds": seconds}))


def high_water() -> float:
    """The most memory that this process has had, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def keep(path: Path, section: str, found: dict[str, Any]) -> None:
    """Write the results, beside those with another number of threads."""
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[section] = found
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print(f"\nKept in {path}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="some of the cells, in less than two minutes; results are not kept"
    )
    parser.add_argument("--limit", type=float, default=3.0, help="seconds per call above which a Hessian is estimated")
    parser.add_argument("--budget", type=float, default=None, help="seconds for the rounds of a cell (1.5; quick: 0.5)")
    parser.add_argument("--output", type=Path, default=None, help=f"where results are kept ({RESULTS})")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.budget is None:
        arguments.budget = 0.5 if arguments.quick else 1.5
    if arguments.output is None and not arguments.quick:
        arguments.output = RESULTS
    return arguments


def main() -> None:
    """Measure, print and keep the results."""
    arguments = parsed()
    settle(arguments.threads)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        report_peak()
        return
    if jax is None:
        print("jax is not installed, and left out. To compare with it: pip install jax")
    else:
        jax.config.update("jax_enable_x64", True)
    own = {"capability": torch.backends.cpu.get_cpu_capability(), "limit": arguments.limit, "budget": arguments.budget}
    began, found = time.perf_counter(), {"environment": environment(PACKAGES, arguments.threads, **own)}
    tables: Tables = {}
    for table, cells in (QUICK if arguments.quick else CELLS).items():
        heading(table, NAMES[table])
        tables[table] = []
        for cell in cells:
            tables[table].append(compare(table, cell, arguments.limit, arguments.budget))
            show(tables[table][-1], NAMES[table])
    found |= {"tables": tables, "goals": judge(tables)}
    show_slower(tables)
    show_goals(found["goals"])
    if not arguments.quick and sys.platform == "linux":
        found["peak memory"] = peak_memory()
        print(
            "\nPeak memory (MB) of the Hessian of P = {P} parameters on N = {N} samples: {MB:.0f}".format(
                **found["peak memory"]
            )
        )
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if arguments.output is not None:
        keep(arguments.output, f"threads: {arguments.threads}", found)


if __name__ == "__main__":
    main()
