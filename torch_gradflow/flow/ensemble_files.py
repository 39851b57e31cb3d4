"""Runs of an ensemble on disk: one file each, complete or absent, that knows of which start and settings it is the result."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.flow.ensemble_worker import Outcome, Settings
from torch_gradflow.flow.solution import Choice, FlowSolution
from torch_gradflow.flow.stopping import StoppingRule

FORMAT = 1
# Runs of these are tried again.
UNFINISHED = ("failed", "interrupted")


def path_of(directory: Path, index: int) -> Path:
    """The file of one run."""
    return directory / f"run-{index:05d}.pt"


def make_directory(directory: str | os.PathLike[str]) -> Path:
    """The directory, made if need be.

    Raises:
        TypeError: If it is no path.
        ValueError: If it cannot be made or written to.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory must be a path, not {directory!r}.")
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"directory={str(path)!r} cannot be made ({error}); choose another one.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"directory={str(path)!r} cannot be written to; choose another one, or change its permissions.")
    return path


def fingerprint(settings: Settings, start: Tensor) -> dict[str, str]:
    """What tells results apart, readable where it is short."""
    values = {field.name: _readable(getattr(settings, field.name)) for field in fields(settings)}
    rows = start.detach().cpu().contiguous()
    values["start"] = f"{rows.dtype} {tuple(rows.shape)} {_digest(rows.numpy().tobytes())}"
    return values


def save(directory: Path, index: int, outcome: Outcome, mark: dict[str, str]) -> None:
    """Write a run's file: beside it first, then renamed, so that there is never half a file of that name."""
    every = {field.name: getattr(outcome.solution, field.name) for field in fields(FlowSolution)}
    solution: dict[str, Any] = {name: value for name, value in every.items() if isinstance(value, Tensor | float | int | str)}
    solution["choices"] = [[c.t, c.method, c.reason] for c in outcome.solution.choices]
    record = {"format": FORMAT, "fingerprint": mark, "initial_loss": outcome.initial_loss, "solution": solution}
    target = path_of(directory, index)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        torch.save(record, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def load(directory: Path, index: int, mark: dict[str, str], device: torch.device) -> Outcome | None:
    """The outcome of a finished run, or None where there is none.

    Raises:
        ValueError: If the file is the result of other settings or another start, or cannot be read.
    """
    path = path_of(directory, index)
    if not path.exists():
        return None
    remedy = "Use another directory, or delete that file."
    try:
        record: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        version, found = record["format"], record["fingerprint"]
        outcome = _outcome(record) if version == FORMAT else None
    except Exception as error:
        raise ValueError(f"{path} is not a run of an ensemble ({type(error).__name__}). {remedy}") from error
    if outcome is None:
        raise ValueError(f"{path} was written by another version of torch_gradflow (format {version}). {remedy}")
    if outcome.solution.status in UNFINISHED:
        return None
    other = [name for name in mark if found.get(name) != mark[name]]
    if other:
        differences = ", ".join(f"{name} = {found.get(name)} there and {mark[name]} now" for name in other)
        raise ValueError(f"{path} is the result of other arguments: {differences}. {remedy}")
    return outcome


def _outcome(record: dict[str, Any]) -> Outcome:
    parts = dict(record["solution"])
    parts |= {name: parts[name].cpu() for name in ("t", "loss", "grad_norm")}
    parts["choices"] = tuple(Choice(*choice) for choice in parts["choices"])
    return Outcome(FlowSolution(**parts), record["initial_loss"])


def _readable(value: Any) -> str:
    if isinstance(value, StoppingRule):
        return _rule(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        text = f"({', '.join(map(_readable, value))})"
        return text if len(text) < 200 else f"{len(value)} values {_digest(text.encode())}"
    return repr(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else _nameless(repr(value))


def _nameless(text: str) -> str:
    """Without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _rule(rule: StoppingRule) -> str:
    """A rule by its class and its data (the usual ``repr`` of a class holds an address)."""
    data = {f.name: getattr(rule, f.name) for f in fields(rule)} if is_dataclass(rule) else getattr(rule, "__dict__", {})
    return f"{type(rule).__name__}({', '.join(f'{name}={_readable(value)}' for name, value in data.items())})"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
