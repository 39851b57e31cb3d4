"""
Newton's end, and what it is
============================

The flow comes close to a critical point, Newton's method takes it there to the last digit, and the
certificate says what kind of point it is.
"""

# %%
# A student with two softplus neurons cannot learn a teacher with four: zero loss is out of reach, and
# its minimum is a regular one.

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from torch_gradflow import ModuleObjective, certify, integrate, leave_saddle, minimize

torch.set_num_threads(1)  # networks this small gain nothing from threads


def network(n_hidden: int) -> nn.Sequential:
    """Two inputs, softplus neurons, one output."""
    return nn.Sequential(nn.Linear(2, n_hidden), nn.Softplus(), nn.Linear(n_hidden, 1)).double()


torch.manual_seed(8)
teacher = network(4)
for parameter in teacher.parameters():
    nn.init.normal_(parameter, std=1.5)
x = torch.randn(500, 2, dtype=torch.float64)
two, three = (ModuleObjective(network(n), nn.MSELoss(), (x, teacher(x).detach())) for n in (2, 3))

flow = integrate(two, two.initial_theta(), (0.0, 1e3), method="bdf")
print(f"flow:   loss {flow.loss[-1]:.12f}, |gradient| {flow.grad_norm[-1]:.1e}")

# %%
# ``minimize`` goes on from there; what is given as ``progress`` sees each iteration. The certificate
# knows all eigenvalues of the Hessian and how well it knows them.

norms = [float(flow.grad_norm[-1])]
minimum = minimize(two, flow.theta[-1], progress=lambda report: norms.append(report.grad_norm))
print(f"polish: loss {minimum.loss:.12f}, |gradient| {minimum.grad_norm:.1e}")
print(minimum.certificate.message)

# %%
# Now a saddle. One of the two neurons is split in two, which have the same input weights and share the
# output weight: a network with three neurons that computes the same function. Its gradient is zero,
# too, but the third neuron opens new directions.


def split(theta: Tensor, share: float) -> Tensor:
    """Three neurons: the last two have the second one's input weights, and share its output weight."""
    weights, biases, outputs, offset = theta.split([4, 2, 2, 1])
    shares = torch.stack([outputs[0], share * outputs[1], (1 - share) * outputs[1]])
    return torch.cat([weights, weights[2:], biases, biases[1:], shares, offset])


theta = split(minimum.theta, share=0.5)
saddle = certify(three, theta)
print(saddle.message)

# %%
# ``leave_saddle`` goes down along the direction that the certificate found, and another polish ends
# lower. (``escape=True`` in ``minimize`` and ``NewtonPolish`` does both.)

lower = minimize(three, leave_saddle(three, theta, saddle))
print(f"From the saddle at the loss {minimum.loss:.8f} to {lower.loss:.8f}.")
print(lower.certificate.message)

# %%
# Left: the gradient norm in each iteration, with the quadratic convergence of Newton's method at the
# end. Right: the eigenvalues of the Hessian at the three points; below zero in red. The saddle has one
# negative and one zero eigenvalue: that one belongs to the share, which does not change the function.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
left.semilogy(norms, marker="o", color="#0072B2")
left.axhline(
    minimum.certificate.gradient_floor,
    color="black",
    linewidth=1,
    linestyle=":",
    label="rounding of θ alone",
)
left.set(xlabel="iteration of Newton's method", ylabel="‖∇L‖∞")
left.grid(alpha=0.3)
left.legend()
shown = {
    f"two neurons:\n{minimum.certificate.kind}\nL = {minimum.loss:.5f}": minimum.certificate,
    f"one of them split:\n{saddle.kind}\nL = {minimum.loss:.5f}": saddle,
    f"after leaving it:\n{lower.certificate.kind}\nL = {lower.loss:.5f}": lower.certificate,
}
for place, point in enumerate(shown.values()):
    negative = point.eigenvalues < -point.uncertainties
    for chosen, color in ((~negative, "#0072B2"), (negative, "#D55E00")):
        right.plot(
            [place] * int(chosen.sum()),
            point.eigenvalues[chosen],
            "_",
            color=color,
            markersize=44,
            markeredgewidth=1.5,
        )
right.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
right.set_yscale("symlog", linthresh=1e-4)
right.set_xticks(range(len(shown)), list(shown))
right.set(ylabel="eigenvalues of the Hessian", xlim=(-0.5, len(shown) - 0.5))
plt.show()
