"""Examples run: here the one whose loops are its own; those of ``plain_loop.py`` are compared in ``test_loops.py``."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An example as a program, which sets the number of threads."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    n_threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        torch.set_num_threads(n_threads)


def test_comparison_of_the_paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figure.png"
    options = ["--seconds", "0.05", "--seeds", "1", "--samples", "100", "--rtol", "1e-4"]
    run("paper_ode_comparison.py", [*options, "--figure", str(figure)], monkeypatch)
    rows = {
        line[:20].strip(): [float(cell) for cell in line[20:].split()] for line in capsys.readouterr().out.splitlines()[3:-2]
    }
    # Exact flows stay near the reference, and the others leave it.
    loss, _, t_m, d_m, _ = rows["bdf"]
    assert loss < rows["descent 1e-3"][0] and t_m > rows["descent 1e-3"][2] and d_m < 1e-6 < rows["Adam 1e-2"][3]
    assert figure.stat().st_size > 10_000


def test_final_losses_of_the_paper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Second derivatives come to zero loss where Adam hardly begins."""
    figure = tmp_path / "figure.png"
    run("paper_final_loss.py", ["--seconds", "0.5", "--seeds", "1", "--samples", "100", "--figure", str(figure)], monkeypatch)
    rows = {line[:20].strip(): float(line[20:].split()[0]) for line in capsys.readouterr().out.splitlines()[3:-2]}
    assert rows["auto"] < 1e-20 < 1e-4 < rows["Adam 1e-3"]
    assert figure.stat().st_size > 10_000


def test_flows_of_mini_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SGD diverges at large rates; flows do not, and that of all data does not depend on the rate."""
    figure = tmp_path / "figure.png"
    run("minibatch_flow.py", ["--time", "5", "--figure", str(figure)], monkeypatch)
    rows = {
        line[:20].strip(): [float(cell) for cell in line[20:].split()] for line in capsys.readouterr().out.splitlines()[3:-2]
    }
    sgd, of_batches, of_all = (rows[name] for name in ("SGD", "flow of each batch", "flow of all data"))
    assert math.isnan(sgd[-1]) and not any(math.isnan(loss) for loss in (*of_batches, *of_all))
    assert max(of_all[:2]) < 1.01 * min(of_all[:2]) and of_all[-1] < of_batches[-1]
    assert figure.stat().st_size > 10_000


def test_several_optimizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figure.png"
    run("compare_optimizers.py", ["--steps", "3", "--figure", str(figure)], monkeypatch)
    rows = {line[:25].strip(): line[25:].split() for line in capsys.readouterr().out.splitlines()[1:-2]}
    assert rows["GradientFlow+NewtonPolish"][-1] == "minimum" and float(rows["GradientFlow+NewtonPolish"][1]) < 1e-13
    assert rows["Adam"][-2:] == ["not", "critical"]
    assert figure.stat().st_size > 10_000
