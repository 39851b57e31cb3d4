"""What is known in closed form of students and teachers under standard normal input.

Where it says erf, the activation is σ(z) = erf(z/√2), with E[σ(w·x) σ(v·x)] = (2/π) asin(w·v / √((1 + ‖w‖²)(1 + |v|²))).
Losses are E[(f − f*)²].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_gradflow.checks import check_count
from torch_gradflow.perceptron.activations import Activation
from torch_gradflow.population.neurons import neurons

# Hermite coefficients below this part of the activation's size count as zero.
_ZERO = 1e-12


def copy_average(teachers: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The critical point of erf students at which each neuron is the average of a group of teachers, or a copy of one.

    For orthonormal v_j with output weights 1, neuron i has a_i = l_i and w_i = Σ_{j ∈ group i} v_j / √(l_i (2 l_i − 1)), l_i
    being the size of its group (Şimşek, Bendjeddou, Gerstner and Brea 2023, arXiv 2311.01644). The least loss among these have
    n − 1 copies and one average.

    Args:
        teachers: The v_j, shape ``(k, d)``, orthonormal.
        groups: A partition of 0, …, k − 1 into n groups.

    Returns:
        w of shape ``(n, d)`` and a of shape ``(n,)``.

    Raises:
        ValueError: If the teachers are not orthonormal, or the groups no partition.
    """
    k = len(teachers)
    if sorted(j for group in groups for j in group) != list(range(k)) or not all(groups):
        raise ValueError(f"groups must be a partition of 0, …, {k - 1} into non-empty groups, not {groups!r}.")
    if not torch.allclose(teachers @ teachers.T, torch.eye(k).to(teachers), rtol=0.0, atol=1e-10):
        raise ValueError("teachers must have orthonormal rows.")
    rows = [teachers[list(group)].sum(0) / math.sqrt(len(group) * (2 * len(group) - 1)) for group in groups]
    return torch.stack(rows), torch.tensor([float(len(group)) for group in groups]).to(teachers)


def copy_average_loss(sizes: Sequence[int]) -> float:
    """The loss of ``copy_average`` for groups of these sizes: Σ l/3 − (2 l²/π) asin(1/(2 l)); a copy's is 0."""
    for size in sizes:
        check_count("sizes", size)
    return sum(size / 3 - 2 * size**2 / math.pi * math.asin(1 / (2 * size)) for size in sizes if size > 1)


def relu_average(k: int) -> tuple[float, float]:
    """The minimum of one ReLU neuron, without bias, that learns k orthonormal ReLU teachers.

    It points along their sum. With h(u) = E[relu relu] = (√(1 − u²) + (π − acos u) u)/(2π) of unit neurons at the cosine u,
    a ‖w‖ = 2 k h(1/√k), and the loss is k/2 + k (k − 1)/(2π) − 2 k² h(1/√k)².

    Returns:
        a ‖w‖, and the loss.
    """
    check_count("k", k)
    u = 1 / math.sqrt(k)
    h = (math.sqrt(1 - u * u) + (math.pi - math.acos(u)) * u) / (2 * math.pi)
    return 2 * k * h, k / 2 + k * (k - 1) / (2 * math.pi) - 2 * (k * h) ** 2


def information_exponent(activation: Activation) -> int:
    """The degree, above 0, of the first Hermite polynomial in an activation: how flat a correlation loss is at zero overlap.

    (Ben Arous, Gheissari and Jagannath 2021.) It is sought up to degree 30.

    Raises:
        ValueError: If there is none.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    found = neurons(activation, one, None).coefficients(0, 31)[0].abs()
    present = (found[1:] > _ZERO * float(found.norm())).nonzero()
    if not len(present):
        raise ValueError(f"the activation {activation.name!r} has no Hermite coefficient of a degree from 1 to 30.")
    return int(present[0]) + 1


def critical_overlap(k: int, exponent: int) -> float:
    """β_c = (p − 2)/(k + p − 2): for larger overlaps v_i·v_j of k index vectors, their mean attracts unit neurons.

    For the correlation loss with the activation He_p (Şimşek, Bendjeddou and Hsu 2025, arXiv 2411.08798); below it the mean
    is a saddle, and neurons go to single index vectors.

    Args:
        k: The number of index vectors.
        exponent: p, at least 2.
    """
    check_count("k", k)
    if isinstance(exponent, bool) or not isinstance(exponent, int) or exponent < 2:
        raise ValueError(f"exponent must be an integer, 2 or more, not {exponent!r}.")
    return (exponent - 2) / (k + exponent - 2)
