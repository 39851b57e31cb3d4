"""Lightning, automatic optimisation: one line in ``configure_optimizers``; a callback shows what the flow does.

python examples/loops/with_lightning.py
"""

from __future__ import annotations

import lightning
from regression import LR, N_STEPS, data, final_loss, network
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import GradientFlow
from torch_gradflow.lightning import FlowMonitor


class Regression(lightning.LightningModule):
    """Nothing in it knows of flows but ``configure_optimizers``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def configure_optimizers(self) -> GradientFlow:
        return GradientFlow(self.parameters(), lr=LR)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = mse_loss(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))  # all data: the flow of the whole loss
    module = Regression()
    # For the minimum at the end of the flow add StopAtFixedPoint() and NewtonPolishCallback().
    trainer = lightning.Trainer(
        max_epochs=n_steps,
        accelerator="cpu",
        devices=1,
        callbacks=[FlowMonitor()],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader)
    return final_loss(module.net)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
