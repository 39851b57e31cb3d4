"""StopAtFixedPoint: training ends where the flow does."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from torch_gradflow.checks import check_number
from torch_gradflow.lightning.host import FlowCallback, check_flows, flows

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

LOG = logging.getLogger(__name__)


class StopAtFixedPoint(FlowCallback):
    """Ends training at the end of an epoch in which every step of every flow ended with ‖∇L‖∞ at most ``gtol``.

    (With mini-batches that is the gradient of each batch at the end of its own step: a point at which all of them vanish.)
    A flow reaches its fixed point only as t → ∞; ``NewtonPolishCallback`` goes the rest of the way. Explicit methods jitter
    at the size of their tolerance where the flow is stiff, and may never get there; the default ``method="auto"`` does.

    Args:
        gtol: The largest gradient norm, of the regularised loss if the flow regularises.

    Attributes:
        reason: Why training was ended, a sentence, or "".

    Raises:
        ValueError, TypeError: For a ``gtol`` that is no positive number. At the start of ``fit``: where there is no
            GradientFlow, or the Trainer's settings cannot be right for it.
    """

    def __init__(self, gtol: float = 1e-6) -> None:
        self._gtol = check_number("gtol", gtol, above=0.0)
        self._largest = math.nan
        self.reason = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be right."""
        super().on_fit_start(trainer, pl_module)
        check_flows(trainer, type(self).__name__)
        self.reason = ""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No step of this epoch was seen yet."""
        self._largest = math.nan

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the largest gradient norm of the epoch."""
        norms = [flow.stats.grad_norm for flow in flows(trainer).values()]
        self._largest = max([*norms, *([] if batch_idx == 0 else [self._largest])])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End training, if that is small."""
        if self._largest <= self._gtol:
            t = max(flow.flow_time for flow in flows(trainer).values())
            self.reason = f"The gradient norm {self._largest:.2e} at flow time {t:.6g} is at most gtol = {self._gtol:.1e}."
            LOG.info("Training ends at a fixed point. %s", self.reason)
            trainer.should_stop = True
