"""The Trainer's side: which Lightning there is, which of its optimizers are ours, which of its settings cannot be right."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from torch_gradflow.optim.closure_optimizer import ClosureOptimizer
from torch_gradflow.optim.gradient_flow import GradientFlow

# The same code under two names.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# These give each process a part of every parameter, as a flat buffer or as a DTensor.
SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


def _callback_classes() -> tuple[type, ...]:
    """Callback of each package that is in use already, for a Trainer knows its own only; else of the first one installed."""
    loaded = tuple(module.Callback for name in PACKAGES if (module := sys.modules.get(name)) is not None)
    return loaded or (_first_callback(),)


def _first_callback() -> type:
    for name in PACKAGES:
        try:
            found: type = importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                raise
        else:
            return found
    raise ImportError("torch_gradflow.lightning needs Lightning: pip install 'torch-gradflow[lightning]'.")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = type("Callback", _callback_classes(), {})


class FlowCallback(Callback):
    """A callback for flows, which refuses settings of the Trainer that cannot be right for them."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard parameters, before they do."""
        check_strategy(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings that change the gradient, or the closure, of an optimizer of ours."""
        check_settings(trainer)


def flows(trainer: Trainer) -> dict[str, GradientFlow]:
    """The GradientFlows among the Trainer's optimizers, by the prefix of what is logged of them."""
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, GradientFlow)]
    return {f"flow{i if len(found) > 1 else ''}": optimizer for i, optimizer in enumerate(found)}


def check_flows(trainer: Trainer, callback: str) -> None:
    """Demand a flow.

    Raises:
        ValueError: If there is none.
    """
    if not flows(trainer):
        names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
        raise ValueError(
            f"{callback} follows a GradientFlow, but the optimizers are {names}. Return a GradientFlow from "
            f"configure_optimizers, or leave {callback} out."
        )


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that leave no process a whole parameter.

    Raises:
        ValueError: Naming the strategy and the remedy.
    """
    known = {base.__name__ for base in type(trainer.strategy).__mro__}
    if known & set(SHARDED):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__} shards the parameters over processes, but flows and Newton steps "
            "need θ as a whole. Use Trainer(devices=1)."
        )


def check_settings(trainer: Trainer) -> None:
    """Refuse settings under which an optimizer of ours would follow something else than the loss of training_step.

    Raises:
        ValueError: Naming the setting and the remedy.
    """
    ours = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ClosureOptimizer)]
    if not ours:
        return
    name = type(ours[0]).__name__
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} leaves all batches but the last outside of the "
            f"closure that {name} evaluates. Leave it at 1, and give the DataLoader a larger batch_size: that of the whole "
            "data set for the flow of its loss."
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"gradient_clip_val={trainer.gradient_clip_val} changes the gradient, so that it is not that of a loss any more, "
            f"and no flow belongs to it. Leave it out: {name} chooses its own step sizes, and needs no clipping."
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None or trainer.precision == "16-mixed":
        raise ValueError(
            f"precision={trainer.precision!r} scales the loss with a GradScaler, which takes no closure. Use "
            "precision='32-true', or '64-true' for an accurate flow, or 'bf16-mixed'."
        )
