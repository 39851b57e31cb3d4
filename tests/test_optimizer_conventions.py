"""What torch users expect of any optimizer, of GradientFlow and NewtonPolish."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import RECORDED, NumpyPerceptron, flat, make_closure, teacher_student
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR

from torch_gradflow import GradientFlow, NewtonPolish
from torch_gradflow.objectives.opened import GradientFlowWarning
from torch_gradflow.optim.closure_optimizer import ClosureOptimizer

RTOL = 1e-7
N_SAMPLES = 60
Closure = Callable[[], Tensor]


def problem(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The 33-parameter teacher–student problem, with fewer samples."""
    return teacher_student(seed, n_samples=N_SAMPLES)


def started(lr: float = 0.5, *, seed: int = 0, **settings: Any) -> tuple[nn.Sequential, GradientFlow, Closure]:
    """A model, its GradientFlow, and the usual closure."""
    model, x, y = problem(seed)
    optimizer = GradientFlow(model.parameters(), lr=lr, **{"rtol": RTOL, **settings})
    return model, optimizer, make_closure(optimizer, model, x, y)


def exact_flow(
    start: Tensor,
    x: Tensor,
    y: Tensor,
    time: float,
    *,
    speeds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
    weight_decay: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
) -> Tensor:
    """θ(t) by scipy on gradients written out in numpy; one inverse time constant and one decay per parameter tensor."""
    n_hidden = (start.numel() - 1) // (x.shape[1] + 2)
    perceptron = NumpyPerceptron(x, y, n_hidden)
    sizes = (n_hidden * x.shape[1], n_hidden, n_hidden, 1)
    speed, decay = np.repeat(speeds, sizes), np.repeat(weight_decay, sizes)

    def slope(_: float, theta: np.ndarray) -> np.ndarray:
        return -speed * (perceptron.loss_and_gradient(theta)[1] + decay * theta)

    solution = solve_ivp(slope, (0.0, time), start.numpy(), method="DOP853", rtol=1e-11, atol=1e-13)
    return torch.from_numpy(solution.y[:, -1])


def distance(found: Tensor, wanted: Tensor) -> float:
    """‖Δθ‖ / ‖θ‖."""
    return float((found.double() - wanted).norm() / wanted.norm())


def run(optimizer: torch.optim.Optimizer, closure: Closure, model: nn.Module, n_steps: int) -> list[Tensor]:
    """θ after each of ``n_steps`` steps."""
    path = []
    for _ in range(n_steps):
        optimizer.step(closure)
        path.append(flat(model))
    return path


# Parameter groups


def test_groups_have_their_own_lr_and_weight_decay() -> None:
    """lr per group are relative speeds, the first one the unit of time; weight decay acts in its own group only."""
    model, x, y = problem()
    groups = [
        {"params": model[0].parameters(), "lr": 0.4, "weight_decay": 0.1},
        {"params": model[2].parameters(), "lr": 0.1},
    ]
    optimizer = GradientFlow(groups, rtol=RTOL)
    wanted = exact_flow(flat(model), x, y, 2.0, speeds=(1.0, 1.0, 0.25, 0.25), weight_decay=(0.1, 0.1, 0.0, 0.0))
    run(optimizer, make_closure(optimizer, model, x, y), model, 5)
    assert optimizer.flow_time == pytest.approx(2.0, rel=1e-14)
    assert distance(flat(model), wanted) < 10 * RTOL


def test_groups_of_other_speed_are_served_from_the_window_too() -> None:
    """On an unchanged objective small steps cost about one gradient each, whatever the ratio of the lrs."""
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "lr": 1e-4}]
    optimizer = GradientFlow(groups, check=False)
    run(optimizer, make_closure(optimizer, model, x, y), model, 40)
    assert optimizer.stats.n_grad < 2 * 40 + 40


def test_stats_give_the_gradient_norm_of_theta_for_groups_of_other_speed() -> None:
    """``stats.grad_norm`` is ‖∇L‖, not that of the rescaled coordinates."""
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 1e-3}]
    optimizer = GradientFlow(groups, rtol=RTOL)
    closure = make_closure(optimizer, model, x, y)
    optimizer.step(closure)
    closure()
    wanted = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    assert optimizer.stats.grad_norm == pytest.approx(wanted, rel=1e-6)


def test_named_parameters_are_accepted() -> None:
    """``named_parameters()`` gives the same flow, with the names kept in group and state_dict."""
    model, x, y = problem()
    optimizer = GradientFlow(model.named_parameters(), lr=0.5, rtol=RTOL)
    run(optimizer, make_closure(optimizer, model, x, y), model, 2)
    twin, twin_optimizer, twin_closure = started(0.5)
    run(twin_optimizer, twin_closure, twin, 2)
    assert torch.equal(flat(model), flat(twin))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_group_with_lr_zero_stays_exactly() -> None:
    """A group with lr=0 keeps every bit, and the others flow as if its values were constants."""
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = GradientFlow(groups, rtol=RTOL, weight_decay=0.1)
    frozen = [p.detach().clone() for p in model[0].parameters()]
    wanted = exact_flow(flat(model), x, y, 1.5, speeds=(0.0, 0.0, 1.0, 1.0), weight_decay=(0.1,) * 4)
    run(optimizer, make_closure(optimizer, model, x, y), model, 3)
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), frozen, strict=True))
    assert distance(flat(model), wanted) < 10 * RTOL


