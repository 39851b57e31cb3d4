"""Do students with fewer neurons than their teacher copy it, or average it? The question of arXiv 2311.01644.

erf students with n = 1, …, k neurons learn, on infinite Gaussian data, k orthonormal erf teachers. From random starts (Glorot
normal) the gradient flow, a Newton polish and a certificate say where they end: at the best copy–average point (n − 1 copies
of teachers and one average of the others), at another one, or elsewhere, where the loss may be lower still. Printed: the
fractions, by n/k. Saved: a figure.

    python examples/copy_or_average.py [--teachers 4 6] [--seeds 10] [--time 10000]
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from torch_gradflow import PopulationObjective, copy_average, copy_average_loss, integrate, minimize

ENDS = ("best copy–average", "other copy–average", "another minimum", "not a minimum")
COLORS = ("#009E73", "#F0E442", "#0072B2", "#000000")  # of Okabe and Ito (2008), apart in grey, too


class Erf(nn.Module):
    """erf(z/√2)."""

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        return torch.erf(z / math.sqrt(2))


def network(n_inputs: int, n: int) -> nn.Sequential:
    """One hidden layer without biases, Glorot normal."""
    model = nn.Sequential(nn.Linear(n_inputs, n, bias=False), Erf(), nn.Linear(n, 1, bias=False)).double()
    for parameter in model.parameters():
        nn.init.xavier_normal_(parameter)
    return model


def problem(n: int, k: int, seed: int) -> PopulationObjective:
    """n students, the k teachers v_j = e_j, and one input more."""
    torch.manual_seed(seed)
    student, teacher = network(k + 1, n), network(k + 1, k)
    with torch.no_grad():
        teacher[0].weight.copy_(torch.eye(k, k + 1))
        teacher[2].weight.fill_(1.0)
    return PopulationObjective(student, teacher)


def groups_of(w: Tensor, a: Tensor, k: int) -> list[list[int]] | None:
    """The teachers that each neuron averages, if this is a copy–average point up to 1e-6; neurons may come with both signs."""
    w, a = w * a.sign()[:, None], a.abs()
    owner = w[:, :k].argmax(0).tolist()
    groups = [[j for j in range(k) if owner[j] == i] for i in range(len(a))]
    if not all(groups):
        return None
    exact_w, exact_a = copy_average(torch.eye(k, w.shape[1], dtype=w.dtype), groups)
    near = torch.allclose(w, exact_w, rtol=0, atol=1e-6) and torch.allclose(a, exact_a, rtol=0, atol=1e-6)
    return groups if near else None


def end_of(objective: PopulationObjective, n: int, k: int, time: float) -> tuple[str, float]:
    """Where the flow ends, and the loss there."""
    flow = integrate(objective, objective.initial_theta(), (0.0, time), rtol=1e-4, method="bdf")
    result = minimize(objective, flow.theta[-1], method="trust-region", gtol=1e-12, max_iter=500)
    weights = n * (k + 1)
    groups = groups_of(result.theta[:weights].view(n, k + 1), result.theta[weights:], k)
    certificate = result.certificate
    if certificate is None or certificate.kind != "minimum":
        return "not a minimum", result.loss
    if groups is None:
        return "another minimum", result.loss
    best = sum(len(group) > 1 for group in groups) <= 1
    return ("best copy–average" if best else "other copy–average"), result.loss


def main() -> None:
    """Run everything, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, nargs="+", default=[4, 6], help="k; 10 takes some minutes")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--time", type=float, default=1e4, help="flow time")
    parser.add_argument("--figure", type=Path, default=Path("copy_or_average.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    n_panels = len(options.teachers)
    figure, axes = plt.subplots(1, n_panels, figsize=(5.5 * n_panels, 4), layout="constrained", squeeze=False)
    print(
        f"{'k':>3s}{'n':>4s}{'n/k':>6s}"
        + "".join(f"{end:>20s}" for end in ENDS)
        + f"{'best loss':>12s}{'least':>12s}{'largest':>12s}"
    )
    for k, axis in zip(options.teachers, axes[0], strict=True):
        for n in range(1, k + 1):
            runs = [end_of(problem(n, k, seed), n, k, options.time) for seed in range(options.seeds)]
            counted = Counter(end for end, _ in runs)
            fractions = [counted[end] / options.seeds for end in ENDS]
            losses = [loss for _, loss in runs]
            known = copy_average_loss([1] * (n - 1) + [k - n + 1])
            cells = "".join(f"{fraction:20.2f}" for fraction in fractions)
            print(f"{k:3d}{n:4d}{n / k:6.2f}{cells}{known:12.6f}{min(losses):12.6f}{max(losses):12.6f}", flush=True)
            bottom = 0.0
            for end, fraction, color in zip(ENDS, fractions, COLORS, strict=True):
                axis.bar(n / k, fraction, 0.8 / k, bottom=bottom, color=color, label=end if n == 1 else None)
                bottom += fraction
        axis.set(title=f"k = {k} teachers", xlabel="n/k", ylabel="fraction of starts", ylim=(0, 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ENDS))
    figure.savefig(options.figure, dpi=110)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
