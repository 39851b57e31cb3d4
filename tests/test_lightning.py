"""The callbacks: what they log, when they stop, what they polish; each against the same thing done by hand in a plain loop."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import RECORDED, flat, make_closure, teacher_student
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from torch_gradflow import GradientFlow, ModuleObjective, NewtonPolish, hessian_spectrum, minimize
from torch_gradflow.flow.methods import METHODS
from torch_gradflow.objectives.regularized import Penalties, Regularized

lightning = pytest.importorskip("lightning")
pytorch_lightning = pytest.importorskip("pytorch_lightning")

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402

from torch_gradflow.lightning import FlowMonitor, NewtonPolishCallback, StopAtFixedPoint  # noqa: E402

mse = nn.functional.mse_loss
DECAY = 0.01
Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """33 parameters, 40 samples."""
    return teacher_student(0, n_samples=40)


def flow(module: nn.Module) -> GradientFlow:
    """The one line; regularised, so that there is a minimum; a method whose steps do not depend on the clock, as auto's do."""
    return GradientFlow(module.parameters(), lr=1.0, weight_decay=DECAY, method="bdf")


class Regression(lightning.LightningModule):
    """A module as users write it: several parameter groups or not, ``self.log``, validation."""

    def __init__(self, make: Optimizers = flow, batch_size: int = 40, **loader: Any) -> None:
        super().__init__()
        self.net, self.x, self.y = problem()
        self.make, self.batch_size, self.loader = make, batch_size, loader
        self.path: list[Tensor] = []
        self.validated: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        return self.make(self)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch_size, **self.loader)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x[:10], self.y[:10]), batch_size=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = mse(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.validated.append(flat(self.net))
        self.log("val_loss", mse(self.net(x), y))

    def on_train_batch_end(self, *_: Any) -> None:
        self.path.append(flat(self.net))


class Manual(Regression):
    """The same under manual optimization."""

    def __init__(self, make: Optimizers = flow) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = mse(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss)


def trainer_of(package: Any, root: Path, callbacks: list[Any], *, epochs: int = 3, **settings: Any) -> Any:
    """A quiet Trainer on the CPU."""
    where = {} if "strategy" in settings else {"accelerator": "cpu", "devices": 1}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return package.Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=root,
        callbacks=callbacks,
        **{**where, **quiet, **settings},
    )


def fit(module: Any, root: Path, *callbacks: Any, checkpoint: Path | None = None, **settings: Any) -> Any:
    """Train."""
    trainer = trainer_of(lightning, root, list(callbacks), **settings)
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


def csv_logger(package: Any, root: Path) -> Any:
    """CSVLogger of that package."""
    return (CSVLogger if package is lightning else pytorch_lightning.loggers.CSVLogger)(root)


def plain_flow(n_steps: int) -> tuple[GradientFlow, nn.Module, list[float]]:
    """The plain loop; the optimizer, its model, and the loss at the start of each step."""
    model, x, y = problem()
    optimizer = flow(model)
    closure = make_closure(optimizer, model, x, y)
    return optimizer, model, [optimizer.step(closure).item() for _ in range(n_steps)]


def logged(root: Path) -> dict[str, list[float]]:
    """What CSVLogger wrote, by name."""
    (path,) = root.rglob("metrics.csv")
    columns: dict[str, list[float]] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        for name, value in row.items():
            if value:
                columns.setdefault(name, []).append(float(value))
    return columns


# Import


