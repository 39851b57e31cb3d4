"""The examples on infinite data run in short form, and show what they are meant to show."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_examples import run


def test_infinite_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figure.png"
    options = ["--samples", "500", "5000", "--seeds", "4", "--time", "3", "--figure", str(figure)]
    run("infinite_data.py", options, monkeypatch)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "to the power" in line)
    assert -1.5 < float(line.split()[-1].rstrip(".")) < -0.6
    assert figure.stat().st_size > 10_000


def test_copy_or_average(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figure.png"
    run("copy_or_average.py", ["--teachers", "3", "--seeds", "1", "--time", "100", "--figure", str(figure)], monkeypatch)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    for row, loss in zip(rows, (0.040593, 0.023222, 0.0), strict=True):
        assert float(row[3]) == 1.0 and float(row[-1]) == pytest.approx(loss, abs=1e-6)
    assert figure.stat().st_size > 10_000


def test_multi_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figure.png"
    run(
        "multi_index.py",
        ["--indices", "3", "--inputs", "5", "--neurons", "4", "--time", "20", "--figure", str(figure)],
        monkeypatch,
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [row[4:] for row in rows] == [["4", "of", "4"]] * 2
    for row in rows:
        assert float(row[3]) == pytest.approx(float(row[2]), abs=1e-6)
    assert figure.stat().st_size > 10_000
