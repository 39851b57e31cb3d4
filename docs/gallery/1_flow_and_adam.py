r"""
The flow and Adam in the same loop
==================================

A network with one neuron and two parameters, :math:`f(x) = a \tanh(w x)`: small enough to see the whole
loss, and where each optimizer goes on it.
"""

# %%
# The data come from a neuron with :math:`w = 1.5, a = 1.2`. As tanh is odd, :math:`(-w, -a)` is the
# same function: there are two minima, and between them the saddle at the origin.

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from torch_gradflow import GradientFlow

torch.set_num_threads(1)  # networks this small gain nothing from threads

torch.manual_seed(0)
x = torch.randn(200, 1, dtype=torch.float64)
y = 1.2 * torch.tanh(1.5 * x) + 0.3 * torch.randn_like(x)


def neuron(w: float, a: float) -> nn.Sequential:
    """The network at these parameters."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(w)
        model[2].weight.fill_(a)
    return model


# %%
# The loop is the one that everybody writes. It does not know which optimizer it is given.


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> tuple[Tensor, list[float]]:
    """The parameters before each step and at the end, and the losses before each step."""
    path, losses = [torch.cat([p.detach().flatten() for p in model.parameters()])], []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(path), losses


# %%
# Three starting points, three optimizers. ``lr`` is flow time per step for GradientFlow: 80 steps of
# 0.25 follow the flow to t = 20. SGD with the same ``lr`` is Euler's method for the same flow.

OPTIMIZERS = {
    "GradientFlow, lr=0.25": (GradientFlow, 0.25, "#0072B2", "-"),
    "SGD, lr=0.25": (torch.optim.SGD, 0.25, "#009E73", ":"),
    "Adam, lr=0.1": (torch.optim.Adam, 0.1, "#D55E00", "--"),
}
STARTS = [(-1.5, 1.5), (2.9, -0.55), (-2.6, 0.75)]

w, a = (
    torch.linspace(-3.2, 3.2, 161, dtype=torch.float64),
    torch.linspace(-2.2, 2.2, 121, dtype=torch.float64),
)
features = torch.tanh(w[:, None] * x.T)  # one row per w
surface = torch.stack([(ai * features - y.T).square().mean(1) for ai in a])

figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(1.35, 1)
)
levels = torch.logspace(float(surface.min().log10()), float(surface.max().log10()), 16)
left.contourf(w, a, surface, levels, cmap="Greys", alpha=0.6, norm="log")
for name, (make, lr, color, dashes) in OPTIMIZERS.items():
    for i, start in enumerate(STARTS):
        model = neuron(*start)
        path, losses = train(model, make(model.parameters(), lr=lr), 80)
        label = name if i == 0 else None
        left.plot(
            path[:, 0], path[:, 1], color=color, linestyle=dashes, marker=".", markersize=4, label=label
        )
        if i == 0:
            right.plot(losses, color=color, linestyle=dashes, label=name)
for start in STARTS:
    left.plot(*start, marker="o", color="black", markersize=6)
left.set(
    xlabel="w", ylabel="a", title="paths from three starts (dots)", xlim=(-3.2, 3.2), ylim=(-2.2, 2.2)
)
right.set(xlabel="iteration", ylabel="loss", yscale="log", title="from the start at the upper left")
right.grid(alpha=0.3)
right.legend()
plt.show()

# %%
# The flow runs at right angles to the contours and decreases the loss monotonically; SGD with this step
# stays near it. Adam takes another way: its steps have about the same length in both directions
# whatever the slope, and momentum carries it past turns. From the start at the upper left it so ends in
# the other minimum.