def test_lightning_is_imported_only_when_asked_for() -> None:
    """And where it is missing, the error names the extra."""
    code = (
        "import sys, torch_gradflow\n"
        "assert 'lightning' not in sys.modules and 'pytorch_lightning' not in sys.modules\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "try:\n    import torch_gradflow.lightning\n"
        "except ImportError as error:\n    sys.exit('torch-gradflow[lightning]' not in str(error))\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# FlowMonitor


def test_monitor_logs_what_the_optimizer_did(tmp_path: Path) -> None:
    trainer = fit(Regression(), tmp_path, FlowMonitor(), logger=CSVLogger(tmp_path))
    columns, (optimizer,) = logged(tmp_path), trainer.optimizers
    wanted, model, _ = plain_flow(3)
    assert columns["flow/time"] == pytest.approx([1.0, 2.0, 3.0])
    theta, (_, x, y) = flat(model), problem()
    loss = mse(model(x), y).item() + DECAY / 2 * float(theta @ theta)
    assert columns["flow/loss_step"][-1] == pytest.approx(loss, rel=1e-6)
    for name in ("grad_norm", "step_size", "order", "n_grad", "n_hvp", "n_hessian", "n_accepted", "n_rejected"):
        assert columns[f"flow/{name}"][-1] == pytest.approx(getattr(optimizer.stats, name), rel=1e-6), name
        assert getattr(optimizer.stats, name) == pytest.approx(getattr(wanted.stats, name), rel=1e-6), name
    assert list(METHODS)[int(columns["flow/method"][-1])] == optimizer.stats.method
    assert {"flow/time", "flow/loss_step", "flow/grad_norm"} <= set(trainer.progress_bar_metrics)


def test_monitor_changes_nothing(tmp_path: Path) -> None:
    watched, alone = Regression(batch_size=20, shuffle=True), Regression(batch_size=20, shuffle=True)
    for module, callbacks in ((watched, [FlowMonitor(hessian_every_n_steps=1)]), (alone, [])):
        torch.manual_seed(0)
        fit(module, tmp_path, *callbacks)
    assert all(torch.equal(a, b) for a, b in zip(watched.path, alone.path, strict=True))


def test_epoch_losses_are_those_at_accepted_points(tmp_path: Path) -> None:
    """Both what the module logs at the start of steps, and what the monitor logs at their ends."""
    fit(Regression(), tmp_path, FlowMonitor(), logger=CSVLogger(tmp_path))
    columns = logged(tmp_path)
    _, _, losses = plain_flow(3)
    # The contract is checked on the first step, at a point next to the start.
    assert columns["loss_epoch"] == pytest.approx(losses, rel=1e-5)
    assert columns["flow/loss_epoch"] == pytest.approx(columns["flow/loss_step"], rel=1e-6)


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_the_monitors_epoch_loss_holds_no_trial_points(tmp_path: Path, engine: str) -> None:
    """Over mini-batches, the mean of what the steps of a plain loop over them end with; whatever the engine."""

    def make(module: nn.Module) -> GradientFlow:
        return GradientFlow(module.parameters(), lr=0.3, method="dopri5", engine=engine)

    fit(Regression(make, batch_size=20), tmp_path, FlowMonitor(), epochs=1, logger=CSVLogger(tmp_path))
    model, x, y = problem()
    optimizer, ends = GradientFlow(model.parameters(), lr=0.3, method="dopri5", engine=engine), []
    for rows in (slice(0, 20), slice(20, 40)):
        optimizer.step(make_closure(optimizer, model, x[rows], y[rows]))
        ends.append(mse(model(x[rows]), y[rows]).item())
    assert logged(tmp_path)["flow/loss_epoch"] == pytest.approx([sum(ends) / 2], rel=1e-5)


def test_monitor_under_manual_optimization(tmp_path: Path) -> None:
    module = Manual()
    monitor = FlowMonitor(hessian_every_n_steps=3, loss=lambda module, batch: mse(module.net(batch[0]), batch[1]))
    fit(module, tmp_path, monitor, logger=CSVLogger(tmp_path))
    columns = logged(tmp_path)
    assert columns["flow/time"] == pytest.approx([1.0, 2.0, 3.0])
    spectrum = hessian_spectrum(module.net, mse, (module.x, module.y))
    assert columns["flow/largest_eigenvalue"] == pytest.approx([spectrum[-1].item()], rel=1e-6)


@pytest.mark.parametrize("batch_size", [40, 15])
def test_monitor_logs_extreme_eigenvalues_over_the_whole_training_set(tmp_path: Path, batch_size: int) -> None:
    """Those of the mean loss over all samples, whatever the batches."""
    module = Regression(batch_size=batch_size)
    steps = -(-40 // batch_size)
    fit(module, tmp_path, FlowMonitor(hessian_every_n_steps=steps), epochs=2, logger=CSVLogger(tmp_path))
    columns = logged(tmp_path)
    spectrum = hessian_spectrum(module.net, mse, (module.x, module.y))
    assert len(columns["flow/largest_eigenvalue"]) == 2
    assert columns["flow/largest_eigenvalue"][-1] == pytest.approx(spectrum[-1].item(), rel=1e-6)
    assert columns["flow/smallest_eigenvalue"][-1] == pytest.approx(spectrum[0].item(), rel=1e-4, abs=1e-7)


def test_monitor_numbers_several_flows(tmp_path: Path) -> None:
    class Two(Manual):
        def configure_optimizers(self) -> Any:
            return [GradientFlow(self.net[0].parameters()), GradientFlow(self.net[2].parameters(), lr=0.5)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(mse(self.net(batch[0]), batch[1]))
                optimizer.step()

    trainer = fit(Two(), tmp_path, FlowMonitor(), epochs=1)
    assert float(trainer.callback_metrics["flow0/time"]) == 1.0
    assert float(trainer.callback_metrics["flow1/time"]) == 0.5


def test_choices_of_auto_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="torch_gradflow.lightning.monitor")
    trainer = fit(Regression(lambda m: GradientFlow(m.parameters(), lr=1.0)), tmp_path, FlowMonitor())
    choices = trainer.optimizers[0].stats.choices
    told = [record.getMessage() for record in caplog.records if record.name == "torch_gradflow.lightning.monitor"]
    assert len(told) == len(choices) > 0
    assert all(choice.method in text and choice.reason in text for choice, text in zip(choices, told, strict=True))


# StopAtFixedPoint


def test_training_stops_at_a_fixed_point(tmp_path: Path) -> None:
    stop = StopAtFixedPoint(1e-5)
    module = Regression(lambda m: GradientFlow(m.parameters(), lr=100.0, weight_decay=DECAY, method="bdf"))
    trainer = fit(module, tmp_path, stop, epochs=200)
    stats = trainer.optimizers[0].stats
    assert trainer.current_epoch < 200 and stats.grad_norm <= 1e-5
    assert f"{stats.grad_norm:.2e}" in stop.reason and "gtol = 1.0e-05" in stop.reason
    # The gradient of the regularised loss there, by autograd.
    loss = mse(module.net(module.x), module.y) + DECAY / 2 * sum(p.square().sum() for p in module.parameters())
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, list(module.parameters()))) <= 1.001e-5


