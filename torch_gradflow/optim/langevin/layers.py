"""The layers of a model as parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torch_gradflow.optim.langevin.sampler import Params


def layer_groups(model: nn.Module, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One parameter group per layer, in the order in which the model registered them.

    A layer is a module that has parameters of its own; parameters that several layers share belong to the first.

    Args:
        model: Any module.
        *settings: What the group of the first layer says, that of the second, and so on; the last serves all further layers.
            ``layer_groups(model, {"thermostat": "adaptive-langevin"}, {"thermostat": "langevin"})``

    Raises:
        ValueError: If the model has no parameters, or fewer layers than there are settings.
    """
    seen: set[Tensor] = set()
    layers: list[list[Tensor]] = []
    for module in model.modules():
        own: list[Tensor] = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        if own:
            layers.append(own)
    return with_settings([{"params": layer} for layer in layers], settings)


def partition(params: Params, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers for an optimizer that is given no groups: ``params`` as groups with ``settings`` as in ``layer_groups``.

    Groups stay as they are, and what they say themselves goes before the settings. Bare (or named) tensors, in the order of
    ``model.parameters()``, are cut where a layer begins: before each tensor with two dimensions or more, which is how layers
    with weight and bias follow each other. (A normalisation's vectors so belong to the layer before.)

    Raises:
        TypeError: For a single tensor.
        ValueError: If there are fewer layers than settings.
    """
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, or of groups, not one tensor: give [tensor].")
    entries: list[Any] = list(params)
    if entries and isinstance(entries[0], dict):
        return with_settings(entries, settings)
    layers: list[list[Any]] = []
    for entry in entries:
        tensor = entry[1] if isinstance(entry, tuple) else entry
        if not layers or tensor.ndim >= 2:
            layers.append([])
        layers[-1].append(entry)
    return with_settings([{"params": layer} for layer in layers], settings)


def with_settings(groups: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group with its settings, the last of which serves all that are left; a group's own entries go first."""
    if len(groups) < max(1, len(settings)):
        raise ValueError(
            f"params make up {len(groups)} layer(s), but there are settings for {len(settings)}: give one group for each, "
            "as layer_groups(model) makes them, or use a method that treats all parameters alike, such as Langevin."
        )
    return [{**(settings[min(i, len(settings) - 1)] if settings else {}), **group} for i, group in enumerate(groups)]
