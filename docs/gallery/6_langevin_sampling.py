r"""
Langevin dynamics samples what it should
========================================

With noise and friction the parameters do not come to rest: they wander through the distribution
:math:`e^{-L(\theta)/\tau}`. How well a method samples it depends on how it splits a step.
"""

# %%
# A loss with two wells, two parameters: :math:`L(\theta) = (\theta_1^2 - 1)^2 + 5\,(\theta_2 -
# \theta_1^2/2)^2`. Two thousand copies of it in one tensor sample at the same time; they know nothing
# of each other.

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from torch_gradflow import SGLD, Langevin

torch.set_num_threads(1)

TEMPERATURE, N_COPIES, N_STEPS = 0.5, 2000, 600


def loss(first: Tensor, second: Tensor) -> Tensor:
    """L, element by element."""
    return (first**2 - 1) ** 2 + 5 * (second - first**2 / 2) ** 2


def sample(optimizer_of: type[torch.optim.Optimizer], lr: float) -> Tensor:
    """Points of all copies, every tenth step in the second half of the run, shape ``(2, number)``."""
    theta = torch.nn.Parameter(torch.zeros(2, N_COPIES, dtype=torch.float64))
    friction = {"friction": 1.0} if optimizer_of is Langevin else {}
    generator = torch.Generator().manual_seed(0)
    optimizer = optimizer_of([theta], lr=lr, temperature=TEMPERATURE, generator=generator, **friction)
    kept = []
    for step in range(N_STEPS):
        optimizer.zero_grad()
        loss(*theta).sum().backward()
        optimizer.step()
        if step >= N_STEPS // 2 and step % 10 == 0:
            kept.append(theta.detach().clone())
    return torch.cat(kept, dim=1)


# %%
# BAOAB, the scheme of ``Langevin``, with h = 0.25; and SGLD, which is Euler's and Maruyama's method,
# whose noise moves the parameters by √(2τh) in a step: about as far as BAOAB's momenta do with h =
# 0.04. (In both, twice the step is unstable here.)

points = {"Langevin (BAOAB), lr=0.25": sample(Langevin, 0.25), "SGLD, lr=0.04": sample(SGLD, 0.04)}

# %%
# Left: samples of BAOAB on the contours of the exact density. Right: histograms of the first parameter
# and its exact density, by quadrature.

first, second = (
    torch.linspace(-2.2, 2.2, 221, dtype=torch.float64),
    torch.linspace(-1.5, 3.0, 226, dtype=torch.float64),
)
density = torch.exp(-loss(first[None, :], second[:, None]) / TEMPERATURE)
density /= density.sum() * (first[1] - first[0]) * (second[1] - second[0])
marginal = density.sum(0) * (second[1] - second[0])

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
name, cloud = next(iter(points.items()))
left.plot(cloud[0, ::15], cloud[1, ::15], ".", markersize=2, color="#0072B2", alpha=0.5)
left.contour(first, second, density, 8, colors="black", linewidths=0.8)
left.set(xlabel="θ₁", ylabel="θ₂", title=name)
for (name, cloud), color, dashes in zip(points.items(), ("#0072B2", "#D55E00"), ("-", "--"), strict=True):
    counts, edges = torch.histogram(cloud[0], 60, range=(-2.2, 2.2), density=True)
    right.stairs(counts, edges, color=color, linestyle=dashes, linewidth=1.5, label=name)
right.plot(first, marginal, color="black", linewidth=1, label="exact")
right.set(xlabel="θ₁", ylabel="density", ylim=(0.0, 1.0))
right.legend(loc="upper center")
plt.show()

for name, cloud in points.items():
    print(f"{name:26s} variance of θ₁ {float(cloud[0].var()):.4f}")
exact = float((first**2 * marginal).sum() / marginal.sum())  # the mean is zero
print(f"{'exact':26s} variance of θ₁ {exact:.4f}")
