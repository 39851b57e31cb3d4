"""Plain torch, without a closure: the loop that everybody writes.

python examples/loops/plain.py
"""

from __future__ import annotations

from regression import LR, N_STEPS, data, final_loss, network
from torch.nn.functional import mse_loss

from torch_gradflow import GradientFlow


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for _ in range(n_steps):
        optimizer.zero_grad()  # before the forward pass, which it begins to record
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return final_loss(model)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
