"""Known losses with their targets and weights, as those of a perceptron's samples (see ``perceptron.architecture``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.objectives.calls import NotRecognised
from torch_gradflow.objectives.program import Slot
from torch_gradflow.objectives.reductions import Reduction
from torch_gradflow.perceptron.architecture import Loss


@dataclass(frozen=True)
class Term:
    """Σ_n w_n ℓ(f_n, t_n).

    Attributes:
        loss: ℓ.
        output: The slot of what ℓ is applied to.
        targets: Gives t and w for the output's shape. With ``per_element``, t of shape ``(1, *shape)``, or ``(2, *shape)`` for
            the two kinds of targets of logits, and w of shape ``shape`` or one that broadcasts to it; else ``(N, O)`` and
            ``(N,)``. It raises NotRecognised where they do not fit.
        per_element: Whether ℓ adds up over the output's elements, whatever its shape.
    """

    loss: Loss
    output: int
    targets: Callable[[torch.Size], tuple[Tensor, Tensor]]
    per_element: bool = True


def elementwise_loss(loss: Loss, output: int, target: Any, reduction: Reduction) -> Term:
    """A loss that adds up over the output's elements, whose target has the same shape."""

    def targets(shape: torch.Size) -> tuple[Tensor, Tensor]:
        if not isinstance(target, Tensor) or not target.is_floating_point():
            raise NotRecognised("the target is not a tensor of numbers")
        if target.shape != shape:
            raise NotRecognised(f"the output has the shape {tuple(shape)} and the target another, {tuple(target.shape)}")
        return target.unsqueeze(0), reduction.weights(shape, shape.numel(), target.device)

    return Term(loss, output, targets)


def logit_loss(output: int, target: Any, given: Mapping[str, Any], reduction: Reduction) -> Term:
    """Binary cross entropy of logits: w (p y log(1 + exp −f) + (1 − y) log(1 + exp f)) with the weight p of positives."""

    def targets(shape: torch.Size) -> tuple[Tensor, Tensor]:
        if not isinstance(target, Tensor) or target.shape != shape:
            raise NotRecognised("the target has another shape than the output")
        factors = [given["weight"], given["pos_weight"]]
        if any(isinstance(f, Slot) for f in factors):
            raise NotRecognised("weights of the loss depend on the parameters")
        one = torch.ones_like(target)
        weight, positive = (one if f is None else f for f in factors)
        yes, no = weight * positive * target, weight * (1 - target)
        if bool((yes < 0).any()) or bool((no < 0).any()):
            raise NotRecognised("a target of binary_cross_entropy_with_logits is not between 0 and 1")
        both = torch.stack([yes.expand(shape), no.expand(shape)])
        return both, reduction.weights(shape, shape.numel(), target.device)

    return Term(Loss("binary cross entropy"), output, targets)


def class_loss(output: int, target: Any, given: Mapping[str, Any], reduction: Reduction) -> Term:
    """Cross entropy over classes, by index or by probability."""

    def targets(shape: torch.Size) -> tuple[Tensor, Tensor]:
        n_classes, smoothing = shape[-1], float(given["label_smoothing"])
        by_class = given["weight"]
        if not isinstance(target, Tensor) or len(shape) != 2 or isinstance(by_class, Slot):
            raise NotRecognised("the target of cross_entropy is not one class, or one probability per class, for each sample")
        if target.is_floating_point():
            if target.shape != shape:
                raise NotRecognised("the target has another shape than the output")
            probabilities, used = target, torch.ones(shape[0], dtype=torch.bool, device=target.device)
            counted = used.to(torch.float64)  # products of booleans with numbers would be of torch's default type
        else:
            if target.shape != shape[:1]:
                raise NotRecognised("the target has not one class per sample")
            used = target != given["ignore_index"]
            classes = torch.where(used, target, 0).long()
            counted = used.to(torch.float64) * (1.0 if by_class is None else by_class[classes])
            probabilities = torch.nn.functional.one_hot(classes, n_classes) * used[:, None].to(torch.float64)
        if smoothing:
            probabilities = (1 - smoothing) * probabilities + smoothing / n_classes * used[:, None].to(torch.float64)
        if by_class is not None:
            probabilities = probabilities * by_class
        if bool((probabilities < 0).any()):
            raise NotRecognised("a target of cross_entropy is negative")
        total = float(counted.sum())  # the loss function's own mean is over the weights of the classes
        if total == 0:
            raise NotRecognised("no sample counts")
        return probabilities, reduction.weights(shape[:1], total, target.device).expand(shape[:1])

    return Term(Loss("cross entropy"), output, targets, per_element=False)
