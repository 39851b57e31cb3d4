"""FlowMonitor: what a flow does, in the Trainer's loggers and its progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from torch_gradflow.checks import check_count
from torch_gradflow.flow.methods import METHODS
from torch_gradflow.lightning.host import FlowCallback, check_flows, flows
from torch_gradflow.lightning.training_set import BatchLoss, check_training_loss, each_once, training_closure
from torch_gradflow.minimize.spectrum import extremes
from torch_gradflow.objectives.base import EvaluationCounts
from torch_gradflow.objectives.closure import open_closure
from torch_gradflow.objectives.opened import Memory
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.optim.gradient_flow import GradientFlow

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

LOG = logging.getLogger(__name__)
# Loggers take numbers only.
METHOD_NUMBERS = {name: number for number, name in enumerate(METHODS)}
# All eigenvalues up to here, beyond by Lanczos' method.
MAX_DENSE = 2000


class FlowMonitor(FlowCallback):
    """Logs what each GradientFlow of the Trainer does, to any logger, after each step (every ``log_every_n_steps``).

    "flow/time" (flow time), "flow/loss" and "flow/grad_norm" (L and ‖∇L‖∞ at the accepted point in which the step ended, of
    the regularised loss if the flow regularises), "flow/step_size" and "flow/order", "flow/n_grad", "flow/n_hvp",
    "flow/n_hessian", "flow/n_accepted", "flow/n_rejected" (so far), and "flow/method" (the position of the integrator's name
    in ``torch_gradflow.flow.methods.METHODS``; what "auto" chooses, and why, goes to Python's logger of this module). Time,
    loss and gradient norm are shown in the progress bar. "flow/loss_epoch" is the mean over the steps of an epoch: unlike what
    training_step logs with ``on_epoch=True``, it never holds losses at trial points, of which there are some where the
    closure is called again (``stats.engine`` is "closure"). With several flows the prefixes are "flow0", "flow1", ….

    Args:
        hessian_every_n_steps: Every so many steps also "flow/largest_eigenvalue" and "flow/smallest_eigenvalue" of the
            Hessian of the loss over the whole training set (without weight decay); None for never. Beyond 2000 parameters
            they come from Lanczos' method, and the smallest may lie a little lower.
        dataloader: The training set for these; None takes that of the train dataloader, each sample once.
        loss: ``loss(module, batch)``, averaged over the batch, for these; None takes what training_step returns.

    Raises:
        ValueError: For a ``hessian_every_n_steps`` that is no positive integer. At the start of ``fit``: where there is no
            GradientFlow, or the Trainer's settings cannot be right for it.
    """

    def __init__(
        self,
        *,
        hessian_every_n_steps: int | None = None,
        dataloader: Iterable[Any] | None = None,
        loss: BatchLoss | None = None,
    ) -> None:
        if hessian_every_n_steps is not None:
            check_count("hessian_every_n_steps", hessian_every_n_steps)
        self._every, self._dataloader, self._loss = hessian_every_n_steps, dataloader, loss
        self._n_choices: dict[str, int] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be right."""
        super().on_fit_start(trainer, pl_module)
        check_flows(trainer, type(self).__name__)
        if self._every is not None:
            check_training_loss(pl_module, self._loss, type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the training set, if it will be needed."""
        self._n_choices = {}
        if self._every is not None and self._dataloader is None:
            each_once(trainer.train_dataloader, type(self).__name__)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step."""
        for prefix, flow in flows(trainer).items():
            self._announce(prefix, flow)
            numbers = {f"{prefix}/{name}": value for name, value in _numbers(flow).items()}
            pl_module.log_dict(numbers, on_step=True, on_epoch=False)
            shown = {f"{prefix}/time": flow.flow_time, f"{prefix}/grad_norm": flow.stats.grad_norm}
            pl_module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True)
            pl_module.log(f"{prefix}/loss", flow.stats.loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=1)
            if self._every is not None and trainer.global_step % self._every == 0:
                low, high = self._extreme_eigenvalues(trainer, pl_module, flow)
                extreme = {f"{prefix}/smallest_eigenvalue": low, f"{prefix}/largest_eigenvalue": high}
                pl_module.log_dict(extreme, on_step=True, on_epoch=False)

    def _announce(self, prefix: str, flow: GradientFlow) -> None:
        choices = flow.stats.choices
        for choice in choices[self._n_choices.get(prefix, 0) :]:
            LOG.info("%s: from t = %.6g on %s: %s", prefix, choice.t, choice.method, choice.reason)
        self._n_choices[prefix] = len(choices)

    def _extreme_eigenvalues(self, trainer: Trainer, module: LightningModule, flow: GradientFlow) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of the Hessian in the parameters that the flow moves."""
        loader = each_once(trainer.train_dataloader, type(self).__name__) if self._dataloader is None else self._dataloader
        closure = training_closure(trainer, module, loader, self._loss)
        moving = [p for group in flow.param_groups if float(group["lr"]) != 0.0 for p in group["params"] if p.requires_grad]
        layout = ParameterLayout.of(moving)
        before = [(p, p.grad) for p in module.parameters()]
        with flow.recording_paused():
            opened = open_closure(closure, moving, layout, Memory(check=False), EvaluationCounts())
            try:
                objective, theta = opened.objective, opened.theta
                if layout.n_parameters <= MAX_DENSE:
                    values = torch.linalg.eigvalsh(objective.hessian(theta))
                else:
                    values = extremes(lambda vectors: objective.hvp(theta, vectors), theta).values
            finally:
                opened.finish(opened.theta)
                for parameter, gradient in before:
                    parameter.grad = gradient
        return float(values[0]), float(values[-1])


def _numbers(flow: GradientFlow) -> dict[str, float]:
    """What is not shown in the progress bar."""
    stats = flow.stats
    return {
        "step_size": stats.step_size,
        "order": float(stats.order),
        "method": float(METHOD_NUMBERS.get(stats.method, -1)),
        "n_grad": float(stats.n_grad),
        "n_hvp": float(stats.n_hvp),
        "n_hessian": float(stats.n_hessian),
        "n_accepted": float(stats.n_accepted),
        "n_rejected": float(stats.n_rejected),
    }