def test_training_does_not_stop_where_one_batch_has_a_gradient(tmp_path: Path) -> None:
    """The second of two batches is at its fixed point from the start."""

    class Half(Regression):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx == 0 else 1e-30 * loss

    stop = StopAtFixedPoint(1e-6)
    trainer = fit(Half(lambda m: GradientFlow(m.parameters(), lr=0.1), batch_size=20), tmp_path, stop, epochs=2)
    assert trainer.current_epoch == 2 and stop.reason == ""


# NewtonPolishCallback


@pytest.fixture(scope="module")
def by_hand() -> Any:
    """Two steps of the flow of all 40 samples, then ``minimize`` on them, regularised as the flow is."""
    _, model, _ = plain_flow(2)
    base = ModuleObjective(model, mse, problem()[1:])
    objective = Regularized(base, Penalties(weight_decay=torch.full((33,), DECAY, dtype=torch.float64)))
    return minimize(objective, flat(model))


@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning"])
def test_polish_at_the_end_of_fit(tmp_path: Path, by_hand: Any, name: str) -> None:
    """The minimum of the regularised loss; validated, logged and saved; with the Trainer of either package."""
    package = {"lightning": lightning, "pytorch_lightning": pytorch_lightning}[name]
    polish, monitor = NewtonPolishCallback(), FlowMonitor()

    class Module(package.LightningModule):
        configure_optimizers, training_step = Regression.configure_optimizers, Regression.training_step
        train_dataloader, val_dataloader = Regression.train_dataloader, Regression.val_dataloader
        validation_step = Regression.validation_step

        def __init__(self) -> None:
            super().__init__()
            (self.net, self.x, self.y), self.make, self.batch_size, self.loader = problem(), flow, 40, {}
            self.validated: list[Tensor] = []

    module = Module()
    loggers = csv_logger(package, tmp_path)
    trainer = trainer_of(package, tmp_path, [monitor, polish], epochs=2, logger=loggers)
    trainer.fit(module)
    assert polish.result.status == "converged" and polish.result.certificate.kind == "minimum"
    assert torch.allclose(polish.result.theta, by_hand.theta, rtol=1e-9)
    assert torch.equal(flat(module.net), polish.result.theta)
    assert len(module.validated) == 3 and torch.equal(module.validated[-1], polish.result.theta)
    value = mse(module.net(module.x[:10]), module.y[:10]).item()
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(value)
    columns = logged(tmp_path)
    assert columns["polish/grad_norm"] == [polish.result.grad_norm] and columns["val_loss"][-1] == pytest.approx(value)
    saved = torch.load(polish.checkpoint_path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("loader", [{"shuffle": True}, {"drop_last": True}, {"sampler": SubsetRandomSampler(range(40))}])
def test_polish_takes_every_sample_once(tmp_path: Path, loader: dict[str, Any]) -> None:
    """Shuffled or not, in mini-batches of unequal size: the minimum of the loss over all samples."""
    torch.manual_seed(0)
    module, polish = Regression(batch_size=15, **loader), NewtonPolishCallback(filename=None)
    fit(module, tmp_path, polish, epochs=2)
    loss = mse(module.net(module.x), module.y) + DECAY / 2 * sum(p.square().sum() for p in module.parameters())
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    assert polish.result.status == "converged" and max(float(g.abs().max()) for g in gradients) < 1e-12
    assert polish.checkpoint_path is None


def test_polish_after_adam_with_everything_of_a_usual_run(tmp_path: Path) -> None:
    """Any optimizer, an lr schedule that ends at zero, EarlyStopping, ModelCheckpoint: the polished file lies beside its."""

    class Usual(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=3)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
            decay = DECAY / 2 * sum(p.square().sum() for p in self.parameters())
            return {"loss": super().training_step(batch, batch_idx) + decay}

    keep = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_last=True)
    polish = NewtonPolishCallback(gtol=1e-12)
    module = Usual()
    fit(module, tmp_path, EarlyStopping("val_loss"), keep, polish, epochs=4, enable_checkpointing=True)
    assert polish.result.status == "converged" and polish.checkpoint_path == tmp_path / "kept" / "polished.ckpt"
    restored = Usual.load_from_checkpoint(polish.checkpoint_path)
    assert torch.equal(flat(restored.net), polish.result.theta)


