"""Lightning Fabric: ``fabric.backward`` in the place of ``loss.backward``.

python examples/loops/with_fabric.py
"""

from __future__ import annotations

import lightning
from regression import LR, N_STEPS, data, final_loss, network
from torch.nn.functional import mse_loss

from torch_gradflow import GradientFlow


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    x, y = (fabric.to_device(tensor) for tensor in data())
    net = network()
    model, optimizer = fabric.setup(net, GradientFlow(net.parameters(), lr=LR))
    for _ in range(n_steps):
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(x), y))
        optimizer.step()
    return final_loss(net)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
