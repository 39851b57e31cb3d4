"""Plain torch, with a closure, as for torch.optim.LBFGS.

python examples/loops/plain_closure.py
"""

from __future__ import annotations

from regression import LR, N_STEPS, data, final_loss, network
from torch import Tensor
from torch.nn.functional import mse_loss

from torch_gradflow import GradientFlow


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(n_steps):
        optimizer.step(closure)
    return final_loss(model)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
