"""
From saddle to saddle
=====================

A deep linear network that begins near zero learns one singular value after the other: the flow passes a
sequence of saddles.
"""

# %%
# Three layers without biases, :math:`f(x) = W_3 W_2 W_1 x`, learn a linear map :math:`A` with the
# singular values 3, 2 and 1 from white inputs. The loss is :math:`\|W_3 W_2 W_1 - A\|_F^2`. Near a
# saddle at which the first k singular values are learnt it is the sum of the squares of all the others
# (A. Jacot et al., 2021, arXiv 2106.15933, describe these dynamics).

import matplotlib.pyplot as plt
import torch
from torch import nn

from torch_gradflow import ModuleObjective, integrate

torch.set_num_threads(1)  # networks this small gain nothing from threads

torch.manual_seed(3)
SINGULAR_VALUES = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
n = len(SINGULAR_VALUES)
left_vectors, right_vectors = (
    torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2)
)
target = left_vectors @ SINGULAR_VALUES.diag() @ right_vectors.T

x = torch.eye(n, dtype=torch.float64)  # white inputs: the loss knows nothing else of them
model = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(3))).double()
for parameter in model.parameters():
    nn.init.normal_(parameter, std=0.03)
objective = ModuleObjective(model, nn.MSELoss(reduction="sum"), (x, x @ target.T))

# %%
# Near a saddle the Hessian has negative eigenvalues: growing modes, which an integrator has to resolve
# however slow everything else is. "exprb53", an exponential method, treats the linear part exactly and
# takes long steps there.

times = torch.linspace(0, 60, 241, dtype=torch.float64)
solution = integrate(
    objective, objective.initial_theta(), (0.0, 60.0), method="exprb53", t_eval=times.tolist()
)
print(solution.message)
print(f"{solution.n_accepted} steps, {solution.n_grad} gradients, {solution.n_hessian} Hessians")

products, spectra = [], []
for theta in solution.theta:
    w1, w2, w3 = theta.reshape(3, n, n)
    products.append(torch.linalg.svdvals(w3 @ w2 @ w1))
    spectra.append(torch.linalg.eigvalsh(objective.hessian(theta)))
learnt, spectra = torch.stack(products), torch.stack(spectra)

# %%
# The loss falls in steps; the singular values of the product rise one at a time; and before each fall a
# few eigenvalues of the Hessian are negative.

figure, axes = plt.subplots(3, 1, figsize=(8.5, 8), sharex=True, layout="constrained")
axes[0].plot(times, solution.loss, color="#0072B2")
for k in range(3):
    plateau = float(SINGULAR_VALUES[k:].square().sum())
    axes[0].axhline(plateau, color="black", linewidth=0.8, linestyle=":")
    axes[0].annotate(
        f"rank {k}", (60, plateau), textcoords="offset points", xytext=(-4, 3), ha="right", fontsize=9
    )
axes[0].set(ylabel="loss", ylim=(-0.8, 16.5))
for k, (value, color) in enumerate(zip(learnt.T[:3], ("#0072B2", "#D55E00", "#009E73"), strict=True)):
    axes[1].plot(times, value, color=color, linestyle=("-", "--", "-.")[k], label=f"number {k + 1}")
axes[1].set_ylabel("singular values\nof the network's map")
axes[1].legend(loc="center right")
axes[2].plot(times, spectra, color="grey", linewidth=0.6)
axes[2].plot(times, spectra[:, 0], color="#D55E00", linewidth=1.6, label="the smallest")
axes[2].set(xlabel="flow time", ylabel="eigenvalues\nof the Hessian")
axes[2].set_yscale("symlog", linthresh=0.1)
axes[2].axhline(0.0, color="black", linewidth=0.8)
axes[2].legend(loc="upper left")
plt.show()
