"""Tables of numbers: CSV files and the data sets that scikit-learn ships, as features and targets."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_gradflow.command_line.errors import UsageError

TASKS = ("regression", "classification")
# Those of scikit-learn that need no download.
DATA_SETS = {
    "diabetes": "regression",
    "linnerud": "regression",
    "breast_cancer": "classification",
    "digits": "classification",
    "iris": "classification",
    "wine": "classification",
}
# Whole numbers of so few values may be classes or quantities.
FEW_VALUES = 10


@dataclass(frozen=True)
class Table:
    """Samples with what is to be predicted.

    Attributes:
        source: The name of a data set, or the path of a file.
        features: Names of the columns of ``x``.
        target: Name of what is predicted.
        x: Shape ``(n, d)``, float64.
        y: Numbers of shape ``(n, k)`` in float64 for regression, numbers of classes of shape ``(n,)`` for classification.
        classes: Names of the classes, empty for regression.
        reason: Why it is a regression or a classification.
    """

    source: str
    features: tuple[str, ...]
    target: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    reason: str

    @property
    def task(self) -> str:
        """One of ``TASKS``."""
        return "classification" if self.classes else "regression"


def read_table(source: str, target: str | None = None, drop: Sequence[str] = (), task: str | None = None) -> Table:
    """A data set by name, or a CSV file.

    Args:
        source: One of ``DATA_SETS``, or a path.
        target: The column to predict; None for the last one.
        drop: Columns to leave out.
        task: One of ``TASKS``; None decides by what the target is.

    Raises:
        UsageError: Naming argument, value and remedy.
        ImportError: If scikit-learn is needed and not installed.
    """
    if source in DATA_SETS:
        return _data_set(source, target, drop, task)
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"argument DATA: {source!r} is neither a file nor one of {', '.join(DATA_SETS)}.")
    names, rows = _read_csv(path)
    by_name = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    chosen = names[-1] if target is None else target
    for argument, name in [("--target", chosen), *(("--drop", name) for name in drop)]:
        if name not in by_name:
            raise UsageError(f"argument {argument}: {name!r} is not a column of {source}; those are {', '.join(names)}.")
    if chosen in drop:
        raise UsageError(f"argument --drop: {chosen!r} is the target; name another --target, or keep it.")
    features = [name for name in names if name != chosen and name not in drop]
    if not features:
        raise UsageError(f"argument --drop: no feature is left of {source}; keep at least one column besides {chosen!r}.")
    x = torch.tensor([_numbers(name, by_name[name]) for name in features], dtype=torch.float64).T.contiguous()
    y, classes, reason = _target(chosen, by_name[chosen], task)
    return Table(str(path.resolve()), tuple(features), chosen, x, y, classes, reason)


def _data_set(name: str, target: str | None, drop: Sequence[str], task: str | None) -> Table:
    for argument, given in (("--target", target), ("--drop", drop)):
        if given:
            raise UsageError(
                f"argument {argument}: {name!r} of scikit-learn comes with its target and features; leave it out."
            )
    if task not in (None, DATA_SETS[name]):
        raise UsageError(f"argument --task: {name!r} of scikit-learn is a {DATA_SETS[name]}; leave it out.")
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise ImportError(f"argument DATA: {name!r} needs scikit-learn: pip install 'torch-gradflow[examples]'.") from None
    bunch = getattr(datasets, f"load_{name}")()
    x = torch.tensor(bunch.data, dtype=torch.float64)
    features = tuple(str(feature) for feature in bunch.feature_names)
    reason = "scikit-learn says so"
    if DATA_SETS[name] == "classification":
        classes = tuple(str(c) for c in bunch.target_names)
        return Table(name, features, "class", x, torch.tensor(bunch.target, dtype=torch.int64), classes, reason)
    y = torch.tensor(bunch.target, dtype=torch.float64).reshape(len(x), -1)
    names = getattr(bunch, "target_names", ["target"])
    return Table(name, features, ", ".join(map(str, names)), x, y, (), reason)


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and the rows; a first row without any number is a header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"argument DATA: {str(path)!r} cannot be read as text in UTF-8 ({error}).") from None
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=delimiter) if any(row)]
    header = bool(rows) and not any(_is_number(cell) for cell in rows[0])
    names = rows.pop(0) if header else [str(i + 1) for i in range(len(rows[0]) if rows else 0)]
    if len(rows) < 2 or len(names) < 2:
        raise UsageError(f"argument DATA: {str(path)!r} holds {len(rows)} rows of {len(names)} columns; at least 2 of each.")
    if len(set(names)) < len(names):
        raise UsageError(
            f"argument DATA: {str(path)!r} has several columns of the same name: {', '.join(names)}. Rename them."
        )
    for number, row in enumerate(rows, start=1 + header):
        if len(row) != len(names):
            raise UsageError(f"argument DATA: row {number} of {str(path)!r} has {len(row)} cells, not {len(names)}. Mend it.")
    return names, rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(column: str, cells: list[str]) -> list[float]:
    for row, cell in enumerate(cells, start=1):
        if not _is_number(cell) or not math.isfinite(float(cell)):
            what = repr(cell) if cell else "nothing"
            raise UsageError(
                f"argument DATA: column {column!r} holds {what} in its sample {row}, which is no finite number: leave the "
                "column out (--drop), or mend the file."
            )
    return [float(cell) for cell in cells]


def _target(column: str, cells: list[str], task: str | None) -> tuple[Tensor, tuple[str, ...], str]:
    """The target, names of its classes (none for regression), and why it is the one or the other."""
    empty = [row for row, cell in enumerate(cells, start=1) if not cell]
    if empty:
        raise UsageError(f"argument DATA: the target {column!r} is empty in its sample {empty[0]}: mend the file.")
    different = sorted(set(cells), key=lambda cell: (float(cell), cell) if _is_number(cell) else (math.inf, cell))
    text = [cell for cell in different if not _is_number(cell)]
    whole = not text and all(float(cell).is_integer() for cell in different)
    reason = "as was asked for"
    if task is None:
        if whole and len(different) <= FEW_VALUES:
            raise UsageError(
                f"argument --task: the target {column!r} holds {len(different)} different whole numbers "
                f"({', '.join(different)}), which may be classes or quantities: say --task classification or "
                "--task regression."
            )
        task, reason = ("classification", "the target is text") if text else ("regression", "the target is a number")
    if len(different) < 2:
        raise UsageError(f"argument --target: {column!r} is {different[0]} for all samples; there is nothing to learn.")
    if task == "regression":
        return torch.tensor(_numbers(column, cells), dtype=torch.float64)[:, None], (), reason
    if len(different) > len(cells) / 2:
        raise UsageError(
            f"argument --target: {column!r} has {len(different)} different values in {len(cells)} samples, too many for "
            f"classes{f' ({text[0]!r} is one)' if text else ': say --task regression'}. Name another --target."
        )
    number = {cell: i for i, cell in enumerate(different)}
    return torch.tensor([number[cell] for cell in cells]), tuple(different), reason
