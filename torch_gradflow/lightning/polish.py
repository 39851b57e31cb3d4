"""NewtonPolishCallback: the end of training, taken to a critical point of the loss over the whole training set."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_gradflow.lightning.host import FlowCallback
from torch_gradflow.lightning.training_set import BatchLoss, check_training_loss, each_once, training_closure
from torch_gradflow.minimize.methods import find_method
from torch_gradflow.minimize.minimize import check_memory
from torch_gradflow.minimize.result import MinimizeResult
from torch_gradflow.objectives.parameters import working_dtype
from torch_gradflow.optim.gradient_flow import GradientFlow
from torch_gradflow.optim.newton_polish import NewtonPolish

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

LOG = logging.getLogger(__name__)


class NewtonPolishCallback(FlowCallback):
    """Polishes when training ends: by a ``NewtonPolish`` step on the whole training set; then validates and saves.

    Training ends after ``max_epochs``, or earlier through other callbacks: with ``StopAtFixedPoint``, when the flow has
    converged. The objective is the mean over all training samples of what training_step returns, with weight decay and
    barrier of the GradientFlow that trained (frozen parameters stay frozen, too); any other optimizer may have trained as
    well. Validation runs once more, so that callbacks and loggers see its metrics; "polish/loss", "polish/grad_norm" and
    "polish/n_iter" are logged.

    Args:
        dataloader: The training set; None takes that of the train dataloader, each sample once (what it augments at random
            is drawn once).
        loss: ``loss(module, batch)``, averaged over the samples of the batch; None takes what training_step returns.
        filename: The checkpoint of the result, in the folder of the Trainer's ModelCheckpoint, or in ``default_root_dir``.
            None saves none.
        settings: Arguments of ``NewtonPolish``: ``gtol``, ``max_iter``, ``method``, ``dtype``, ….

    Attributes:
        result: The ``MinimizeResult``, or None.
        checkpoint_path: The checkpoint, or None.

    Raises:
        ValueError, TypeError: For settings that NewtonPolish refuses. At the start of ``fit``: where the Trainer's
            settings cannot be right, or the training set cannot be known.
        MemoryError: There, too, if the method's dense matrices would not fit into memory.
    """

    def __init__(
        self,
        *,
        dataloader: Iterable[Any] | None = None,
        loss: BatchLoss | None = None,
        filename: str | None = "polished",
        **settings: Any,
    ) -> None:
        NewtonPolish([torch.zeros(1, requires_grad=True)], **settings)  # refuses what it would refuse at the end
        self._dataloader, self._loss, self._filename, self._settings = dataloader, loss, filename, settings
        self.result: MinimizeResult | None = None
        self.checkpoint_path: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be right."""
        super().on_fit_start(trainer, pl_module)
        name = type(self).__name__
        check_training_loss(pl_module, self._loss, name)
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"{name} needs one optimizer, whose objective it polishes, not {len(trainer.optimizers)}: several "
                "descend on several losses."
            )
        groups = _groups(trainer.optimizers[0])
        moving = [p for group in groups if group["lr"] for p in group["params"] if p.requires_grad]
        method, dtype = find_method(self._settings.get("method", "auto")), self._settings.get("dtype")
        check_memory(method, sum(p.numel() for p in moving), working_dtype(moving, dtype), moving[0].device)
        self.result, self.checkpoint_path = None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the training set."""
        self._loader(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Polish, validate, save."""
        closure = training_closure(trainer, pl_module, self._loader(trainer), self._loss)
        polish = NewtonPolish(_groups(trainer.optimizers[0]), **self._same_objective(trainer.optimizers[0]))
        with torch.enable_grad():
            polish.step(closure)
        pl_module.zero_grad()
        self.result = polish.result
        assert self.result is not None
        LOG.info("Polished. %s", self.result.message)
        numbers = {"loss": self.result.loss, "grad_norm": self.result.grad_norm, "n_iter": float(self.result.n_iter)}
        metrics = {f"polish/{name}": value for name, value in numbers.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if trainer.enable_validation:
            _validate(trainer)
        if self._filename is not None:
            self.checkpoint_path = _folder(trainer) / f"{self._filename}.ckpt"
            trainer.save_checkpoint(self.checkpoint_path)

    def _same_objective(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The settings, with the barrier of the flow if they name no other."""
        barrier = {"max_norm": optimizer.max_norm} if isinstance(optimizer, GradientFlow) else {}
        return {**barrier, **self._settings}

    def _loader(self, trainer: Trainer) -> Iterable[Any]:
        return each_once(trainer.train_dataloader, type(self).__name__) if self._dataloader is None else self._dataloader


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameters of an optimizer, with what belongs to the objective: those frozen from the start, and weight decay."""
    ours = isinstance(optimizer, GradientFlow)
    return [
        {
            "params": group["params"],
            "lr": 0.0 if float(group.get("initial_lr", group["lr"])) == 0.0 else 1.0,  # schedules may end at zero
            **({name: group[name] for name in ("weight_decay", "maximize")} if ours else {}),
        }
        for group in optimizer.param_groups
    ]


def _validate(trainer: Trainer) -> None:
    """Validate as the Trainer does at the end of an epoch of training."""
    trainer.validating = True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True


def _folder(trainer: Trainer) -> Path:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(trainer.default_root_dir if folder is None else folder)
