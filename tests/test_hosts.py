"""GradientFlow inside Lightning, Fabric and Accelerate: the same trajectory as in a plain loop, or a refusal by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import RECORDED, flat, make_closure, teacher_student
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import GradientFlow, NewtonPolish
from torch_gradflow.objectives.base import ClosureError
from torch_gradflow.objectives.opened import GradientFlowWarning

lightning = pytest.importorskip("lightning")

LR, N_STEPS = 0.3, 5
Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """33 parameters, 40 samples."""
    return teacher_student(0, n_samples=40)


def plain_loop(**settings: Any) -> list[Tensor]:
    """θ after each step of the loop that everybody writes."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=LR, **settings)
    closure, path = make_closure(optimizer, model, x, y), []
    for _ in range(N_STEPS):
        optimizer.step(closure)
        path.append(flat(model))
    return path


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Equal trajectories, up to the order of sums."""
    return len(found) == len(wanted) and all(
        torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(found, wanted, strict=True)
    )


class Regression(lightning.LightningModule):
    """A module as users write it: nothing in it knows of flows but the line that makes the optimizer."""

    def __init__(self, make: Optimizers) -> None:
        super().__init__()
        self.net, self.x, self.y = problem()
        self.make = make
        self.calls: list[int] = []
        self.path: list[Tensor] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=len(self.x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.calls.append(self.global_step)
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.path.append(flat(self.net))


class Manual(Regression):
    """The same with manual optimization; ``passes`` says whether the closure is handed over."""

    def __init__(self, make: Optimizers, passes: bool) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.passes = passes

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        x, y = batch

        def closure() -> Tensor:
            self.calls.append(self.global_step)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.net(x), y)
            self.manual_backward(loss)
            return loss

        if self.passes:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


def fit(
    module: lightning.LightningModule, *, epochs: int = N_STEPS, checkpoint: Path | None = None, **settings: Any
) -> lightning.Trainer:
    """Train on the CPU, quietly; an epoch is one batch unless the module says otherwise."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


def flow(module: nn.Module) -> GradientFlow:
    """The one line."""
    return GradientFlow(module.parameters(), lr=LR)


# Lightning


def test_lightning_automatic_optimization() -> None:
    """The plain loop's trajectory; training_step runs once per step after the first, which checks its contract."""
    module = Regression(flow)
    trainer = fit(module)
    assert same(module.path, plain_loop())
    assert trainer.global_step == N_STEPS
    assert [module.calls.count(i) for i in range(N_STEPS)] == [3, 1, 1, 1, 1]
    optimizer = trainer.optimizers[0]
    assert optimizer.stats.engine in RECORDED and optimizer.stats.n_closure == N_STEPS + 2
    assert optimizer.flow_time == pytest.approx(N_STEPS * LR)


def test_lightning_reports_the_loss_at_the_start_of_the_step() -> None:
    """What training_step logged, after the contract check's calls too, is the loss that the plain loop's step returns."""

    class Reporting(Regression):
        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            self.path.append(outputs["loss"].detach().clone())

    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    closure = make_closure(optimizer, model, x, y)
    wanted = [optimizer.step(closure).detach() for _ in range(N_STEPS)]
    module = Reporting(flow)
    fit(module)
    assert same(module.path, wanted)


def test_lightning_scheduler_and_several_groups() -> None:
    """``configure_optimizers`` with groups and an lr scheduler that steps once per epoch."""

    def make(module: nn.Module) -> GradientFlow:
        net = module.net
        return GradientFlow([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.1}], lr=LR)

    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    module = Scheduled(make)
    trainer = fit(module)
    model, x, y = problem()
    optimizer = GradientFlow([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}], lr=LR)
    scheduler, path = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), []
    for _ in range(N_STEPS):
        optimizer.step(make_closure(optimizer, model, x, y))
        scheduler.step()
        path.append(flat(model))
    assert same(module.path, path)
    assert trainer.optimizers[0].flow_time == pytest.approx(LR * (1 - 0.5**N_STEPS) / 0.5)


def test_lightning_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A checkpoint in the middle of a flow, loaded by ``ckpt_path``, continues as if nothing had happened."""
    whole, half, rest = Regression(flow), Regression(flow), Regression(flow)
    fit(whole)
    fit(half, epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, checkpoint=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(half.path + rest.path, whole.path, strict=True))


def test_lightning_accumulate_grad_batches_is_refused() -> None:
    """Only part of the objective is inside the closure then; the error names the option."""
    module = Regression(flow)
    module.train_dataloader = lambda: DataLoader(TensorDataset(module.x, module.y), batch_size=20)
    before = flat(module.net)
    with pytest.raises(ClosureError, match="accumulat"):
        fit(module, accumulate_grad_batches=2)
    assert torch.equal(flat(module.net), before)


def test_lightning_gradient_clipping_is_refused_or_followed() -> None:
    """Clipping changes the gradient after backward: the flow follows ``.grad`` through the closure, and warns of it."""
    module = Regression(flow)
    with pytest.warns(UserWarning, match="not the gradient of the loss"):
        trainer = fit(module, gradient_clip_val=1e-3)
    stats = trainer.optimizers[0].stats
    assert stats.engine == "closure" and "clipping" in stats.engine_reason


def test_lightning_mini_batches() -> None:
    """Each batch its own flow, as in a plain loop over the same batches."""
    module = Regression(flow)
    module.train_dataloader = lambda: DataLoader(TensorDataset(module.x, module.y), batch_size=10)
    fit(module, epochs=2)
    model, x, y = problem()
    optimizer, path = GradientFlow(model.parameters(), lr=LR), []
    for i in [0, 1, 2, 3] * 2:
        rows = slice(10 * i, 10 * (i + 1))
        optimizer.step(make_closure(optimizer, model, x[rows], y[rows]))
        path.append(flat(model))
    assert same(module.path, path)


def test_lightning_manual_optimization_with_closure() -> None:
    """``optimizer.step(closure=closure)`` with manual_backward inside: the plain loop's trajectory."""
    module = Manual(flow, passes=True)
    trainer = fit(module)
    assert same(module.path, plain_loop())
    assert trainer.optimizers[0].stats.engine in RECORDED


