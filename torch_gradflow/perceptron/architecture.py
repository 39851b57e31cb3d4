"""What a multi-layer perceptron is: sizes, biases, activations; a loss; data. Nothing is computed here.

Networks: z_l = W_l a_{l−1} + b_l, a_l = g_l(z_l) for l = 1, …, L, with a_0 = x and the output f = a_L. The parameters φ are
W_1 (row by row, n_1 × n_0), b_1 (if the layer has biases), W_2, b_2, …

Losses: L = Σ_n w_n ℓ(f_n, t_n), with means as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_gradflow.perceptron.activations import Activation

LossName = Literal["squared error", "cross entropy", "binary cross entropy", "huber"]
LOSSES: tuple[LossName, ...] = ("squared error", "cross entropy", "binary cross entropy", "huber")


@dataclass(frozen=True)
class Perceptron:
    """A multi-layer perceptron.

    Attributes:
        sizes: n_0, …, n_L, each at least 1.
        biases: For each layer whether it has them.
        activations: For each layer the activation of each neuron, as runs of (number of neurons, activation).
    """

    sizes: tuple[int, ...]
    biases: tuple[bool, ...]
    activations: tuple[tuple[tuple[int, Activation], ...], ...]

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or any(n < 1 for n in self.sizes):
            raise ValueError(f"sizes must be at least two numbers of neurons, each 1 or more, not {self.sizes!r}.")
        if len(self.biases) != self.n_layers or len(self.activations) != self.n_layers:
            raise ValueError(
                f"biases and activations must have one entry for each of the {self.n_layers} layers, not "
                f"{len(self.biases)} and {len(self.activations)}."
            )
        for i, (n, runs) in enumerate(zip(self.sizes[1:], self.activations, strict=True)):
            if sum(count for count, _ in runs) != n:
                raise ValueError(f"activations[{i}] must cover the {n} neurons of that layer, not {runs!r}.")

    @classmethod
    def of(cls, sizes: Sequence[int], activation: Activation, output: Activation, *, bias: bool = True) -> Perceptron:
        """The usual one: the same activation in each hidden layer, and one on the output."""
        if len(sizes) < 2:
            raise ValueError(f"sizes must be at least two numbers of neurons, not {sizes!r}.")
        kinds = [activation] * (len(sizes) - 2) + [output]
        runs = tuple(((n, kind),) for n, kind in zip(sizes[1:], kinds, strict=True))
        return cls(tuple(sizes), (bias,) * (len(sizes) - 1), runs)

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.sizes) - 1

    @property
    def n_parameters(self) -> int:
        """P, the length of φ."""
        return sum(b * (a + has) for a, b, has in zip(self.sizes, self.sizes[1:], self.biases, strict=False))

    def offsets(self) -> list[tuple[int, int | None]]:
        """Where W_l and b_l begin in φ; None where there is no b_l."""
        places: list[tuple[int, int | None]] = []
        start = 0
        for fan_in, fan_out, has in zip(self.sizes, self.sizes[1:], self.biases, strict=False):
            bias = start + fan_in * fan_out if has else None
            places.append((start, bias))
            start += fan_out * (fan_in + has)
        return places


@dataclass(frozen=True)
class Loss:
    """ℓ(f, t) of one sample.

    "squared error": Σ_o (f_o − t_o)²; "cross entropy": −Σ_c t_c f_c + (Σ_c t_c) log Σ_c exp f_c, for t ≥ 0 that need not sum
    to 1; "binary cross entropy": Σ_o a_o log(1 + exp −f_o) + b_o log(1 + exp f_o), whose targets are the a_o followed by the
    b_o; "huber": Σ_o r²/2 for ``|r| ≤ δ``, else ``δ (|r| − δ/2)``, with r = f_o − t_o.

    Attributes:
        name: Which.
        delta: δ of "huber".
    """

    name: LossName
    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"name must be one of {', '.join(map(repr, LOSSES))}, not {self.name!r}.")
        if not self.delta > 0:
            raise ValueError(f"delta must be positive, not {self.delta!r}.")

    @property
    def code(self) -> int:
        """That of the compiled kernels."""
        return LOSSES.index(self.name)

    def n_targets(self, n_outputs: int) -> int:
        """Targets per sample."""
        return 2 * n_outputs if self.name == "binary cross entropy" else n_outputs


@dataclass(frozen=True)
class Samples:
    """The data of a loss, one column per sample.

    Attributes:
        x: Inputs, shape ``(n_0, N)``.
        targets: t, shape ``(R, N)`` with R = ``Loss.n_targets``.
        weights: w ≥ 0, shape ``(N,)``.
    """

    x: Tensor
    targets: Tensor
    weights: Tensor

    def check(self, network: Perceptron, loss: Loss) -> None:
        """Check that these are samples for that network and that loss.

        Raises:
            ValueError: Naming what does not fit.
        """
        n = self.x.shape[-1] if self.x.dim() == 2 else 0
        shapes = (("x", self.x, network.sizes[0]), ("targets", self.targets, loss.n_targets(network.sizes[-1])))
        for name, tensor, rows in shapes:
            if n == 0 or tensor.shape != (rows, n):
                raise ValueError(f"{name} must have the shape ({rows}, N) with N > 0 samples, not {tuple(tensor.shape)}.")
        if self.weights.shape != (n,):
            raise ValueError(f"weights must have the shape ({n},), not {tuple(self.weights.shape)}.")
        if not bool((self.weights >= 0).all()):
            raise ValueError("weights must not be negative, or the loss would be maximised on some samples.")

    def to(self, dtype: torch.dtype) -> Samples:
        """In that type, contiguous and detached."""
        return Samples(*(t.detach().to(dtype).contiguous() for t in (self.x, self.targets, self.weights)))
