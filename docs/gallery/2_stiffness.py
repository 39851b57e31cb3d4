"""
Stiffness: why the method matters
=================================

Along the flow of a network some curvatures grow and others vanish. An explicit method may then only
take steps that the largest curvature allows, however little happens; an implicit one takes steps as
long as the flow itself is smooth.
"""

# %%
# A student with eight softplus neurons (33 parameters) learns a teacher with four from 1,000 Gaussian
# inputs, the problem of arXiv 2301.10638.

import matplotlib.pyplot as plt
import torch
from torch import nn

from torch_gradflow import FlowReport, ModuleObjective, integrate

torch.set_num_threads(1)  # networks this small gain nothing from threads
torch.use_deterministic_algorithms(True)  # "auto" then chooses the same methods every time


def network(n_hidden: int) -> nn.Sequential:
    """Two inputs, softplus neurons, one output."""
    return nn.Sequential(nn.Linear(2, n_hidden), nn.Softplus(), nn.Linear(n_hidden, 1)).double()


torch.manual_seed(1)
teacher, student = network(4), network(8)
for parameter in teacher.parameters():
    nn.init.normal_(parameter)
x = torch.randn(1000, 2, dtype=torch.float64)
objective = ModuleObjective(student, nn.MSELoss(), (x, teacher(x).detach()))

# %%
# A function that is given as ``progress`` sees a report at each accepted point. Here it notes time and
# step size. The explicit method only goes to t = 200.

T_END = {"dopri5": 200.0, "bdf": 1e4}
steps: dict[str, list[tuple[float, float]]] = {"dopri5": [], "bdf": []}
solutions = {}
for method, noted in steps.items():

    def note(report: FlowReport, noted: list[tuple[float, float]] = noted) -> None:
        """Keep where the step to come begins, and how long it is meant to be."""
        noted.append((report.t, report.step_size))

    solutions[method] = integrate(
        objective, objective.initial_theta(), (0.0, T_END[method]), method=method, progress=note
    )
    s = solutions[method]
    print(
        f"{method:7s} {s.n_accepted:6,d} steps, {s.n_grad:7,d} gradients, {s.n_hessian:4d} Hessians, "
        f"to t = {s.t[-1]:g}"
    )

flow = solutions["bdf"]
spectra = torch.stack([torch.linalg.eigvalsh(objective.hessian(theta)) for theta in flow.theta])

# %%
# Left: the eigenvalues of the Hessian along the flow; only their magnitude, negative ones are red.
# Right: the steps that the two methods took. The explicit one, dopri5, stays below its stability limit,
# some 3.3/λ for the largest eigenvalue λ; the steps of "bdf" grow in proportion to the time.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
for values in spectra.T:
    left.loglog(flow.t[1:], values[1:].abs(), color="#0072B2", linewidth=0.8)
    below = values[1:] < 0
    left.loglog(flow.t[1:][below], values[1:][below].abs(), ".", color="#D55E00", markersize=3)
left.set(xlabel="flow time", ylabel="|eigenvalues of the Hessian|", xlim=(1e-2, 1e4), ylim=(1e-7, None))
for method, color, marker in (("dopri5", "#D55E00", "."), ("bdf", "#0072B2", "o")):
    t, h = torch.tensor(steps[method], dtype=torch.float64).T
    right.loglog(
        t,
        h,
        marker,
        color=color,
        markersize=3,
        label=f"{method}, {len(t):,d} steps to t = {T_END[method]:g}",
    )
right.loglog(
    flow.t[1:],
    3.3 / spectra[1:, -1],
    color="black",
    linewidth=1,
    linestyle="--",
    label="stability limit of dopri5",
)
right.set(xlabel="flow time", ylabel="step size", xlim=(1e-2, 1e4), ylim=(1e-3, None))
for axis in (left, right):
    axis.grid(alpha=0.3)
right.legend()
plt.show()

# %%
# ``method="auto"``, the default, begins with dopri5, notices the stiffness, and changes over:

automatic = integrate(objective, objective.initial_theta(), (0.0, T_END["bdf"]))
for choice in automatic.choices:
    print(f"from t = {choice.t:.3g}: {choice.method} ({choice.reason})")