def test_lightning_manual_optimization_without_closure() -> None:
    """Lightning then passes a function that does nothing; the recorded pass serves."""
    module = Manual(flow, passes=False)
    trainer = fit(module)
    assert same(module.path, plain_loop())
    assert trainer.optimizers[0].stats.engine in RECORDED and trainer.optimizers[0].stats.n_closure == 0


def test_lightning_polish() -> None:
    """NewtonPolish as the optimizer of a second ``fit``: one step ends at a minimum of the regularised loss."""
    module = Regression(flow)
    fit(module)
    module.make = lambda m: NewtonPolish(m.parameters(), weight_decay=0.01)
    trainer = fit(module, epochs=1)
    result = trainer.optimizers[0].result
    assert result.status == "converged" and result.certificate.kind == "minimum"
    assert torch.equal(result.theta, flat(module.net))


# Fabric


def test_fabric() -> None:
    """``fabric.backward`` in the closure."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, x, y = problem()
    net, optimizer = fabric.setup(model, GradientFlow(model.parameters(), lr=LR))
    path, losses = [], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        fabric.backward(loss)
        return loss

    for _ in range(N_STEPS):
        losses.append(optimizer.step(closure).item())
        path.append(flat(model))
    assert same(path, plain_loop())
    assert optimizer.optimizer.stats.engine in RECORDED and optimizer.optimizer.stats.n_closure == N_STEPS + 2
    assert losses == sorted(losses, reverse=True)


def test_fabric_checkpoint(tmp_path: Path) -> None:
    """``fabric.save`` and ``fabric.load`` in the middle of a flow."""
    wanted = plain_loop()

    def make() -> tuple[Any, nn.Module, Any, Callable[[], Tensor]]:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model, x, y = problem()
        net, optimizer = fabric.setup(model, GradientFlow(model.parameters(), lr=LR))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            fabric.backward(loss)
            return loss

        return fabric, net, optimizer, closure

    fabric, net, optimizer, closure = make()
    for _ in range(2):
        optimizer.step(closure)
    fabric.save(tmp_path / "state.ckpt", {"net": net, "optimizer": optimizer})
    fabric, net, optimizer, closure = make()
    fabric.load(tmp_path / "state.ckpt", {"net": net, "optimizer": optimizer})
    path = []
    for _ in range(2, N_STEPS):
        optimizer.step(closure)
        path.append(flat(net))
    assert same(path, wanted[2:])


# Accelerate


@pytest.fixture
def make_accelerator() -> Iterator[Callable[..., Any]]:
    """Makes one on the CPU; none of its global state is left afterwards."""
    accelerate = pytest.importorskip("accelerate")
    yield lambda **settings: accelerate.Accelerator(cpu=True, **settings)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(make_accelerator: Callable[..., Any]) -> None:
    """``accelerator.backward`` in the closure; what step returns is dropped by Accelerate, ``stats.loss`` has it."""
    accelerator = make_accelerator()
    model, x, y = problem()
    net, optimizer = accelerator.prepare(model, GradientFlow(model.parameters(), lr=LR))
    path = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        accelerator.backward(loss)
        return loss

    for _ in range(N_STEPS):
        optimizer.step(closure)
        path.append(flat(model))
    assert same(path, plain_loop())
    stats = optimizer.optimizer.stats
    assert stats.engine in RECORDED and stats.n_closure == N_STEPS + 2
    assert stats.loss == pytest.approx(nn.functional.mse_loss(net(x), y).item(), rel=1e-9)


def test_accelerate_without_closure(make_accelerator: Callable[..., Any]) -> None:
    """The usual loop of Accelerate."""
    accelerator = make_accelerator()
    model, x, y = problem()
    net, optimizer = accelerator.prepare(model, GradientFlow(model.parameters(), lr=LR))
    path = []
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        accelerator.backward(nn.functional.mse_loss(net(x), y))
        optimizer.step()
        path.append(flat(model))
    assert same(path, plain_loop())
    assert optimizer.optimizer.stats.engine in RECORDED


def test_accelerate_gradient_accumulation_is_refused(make_accelerator: Callable[..., Any]) -> None:
    """accelerator.backward divides the loss by the number of batches: not the loss that the closure returns."""
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    model, x, y = problem()
    before = flat(model)
    net, optimizer = accelerator.prepare(model, GradientFlow(model.parameters(), lr=LR))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        accelerator.backward(loss)
        return loss

    with pytest.raises(ClosureError, match="divided for gradient accumulation"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


def test_torch_grad_scaler() -> None:
    """torch's GradScaler refuses closures itself; without one, the gradient that it unscales is all there is."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    closure = make_closure(optimizer, model, x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.zero_grad()
    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=closure)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.warns(GradientFlowWarning, match="multiple of it"):
        scaler.step(optimizer)
    assert optimizer.stats.engine == "fallback" and optimizer.stats.status == "begun"
