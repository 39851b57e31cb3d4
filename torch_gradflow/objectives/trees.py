"""Nested arguments of torch functions: their leaves, their tensors, their equality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """The counter that every in-place write to a tensor advances; inference tensors have none."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """``function`` of everything in nested tuples, lists, dictionaries and slices."""
    if isinstance(tree, tuple):
        mapped = [map_leaves(function, item) for item in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)
    if isinstance(tree, list):
        return [map_leaves(function, item) for item in tree]
    if isinstance(tree, dict):
        return {key: map_leaves(function, item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_leaves(function, item) for item in (tree.start, tree.stop, tree.step)))
    return function(tree)


def leaves_in(tree: Any) -> Iterator[Any]:
    """Everything in nested tuples (named ones and torch's return types among them), lists, dictionaries and slices."""
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves_in(item)
    elif isinstance(tree, slice):
        yield from leaves_in((tree.start, tree.stop, tree.step))
    else:
        yield tree


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among ``leaves_in``."""
    found: list[Tensor] = []
    _collect_tensors((tree,), found)
    return found


def _collect_tensors(items: Iterable[Any], found: list[Tensor]) -> None:
    # Written out, because it runs for every recorded call.
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list):
            if item:
                _collect_tensors(item, found)
        elif isinstance(item, dict):
            if item:
                _collect_tensors(item.values(), found)
        elif isinstance(item, slice):
            _collect_tensors((item.start, item.stop, item.step), found)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, tensors by identity or value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if a is b:
            return True
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.device == b.device
            and a.shape == b.shape
            and a.layout == b.layout == torch.strided
            and torch.equal(a, b)
        )
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, slice):
        return isinstance(b, slice) and same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return type(a) is type(b) and bool(a == b)


def storage_of(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors, and those that dynamo traces with, have none
        return id(tensor)