@pytest.mark.parametrize("kind", [GradientFlow, NewtonPolish])
def test_all_lr_zero_evaluates_once_and_moves_nothing(kind: type[ClosureOptimizer]) -> None:
    """With all lrs 0 the closure is called once, its loss returned, its gradient left in .grad, and nothing moves."""
    model, x, y = problem()
    optimizer = kind(model.parameters(), lr=0.0)
    before, calls = flat(model), []
    inner = make_closure(optimizer, model, x, y)

    def closure() -> Tensor:
        calls.append(1)
        return inner()

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert torch.equal(loss, nn.functional.mse_loss(model(x), y))
    assert torch.equal(flat(model), before)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [GradientFlow, NewtonPolish])
def test_step_without_closure_is_legal_where_all_lr_are_zero(kind: type[ClosureOptimizer]) -> None:
    """torch.distributed.checkpoint calls step(closure=None) with lr=0 to create the state."""
    model, _, _ = problem()
    optimizer = kind(model.parameters(), lr=0.0)
    before = flat(model)
    assert optimizer.step(closure=None) is None
    assert torch.equal(flat(model), before)


def test_step_without_motion_creates_the_state_of_a_step() -> None:
    """A legal no-op gives every parameter the state entries, of the same shapes, that a step leaves."""
    model, optimizer, closure = started(0.0)
    optimizer.step(None)
    made = [{name: (v.shape, v.dtype) for name, v in optimizer.state[p].items()} for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.1
    run(optimizer, closure, model, 2)
    assert made == [{name: (v.shape, v.dtype) for name, v in optimizer.state[p].items()} for p in model.parameters()]


def test_lr_may_be_a_tensor() -> None:
    """torch allows a 0-dimensional tensor as lr, which schedulers fill in place."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=torch.tensor(0.5, dtype=torch.float64), rtol=RTOL)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    wanted = exact_flow(flat(model), x, y, 0.75)
    for _ in range(2):
        optimizer.step(make_closure(optimizer, model, x, y))
        scheduler.step()
    assert distance(flat(model), wanted) < 10 * RTOL


# Learning-rate schedulers


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "StepLR": lambda o: StepLR(o, step_size=2, gamma=0.3),
    "LambdaLR": lambda o: LambdaLR(o, lambda i: 1.0 / (1 + i)),
    "LambdaLR through 0": lambda o: LambdaLR(o, lambda i: 0.0 if i == 2 else 1.0),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_time_of_each_step(name: str) -> None:
    """Steps of scheduled lr end where one ``integrate`` over their sum does."""
    model, optimizer, closure = started(0.5)
    scheduler = SCHEDULERS[name](optimizer)
    times = []
    for _ in range(6):
        times.append(optimizer.param_groups[0]["lr"])
        optimizer.step(closure)
        scheduler.step()
    twin, twin_optimizer, twin_closure = started()
    twin_optimizer.integrate(twin_closure, sum(times))
    assert optimizer.flow_time == pytest.approx(sum(times), rel=1e-13)
    assert distance(flat(model), flat(twin)) < 10 * RTOL


def test_scheduler_that_changes_the_ratio_of_speeds() -> None:
    """Each step flows at the relative speeds of its own lrs."""
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.3}]
    optimizer = GradientFlow(groups, rtol=RTOL)
    scheduler = LambdaLR(optimizer, [lambda i: 1.0, lambda i: 0.5**i])
    wanted, closure = flat(model), make_closure(optimizer, model, x, y)
    for i in range(4):
        ratio = 1.5 * 0.5**i
        wanted = exact_flow(wanted, x, y, 0.2, speeds=(1.0, 1.0, ratio, ratio))
        optimizer.step(closure)
        scheduler.step()
    assert optimizer.flow_time == pytest.approx(0.8)
    assert distance(flat(model), wanted) < 10 * RTOL


# Saving and resuming


Built = tuple[nn.Module, GradientFlow, Closure]


def build(setting: str, lr: float) -> Built:
    """A model with an optimizer of the named setting."""
    model, x, y = problem()
    if setting in ("float32", "float64 master"):
        model, x, y = model.float(), x.float(), y.float()
    params: Any = model.parameters()
    if setting == "two speeds":
        params = [{"params": model[0].parameters(), "lr": lr}, {"params": model[2].parameters(), "lr": 0.3 * lr}]
    settings: dict[str, dict[str, Any]] = {
        "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e-3},
        "bosh3": {"method": "bosh3", "rtol": 1e-5},
        "dopri8": {"method": "dopri8"},
        "penalties": {"weight_decay": 0.01, "max_norm": 0.05},
        "float64 master": {"dtype": torch.float64},
        "closure engine": {"engine": "closure"},
    }
    optimizer = GradientFlow(params, lr=lr, **settings.get(setting, {}))
    return model, optimizer, make_closure(optimizer, model, x, y)


def through_memory(built: Built, fresh: Built) -> Built:
    """Load the state dictionaries themselves."""
    fresh[0].load_state_dict(built[0].state_dict())
    fresh[1].load_state_dict(built[1].state_dict())
    return fresh


def through_file(built: Built, fresh: Built) -> Built:
    """``torch.save`` and ``torch.load(weights_only=True)``."""
    file = io.BytesIO()
    torch.save({"model": built[0].state_dict(), "optimizer": built[1].state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh[0].load_state_dict(loaded["model"])
    fresh[1].load_state_dict(loaded["optimizer"])
    return fresh


def closure_on_same_data(model: nn.Module, optimizer: GradientFlow) -> Closure:
    """The closure of ``problem`` for a copied model."""
    _, x, y = problem()
    dtype = next(model.parameters()).dtype
    return make_closure(optimizer, model, x.to(dtype), y.to(dtype))


def through_deepcopy(built: Built, fresh: Built) -> Built:
    """``copy.deepcopy`` of model and optimizer together."""
    model, optimizer = copy.deepcopy((built[0], built[1]))
    return model, optimizer, closure_on_same_data(model, optimizer)


def through_pickle(built: Built, fresh: Built) -> Built:
    """``pickle`` of model and optimizer together."""
    model, optimizer = pickle.loads(pickle.dumps((built[0], built[1])))
    return model, optimizer, closure_on_same_data(model, optimizer)


WAYS = {"memory": through_memory, "file": through_file, "deepcopy": through_deepcopy, "pickle": through_pickle}
SETTINGS = [
    "plain",
    "adaptive_heun",
    "bosh3",
    "dopri8",
    "penalties",
    "two speeds",
    "float32",
    "float64 master",
    "closure engine",
]


def assert_resumes(
    setting: str, lr: float, way: Callable[[Built, Built], Built], interruptions: tuple[int, ...], n: int
) -> None:
    """A run that was saved and resumed after each of ``interruptions`` steps is the uninterrupted one, bit for bit."""
    built = build(setting, lr)
    wanted = run(built[1], built[2], built[0], n)
    for k in interruptions:
        first = build(setting, lr)
        run(first[1], first[2], first[0], k)
        model, optimizer, closure = way(first, build(setting, 12.3))
        assert torch.equal(flat(model), wanted[k - 1])
        for i, theta in enumerate(run(optimizer, closure, model, n - k), start=k):
            assert torch.equal(theta, wanted[i]), f"interrupted after {k} steps, step {i + 1} differs"
        assert optimizer.flow_time == built[1].flow_time


@pytest.mark.parametrize("lr", [0.3, 0.004], ids=["large steps", "inside the window"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_bit_for_bit(setting: str, lr: float) -> None:
    """state_dict holds all that a flow needs, wherever it is interrupted."""
    assert_resumes(setting, lr, through_memory, (1, 2, 4), 6)


@pytest.mark.parametrize("way", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("setting", ["plain", "float64 master"])
def test_resume_bit_for_bit_through(way: str, setting: str) -> None:
    """The same through a file, a deep copy and a pickle."""
    assert_resumes(setting, 0.004, WAYS[way], (1, 4), 6)


def test_loaded_state_is_not_shared() -> None:
    """Steps of the optimizer that loaded a state leave the tensors of the one that gave it alone."""
    first = build("plain", 0.004)
    run(first[1], first[2], first[0], 4)
    before = [t.clone() for entry in first[1].state.values() for t in entry.values()]
    second = through_memory(first, build("plain", 0.004))
    run(second[1], second[2], second[0], 3)
    after = [t for entry in first[1].state.values() for t in entry.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_load_hooks_see_and_change_the_state() -> None:
    """What hooks before and after load_state_dict make of the state is what the optimizer then has."""
    model, optimizer, closure = build("float64 master", 0.1)
    run(optimizer, closure, model, 2)

    def without_slopes(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {**entry, "slope": torch.zeros_like(entry["slope"])} for i, entry in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def master_of_ones(loaded: torch.optim.Optimizer) -> None:
        for entry in loaded.state.values():
            entry["theta"].fill_(1.0)

    optimizer.register_load_state_dict_pre_hook(without_slopes)
    optimizer.register_load_state_dict_post_hook(master_of_ones)
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(bool((entry["slope"] == 0).all()) for entry in optimizer.state.values())
    assert all(bool((entry["theta"] == 1).all()) for entry in optimizer.state.values())


def test_deepcopy_is_independent_of_the_original() -> None:
    """Steps of a copy move only the copy's model."""
    model, optimizer, closure = build("plain", 0.1)
    run(optimizer, closure, model, 2)
    before, time = flat(model), optimizer.flow_time
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    run(twin_optimizer, closure_on_same_data(twin, twin_optimizer), twin, 2)
    assert torch.equal(flat(model), before) and optimizer.flow_time == time
    assert not torch.equal(flat(twin), before)


def test_state_is_plain_tensors_under_parameters_and_plain_numbers_in_groups() -> None:
    """Checkpoints of any kind know what to do with it."""
    _, optimizer, closure = build("plain", 0.004)
    for _ in range(3):
        optimizer.step(closure)
    state = optimizer.state_dict()
    assert all(isinstance(v, Tensor) for entry in state["state"].values() for v in entry.values())
    for group in state["param_groups"]:
        for value in group.values():
            parts = value if isinstance(value, list) else [value]
            assert all(part is None or type(part) in (bool, int, float, str) for part in parts)


def test_master_copy_keeps_its_type_through_load() -> None:
    """The float64 master copy under a float32 parameter is not cast, nor is the rest of the state."""
    first = build("float64 master", 0.004)
    run(first[1], first[2], first[0], 4)
    second = through_memory(first, build("float64 master", 0.004))
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert p.dtype == torch.float32
        for name, value in first[1].state[p].items():
            assert value.dtype == torch.float64
            assert second[1].state[q][name].dtype == torch.float64
            assert torch.equal(second[1].state[q][name], value)


@pytest.mark.parametrize("setting", ["plain", "two speeds", "float64 master"])
@pytest.mark.parametrize("interrupted", [1, 5])
def test_resume_through_distributed_checkpoint(setting: str, interrupted: int, tmp_path: Path) -> None:
    """torch.distributed.checkpoint saves and restores the flow bit for bit; it initialises the state by a step(None)."""

    def way(built: Built, fresh: Built) -> Built:
        state = {"model": built[0].state_dict(), "optimizer": get_optimizer_state_dict(built[0], built[1])}
        dcp.save(state, checkpoint_id=tmp_path)
        state = {"model": fresh[0].state_dict(), "optimizer": get_optimizer_state_dict(fresh[0], fresh[1])}
        dcp.load(state, checkpoint_id=tmp_path)
        fresh[0].load_state_dict(state["model"])
        set_optimizer_state_dict(fresh[0], fresh[1], state["optimizer"])
        return fresh

    assert_resumes(setting, 0.004, way, (interrupted,), 7)


def test_distributed_checkpoint_of_a_fresh_optimizer() -> None:
    """Asking for the state before the first step changes neither lr, parameters, nor the flow that follows."""
    model, optimizer, closure = started(0.3)
    before = flat(model)
    get_optimizer_state_dict(model, optimizer)
    assert torch.equal(flat(model), before) and optimizer.param_groups[0]["lr"] == 0.3 and optimizer.flow_time == 0.0
    twin, twin_optimizer, twin_closure = started(0.3)
    assert torch.equal(run(optimizer, closure, model, 2)[-1], run(twin_optimizer, twin_closure, twin, 2)[-1])


# Hooks, and changes between steps


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_step_hooks_fire_once_per_step(engine: str) -> None:
    """Not once per evaluation."""
    model, optimizer, closure = started(0.3, engine=engine)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    run(optimizer, closure, model, 3)
    assert fired == ["pre", "post"] * 3


def test_add_param_group_joins_the_flow() -> None:
    """Parameters added after some steps flow from then on, at the flow's present time."""
    model, x, y = problem()
    optimizer = GradientFlow(model[0].parameters(), lr=0.4, rtol=RTOL)
    wanted = exact_flow(flat(model), x, y, 0.8, speeds=(1.0, 1.0, 0.0, 0.0))
    wanted = exact_flow(wanted, x, y, 0.8, speeds=(1.0, 1.0, 0.5, 0.5))
    closure = make_closure(optimizer, model, x, y)
    run(optimizer, closure, model, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    run(optimizer, closure, model, 2)
    assert optimizer.flow_time == pytest.approx(1.6)
    assert all(group["flow_time"] == optimizer.flow_time for group in optimizer.param_groups)
    assert distance(flat(model), wanted) < 10 * RTOL


@pytest.mark.parametrize("lr", [0.4, 0.004], ids=["large steps", "inside the window"])
def test_requires_grad_toggled_between_steps(lr: float) -> None:
    """A parameter frozen for some steps stays exactly, and then flows again."""
    model, optimizer, closure = started(lr)
    _, x, y = problem()
    wanted = flat(model)
    for moving in (1.0, 0.0, 1.0):
        model[0].weight.requires_grad_(moving == 1.0)
        before = model[0].weight.detach().clone()
        wanted = exact_flow(wanted, x, y, 4 * lr, speeds=(moving, 1.0, 1.0, 1.0))
        run(optimizer, closure, model, 4)
        assert torch.equal(model[0].weight, before) == (moving == 0.0)
    assert distance(flat(model), wanted) < 10 * RTOL


def test_all_parameters_frozen_is_no_motion() -> None:
    """With requires_grad off everywhere a step evaluates the closure and does nothing."""
    model, optimizer, _ = started(0.5)
    _, x, y = problem()
    model.requires_grad_(False)
    before = flat(model)
    loss = optimizer.step(lambda: nn.functional.mse_loss(model(x), y))
    assert loss.item() > 0 and torch.equal(flat(model), before) and optimizer.flow_time == 0.0


@pytest.mark.parametrize("lr", [0.3, 0.004], ids=["large steps", "inside the window"])
def test_parameters_changed_by_the_user_between_steps(lr: float) -> None:
    """The flow goes on from where the user put the parameters; nothing from before is used."""
    model, optimizer, closure = started(lr)
    _, x, y = problem()
    run(optimizer, closure, model, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    wanted = exact_flow(flat(model), x, y, 3 * lr)
    run(optimizer, closure, model, 3)
    assert optimizer.flow_time == pytest.approx(8 * lr)
    assert distance(flat(model), wanted) < 10 * RTOL


def test_tiny_change_of_parameters_inside_the_window_is_respected() -> None:
    """A change too small to show in loss and gradient is not undone by the flow computed ahead."""
    model, optimizer, closure = started(0.004)
    _, x, y = problem()
    run(optimizer, closure, model, 5)
    unmoved = exact_flow(flat(model), x, y, 0.004)
    with torch.no_grad():
        model[0].weight.add_(1e-10)
    moved = exact_flow(flat(model), x, y, 0.004)
    optimizer.step(closure)
    assert distance(flat(model), moved) < 0.2 * distance(unmoved, moved)


@pytest.mark.parametrize("how", ["torch", "numpy", "target"])
@pytest.mark.parametrize("lr", [0.3, 0.004], ids=["large steps", "inside the window"])
def test_data_changed_in_place_between_steps_is_noticed(how: str, lr: float) -> None:
    """The next step follows the flow of the data as it is then, changed with or without torch's knowledge."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=lr, rtol=RTOL)
    closure = make_closure(optimizer, model, x, y)
    run(optimizer, closure, model, 5)
    if how == "torch":
        x.mul_(1.2)
    elif how == "numpy":
        x.numpy()[:] *= 1.2
    else:
        y.add_(0.5)
    wanted = exact_flow(flat(model), x, y, 3 * lr)
    run(optimizer, closure, model, 3)
    assert distance(flat(model), wanted) < 10 * RTOL
    assert optimizer.stats.engine in RECORDED


def test_numbers_read_with_item_are_noticed_on_every_step() -> None:
    """A closure whose record freezes a number read from the parameters is called again, on the first step and after."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        weight = loss.item()
        loss = loss * weight
        loss.backward()
        return loss

    with pytest.warns(GradientFlowWarning, match="not the gradient of the loss"):
        optimizer.step(closure)
    engines = [optimizer.stats.engine]
    for _ in range(3):
        optimizer.step(closure)
        engines.append(optimizer.stats.engine)
    assert engines == ["closure"] * 4


# The objective: sign, penalties, mini-batches, types


def test_maximize_ascends() -> None:
    """Maximising −L is minimising L, step for step."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=0.5, method="dopri5", rtol=RTOL, maximize=True)
    closure = make_closure(optimizer, model, x, y, lambda prediction, target: -nn.functional.mse_loss(prediction, target))
    loss = optimizer.step(closure)
    optimizer.step(closure)
    twin, twin_optimizer, twin_closure = started(0.5, method="dopri5")
    run(twin_optimizer, twin_closure, twin, 2)
    assert loss.item() < 0
    assert distance(flat(model), flat(twin)) < 1e-14
    solution = optimizer.integrate(closure, 1.0)
    assert float(solution.loss[-1]) == pytest.approx(closure().item(), rel=1e-9)


def test_weight_decay_is_a_penalty_of_the_loss() -> None:
    """weight_decay=λ flows as λ/2 ‖θ‖² added in the closure."""
    model, optimizer, closure = started(0.5, weight_decay=0.2)
    twin, x, y = problem()
    twin_optimizer = GradientFlow(twin.parameters(), lr=0.5, rtol=RTOL)

    def penalised() -> Tensor:
        twin_optimizer.zero_grad()
        loss = nn.functional.mse_loss(twin(x), y) + 0.1 * sum(p.square().sum() for p in twin.parameters())
        loss.backward()
        return loss

    run(optimizer, closure, model, 4)
    run(twin_optimizer, penalised, twin, 4)
    assert distance(flat(model), flat(twin)) < 10 * RTOL
    assert optimizer.stats.loss == pytest.approx(twin_optimizer.stats.loss, rel=1e-7)


def test_max_norm_is_a_barrier_of_the_loss() -> None:
    """max_norm=c flows as (w − c)³/3 for w = ‖θ‖²/(2P) > c added in the closure; below c nothing is added."""
    twin, x, y = problem()
    w0 = float(flat(twin).square().mean() / 2)
    c = 0.3 * w0
    model, optimizer, closure = started(0.5, max_norm=c)
    twin_optimizer = GradientFlow(twin.parameters(), lr=0.5, rtol=RTOL)

    def barred() -> Tensor:
        twin_optimizer.zero_grad()
        w = torch.cat([p.reshape(-1) for p in twin.parameters()]).square().mean() / 2
        loss = nn.functional.mse_loss(twin(x), y) + (w - c).clamp(min=0) ** 3 / 3
        loss.backward()
        return loss

    run(optimizer, closure, model, 4)
    run(twin_optimizer, barred, twin, 4)
    assert distance(flat(model), flat(twin)) < 10 * RTOL
    free, free_optimizer, free_closure = started(0.5, max_norm=1e3)
    wanted = exact_flow(flat(free), x, y, 2.0)
    run(free_optimizer, free_closure, free, 4)
    assert distance(flat(free), wanted) < 10 * RTOL
    assert distance(flat(model), flat(free)) > 1e-4


def test_mini_batches_follow_the_flow_of_each_batch() -> None:
    """Each step is the flow of that batch's loss from where the step before left the parameters."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=0.2, rtol=RTOL)
    for i in list(range(4)) * 2:
        batch = x[15 * i : 15 * (i + 1)], y[15 * i : 15 * (i + 1)]
        twin = copy.deepcopy(model)
        twin_optimizer = GradientFlow(twin.parameters(), rtol=RTOL)
        twin_optimizer.integrate(make_closure(twin_optimizer, twin, *batch), 0.2)
        optimizer.step(make_closure(optimizer, model, *batch))
        assert distance(flat(model), flat(twin)) < 10 * RTOL
    assert optimizer.flow_time == pytest.approx(1.6)


def test_the_same_batch_twice_then_another() -> None:
    """What was computed ahead on one batch is not used for the next."""
    model, x, y = problem()
    optimizer = GradientFlow(model.parameters(), lr=0.004, rtol=RTOL)
    wanted = flat(model)
    for i in (0, 0, 0, 1, 1, 1, 0, 1):
        batch = x[30 * i : 30 * (i + 1)].contiguous(), y[30 * i : 30 * (i + 1)].contiguous()
        wanted = exact_flow(wanted, *batch, 0.004)
        optimizer.step(make_closure(optimizer, model, *batch))
        assert distance(flat(model), wanted) < 10 * RTOL


def test_float32_model_stays_float32() -> None:
    """The default tolerance in float32 is 1e-4; parameters and loss keep their type, times are Python floats."""
    model, x, y = problem()
    wanted = exact_flow(flat(model), x, y, 5.0)
    model = model.float()
    optimizer = GradientFlow(model.parameters(), lr=0.5)
    closure = make_closure(optimizer, model, x.float(), y.float())
    run(optimizer, closure, model, 10)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert isinstance(optimizer.flow_time, float)
    assert distance(flat(model), wanted) < 1e-3


def test_tight_tolerance_warns_in_float32() -> None:
    """A tolerance that float32 gradients cannot resolve is floored, with a warning that names it and the remedy."""
    model, x, y = problem()
    model = model.float()
    with pytest.warns(GradientFlowWarning, match=r"rtol=1e-07.*1e-05.*dtype=torch\.float64"):
        optimizer = GradientFlow(model.parameters(), lr=0.5, rtol=1e-7)
    run(optimizer, make_closure(optimizer, model, x.float(), y.float()), model, 2)
    GradientFlow(model.parameters(), rtol=1e-7, dtype=torch.float64)


@pytest.mark.parametrize(("lr", "n_steps"), [(0.5, 2), (0.05, 20)])
def test_float64_master_copy_follows_the_flow_beyond_float32(lr: float, n_steps: int) -> None:
    """With dtype=torch.float64 a float32 model ends within the tolerance of the exact flow, rounded once."""
    model, x, y = problem()
    model, x, y = model.float(), x.float(), y.float()
    wanted = exact_flow(flat(model).double(), x.double(), y.double(), lr * n_steps)
    optimizer = GradientFlow(model.parameters(), lr=lr, rtol=1e-11, dtype=torch.float64)
    run(optimizer, make_closure(optimizer, model, x, y), model, n_steps)
    master = torch.cat([optimizer.state[p]["theta"].reshape(-1) for p in model.parameters()])
    assert torch.equal(master.float(), flat(model))
    assert distance(master, wanted) < 1e-10


# Steps and times


@pytest.mark.parametrize(
    ("method", "rtol", "bound"),
    [
        ("dopri5", 1e-7, 1e-6),
        ("dopri8", 1e-7, 1e-6),
        ("bosh3", 1e-5, 1e-4),
        ("adaptive_heun", 1e-4, 1e-2),
        ("fehlberg2", 1e-4, 1e-2),
    ],
)
@pytest.mark.parametrize("pieces", [4, 40])
def test_steps_end_where_integrate_does(method: str, rtol: float, bound: float, pieces: int) -> None:
    """K steps of lr = h and one ``integrate`` to K h agree, at comparable cost."""
    model, optimizer, closure = started(2.0 / pieces, method=method, rtol=rtol, check=False)
    run(optimizer, closure, model, pieces)
    twin, twin_optimizer, twin_closure = started(method=method, rtol=rtol, check=False)
    solution = twin_optimizer.integrate(twin_closure, 2.0)
    assert solution.status == "t_end" and float(solution.t[-1]) == 2.0
    assert torch.equal(solution.theta[-1], flat(twin))
    assert optimizer.flow_time == pytest.approx(2.0) and twin_optimizer.flow_time == 2.0
    assert distance(flat(model), flat(twin)) < bound
    assert optimizer.stats.n_grad - 2 * pieces <= 2 * solution.n_grad


def test_stats_say_what_a_step_did() -> None:
    """Engine, method, loss and gradient at the end, status, and running totals."""
    model, optimizer, closure = started(0.5, method="dopri5")
    _, x, y = problem()
    start = nn.functional.mse_loss(model(x), y).item()
    assert optimizer.stats.status == ""
    returned = optimizer.step(closure)
    first = optimizer.stats
    assert returned.item() == start
    assert (first.engine, first.engine_reason, first.method, first.status) == ("perceptron", "", "dopri5", "t_end")
    assert first.n_closure == 3 and first.n_grad > 3 and first.n_accepted > 0 and first.step_size > 0
    assert first.n_hvp == first.n_hessian == 0
    assert "t = 0.5" in first.message
    loss = nn.functional.mse_loss(model(x), y)
    assert first.loss == pytest.approx(loss.item(), rel=1e-12)
    norm = max(float(g.abs().max()) for g in torch.autograd.grad(loss, list(model.parameters())))
    assert first.grad_norm == pytest.approx(norm, rel=1e-9)
    optimizer.step(closure)
    assert optimizer.stats.n_closure == 4
    assert optimizer.stats.n_grad > first.n_grad and optimizer.stats.n_accepted > first.n_accepted


def test_gradient_after_a_step_is_that_at_its_start() -> None:
    """Hooks and loggers see the closure's own gradient, as with any other optimizer."""
    for engine in ("auto", "closure"):
        model, optimizer, closure = started(0.5, engine=engine)
        closure()
        wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step(closure)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True) if p.grad is not None)


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_gradients_zeroed_in_place(engine: str) -> None:
    """A closure that keeps its gradient tensors (set_to_none=False) gives the same steps."""
    model, optimizer, closure = started(0.5, engine=engine)
    twin, twin_optimizer, _ = started(0.5, engine=engine)
    _, x, y = problem()

    def in_place() -> Tensor:
        twin_optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.mse_loss(twin(x), y)
        loss.backward()
        return loss

    assert torch.equal(run(twin_optimizer, in_place, twin, 3)[-1], run(optimizer, closure, model, 3)[-1])


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_step_under_no_grad(engine: str) -> None:
    """Frameworks call step under torch.no_grad; the closure gets its gradients all the same."""
    model, optimizer, closure = started(0.5, engine=engine)
    twin, twin_optimizer, twin_closure = started(0.5, engine=engine)
    with torch.no_grad():
        path = run(optimizer, closure, model, 2)
        assert not torch.is_grad_enabled()
    assert torch.equal(path[-1], run(twin_optimizer, twin_closure, twin, 2)[-1])


@pytest.mark.parametrize("kind", [GradientFlow, NewtonPolish])
def test_random_numbers_are_left_alone(kind: type[ClosureOptimizer]) -> None:
    """Two runs under one seed are equal bit for bit, and a step draws nothing from the global generator."""
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        x = torch.randn(30, 2, dtype=torch.float64)
        optimizer = kind(model.parameters(), lr=0.5, weight_decay=0.01)
        state = torch.get_rng_state()
        run(optimizer, make_closure(optimizer, model, x, x.sin().sum(1, keepdim=True)), model, 2)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(flat(model))
    assert torch.equal(*ends)


# Ends before the end


def test_max_evals_ends_a_step_early() -> None:
    """The step stops with status and warning on an accepted point of the trajectory, and the next one goes on from there."""
    model, optimizer, closure = started(1e3, max_evals=60, check=False)
    _, x, y = problem()
    start = flat(model)
    with pytest.warns(GradientFlowWarning, match="max_evals"):
        optimizer.step(closure)
    assert optimizer.stats.status == "max_evals" and "max_evals" in optimizer.stats.message
    assert optimizer.stats.n_grad <= 60 + 8
    first = optimizer.flow_time
    assert 0 < first < 1e3
    assert distance(flat(model), exact_flow(start, x, y, first)) < 10 * RTOL
    with pytest.warns(GradientFlowWarning, match="max_evals"):
        optimizer.step(closure)
    assert optimizer.flow_time > first
    assert distance(flat(model), exact_flow(start, x, y, optimizer.flow_time)) < 10 * RTOL


class Failing:
    """A closure that raises at its n-th call."""

    def __init__(self, closure: Closure, at: int, error: type[BaseException]) -> None:
        self.closure, self.left, self.error = closure, at, error

    def __call__(self) -> Tensor:
        """The wrapped closure, or the error."""
        self.left -= 1
        if self.left == 0:
            raise self.error("from the closure")
        return self.closure()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [20, 33])
