"""Files from which an interrupted integration goes on."""

from __future__ import annotations

import os
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from torch_gradflow.flow.dense import Clock
from torch_gradflow.flow.method import Memory
from torch_gradflow.flow.solution import Knot

VERSION = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state; a file that was there stays whole until the new one is."""
    partial = path.with_name(path.name + ".partial")
    torch.save({"version": VERSION, **state}, partial)
    os.replace(partial, path)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a state that was saved under the same settings.

    Raises:
        ValueError: If the file is not of such a run.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"checkpoint={str(path)!r} cannot be read ({type(error).__name__}); delete it to start anew."
        ) from error
    if not isinstance(state, dict) or state.get("version") != VERSION or "settings" not in state:
        raise ValueError(f"checkpoint={str(path)!r} is not a checkpoint of this version; delete it to start anew.")
    for name, value in settings.items():
        kept = state["settings"].get(name)
        same = _equal(kept, value) if isinstance(value, torch.Tensor) else kept == value
        if not same:
            shown = "another one" if isinstance(value, torch.Tensor) else f"{kept!r}, not {value!r}"
            raise ValueError(
                f"checkpoint={str(path)!r} belongs to another run: its {name} is {shown}. Delete it, or name another file."
            )
    return state


def _equal(kept: Any, value: torch.Tensor) -> bool:
    return isinstance(kept, torch.Tensor) and kept.dtype == value.dtype and torch.equal(kept, value)


def pack_knot(knot: Knot) -> list[Any]:
    """A knot as plain values and tensors on the CPU."""
    return [knot.t, knot.theta.cpu(), torch.as_tensor(knot.loss).cpu(), knot.gradient.cpu()]


def unpack_knot(packed: list[Any], device: torch.device) -> Knot:
    """The inverse of ``pack_knot``."""
    t, theta, loss, gradient = packed
    return Knot(t, theta.to(device), loss.to(device), gradient.to(device))


def pack_memory(memory: Memory | None) -> list[Any] | None:
    """A memory as plain values and tensors on the CPU."""
    if memory is None:
        return None
    curvature = None if memory.curvature is None else memory.curvature.cpu()
    clock = None if memory.clock is None else list(astuple(memory.clock))
    return [list(memory.times), memory.theta.cpu(), memory.degree, curvature, list(memory.numbers), clock]


def unpack_memory(packed: list[Any] | None, device: torch.device) -> Memory | None:
    """The inverse of ``pack_memory``."""
    if packed is None:
        return None
    times, theta, degree, curvature, numbers, clock = packed
    return Memory(
        tuple(times),
        theta.to(device),
        degree,
        None if curvature is None else curvature.to(device),
        tuple(numbers),
        None if clock is None else Clock(*clock),
    )
