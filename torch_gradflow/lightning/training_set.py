"""The loss over the whole training set, as the closure of an optimizer: what training_step computes, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, SubsetRandomSampler

from torch_gradflow.objectives.trees import tensors_in

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

BatchLoss = Callable[[Any, Any], Tensor]


def check_training_loss(module: LightningModule, loss: BatchLoss | None, callback: str) -> None:
    """Demand a loss that can be had of one batch.

    Raises:
        ValueError: If training_step is one that steps by itself.
    """
    if loss is None and not module.automatic_optimization:
        raise ValueError(
            f"{callback} takes the loss of training_step, but under manual optimization that steps by itself. Pass "
            "loss=function of (module, batch) that returns the loss."
        )


def each_once(loader: Any, callback: str) -> Iterable[Any]:
    """Batches with each sample of a DataLoader's training set once, in order: its shuffling and drop_last left out.

    Raises:
        ValueError: Where that cannot be known from the loader.
    """
    remedy = f"Pass {callback}(dataloader=...), which gives each sample once."
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        what = "has a batch_sampler of its own" if isinstance(loader, DataLoader) else f"is a {type(loader).__name__}"
        raise ValueError(f"{callback} needs the whole training set, but the train dataloader {what}. {remedy}")
    sampler, dataset = loader.sampler, loader.dataset
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, list(sampler.indices))
    elif not isinstance(sampler, SequentialSampler | RandomSampler) or getattr(sampler, "replacement", False):
        raise ValueError(
            f"{callback} needs the whole training set, but the train dataloader draws from it with a "
            f"{type(sampler).__name__}. {remedy}"
        )
    return DataLoader(dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)


def training_closure(
    trainer: Trainer, module: LightningModule, loader: Iterable[Any], loss: BatchLoss | None
) -> Callable[[], Tensor]:
    """A closure for the mean of a loss over all samples of ``loader``, whose batches are read now and kept.

    Args:
        trainer: Moves batches to the device and sets the precision, as in training.
        module: Its training_step serves on a shallow copy, which shares the parameters and logs nothing.
        loader: Batches, each sample once.
        loss: A function of (module, batch) that averages over the samples of the batch; None for training_step.

    Raises:
        ValueError: If there is no batch.
    """
    with torch.random.fork_rng(devices=[]):  # reading data leaves the training's random numbers alone
        batches = [trainer.strategy.batch_to_device(batch) for batch in loader]
    sizes = [len(tensors_in(batch)[0]) for batch in batches]
    if not sum(sizes):
        raise ValueError("the training set holds no samples.")
    silent = _silent(trainer, module)
    convert = trainer.precision_plugin.convert_input
    batches = [convert(batch) for batch in batches]

    def closure() -> Tensor:
        module.zero_grad()
        losses = []
        for index, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            with trainer.precision_plugin.train_step_context():
                value = _loss_of(silent.training_step(batch, index)) if loss is None else loss(module, batch)
            losses.append(value * (size / sum(sizes)))
        total = torch.stack(losses).sum()
        total.backward()
        return total

    return closure


def _loss_of(output: Any) -> Tensor:
    """What training_step returned as its loss."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step returned {output!r}; it must return the loss, or a dictionary with it as 'loss'.")
    return loss


def _silent(trainer: Trainer, module: LightningModule) -> Any:
    """A shallow copy of the module: the same parameters and submodules, but ``self.log`` does nothing."""
    silent: Any = copy.copy(module)
    silent.trainer = trainer

    def discard(*_: Any, **__: Any) -> None:
        """Outside of a training loop Lightning has nowhere to put it."""

    silent.log = silent.log_dict = discard
    return silent