def test_closure_that_raises_in_the_middle_of_a_step(error: type[BaseException], at: int) -> None:
    """The parameters are the last accepted point, at ``flow_time`` on the trajectory, and the flow can go on from there."""
    model, optimizer, closure = started(5.0, engine="closure", check=False)
    _, x, y = problem()
    start = flat(model)
    with pytest.raises(error, match="from the closure"):
        optimizer.step(Failing(closure, at, error))
    assert 0 < optimizer.flow_time < 5.0
    assert distance(flat(model), exact_flow(start, x, y, optimizer.flow_time)) < 10 * RTOL
    optimizer.param_groups[0]["lr"] = 0.5
    time = optimizer.flow_time
    optimizer.step(closure)
    assert optimizer.flow_time == pytest.approx(time + 0.5)
    assert distance(flat(model), exact_flow(start, x, y, time + 0.5)) < 10 * RTOL


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", [GradientFlow, NewtonPolish])
def test_closure_that_raises_before_anything_moved(kind: type[ClosureOptimizer], at: int) -> None:
    """In its first call or in the contract check: the parameters keep every bit."""
    model, x, y = problem()
    optimizer = kind(model.parameters())
    before = flat(model)
    with pytest.raises(RuntimeError, match="from the closure"):
        optimizer.step(Failing(make_closure(optimizer, model, x, y), at, RuntimeError))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("lr", [0.3, 0.004], ids=["large steps", "inside the window"])