def test_polish_when_the_flow_has_converged(tmp_path: Path) -> None:
    """Together with StopAtFixedPoint; under manual optimization with a loss of its own; barrier of the flow included."""

    def make(module: nn.Module) -> GradientFlow:
        return GradientFlow(module.parameters(), lr=100.0, weight_decay=DECAY, max_norm=0.1, method="bdf")

    stop = StopAtFixedPoint(1e-4)
    polish = NewtonPolishCallback(loss=lambda module, batch: mse(module.net(batch[0]), batch[1]))
    module = Manual(make)
    trainer = fit(module, tmp_path, stop, polish, epochs=200)
    theta = flat(module.net)
    barrier = (theta.square().sum() / 66 - 0.1).clamp(min=0) ** 3 / 3
    assert trainer.current_epoch < 200 and polish.result.status == "converged" and barrier > 0
    loss = mse(module.net(module.x), module.y).item() + DECAY / 2 * float(theta.square().sum()) + float(barrier)
    assert polish.result.loss == pytest.approx(loss, rel=1e-12)
    assert polish.result.n_iter <= 5


def test_frozen_parameters_are_not_polished(tmp_path: Path) -> None:
    def make(module: Any) -> GradientFlow:
        groups = [{"params": module.net[0].parameters(), "lr": 0.0}, {"params": module.net[2].parameters()}]
        return GradientFlow(groups, lr=1.0, weight_decay=DECAY)

    module, polish = Regression(make), NewtonPolishCallback(filename=None)
    before = module.net[0].weight.detach().clone()
    fit(module, tmp_path, polish, epochs=1)
    assert torch.equal(module.net[0].weight, before) and polish.result.theta.shape == (9,)
    assert polish.result.status == "converged"


