"""All batches of a loader as one closure: the loss of the whole data set, computed a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class FullBatch:
    """L(θ) = Σ_b n_b ℓ_b(θ) / Σ_b n_b over the batches b of a loader, as the closure of one step.

    ``optimizer.step(FullBatch(loader, loss, optimizer))`` follows the flow of that one function, however the data are cut:
    a flow of each batch's own loss, which ``step`` follows where the closure sees one batch, is another flow (see
    ``examples/minibatch_flow.py``). Gradients, products and Hessians are sums over batches, and no more than one batch's
    intermediate results are held at a time.

    Args:
        loader: The batches, for instance a ``DataLoader``; it must be possible to go through them more than once.
        loss: Called with a batch; returns its loss ℓ_b, a tensor with one element. It calls no ``backward``.
        optimizer: The optimizer whose gradients are zeroed.
        reduction: "mean" where ℓ_b is a mean over the samples of the batch, so that batches count by their size; "sum"
            where it is a sum: L is then Σ_b ℓ_b.
        stream: False reads the batches once, here, and holds them: the order, and augmentation drawn by the loader, are then
            fixed, and replays are fast. True reads them anew at every evaluation, for data beyond memory; the loader must
            give the same samples each time (in any order). The step then calls this closure again at each evaluation.
        size: Gives the n_b of a batch; by default the length of the first tensor that is found in it.

    Raises:
        TypeError: For a loader that can be gone through only once, or one that is not iterable.
        ValueError: For a loader without batches, one that leaves samples out (``drop_last``), or an unknown reduction.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        loss: Callable[[Any], Tensor],
        optimizer: Optimizer,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        stream: bool = False,
        size: Callable[[Any], int] | None = None,
    ) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must be a DataLoader or another iterable of batches, not {loader!r}.")
        if isinstance(loader, Iterator):
            raise TypeError("loader must be one that can be gone through again, a DataLoader or a list; it is an iterator.")
        if getattr(loader, "drop_last", False):
            raise ValueError("loader has drop_last=True, which leaves samples out; make it with drop_last=False.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}.")
        self.stream = stream
        self._batches = loader if stream else list(loader)
        self._loss, self._optimizer = loss, optimizer
        self._size: Callable[[Any], int] = first_length if size is None else size
        sizes = [self._size(batch) for batch in self._batches]
        if not sizes:
            raise ValueError("loader has no batches.")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"size must give a positive integer for each batch; it gave {sizes}.")
        self._n_samples = sum(sizes)
        self._mean = reduction == "mean"

    def __call__(self) -> Tensor:
        """Zero the gradients, add those of all batches, and return L.

        Raises:
            TypeError: If ``loss`` returns anything but a tensor with one element.
            ValueError: If the loader gives more or fewer samples than before.
        """
        self._optimizer.zero_grad()
        losses, n_seen = [], 0
        with torch.enable_grad():
            for batch in self._batches:
                loss, n = self._loss(batch), self._size(batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise TypeError(f"loss must return a tensor with one element for each batch; it returned {loss!r}.")
                part = loss * (n / self._n_samples) if self._mean else loss
                part.backward()
                losses.append(part.detach().reshape(()))
                n_seen += n
        if n_seen != self._n_samples:
            raise ValueError(
                f"loader gave {self._n_samples} samples at first and {n_seen} now; it must give the same each time."
            )
        return torch.stack(losses).sum()


def first_length(batch: Any) -> int:
    """The length of the first tensor in a batch: a tensor, or a sequence or mapping that holds some.

    Raises:
        TypeError: If there is none.
    """
    found = _first_tensor(batch)
    if found is None or found.dim() == 0:
        raise TypeError(
            f"the number of samples in a batch of type {type(batch).__name__} is not known; pass size=, a function that "
            "gives it, or reduction='sum'."
        )
    return len(found)


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    if isinstance(batch, str):
        return None
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