def test_closure_that_raises_at_the_start_of_a_later_step(lr: float) -> None:
    """A step that could not begin changes nothing: repeated, the run is the undisturbed one, bit for bit."""
    model, optimizer, closure = started(lr)
    twin, twin_optimizer, twin_closure = started(lr)
    run(optimizer, closure, model, 4)
    with pytest.raises(RuntimeError, match="from the closure"):
        optimizer.step(Failing(closure, 1, RuntimeError))
    path = run(optimizer, closure, model, 3)
    assert torch.equal(path[-1], run(twin_optimizer, twin_closure, twin, 7)[-1])


def test_ctrl_c_ends_integrate_with_a_usable_solution() -> None:
    """``integrate`` returns what it has, the parameters at its last point."""
    model, optimizer, closure = started(engine="closure", check=False)
    solution = optimizer.integrate(Failing(closure, 33, KeyboardInterrupt), 5.0)
    assert solution.status == "interrupted" and "Interrupted by the user" in solution.message
    assert 0 < float(solution.t[-1]) == optimizer.flow_time < 5.0
    assert torch.equal(flat(model), solution.theta[-1])
    assert optimizer.stats.status == "interrupted"


def test_exception_in_integrate_keeps_the_solution_so_far() -> None:
    """The exception is raised, the parameters are the last accepted point, and ``optimizer.solution`` tells the rest."""
    model, optimizer, closure = started(engine="closure", check=False)
    with pytest.raises(RuntimeError, match="from the closure"):
        optimizer.integrate(Failing(closure, 33, RuntimeError), 5.0)
    solution = optimizer.solution
    assert solution is not None and solution.status == "failed" and "from the closure" in solution.message
    assert 0 < float(solution.t[-1]) == optimizer.flow_time < 5.0
    assert torch.equal(flat(model), solution.theta[-1])