# Refusals, before training starts


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Only its name: the real one needs a package and GPUs."""


@pytest.fixture
def untouched() -> Iterator[Regression]:
    """A module that must not be trained."""
    module = Regression()
    yield module
    assert not module.path and torch.equal(flat(module.net), flat(problem()[0]))


REFUSED = {
    "accumulate_grad_batches": {"accumulate_grad_batches": 2},
    "gradient_clip_val": {"gradient_clip_val": 1.0},
    "GradScaler": {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
    "shards": {"strategy": DeepSpeedStrategy(torch.device("cpu"))},
}


@pytest.mark.parametrize("setting", REFUSED)
@pytest.mark.parametrize("callback", [FlowMonitor, StopAtFixedPoint, NewtonPolishCallback])
def test_settings_that_cannot_be_right_are_refused(
    tmp_path: Path, untouched: Regression, setting: str, callback: Callable[[], Any]
) -> None:
    with pytest.raises(ValueError, match=setting):
        fit(untouched, tmp_path, callback(), **REFUSED[setting])


def test_accumulation_and_clipping_are_allowed_for_other_optimizers(tmp_path: Path) -> None:
    module = Regression(lambda m: torch.optim.SGD(m.parameters(), lr=0.01))
    polish = NewtonPolishCallback(max_iter=1, certificate=False, filename=None)
    fit(module, tmp_path, polish, epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert polish.result.n_iter == 1


@pytest.mark.parametrize("callback", [FlowMonitor, StopAtFixedPoint])
def test_a_flow_is_demanded(tmp_path: Path, callback: Callable[[], Any]) -> None:
    module = Regression(lambda m: torch.optim.Adam(m.parameters()))
    with pytest.raises(ValueError, match="the optimizers are Adam"):
        fit(module, tmp_path, callback())
    assert not module.path


def test_manual_optimization_needs_a_loss(tmp_path: Path) -> None:
    for callback in (FlowMonitor(hessian_every_n_steps=1), NewtonPolishCallback()):
        module = Manual()
        with pytest.raises(ValueError, match=r"loss=function of \(module, batch\)"):
            fit(module, tmp_path, callback)
        assert not module.path


def test_a_training_set_that_cannot_be_known_is_refused(tmp_path: Path, untouched: Regression) -> None:
    untouched.loader = {"sampler": WeightedRandomSampler([1.0] * 40, 40)}
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        fit(untouched, tmp_path, NewtonPolishCallback())


def test_a_hessian_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    class Wide(Regression):
        def configure_optimizers(self) -> Any:
            return GradientFlow(nn.Linear(2000, 2000).parameters())

    module = Wide()
    with pytest.raises(MemoryError, match="dense Hessian"):
        fit(module, tmp_path, NewtonPolishCallback(method="trust-region"))
    assert not module.path


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: FlowMonitor(hessian_every_n_steps=0), "hessian_every_n_steps"),
        (lambda: StopAtFixedPoint(-1.0), "gtol"),
        (lambda: NewtonPolishCallback(gtol=-1.0), "gtol"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        make()


# Resuming


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("method", ["bdf", "bdf-secant", "dopri5"])
def test_model_checkpoint_resumes_in_the_middle_of_a_flow_bit_for_bit(tmp_path: Path, method: str) -> None:
    """Plain ModelCheckpoint, a schedule and two groups: nothing of our own is needed."""

    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.2}]
            optimizer = GradientFlow(groups, lr=0.4, method=method)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]

    whole, rest = Scheduled(batch_size=20), Scheduled(batch_size=20)
    for module, checkpoint in ((whole, None), (rest, tmp_path / "step=4.ckpt")):
        keep = ModelCheckpoint(tmp_path, every_n_epochs=2, save_top_k=-1, filename="{step}")
        fit(module, tmp_path, keep, FlowMonitor(), epochs=4, checkpoint=checkpoint, enable_checkpointing=True)
    assert len(whole.path) == 8 and len(rest.path) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.path[4:], rest.path, strict=True))


def test_engines_under_lightning_are_the_recorded_ones(tmp_path: Path) -> None:
    trainer = fit(Regression(), tmp_path, FlowMonitor(hessian_every_n_steps=2))
    assert trainer.optimizers[0].stats.engine in RECORDED


def test_newton_polish_as_the_optimizer_is_refused_what_flows_are(tmp_path: Path) -> None:
    module = Regression(lambda m: NewtonPolish(m.parameters()))
    with pytest.raises(ValueError, match="gradient_clip_val"):
        fit(module, tmp_path, NewtonPolishCallback(), gradient_clip_val=1.0)
