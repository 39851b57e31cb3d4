"""skorch: it always passes a closure; ``batch_size=-1`` takes all data at once.

python examples/loops/with_skorch.py
"""

from __future__ import annotations

from regression import LR, N_STEPS, data, final_loss, network
from skorch import NeuralNetRegressor

from torch_gradflow import GradientFlow


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    x, y = data()
    net = NeuralNetRegressor(
        network(), optimizer=GradientFlow, lr=LR, batch_size=-1, max_epochs=n_steps, train_split=None, verbose=0
    )
    net.fit(x, y)
    return final_loss(net.module_)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
