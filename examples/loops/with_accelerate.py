"""Accelerate: ``accelerator.backward`` in the place of ``loss.backward``; leave ``gradient_accumulation_steps`` at 1.

python examples/loops/with_accelerate.py
"""

from __future__ import annotations

from accelerate import Accelerator
from regression import LR, N_STEPS, data, final_loss, network
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import GradientFlow


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    accelerator = Accelerator(cpu=True)
    x, y = data()
    net = network()
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    model, optimizer, loader = accelerator.prepare(net, GradientFlow(net.parameters(), lr=LR), loader)
    for _ in range(n_steps):
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(mse_loss(model(inputs), targets))
            optimizer.step()
    return final_loss(net)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