# NewtonPolish


def small_problem(seed: int = 1) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Three neurons; with some weight decay its minimum is regular."""
    return teacher_student(seed, n_student=3, n_samples=N_SAMPLES)


def polished(**settings: Any) -> tuple[nn.Sequential, NewtonPolish, Closure]:
    """The small problem and a NewtonPolish for it."""
    model, x, y = small_problem()
    optimizer = NewtonPolish(model.parameters(), **{"weight_decay": 0.01, **settings})
    return model, optimizer, make_closure(optimizer, model, x, y)


def test_polish_freezes_groups_with_lr_zero() -> None:
    """They keep every bit, and the rest is polished."""
    model, x, y = small_problem()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = NewtonPolish(groups)
    frozen = [p.detach().clone() for p in model[0].parameters()]
    optimizer.step(make_closure(optimizer, model, x, y))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), frozen, strict=True))
    assert optimizer.result is not None and optimizer.result.status == "converged"
    assert optimizer.result.theta.numel() == 4


def test_polish_weight_decay_is_a_penalty_of_the_loss() -> None:
    """weight_decay=λ minimises L + λ/2 ‖θ‖², each group with its own λ."""
    model, x, y = small_problem()
    twin = copy.deepcopy(model)
    groups = [{"params": model[0].parameters(), "weight_decay": 0.02}, {"params": model[2].parameters(), "weight_decay": 0.04}]
    optimizer, twin_optimizer = NewtonPolish(groups), NewtonPolish(twin.named_parameters())

    def penalised() -> Tensor:
        twin_optimizer.zero_grad()
        loss = nn.functional.mse_loss(twin(x), y)
        loss = loss + 0.01 * sum(p.square().sum() for p in twin[0].parameters())
        loss = loss + 0.02 * sum(p.square().sum() for p in twin[2].parameters())
        loss.backward()
        return loss

    loss = optimizer.step(make_closure(optimizer, model, x, y))
    assert float(loss) == pytest.approx(float(twin_optimizer.step(penalised)), rel=1e-10)
    assert distance(flat(model), flat(twin)) < 1e-9
    assert optimizer.result is not None and optimizer.result.grad_norm <= 1e-13


def test_polish_maximize() -> None:
    """Maximising −L ends where minimising L does."""
    model, optimizer, closure = polished(weight_decay=0.01)
    twin, x, y = small_problem()
    twin_optimizer = NewtonPolish(twin.parameters(), weight_decay=0.01, maximize=True)
    optimizer.step(closure)
    loss = twin_optimizer.step(make_closure(twin_optimizer, twin, x, y, lambda p, t: -nn.functional.mse_loss(p, t)))
    assert distance(flat(twin), flat(model)) < 1e-9
    assert optimizer.result is not None and twin_optimizer.result is not None
    assert twin_optimizer.result.loss == loss.item() == pytest.approx(-optimizer.result.loss, rel=1e-9)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_polish_that_is_cut_off(error: type[BaseException]) -> None:
    """Ctrl-C or an exception in the middle: the parameters are the best point so far, and ``result`` says so."""
    model, optimizer, closure = polished(engine="closure")
    start = closure().item() + 0.005 * float(flat(model).square().sum())
    with pytest.raises(error):
        optimizer.step(Failing(closure, 16, error))
    result = optimizer.result
    assert result is not None and result.status == ("interrupted" if error is KeyboardInterrupt else "failed")
    assert result.n_iter > 0 and result.loss < start
    assert torch.equal(result.theta, flat(model))


def test_polish_hooks_fire_once() -> None:
    """Once per step, not per iteration."""
    _, optimizer, closure = polished()
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    optimizer.step(closure)
    assert fired == ["pre", "post"]
    assert optimizer.result is not None and optimizer.result.n_iter > 1


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_polish_copies_keep_their_settings(copies: Callable[[Any], Any]) -> None:
    """A copy does what the original does."""
    model, optimizer, closure = polished(gtol=1e-6, max_iter=7, max_norm=0.2)
    twin, twin_optimizer = copies((model, optimizer))
    _, x, y = small_problem()
    optimizer.step(closure)
    twin_optimizer.step(make_closure(twin_optimizer, twin, x, y))
    assert torch.equal(flat(model), flat(twin))
    assert twin_optimizer.result.message == optimizer.result.message


def polished_in_float32(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A float32 model at its minimum as far as float32 resolves it, and its data."""
    model, x, y = small_problem(seed)
    model, x, y = model.float(), x.float(), y.float()
    optimizer = NewtonPolish(model.parameters(), weight_decay=0.01, certificate=False)
    optimizer.step(make_closure(optimizer, model, x, y))
    return model, x, y


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_polish_in_float64_on_a_float32_model(seed: int) -> None:
    """dtype=torch.float64 reaches float64's round-off where float32 had to stop, and stays there if asked again."""
    model, x, y = polished_in_float32(seed)
    optimizer = NewtonPolish(model.parameters(), weight_decay=0.01, dtype=torch.float64, certificate=False)
    closure = make_closure(optimizer, model, x, y)
    for _ in range(2):
        optimizer.step(closure)
        assert optimizer.result is not None
        assert optimizer.result.status == "converged" and optimizer.result.grad_norm <= 1e-13
        assert torch.equal(optimizer.result.theta.float(), flat(model))
    assert optimizer.result.n_iter == 0


