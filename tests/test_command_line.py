"""``python -m torch_gradflow``: what it writes is what the library gives; what makes no sense is named, with exit code 2."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_diabetes, load_iris
from torch import Tensor, nn

import torch_gradflow.command_line.flow as flow_command
from torch_gradflow import GradientFlow, NewtonPolish, integrate
from torch_gradflow.command_line.compare import stages
from torch_gradflow.command_line.errors import UsageError
from torch_gradflow.command_line.main import COMMANDS, main
from torch_gradflow.command_line.networks import Problem, Settings, load_model
from torch_gradflow.command_line.tables import DATA_SETS, read_table

CLASSES = ("ada", "bob")


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """40 samples of y = x₁ − 2 x₂ + noise, with an identifier and a constant."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2)) * [1.0, 30.0] + [5.0, -100.0]
    y = x @ [1.0, -2.0] + rng.normal(size=40)
    lines = [
        "id,one,two,always,y",
        *(f"s{i},{float(a)!r},{float(b)!r},7,{float(c)!r}" for i, ((a, b), c) in enumerate(zip(x, y, strict=True))),
    ]
    path = tmp_path / "numbers.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Two overlapping classes, named in the first of three columns; semicolons."""
    rng = np.random.default_rng(1)
    lines = ["who;a;b"]
    for i in range(30):
        a, b = rng.normal(size=2) + (i % 2)
        lines.append(f"{CLASSES[i % 2]};{float(a)!r};{float(b)!r}")
    path = tmp_path / "words.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The error of a command that ends with code 2."""
    with pytest.raises(SystemExit) as end:
        main([str(part) for part in argv])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return " ".join(shown.split("error: ", 1)[1].split())


def settings(data: object, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "data": str(data), "target": None, "drop": [], "task": None, "scale": "standard", "layers": [3],
        "activation": "tanh", "loss": None, "weight_decay": 0.01, "dtype": "float64",
    }  # fmt: skip
    return Settings(**(values | changes))


def penalised(problem: Problem, network: nn.Module) -> Tensor:
    """The loss as a user would write it."""
    decay = sum(p.square().sum() for p in network.parameters()) * problem.settings.weight_decay / 2
    return problem.loss_fn(network(problem.x), problem.y) + decay


# Tables.


def test_columns_by_name(numbers: Path) -> None:
    table = read_table(str(numbers), drop=["id"])
    assert table.features == ("one", "two", "always") and table.target == "y" and table.task == "regression"
    assert table.reason == "the target is a number"
    with numbers.open() as file:
        rows = list(csv.DictReader(file))
    assert table.x[:, 1].tolist() == [float(row["two"]) for row in rows]
    assert table.y[:, 0].tolist() == [float(row["y"]) for row in rows]
    other = read_table(str(numbers), target="one", drop=["id"])
    assert other.features == ("two", "always", "y") and torch.equal(other.y[:, 0], table.x[:, 0])


def test_columns_by_number_where_there_is_no_header(tmp_path: Path) -> None:
    path = tmp_path / "bare.csv"
    path.write_text("1.5\t2\t0.25\n3\t4.5\t1\n5\t6\t1e-2\n\n")
    table = read_table(str(path), target="2")
    assert table.features == ("1", "3") and table.x.tolist() == [[1.5, 0.25], [3.0, 1.0], [5.0, 0.01]]
    assert table.y.tolist() == [[2.0], [4.5], [6.0]]


def test_text_is_classified(words: Path) -> None:
    table = read_table(str(words), target="who")
    assert table.task == "classification" and table.classes == CLASSES and table.reason == "the target is text"
    assert table.y.tolist() == [0, 1] * 15 and table.features == ("a", "b")


