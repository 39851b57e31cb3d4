"""
What a flow of mini-batches follows
===================================

A step on a mini-batch follows the flow of *that batch's* loss. Where ``lr`` is small, these pieces add
up to the flow of the loss of all data; where it is large, each step runs towards the minimum of its
batch. ``FullBatch`` follows the flow of all data.
"""

# %%
# The network with two parameters again, :math:`f(x) = a \tanh(w x)`, with noisy data in batches of ten.
# Each batch has its own minimum.

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import FullBatch, GradientFlow, ModuleObjective, minimize

torch.set_num_threads(1)  # networks this small gain nothing from threads

torch.manual_seed(0)
x = torch.randn(100, 1, dtype=torch.float64)
y = 1.2 * torch.tanh(1.5 * x) + 0.5 * torch.randn_like(x)
loader = DataLoader(TensorDataset(x, y), batch_size=10)
START, FLOW_TIME = (0.6, 0.3), 18.0


def neuron() -> nn.Sequential:
    """The network at the start."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), START, strict=True):
            parameter.fill_(value)
    return model


def minimum(inputs: Tensor, targets: Tensor) -> Tensor:
    """(w, a) at the minimum of these samples' loss."""
    objective = ModuleObjective(neuron(), nn.MSELoss(), (inputs, targets))
    return minimize(objective, objective.initial_theta(), certificate=False).theta


# %%
# Three ways of training for the same flow time with the same ``lr``: SGD and GradientFlow, batch by
# batch, and GradientFlow on all batches at once, by ``FullBatch``, which needs the memory of one batch
# at a time.


def train(name: str, lr: float) -> Tensor:
    """(w, a) before each step and at the end, shape ``(steps + 1, 2)``."""
    model = neuron()
    by_flow = name != "SGD"
    optimizer = (
        GradientFlow(model.parameters(), lr=lr) if by_flow else torch.optim.SGD(model.parameters(), lr=lr)
    )
    everything = FullBatch(loader, lambda batch: mse_loss(model(batch[0]), batch[1]), optimizer)
    batches = list(loader)

    def closure_of(inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        return closure

    path = [torch.cat([p.detach().flatten() for p in model.parameters()])]
    for step in range(round(FLOW_TIME / lr)):
        optimizer.step(
            everything if name == "flow of all data" else closure_of(*batches[step % len(batches)])
        )
        path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(path)


# %%
STYLES = {
    "SGD": ("#D55E00", ":"),
    "flow of each batch": ("#009E73", "-"),
    "flow of all data": ("#0072B2", "--"),
}
own = torch.stack([minimum(*batch) for batch in loader])
best = minimum(x, y)
w, a = (
    torch.linspace(0.3, 3.4, 121, dtype=torch.float64),
    torch.linspace(0.2, 2.0, 121, dtype=torch.float64),
)
features = torch.tanh(w[:, None] * x.T)
surface = torch.stack([(ai * features - y.T).square().mean(1) for ai in a])
figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, sharey=True, layout="constrained")
for axis, lr in zip(axes, (0.1, 1.2), strict=True):
    axis.contour(w, a, surface, 22, colors="grey", linewidths=0.5)
    for name, (color, dashes) in STYLES.items():
        path = train(name, lr)
        axis.plot(
            path[:, 0],
            path[:, 1],
            color=color,
            linestyle=dashes,
            marker="." if lr > 1 else None,
            label=name,
        )
    axis.plot(own[:, 0], own[:, 1], "x", color="black", markersize=5, label="minimum of each batch")
    axis.plot(*best, "*", color="black", markersize=12, label="minimum of all data")
    axis.set(xlabel="w", title=f"lr = {lr:g}", xlim=(0.3, 3.4), ylim=(0.2, 2.0))
axes[0].set_ylabel("a")
axes[0].legend(loc="lower right")
plt.show()

# %%
# The flow of all data takes the same way for both. ``examples/minibatch_flow.py`` in the repository
# measures this with a larger network.
