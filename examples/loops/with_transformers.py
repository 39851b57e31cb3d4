"""Hugging Face's Trainer: no closure, and it zeroes the gradients of the model; a callback tells the optimizer of each step.

python examples/loops/with_transformers.py
"""

from __future__ import annotations

import tempfile
from typing import Any

from regression import LR, N_STEPS, data, final_loss, network
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import Trainer, TrainerCallback, TrainingArguments

from torch_gradflow import GradientFlow


class WithLoss(nn.Module):
    """The network as the Trainer wants it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": mse_loss(self.net(x), labels)}


class BeginRecord(TrainerCallback):
    """The optimizer's own ``zero_grad`` begins the record of the forward pass; the Trainer calls the model's."""

    def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        optimizer.zero_grad()


def train(n_steps: int = N_STEPS) -> float:
    """The final loss."""
    x, y = data()
    model = WithLoss()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=n_steps, per_device_train_batch_size=len(x), lr_scheduler_type="constant",
            max_grad_norm=0.0,  # it clips by default, which changes the flow
            use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
        optimizers = GradientFlow(model.parameters(), lr=LR), None
        Trainer(model, arguments, train_dataset=rows, optimizers=optimizers, callbacks=[BeginRecord()]).train()
    return final_loss(model.net)


if __name__ == "__main__":
    print(f"loss {train():.8f}")
