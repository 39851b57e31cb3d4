"""PyTorch-Ignite: ``create_supervised_trainer`` calls zero_grad, backward and step, without a closure.

python examples/loops/with_ignite.py
"""

from __future__ import annotations

from ignite.engine import create_supervised_trainer
from regression import LR, N_STEPS, data, final_loss, network
from torch.nn.functional import mse_loss

from torch_gradflow import GradientFlow


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    model = network()
    trainer = create_supervised_trainer(model, GradientFlow(model.parameters(), lr=LR), mse_loss)
    trainer.run([data()], max_epochs=n_steps)
    return final_loss(model)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