def test_polish_resumes_from_its_master_copy() -> None:
    """The float64 master copy survives state_dict in its own type: a converged polish is known to be converged."""
    model, x, y = polished_in_float32(5)
    optimizer = NewtonPolish(model.parameters(), weight_decay=0.01, dtype=torch.float64)
    optimizer.step(make_closure(optimizer, model, x, y))
    twin = copy.deepcopy(model)
    other = NewtonPolish(twin.parameters(), weight_decay=0.01, dtype=torch.float64)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert other.state[q]["theta"].dtype == torch.float64
        assert torch.equal(other.state[q]["theta"], optimizer.state[p]["theta"])
    other.step(make_closure(other, twin, x, y))
    assert other.result is not None and other.result.n_iter == 0


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_polish_through_distributed_checkpoint(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """A polish's state, which is empty or the master copy, goes through torch.distributed.checkpoint."""
    model, x, y = small_problem()
    model, x, y = model.float(), x.float(), y.float()
    optimizer = NewtonPolish(model.parameters(), weight_decay=0.01, dtype=dtype)
    optimizer.step(make_closure(optimizer, model, x, y))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    twin = copy.deepcopy(model)
    other = NewtonPolish(twin.parameters(), lr=0.5, dtype=dtype)
    state = {"optimizer": get_optimizer_state_dict(twin, other)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, state["optimizer"])
    assert other.param_groups[0]["weight_decay"] == 0.01 and other.param_groups[0]["lr"] == 1.0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(optimizer.state[p][name], other.state[q][name]) for name in optimizer.state[p])


def test_flow_then_polish_on_the_same_model() -> None:
    """The two optimizers of one loop: the flow's minimum is polished, and the flow goes on from where the polish ended."""
    model, optimizer, closure = started(0.5, weight_decay=0.05)
    run(optimizer, closure, model, 3)
    polish = NewtonPolish(model.parameters(), weight_decay=0.05)
    _, x, y = problem()
    polish.step(make_closure(polish, model, x, y))
    assert polish.result is not None and polish.result.grad_norm < 1e-12
    bottom = flat(model)
    optimizer.step(closure)
    assert distance(flat(model), bottom) < 10 * RTOL