def test_few_whole_numbers_are_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "grades.csv"
    path.write_text("x,grade\n" + "".join(f"{i / 7},{i % 3 + 9}\n" for i in range(12)))
    with pytest.raises(UsageError, match=r"3 different whole numbers \(9, 10, 11\).*--task"):
        read_table(str(path))
    assert read_table(str(path), task="classification").classes == ("9", "10", "11")
    assert read_table(str(path), task="regression").y.shape == (12, 1)


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_sets_of_scikit_learn(name: str) -> None:
    table = read_table(name)
    assert table.task == DATA_SETS[name] and len(table.features) == table.x.shape[1] and len(table.x) == len(table.y)
    assert not table.classes or int(table.y.max()) + 1 == len(table.classes)


def test_what_a_network_sees() -> None:
    """Mean 0 and variance 1 against numpy; as it is with --scale none; a target per loss."""
    data = load_diabetes()
    problem = Problem(settings("diabetes"))
    assert torch.allclose(problem.x, torch.tensor((data.data - data.data.mean(0)) / data.data.std(0)), rtol=1e-12)
    assert torch.allclose(problem.y[:, 0], torch.tensor((data.target - data.target.mean()) / data.target.std()), rtol=1e-12)
    assert problem.sizes == (10, 3, 1)
    assert torch.equal(Problem(settings("diabetes", scale="none")).x, torch.tensor(data.data))
    iris = Problem(settings("iris", layers=[4, 5], dtype="float32"))
    assert iris.sizes == (4, 4, 5, 3) and iris.x.dtype == torch.float32 and iris.settings.loss == "cross-entropy"
    assert iris.y.tolist() == load_iris().target.tolist()
    assert Problem(settings("iris", loss="mse")).y.sum(0).tolist() == [50.0, 50.0, 50.0]
    assert "mean 0 and variance 1 (--scale standard)" in str(iris) and "as they are" in str(
        Problem(settings("iris", scale="none"))
    )


def test_constant_features_stay_finite(numbers: Path) -> None:
    problem = Problem(settings(numbers, drop=["id"]))
    assert problem.x[:, 2].tolist() == [0.0] * 40 and problem.scaling["x_scale"][2] == 1.0


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_objective_is_the_loss_with_decay(decay: float) -> None:
    """Against autograd."""
    problem = Problem(settings("iris", weight_decay=decay))
    network = problem.network()
    objective = problem.objective(network)
    loss, gradient = objective.loss_and_gradient(nn.utils.parameters_to_vector(network.parameters()).detach())
    wanted = penalised(problem, network)
    gradients = torch.autograd.grad(wanted, list(network.parameters()))
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.allclose(gradient, torch.cat([g.reshape(-1) for g in gradients]), rtol=1e-9, atol=1e-12)


# Commands.


