"""
Tutorial: from Adam's loop to a certified minimum
=================================================

One training loop, three optimizers: Adam, then ``GradientFlow`` in its place, then ``NewtonPolish`` for
the last digits. On the way: how to follow a long flow in one call, and how to read what the optimizers
say about their work.
"""

# %%
# The loop
# --------
# A small tanh network learns the diabetes data that scikit-learn ships: 442 patients, ten measurements
# each, and how the disease went on. The data are in float64, as will be the network: the flow can be
# followed in float32 too, but not to many digits.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from torch_gradflow import GradientFlow, GradientNorm, NewtonPolish

torch.set_num_threads(1)  # networks this small gain nothing from threads
torch.use_deterministic_algorithms(True)  # "auto" then chooses the same methods every time

bunch = load_diabetes()
x, y = torch.tensor(bunch.data), torch.tensor(bunch.target)[:, None]
x, y = x / x.std(0), (y - y.mean()) / y.std()


def network() -> nn.Sequential:
    """97 parameters, always the same ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss_of(model: nn.Module) -> Tensor:
    """Mean square error, with a penalty on large weights."""
    penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    return nn.functional.mse_loss(model(x), y) + 0.005 * penalty


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> list[float]:
    """The loss at the start of each step."""
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# With Adam:

model = network()
with_adam = train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 100)
print(f"loss {loss_of(model).item():.9f}")

# %%
# One line changes
# ----------------
# ``lr`` is now *flow time per step*: SGD with learning rate ``lr`` is one Euler step of that length,
# and ``GradientFlow`` takes as many accurate steps inside ``step()`` as that time needs. Natural values
# are far above Adam's.

model = network()
optimizer = GradientFlow(model.parameters(), lr=1.0)
with_flow = train(model, optimizer, 100)
print(f"loss {loss_of(model).item():.9f} at the flow time {optimizer.flow_time:g}")

# %%
# What it did, and what it cost
# -----------------------------
# ``optimizer.stats`` tells both. ``engine`` says how the loss is evaluated at other parameters:
# "perceptron" means that the loop's loss was recognised as that of a multi-layer perceptron, and is
# computed in closed form. ``choices`` says which integrator ``method="auto"`` took from when on, and
# why.

stats = optimizer.stats
print(f"engine {stats.engine!r}, method {stats.method!r}, status {stats.status!r}: {stats.message}")
print(f"loss {stats.loss:.9f}, gradient norm {stats.grad_norm:.1e}, next step size {stats.step_size:.2g}")
print(f"{stats.n_accepted} steps accepted, {stats.n_rejected} rejected")
print(f"{stats.n_grad} gradients and {stats.n_hessian} Hessians in all")
for choice in stats.choices[:3]:
    print(f"from t = {choice.t:.3g}: {choice.method} ({choice.reason})")

# %%
# ``n_grad`` counts the loop's own gradients with those that the integrator evaluated: that is what a
# step costs, see :doc:`/cost`.
#
# A long flow in one call
# -----------------------
# Gradient flows slow down: to see where one goes, flow time has to grow by powers of ten. ``integrate``
# follows it in one go, and returns samples of the trajectory. It takes a closure, as torch's LBFGS
# does, and stopping rules: here it ends where the gradient is small.


def closure() -> Tensor:
    """Loss and gradients, as for any optimizer that takes a closure."""
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss


solution = optimizer.integrate(closure, 1e5, stop=GradientNorm(1e-4))
print(solution.message)
print(
    f"loss {solution.loss[-1]:.9f}, gradient norm {solution.grad_norm[-1]:.1e}, "
    f"flow time {optimizer.flow_time:.4g}"
)

# %%
# ``solution.theta`` holds the parameters at the times ``solution.t``. ``solution.dissipation_error`` is
# a check that costs nothing: along the flow the loss has to fall by exactly the integral of the squared
# gradient norm.

print(f"{len(solution.t)} samples, dissipation error {solution.dissipation_error:.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.plot(with_adam, color="#D55E00", linestyle="--", label="Adam, lr=0.01")
left.plot(with_flow, color="#0072B2", label="GradientFlow, lr=1")
left.set(xlabel="iteration of the loop", ylabel="loss")
left.legend()
right.loglog(100 + solution.t, solution.grad_norm, color="#0072B2", marker=".")
right.set(xlabel="flow time", ylabel="‖∇L‖∞", title="the long flow")
for axis in (left, right):
    axis.grid(alpha=0.3)
plt.show()

# %%
# To the last digit
# -----------------
# The flow reaches its end only as t → ∞. ``NewtonPolish`` takes the remaining way with second
# derivatives, in one ``step``, and never goes uphill.

polish = NewtonPolish(model.parameters())
polish.zero_grad()
loss_of(model).backward()
polish.step()
print(polish.result.message)

# %%
# And the certificate says what was found, and how sure that is: by all eigenvalues of the Hessian, each
# with its uncertainty.

certificate = polish.result.certificate
print(certificate.message)
values = certificate.eigenvalues
print(f"{certificate.kind!r}: of {len(values)} eigenvalues {certificate.n_negative} are negative")
print(f"smallest {values[0]:.6f}, largest {values[-1]:.6f}")

# %%
# Had it been a saddle, ``NewtonPolish(..., escape=True)`` would have left it. How to read the other
# verdicts is told in :doc:`/choosing`.
#
# Where to go from here
# ---------------------
# - :doc:`/choosing`: which integrator, which minimiser, which tolerance.
# - :doc:`/migrating`: what corresponds to what, coming from Adam, from LBFGS, or from MLPGradientFlow.jl.
# - :doc:`/faq`: what people stumble over.
# - :doc:`index`: more pictures.