def test_compare(numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, runs, figure and models agree; a model's loss is the run's; Adam's is that of the loop by hand."""
    output = tmp_path / "deep" / "out"
    optimizers = ["Adam:lr=0.02", "GradientFlow:lr=5+NewtonPolish"]
    argv = ["compare", numbers, "--drop", "id", "--layers", 3, "--optimizers", *optimizers, "--seeds", 3, 4, "--steps", 20]
    assert main([str(part) for part in [*argv, "--output", output]]) == 0
    shown = capsys.readouterr().out
    assert "40 samples, 3 features; regression of 'y' (the target is a number)" in shown and "Network 3-3-1" in shown
    assert (output / "table.txt").read_text(encoding="utf-8").strip() in shown
    with (output / "runs.csv").open(encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert [(run["name"], run["seed"]) for run in runs] == [(name, seed) for name in optimizers for seed in ("3", "4")]
    assert runs[2]["verdict"] in ("minimum", "saddle") and float(runs[2]["grad_norm"]) < 1e-12
    pixels = np.asarray(Image.open(output / "loss.png").convert("L"))
    assert pixels.shape[0] >= 400 and 0.005 < (pixels < 128).mean() < 0.2
    files = sorted(path.name for path in (output / "models").iterdir())
    assert files == [
        "Adam-lr-0.02-seed3.pt", "Adam-lr-0.02-seed4.pt",
        "GradientFlow-lr-5-NewtonPolish-seed3.pt", "GradientFlow-lr-5-NewtonPolish-seed4.pt",
    ]  # fmt: skip
    problem, network = load_model(output / "models" / files[0])
    assert penalised(problem, network).item() == pytest.approx(float(runs[0]["loss"]), rel=1e-12)
    torch.manual_seed(3)
    by_hand = problem.network()
    adam = torch.optim.Adam(by_hand.parameters(), lr=0.02)
    for _ in range(20):
        adam.zero_grad()
        penalised(problem, by_hand).backward()
        adam.step()
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, rtol=1e-9)


def test_flow_then_polish(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flow is what ``integrate`` gives, and goes on from its checkpoint; the polish ends at a gradient of rounding."""
    flow, polished = tmp_path / "flow", tmp_path / "polished"
    argv = ["flow", words, "--target", "who", "--layers", 3, "--method", "bdf", "--t-end", 50, "--seed", 7, "--output", flow]
    argv = [str(part) for part in argv]
    assert main(argv) == 0
    saved = torch.load(flow / "solution.pt", weights_only=True)
    problem, network = load_model(flow / "model.pt")
    torch.manual_seed(7)
    start = problem.network()
    objective = problem.objective(start)
    theta0 = nn.utils.parameters_to_vector(start.parameters()).detach()
    wanted = integrate(objective, theta0, (0.0, 50.0), method="bdf")
    assert torch.equal(saved["theta"], wanted.theta) and torch.equal(saved["t"], wanted.t) and saved["status"] == "t_end"
    assert torch.equal(nn.utils.parameters_to_vector(network.parameters()), wanted.theta[-1])
    assert (flow / "model.pt").stat().st_size < 20_000 and (flow / "flow.png").stat().st_size > 20_000
    assert saved["evaluations"].shape == (len(saved["t"]), 3)
    shown = capsys.readouterr().out
    assert "classification of 'who' into 2 classes (ada, bob) (the target is text)" in shown
    assert main(argv) == 0 and "goes on" in capsys.readouterr().out
    assert torch.equal(torch.load(flow / "solution.pt", weights_only=True)["theta"], wanted.theta)
    assert "t_span" in refused(capsys, *argv, "--t-end", 60) and (flow / "checkpoint.pt").exists()

    assert main(["polish", str(flow / "model.pt"), "--output", str(polished)]) == 0
    problem, network = load_model(polished / "model.pt")
    loss = penalised(problem, network)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-13 and loss.item() < wanted.loss[-1]
    text = (polished / "certificate.txt").read_text(encoding="utf-8")
    assert "minimum" in text and text.strip() in capsys.readouterr().out
    assert (polished / "spectrum.png").stat().st_size > 10_000
    polish = NewtonPolish(network.parameters(), weight_decay=0.01)
    polish.step(lambda: closure(polish, problem, network))
    low = re.search(r"eigenvalues of the Hessian: (\S+) to", text)
    assert low is not None and float(low[1]) == pytest.approx(float(polish.result.certificate.eigenvalues[0]), rel=1e-4)


def closure(optimizer: torch.optim.Optimizer, problem: Problem, network: nn.Module) -> Tensor:
    optimizer.zero_grad()
    loss = problem.loss_fn(network(problem.x), problem.y)
    loss.backward()
    return loss


def test_an_interrupted_flow_is_kept_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after some steps: exit code 130, all files written; the same command then arrives where it would have."""
    argv = ["flow", "iris", "--layers", "3", "--method", "bdf", "--t-end", "30"]
    assert main([*argv, "--output", str(tmp_path / "whole")]) == 0
    whole = torch.load(tmp_path / "whole" / "solution.pt", weights_only=True)
    n = 0

    def interrupting(*args: Any, **options: Any) -> Any:
        def progress(report: object) -> None:
            nonlocal n
            n += 1
            if n == 15:
                raise KeyboardInterrupt

        return integrate(*args, **options | {"progress": progress})

    argv += ["--output", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(flow_command, "integrate", interrupting)
        assert main(argv) == 130
    cut = torch.load(tmp_path / "cut" / "solution.pt", weights_only=True)
    assert cut["status"] == "interrupted" and 0 < cut["t"][-1] < 30
    assert main(argv) == 0
    assert torch.equal(torch.load(tmp_path / "cut" / "solution.pt", weights_only=True)["theta"], whole["theta"])


def test_flows_end_by_rules(tmp_path: Path) -> None:
    argv = ["flow", "iris", "--layers", "2", "--method", "bdf", "--t-end", "inf", "--output", str(tmp_path)]
    assert main([*argv, "--gradient-norm", "0.05"]) == 0
    saved = torch.load(tmp_path / "solution.pt", weights_only=True)
    assert saved["status"] == "stopped" and saved["grad_norm"][-1] <= 0.05 < saved["grad_norm"][-3]


def test_polish_says_when_it_does_not_arrive(tmp_path: Path) -> None:
    assert main(["flow", "iris", "--layers", "2", "--method", "bdf", "--t-end", "0.1", "--output", str(tmp_path)]) == 0
    assert main(["polish", str(tmp_path / "model.pt"), "--max-iter", "1"]) == 1
    assert "not critical" in (tmp_path / "model-polish" / "certificate.txt").read_text(encoding="utf-8")


def test_a_moved_file_is_named_and_a_changed_one_is_noticed(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = ["flow", str(words), "--target", "who", "--layers", "2", "--t-end", "0.1", "--output", str(tmp_path)]
    assert main([*flow, "--method", "dopri5"]) == 0
    moved = words.rename(tmp_path / "moved.csv")
    assert "neither a file nor" in refused(capsys, "polish", tmp_path / "model.pt")
    _, network = load_model(tmp_path / "model.pt", str(moved))
    assert sum(p.numel() for p in network.parameters()) == 12
    lines = moved.read_text().splitlines()
    moved.write_text("\n".join([*lines[:-1], "bob;100;100"]))
    message = refused(capsys, "polish", tmp_path / "model.pt", "--data", moved)
    assert "argument --data" in message and "the loss is not the one that was saved" in message


def test_optimizers_by_name() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    adam, flow, polish = (stages(spec) for spec in ("Adam", "GradientFlow:lr=2.5", "GradientFlow+NewtonPolish"))
    assert adam[0](parameters).param_groups[0]["lr"] == 1e-3 and len(adam) == 1
    made = flow[0](parameters)
    assert isinstance(made, GradientFlow) and made.param_groups[0]["lr"] == 2.5
    assert [type(make(parameters)) for make in polish] == [GradientFlow, NewtonPolish]


def test_info_as_a_process() -> None:
    argv = [sys.executable, "-m", "torch_gradflow", "info"]
    found = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120).stdout
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", found, re.MULTILINE) and "cpu: " in found
    assert "compiled by Numba" in found
    for name in ("bdf-secant", "dopri5", "trust-region-lanczos", "torchdiffeq"):
        assert name in found


def test_info_without_numba_and_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch_gradflow.perceptron.compiled", None)
    monkeypatch.setattr("torch_gradflow.command_line.info.version", lambda name: None)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "the compiled kernels cannot be had" in shown and "pip install 'torch-gradflow[plotting]'" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: python -m torch_gradflow {command}" in shown and "None" not in shown


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["compare"], "required: DATA"),
        (["compare", "nowhere.csv"], "argument DATA: 'nowhere.csv' is neither a file nor one of diabetes"),
        (["compare", "iris", "--layers", "0"], "argument --layers: the value must be at least 1, not 0"),
        (["compare", "iris", "--layers", "two"], "argument --layers: 'two' is not a whole number"),
        (["compare", "iris", "--weight-decay", "-1"], "argument --weight-decay: the value must be a number >= 0"),
        (["compare", "iris", "--seconds", "x"], "argument --seconds: 'x' is not a number"),
        (["compare", "iris", "--activation", "step"], "argument --activation: invalid choice: 'step'"),
        (["compare", "iris", "--loss", "huber"], "argument --loss: 'huber' does not go with classification"),
        (["compare", "diabetes", "--loss", "cross-entropy"], "'cross-entropy' does not go with regression; take mse or huber"),
        (["compare", "iris", "--task", "regression"], "argument --task: 'iris' of scikit-learn is a classification"),
        (["compare", "iris", "--target", "petal"], "argument --target: 'iris' of scikit-learn comes with its target"),
        (["compare", "iris", "--optimizers", "Adamant"], "argument --optimizers: 'Adamant' is not one of Adam, SGD"),
        (["compare", "iris", "--optimizers", "Adam:lr=0"], "argument --optimizers: lr in 'Adam:lr=0': the value must be"),
        (["compare", "iris", "--optimizers", "Adam:beta=0"], "argument --optimizers: 'beta=0' is no setting of Adam"),
        (["compare", "{numbers}"], "argument DATA: column 'id' holds 's0' in its sample 1, which is no finite number"),
        (["compare", "{numbers}", "--target", "z"], "argument --target: 'z' is not a column of"),
        (["compare", "{numbers}", "--drop", "z"], "argument --drop: 'z' is not a column of"),
        (["compare", "{numbers}", "--drop", "y"], "argument --drop: 'y' is the target"),
        (["compare", "{numbers}", "--drop", "id", "one", "two", "always"], "argument --drop: no feature is left"),
        (
            ["compare", "{numbers}", "--drop", "id", "--target", "always", "--task", "regression"],
            "'always' is 7 for all samples",
        ),
        (["compare", "{numbers}", "--target", "id"], "argument --target: 'id' has 40 different values in 40 samples"),
        (["flow", "{numbers}", "--drop", "id", "--task", "classification"], "too many for classes: say --task regression"),
        (["flow", "iris", "--t-end", "inf"], "argument --t-end: inf needs an end of another kind"),
        (["flow", "iris", "--t-end", "0"], "argument --t-end: the value must be a number > 0"),
        (["flow", "iris", "--rtol", "1"], "argument --rtol: the value must be a number > 0, < 1"),
        (["flow", "iris", "--method", "euler"], "argument --method: invalid choice: 'euler'"),
        (["flow", "iris", "--output", "{numbers}"], "argument --output: "),
        (["polish", "{numbers}"], "is no model that 'compare', 'flow' or 'polish' saved"),
        (["polish", "nowhere.pt"], "argument MODEL: 'nowhere.pt' is no model"),
    ],
)
def test_bad_arguments_are_named(
    argv: list[str], what: str, numbers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written."""
    monkeypatch.chdir(numbers.parent)
    assert what in refused(capsys, *(part.format(numbers=numbers.name) for part in argv))
    assert [path.name for path in numbers.parent.iterdir()] == [numbers.name]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "holds 0 rows of 0 columns"),
        ("a,b\n1,2\n", "holds 1 rows of 2 columns"),
        ("a\n1\n2\n", "2 rows of 1 columns"),
        ("a,a\n1,2\n3,4\n", "several columns of the same name: a, a"),
        ("a,b\n1,2\n3\n", "row 3 of 'table.csv' has 1 cells, not 2"),
        ("a,b\n1,\n3,4\n", "the target 'b' is empty in its sample 1"),
        ("a,b\n,1.5\n3,4\n", "column 'a' holds nothing in its sample 1"),
        ("a,b\n1,1.5\ninf,4\n", "column 'a' holds 'inf' in its sample 2"),
        (b"\xff\xfe\x00", "cannot be read as text in UTF-8"),
    ],
)
def test_bad_files_are_named(
    content: str | bytes, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert what in refused(capsys, "compare", "table.csv")


@pytest.mark.parametrize(
    ("module", "argv", "what"),
    [
        ("sklearn.datasets", ["compare", "iris"], r"torch-gradflow[examples]"),
        ("matplotlib", ["flow", "iris", "--t-end", "0.1"], r"torch-gradflow[plotting]"),
    ],
)
def test_missing_packages_are_named_before_anything_runs(
    module: str,
    argv: list[str],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert what in refused(capsys, *argv)
    assert not list(tmp_path.iterdir())
