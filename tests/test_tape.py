"""The recorder between ``zero_grad()`` and ``step()``: torch's stack of modes, threads, forks, memory, copies."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from problems import RECORDED
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch_gradflow import GradientFlow, NewtonPolish
from torch_gradflow.objectives import record
from torch_gradflow.objectives import tape as tape_module
from torch_gradflow.objectives.opened import GradientFlowWarning

RECORDER = "TapeRecorder"


# Tools


def stack() -> list[str]:
    """The names of the modes on the stack, the outermost first; no reference to the modes is left behind."""
    return [type(mode).__name__ for mode in _get_current_function_mode_stack()]


@pytest.fixture(autouse=True)
def empty_stack() -> Iterator[None]:
    """Each test begins and ends with nothing on the stack; a test that fails does not spoil the next one."""
    assert stack() == []
    yield
    if stack():
        gc.collect()
    left = stack()
    if left:
        tape_module._of_thread.tape = tape_module.Tape()
        while stack():
            _pop_mode()
    assert left == []


class Mode(TorchFunctionMode):
    """Counts the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.n_seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_seen += 1
        return func(*args, **(kwargs or {}))


def is_foreign(func: Any) -> bool:
    """Whether a function is not one of torch's own."""
    return (getattr(func, "__module__", None) or "torch").split(".")[0] == "torch_gradflow"


class Swallowing(Mode):
    """Answers functions that are not torch's by itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if is_foreign(func) else super().__torch_function__(func, types, args, kwargs)


class Refusing(Mode):
    """Raises for functions that are not torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_foreign(func):
            raise NotImplementedError(f"never heard of {func}")
        return super().__torch_function__(func, types, args, kwargs)


class CountingDispatch(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_seen += 1
        return func(*args, **(kwargs or {}))


def recording_of(optimizer: GradientFlow) -> record.Recording:
    """What is being recorded."""
    assert optimizer._loop.recording is not None
    return optimizer._loop.recording


class Loop:
    """A small regression, with the pieces of its training loop."""

    def __init__(self, *, lr: float = 0.1, n: int = 20, seed: int = 0, **settings: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        self.x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        self.y = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        self.optimizer = GradientFlow(self.model.parameters(), lr=lr, **settings)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def assert_was_replayed(self, n_steps: int = 1, *, seed: int = 0) -> None:
        """The last step was replayed, and the parameters are where as many undisturbed steps lead."""
        assert self.optimizer.stats.engine in RECORDED, self.optimizer.stats.engine_reason
        self.assert_is_right(n_steps, seed=seed)

    def assert_is_right(self, n_steps: int = 1, *, seed: int = 0, rtol: float = 1e-9) -> None:
        """The parameters are where ``n_steps`` steps with a closure lead."""
        other = Loop(seed=seed)

        def closure() -> Tensor:
            other.optimizer.zero_grad()
            loss = other.loss()
            loss.backward()
            return loss

        for _ in range(n_steps):
            other.optimizer.step(closure)
        torch.testing.assert_close(self.theta, other.theta, rtol=rtol, atol=rtol / 100)


@pytest.fixture
def loop() -> Loop:
    return Loop()


def run_script(text: str, *, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own; ``make()`` gives it model, optimizer and data."""
    head = """
import gc, os, sys, threading, warnings
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch_gradflow import GradientFlow

torch.set_num_threads(1)
warnings.simplefilter("error")


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    return model, GradientFlow(model.parameters(), lr=0.1, record=True), torch.randn(20, 2), torch.randn(20, 1)


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y)


def stack():
    return [type(mode).__name__ for mode in _get_current_function_mode_stack()]


"""
    return subprocess.run([sys.executable, "-c", head + text], capture_output=True, text=True, timeout=timeout, check=False)


def assert_quiet(done: subprocess.CompletedProcess[str]) -> None:
    """The script ended well and said nothing but what it printed."""
    assert (done.returncode, done.stderr) == (0, "")


# The plain loop


def test_plain_loop_warns_of_nothing_and_leaves_no_mode(loop: Loop) -> None:
    """Not one warning in twenty steps; between the steps nothing stands on the stack."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            loop.step()
            assert stack() == []
    loop.assert_was_replayed(20)


def test_nothing_is_recorded_at_construction(loop: Loop) -> None:
    """A mode stands on the stack only after ``zero_grad()``."""
    assert stack() == []
    loop.model(loop.x)
    loop.optimizer.zero_grad()
    assert stack() == [RECORDER]
    del loop.optimizer


def test_zero_grad_twice(loop: Loop) -> None:
    """The second ``zero_grad()`` begins anew; there is one recorder."""
    loop.optimizer.zero_grad()
    loop.loss().backward()
    loop.optimizer.zero_grad()
    assert stack() == [RECORDER]
    loop.loss().backward()
    loop.optimizer.step()
    assert loop.optimizer.stats.n_recorded < 10
    loop.assert_was_replayed()


def test_one_recorder_serves_all_optimizers() -> None:
    """Five optimizers, one mode; each step is right."""
    loops = [Loop(seed=seed) for seed in range(5)]
    for one in loops:
        one.optimizer.zero_grad()
        assert stack() == [RECORDER]
    for one in loops:
        one.loss().backward()
    for one in loops:
        one.optimizer.step()
    assert stack() == []
    for seed, one in enumerate(loops):
        one.assert_was_replayed(seed=seed)


def test_frozen_parameters_and_lr_zero_record_nothing() -> None:
    """Where nothing moves, nothing is recorded."""
    loop = Loop(lr=0.0)
    loop.optimizer.zero_grad()
    assert stack() == []
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.1
    loop.model.requires_grad_(False)
    loop.optimizer.zero_grad()
    assert stack() == []


@pytest.mark.parametrize("settings", [{"record": False}, {"engine": "closure"}])
def test_record_false_never_touches_the_stack(settings: dict[str, Any]) -> None:
    """No mode at any time, and the step falls back without a warning."""
    loop = Loop(**settings)
    loop.optimizer.zero_grad()
    assert stack() == []
    loss = loop.loss()
    assert stack() == []
    loss.backward()
    loop.optimizer.step()
    assert stack() == []
    assert loop.optimizer.stats.engine == "fallback"
    assert loop.optimizer.stats.n_recorded == 0
    assert loop.optimizer.stats.record_seconds == 0.0


def test_stats_say_what_recording_cost(loop: Loop) -> None:
    """``n_recorded`` counts torch calls of the last pass, ``record_seconds`` adds up and is no more than the time spent."""
    began = time.perf_counter()
    loop.step()
    stats = loop.optimizer.stats
    # Two linear, one tanh, one mse_loss.
    assert stats.n_recorded == 4
    assert 0 < stats.record_seconds < time.perf_counter() - began
    first = stats.record_seconds
    loop.step()
    assert loop.optimizer.stats.n_recorded == 4
    assert first < loop.optimizer.stats.record_seconds < 1.0


# A closure beside the loop


def test_zero_grad_in_a_closure_does_not_record(loop: Loop) -> None:
    """``step(closure)`` leaves the stack empty, within and after."""
    seen: list[list[str]] = []

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        seen.append(stack())
        return loss

    loop.optimizer.step(closure)
    assert all(RECORDER not in names for names in seen)
    assert stack() == []
    loop.assert_was_replayed()
    assert loop.optimizer.stats.n_recorded == 0


def test_step_with_closure_discards_the_record(loop: Loop) -> None:
    """A loop that switches to a closure after ``zero_grad()`` follows the closure."""
    loop.optimizer.zero_grad()
    (100 * loop.loss()).backward()

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        return loss

    loop.optimizer.step(closure)
    assert stack() == []
    loop.assert_was_replayed()
    loop.step()
    loop.assert_was_replayed(2)


def test_newton_polish_uses_the_same_recorder(loop: Loop) -> None:
    """Both optimizers on one model, one after the other."""
    for _ in range(3):
        loop.step()
    newton = NewtonPolish(loop.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)
        newton.zero_grad()
        assert stack() == [RECORDER]
        loop.loss().backward()
        newton.step()
    assert stack() == []


# User modes


def test_user_mode_entered_before_and_left_after_zero_grad(loop: Loop) -> None:
    """The user's mode is off at once when it is left, and recording goes on."""
    mode = Mode()
    with mode:
        loop.optimizer.zero_grad()
        assert stack() == ["Mode", RECORDER]
    assert stack() == [RECORDER]
    n_seen = mode.n_seen
    loop.loss().backward()
    assert mode.n_seen == n_seen
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_part_of_the_pass_inside_the_user_mode(loop: Loop) -> None:
    """What was recorded before the user's mode is left is kept."""
    with Mode():
        loop.optimizer.zero_grad()
        hidden = loop.model[0](loop.x)
    F.mse_loss(loop.model[2](torch.tanh(hidden)), loop.y).backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


def test_user_mode_around_the_forward_pass(loop: Loop) -> None:
    """Entered after ``zero_grad()`` and left before ``step()``."""
    loop.optimizer.zero_grad()
    with Mode() as mode:
        assert stack() == [RECORDER, "Mode"]
        loss = loop.loss()
    assert mode.n_seen > 0
    assert stack() == [RECORDER]
    loss.backward()
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_step_inside_a_user_mode(loop: Loop) -> None:
    """Entered after ``zero_grad()``, left after ``step()``: the user's mode stays on the stack, the recorder is inert."""
    loop.optimizer.zero_grad()
    with Mode() as mode:
        loop.loss().backward()
        loop.optimizer.step()
        assert stack() == [RECORDER, "Mode"]
        n_seen = mode.n_seen
        torch.ones(1) + 1
        assert mode.n_seen > n_seen
    loop.assert_was_replayed()
    loop.step()
    assert stack() == []
    loop.assert_was_replayed(2)


def test_whole_loop_inside_a_user_mode(loop: Loop) -> None:
    """With a mode around everything the stack is the user's after every step."""
    with Mode():
        for _ in range(3):
            loop.step()
            assert stack() == ["Mode"]
    loop.assert_was_replayed(3)


def test_nested_user_modes_entered_before(loop: Loop) -> None:
    """Each of three modes is off as soon as it is left."""
    a, b, c = Mode(), Mode(), Mode()
    with a:
        with b:
            with c:
                loop.optimizer.zero_grad()
            assert stack() == ["Mode", "Mode", RECORDER]
            hidden = loop.model[0](loop.x)
        assert stack() == ["Mode", RECORDER]
        hidden = torch.tanh(hidden)
    assert stack() == [RECORDER]
    counts = [m.n_seen for m in (a, b, c)]
    assert counts[0] > counts[1] > counts[2]
    F.mse_loss(loop.model[2](hidden), loop.y).backward()
    assert [m.n_seen for m in (a, b, c)] == counts
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_mode_entered_again_while_it_is_on(loop: Loop) -> None:
    """The same mode object twice on the stack, with the recorder in between."""
    mode = Mode()
    with mode:
        loop.optimizer.zero_grad()
        with mode:
            hidden = loop.model[0](loop.x)
        assert stack() == ["Mode", RECORDER]
    assert stack() == [RECORDER]
    F.mse_loss(loop.model[2](torch.tanh(hidden)), loop.y).backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_interleaved_with_modes(order: tuple[int, int]) -> None:
    """zero_grad and step of two optimizers in any order, with user modes opened and closed in between."""
    loops = [Loop(seed=0), Loop(seed=1)]
    outer, inner = Mode(), Mode()
    for _ in range(3):
        with outer:
            loops[0].optimizer.zero_grad()
            with inner:
                loops[1].optimizer.zero_grad()
                loops[0].loss().backward()
        assert stack() == [RECORDER]
        with inner:
            loops[1].loss().backward()
            loops[order[0]].optimizer.step()
        with outer:
            loops[order[1]].optimizer.step()
            assert [name for name in stack() if name == "Mode"] == ["Mode"]
        assert "Mode" not in stack()
    assert loops[0].optimizer.stats.engine in RECORDED and loops[1].optimizer.stats.engine in RECORDED
    loops[0].assert_was_replayed(3, seed=0)
    loops[1].assert_was_replayed(3, seed=1)
    loops.clear()


def test_steps_in_two_loops_nested_in_each_other() -> None:
    """An inner training loop between ``zero_grad()`` and ``step()`` of an outer one."""
    outer, inner = Loop(seed=0), Loop(seed=1)
    outer.optimizer.zero_grad()
    loss = outer.loss()
    for _ in range(3):
        inner.step()
        assert stack() == [RECORDER]
    loss.backward()
    outer.optimizer.step()
    assert stack() == []
    outer.assert_was_replayed(seed=0)
    inner.assert_was_replayed(3, seed=1)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *((Swallowing, where) for where in ("around zero_grad", "around forward", "around step", "around all")),
        *((Refusing, where) for where in ("around zero_grad", "around forward", "around step", "around all")),
    ],
)
def test_modes_that_do_not_pass_on_unknown_functions(loop: Loop, kind: type[Mode], where: str) -> None:
    """A mode that swallows foreign functions, or raises, disturbs neither loop nor stack."""

    def mode_if(*places: str) -> AbstractContextManager[Any]:
        return kind() if where in places else nullcontext()

    for _ in range(3):
        with mode_if("around all"):
            with mode_if("around zero_grad"):
                loop.optimizer.zero_grad()
            assert stack() == [kind.__name__] * (where == "around all") + [RECORDER]
            with mode_if("around forward"):
                loop.loss().backward()
            with mode_if("around step"):
                loop.optimizer.step()
        assert kind.__name__ not in stack()
    loop.assert_was_replayed(3)
    del loop.optimizer


def test_dispatch_mode_beside_the_recorder(loop: Loop) -> None:
    """A TorchDispatchMode lives on another stack."""
    for _ in range(2):
        with CountingDispatch() as mode:
            loop.optimizer.zero_grad()
            loss = loop.loss()
        n_seen = mode.n_seen
        assert n_seen > 0
        loss.backward()
        loop.optimizer.step()
        assert mode.n_seen == n_seen
        assert stack() == []
    loop.assert_was_replayed(2)


def test_user_mode_left_by_an_exception_of_torch(loop: Loop) -> None:
    """The recorder's frame is in the traceback when the user's mode is left; it is off all the same, at once."""
    mode = Mode()
    try:
        with mode:
            loop.optimizer.zero_grad()
            loop.model(torch.ones(3, 7, dtype=torch.float64))
    except RuntimeError:
        assert "Mode" not in stack()
    assert "Mode" not in stack()
    n_seen = mode.n_seen
    loop.step()
    assert mode.n_seen == n_seen
    assert stack() == []
    loop.assert_was_replayed()


def test_user_mode_left_by_an_exception_that_is_kept(loop: Loop) -> None:
    """As a notebook does (sys.last_exc); the stack is right while it is kept, and right when it goes."""
    kept: list[BaseException] = []
    mode = Mode()
    try:
        with mode:
            loop.optimizer.zero_grad()
            loop.model(torch.ones(3, 7, dtype=torch.float64))
    except RuntimeError as error:
        kept.append(error)
    during = stack()
    other = CountingOther()
    with other:
        kept.clear()
        gc.collect()
        inside = stack()
    after = stack()
    assert during == [RECORDER]
    assert inside == [RECORDER, "CountingOther"]
    assert after == [RECORDER]
    del loop.optimizer


class CountingOther(Mode):
    """Another user mode."""


def test_user_mode_left_by_an_exception_of_python(loop: Loop) -> None:
    """An exception that passes no frame of the recorder."""
    with contextlib.suppress(KeyError), Mode():
        loop.optimizer.zero_grad()
        loop.loss()
        raise KeyError
    assert stack() == [RECORDER]
    loop.step()
    loop.assert_was_replayed()


# Devices


def test_device_context_around_zero_grad(loop: Loop) -> None:
    """After ``with torch.device("meta")`` tensors are made on the CPU at once, and recording goes on."""
    with torch.device("meta"):
        loop.optimizer.zero_grad()
        assert torch.ones(1).device.type == "meta"
    assert torch.ones(1).device.type == "cpu"
    assert stack() == [RECORDER]
    loop.loss().backward()
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_device_context_between_zero_grad_and_step(loop: Loop) -> None:
    """Entered and left while it records."""
    loop.optimizer.zero_grad()
    loss = loop.loss()
    with torch.device("meta"):
        assert torch.ones(1).device.type == "meta"
        nn.Linear(3, 3)
    assert torch.ones(1).device.type == "cpu"
    loss.backward()
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_device_context_around_step(loop: Loop) -> None:
    """``step()`` inside: the device stays until it is left."""
    loop.optimizer.zero_grad()
    loop.loss().backward()
    with torch.device("cpu"):
        loop.optimizer.step()
        assert "DeviceContext" in stack()
    assert "DeviceContext" not in stack()
    loop.assert_was_replayed()
    loop.step()
    assert stack() == []
    loop.assert_was_replayed(2)


def test_device_contexts_nested_with_user_modes(loop: Loop) -> None:
    """Both kinds, entered before and left after ``zero_grad()``."""
    mode = Mode()
    with torch.device("meta"):
        with mode, torch.device("cpu"):
            loop.optimizer.zero_grad()
        assert torch.ones(1).device.type == "meta"
        assert stack() == ["DeviceContext", RECORDER]
    assert torch.ones(1).device.type == "cpu"
    assert stack() == [RECORDER]
    loop.loss().backward()
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_default_device_set_and_reset_while_recording(loop: Loop) -> None:
    """``torch.set_default_device`` in between."""
    try:
        loop.optimizer.zero_grad()
        torch.set_default_device("meta")
        assert torch.ones(1).device.type == "meta"
        loss = loop.loss()
        torch.set_default_device("cpu")
        loss.backward()
        loop.optimizer.step()
        assert torch.ones(1).device.type == "cpu"
        assert stack() == ["DeviceContext"]
        loop.optimizer.zero_grad()
        torch.set_default_device(None)
        assert stack() == [RECORDER]
        loop.loss().backward()
        loop.optimizer.step()
    finally:
        torch.set_default_device(None)
    assert stack() == []
    loop.assert_was_replayed(2)


# Exceptions


def test_exception_in_the_forward_pass(loop: Loop) -> None:
    """The next loop is right, the stack is clean after it."""
    for _ in range(3):
        loop.optimizer.zero_grad()
        with pytest.raises(RuntimeError):
            loop.model(torch.ones(3, 7, dtype=torch.float64))
        assert stack() == [RECORDER]
    loop.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_exception_in_backward(loop: Loop) -> None:
    """A hook that raises."""

    def hook(_: Tensor) -> None:
        raise KeyboardInterrupt

    loop.optimizer.zero_grad()
    loss = loop.loss()
    handle = next(loop.model.parameters()).register_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    handle.remove()
    assert stack() == [RECORDER]
    loop.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_exception_in_step_leaves_the_stack_clean(loop: Loop) -> None:
    """A loss that is not finite."""
    loop.optimizer.zero_grad()
    (loop.loss() * float("nan")).backward()
    with pytest.raises(FloatingPointError):
        loop.optimizer.step()
    assert stack() == []
    loop.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_interrupted_loop_of_a_dropped_optimizer(loop: Loop) -> None:
    """After an exception the recorder goes with the optimizer."""
    loop.optimizer.zero_grad()
    with pytest.raises(KeyboardInterrupt):
        raise_interrupt()
    del loop.optimizer
    assert stack() == []


def raise_interrupt() -> None:
    raise KeyboardInterrupt


# The optimizer's end


def test_recorder_goes_with_the_optimizer(loop: Loop) -> None:
    """At ``del``, at once."""
    loop.optimizer.zero_grad()
    loss = loop.loss()
    del loop.optimizer
    assert stack() == []
    loss.backward()


def test_recorder_goes_with_an_optimizer_in_a_cycle() -> None:
    """At the next garbage collection."""
    loop = Loop()
    loop.optimizer.zero_grad()
    loop.optimizer.itself = loop.optimizer  # type: ignore[attr-defined]
    loop.optimizer.scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1)  # type: ignore[attr-defined]
    del loop
    gc.collect()
    assert stack() == []


def test_optimizer_collected_below_a_user_mode() -> None:
    """It cannot be taken off then; it is at the next occasion, and the user's mode stays."""
    loop = Loop()
    loop.optimizer.zero_grad()
    with Mode():
        del loop
        gc.collect()
        assert stack() == [RECORDER, "Mode"]
        torch.ones(1)
    other = Loop()
    other.step()
    assert stack() == []
    other.assert_was_replayed()


def test_thousand_optimizers_made_and_dropped() -> None:
    """None leaves anything on the stack."""
    parameter = nn.Parameter(torch.ones(2))
    for _ in range(1000):
        optimizer = GradientFlow([parameter])
        optimizer.zero_grad()
        (parameter**2).sum()
        del optimizer
        assert stack() == []


def test_script_that_ends_while_recording() -> None:
    """Exit code 0 and no word on stderr."""
    text = "model, optimizer, x, y = make()\n"
    text += "for _ in range(3):\n    optimizer.zero_grad(); loss_of(model, x, y).backward(); optimizer.step()\n"
    assert_quiet(run_script(text + "optimizer.zero_grad()\nloss_of(model, x, y).backward()\n"))


@pytest.mark.slow
def test_script_that_ends_inside_a_user_mode_while_recording() -> None:
    """The same with a device context that is never left."""
    text = "model, optimizer, x, y = make()\ntorch.set_default_device('cpu')\noptimizer.zero_grad()\nloss_of(model, x, y)"
    assert_quiet(run_script(text))


# Threads


def test_threads_that_end_while_recording() -> None:
    """A thread's stack goes with it: no crash, no word, and its optimizer can be used elsewhere."""
    text = """
def work(kept):
    model, optimizer, x, y = make()
    optimizer.zero_grad()
    loss_of(model, x, y)
    kept.append((model, optimizer, x, y))

for i in range(20):
    kept = []
    thread = threading.Thread(target=work, args=(kept,)); thread.start(); thread.join()
    if i % 2:
        model, optimizer, x, y = kept[0]
        optimizer.zero_grad(); loss_of(model, x, y).backward(); optimizer.step()
        assert optimizer.stats.engine in ("perceptron", "replay"), optimizer.stats.engine_reason
        assert stack() == []
    del kept
    gc.collect()
"""
    assert_quiet(run_script(text))


def test_other_threads_are_not_recorded(loop: Loop) -> None:
    """What another thread computes from the parameters is not seen, and its stack is empty."""
    seen: list[list[str]] = []

    def work() -> None:
        seen.append(stack())
        with torch.no_grad():
            for _ in range(10):
                loop.loss()
        loop.loss()

    loop.optimizer.zero_grad()
    loss = loop.loss()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    loss.backward()
    loop.optimizer.step()
    assert seen == [[]]
    assert loop.optimizer.stats.n_recorded == 4
    loop.assert_was_replayed()


def test_two_threads_train_at_once() -> None:
    """Each with its own model and optimizer; both right."""
    loops = [Loop(seed=seed) for seed in range(4)]
    failures: list[BaseException] = []

    def work(one: Loop) -> None:
        try:
            for _ in range(20):
                one.step()
                assert stack() == []
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(one,)) for one in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for seed, one in enumerate(loops):
        one.assert_was_replayed(20, seed=seed)


@pytest.mark.parametrize("collected", ["here", "there"])
def test_zero_grad_here_and_step_there(loop: Loop, collected: str) -> None:
    """The step is right, whichever way; afterwards this thread's recorder is inert, and goes at the next occasion."""

    def work() -> None:
        loop.loss().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop.optimizer.step()
        if collected == "there":
            del loop.optimizer
            gc.collect()

    optimizer = loop.optimizer if collected == "here" else None
    loop.optimizer.zero_grad()
    if collected == "here":
        loop.loss()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if optimizer is not None:
        assert optimizer.stats.engine in {*RECORDED, "fallback"}
    del optimizer
    other = Loop()
    other.step()
    assert stack() == []
    other.assert_was_replayed()


def test_backward_and_step_in_another_thread_replay(loop: Loop) -> None:
    """The forward pass was recorded here, where backward is not seen: a named fallback, or the right step."""
    loop.optimizer.zero_grad()
    loss = loop.loss()
    loss.backward()
    with warnings.catch_warnings(record=True):
        thread = threading.Thread(target=loop.optimizer.step)
        thread.start()
        thread.join()
    assert loop.optimizer.stats.engine in RECORDED or loop.optimizer.stats.engine_reason
    loop.step()
    assert stack() == []


def test_recorder_whose_recording_ended_in_another_thread_keeps_nothing(loop: Loop) -> None:
    """It tells nobody, and what passes through it is freed."""
    loop.optimizer.zero_grad()
    loop.loss().backward()
    thread = threading.Thread(target=loop.optimizer.step)
    thread.start()
    thread.join()
    out = loop.model(loop.x)
    seen = weakref.ref(out)
    del out
    assert seen() is None
    loop.step()
    assert stack() == []


# Forks


def in_child(work: Callable[[], bool]) -> int:
    """The exit code of a forked process that does ``work``: 0 if it says that all is well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_fork_while_recording(loop: Loop) -> None:
    """The child computes and records nothing; the parent goes on as if nothing had happened."""
    loop.optimizer.zero_grad()
    loss = loop.loss()
    recording = recording_of(loop.optimizer)

    def work() -> bool:
        before = recording.n_calls
        loop.loss().backward()
        with torch.no_grad():
            loop.model(loop.x)
        return recording.n_calls == before and recording.n_backward == 0

    assert in_child(work) == 0
    loss.backward()
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_child_trains_by_itself(loop: Loop) -> None:
    """A child of a recording process may train; its steps are right."""
    loop.optimizer.zero_grad()
    loss = loop.loss()

    def work() -> bool:
        own = Loop(seed=3)
        for _ in range(3):
            own.step()
        own.assert_was_replayed(3, seed=3)
        loop.step()
        loop.assert_was_replayed()
        return True

    assert in_child(work) == 0
    loss.backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


def test_child_leaves_a_mode_that_the_parent_entered(loop: Loop) -> None:
    """The child takes the user's mode off and still records nothing."""
    mode = Mode()
    with mode:
        loop.optimizer.zero_grad()
        loop.loss()
        recording = recording_of(loop.optimizer)

        def work() -> bool:
            before = recording.n_calls
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            n_seen = mode.n_seen
            loop.loss()
            return mode.n_seen == n_seen and "Mode" not in stack() and recording.n_calls == before

        assert in_child(work) == 0
    loop.step()
    assert stack() == []


def test_child_leaves_a_mode_after_zero_grad_of_its_own(loop: Loop) -> None:
    """The mode that the parent entered is off in the child as soon as it leaves it."""
    mode = Mode()
    with mode:
        loop.optimizer.zero_grad()

        def work() -> bool:
            loop.optimizer.zero_grad()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            n_seen = mode.n_seen
            loop.loss().backward()
            loop.optimizer.step()
            return mode.n_seen == n_seen

        assert in_child(work) == 0
    loop.step()
    assert stack() == []


class Squares(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Data that a worker computes with torch."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.tensor([index / 24.0, 1.0], dtype=torch.float64)
        return x, (x**2).sum().reshape(1)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
def test_data_loader_workers_while_recording(loop: Loop, persistent: bool) -> None:
    """Workers that are forked between ``zero_grad()`` and the forward pass."""
    loader = torch.utils.data.DataLoader(
        Squares(), batch_size=8, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork"
    )
    for _ in range(2):
        loop.optimizer.zero_grad()
        n = 0
        for x, y in loader:
            (F.mse_loss(loop.model(x), y) / 3).backward()
            n += 1
        assert n == 3
        loop.optimizer.step()
        assert loop.optimizer.stats.engine in RECORDED, loop.optimizer.stats.engine_reason
        assert stack() == []


def test_forked_pool_while_recording(loop: Loop) -> None:
    """Python's own process pool."""
    loop.optimizer.zero_grad()
    loss = loop.loss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(_worker, range(4)) == [0.0, 1.0, 4.0, 9.0]
    loss.backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


def _worker(number: int) -> float:
    return float(torch.tensor(float(number)) ** 2)


# Memory


class Batches:
    """Batches that remember how many of them are alive."""

    def __init__(self, n: int, width: int = 2) -> None:
        self._n, self._width = n, width
        self._seen: list[weakref.ref[Tensor]] = []

    def one(self) -> Tensor:
        batch = torch.full((self._n, self._width), 0.5, dtype=torch.float64)
        self._seen.append(weakref.ref(batch))
        return batch

    @property
    def n_alive(self) -> int:
        return sum(reference() is not None for reference in self._seen)


def inplace_relu_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 1), nn.Tanh()).double()


def plain_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def test_no_grad_evaluations_keep_nothing(loop: Loop) -> None:
    """Batches, outputs and activations that are computed under no_grad are freed with the last reference."""
    loop.optimizer.zero_grad()
    batches, outs = Batches(100), []
    with torch.no_grad():
        for _ in range(20):
            out = loop.model(batches.one())
            outs.append(weakref.ref(out))
            assert float(out.mean()) == float(out.mean())
            del out
    assert batches.n_alive == 0
    assert [o() for o in outs] == [None] * 20
    loop.loss().backward()
    loop.optimizer.step()
    assert loop.optimizer.stats.n_recorded == 4
    loop.assert_was_replayed()


def test_inference_mode_evaluation_in_between(loop: Loop) -> None:
    """The same with ``torch.inference_mode``."""
    loop.optimizer.zero_grad()
    batches = Batches(10)
    with torch.inference_mode():
        assert float(loop.model(batches.one()).sum()) != 0.0
    assert batches.n_alive == 0
    loop.loss().backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


@pytest.mark.parametrize("make", [plain_model, inplace_relu_model])
def test_evaluations_with_gradients_hold_a_bounded_amount(make: Callable[[], nn.Module]) -> None:
    """Of 300 big batches only those that fit into the spare bytes are alive at any time; none after the step."""
    model = make()
    optimizer = GradientFlow(model.parameters(), lr=0.01)
    size = record._SPARE_BYTES // 16  # 4 MiB: of these at most 16 fit
    batches = Batches(size // 16)
    optimizer.zero_grad()
    most = 0
    for _ in range(300):
        model(batches.one()).sum()
        most = max(most, batches.n_alive)
    assert most <= 2 * 17
    x, y = torch.randn(20, 2, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    assert optimizer.stats.engine in RECORDED, optimizer.stats.engine_reason
    optimizer.zero_grad()
    assert batches.n_alive == 0
    del optimizer


@pytest.mark.parametrize("make", [plain_model, inplace_relu_model])
def test_small_evaluations_with_gradients_hold_a_bounded_number(make: Callable[[], nn.Module]) -> None:
    """Of many small batches only those that fit into the spare calls are alive."""
    model = make()
    optimizer = GradientFlow(model.parameters(), lr=0.01)
    batches = Batches(2)
    optimizer.zero_grad()
    most = 0
    for _ in range(1000):
        model(batches.one()).sum().item()
        most = max(most, batches.n_alive)
    assert most <= record._SPARE_CALLS
    del optimizer
    assert batches.n_alive == 0


def test_evaluations_with_gradients_cost_the_same_however_many() -> None:
    """What was forgotten costs nothing: neither memory nor time grow with the number of evaluations before."""
    model = plain_model()
    optimizer = GradientFlow(model.parameters())
    x = torch.ones(2, 2, dtype=torch.float64)
    optimizer.zero_grad()

    def some() -> float:
        began = time.process_time()
        for _ in range(1500):
            model(x)
        return time.process_time() - began

    times = [some() for _ in range(8)]
    recording = recording_of(optimizer)
    sizes = {k: len(v) for k, v in vars(recording).items() if isinstance(v, list | dict | set)}
    del optimizer
    assert max(sizes.values()) < 3000, sizes
    assert min(times[-3:]) < 2 * min(times[:3]), times


def test_evaluation_before_the_pass_does_not_make_it_another_program(loop: Loop) -> None:
    """Logging a norm in every third step: small steps on an unchanged objective still cost one gradient each."""
    other = Loop()
    for i in range(30):
        other.step()
        loop.optimizer.zero_grad()
        if i % 3 == 0:
            sum(p.norm() for p in loop.model.parameters())
        loop.loss().backward()
        loop.optimizer.step()
    assert loop.optimizer.stats.n_grad <= other.optimizer.stats.n_grad


def test_evaluation_before_a_pass_that_logs_its_loss(loop: Loop) -> None:
    """``loss.item()`` before backward serves as long as the pass is the same, whatever was evaluated before it."""
    engines = []
    for i in range(9):
        loop.optimizer.zero_grad()
        if i % 3 == 2:
            sum(p.norm() for p in loop.model.parameters())
        loss = loop.loss()
        loss.item()
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientFlowWarning)
            loop.optimizer.step()
        engines.append(loop.optimizer.stats.engine)
    assert all(engine in RECORDED for engine in engines[2:])


def test_tensors_that_the_user_keeps_are_respected(loop: Loop) -> None:
    """A loss from an old, living activation is replayed after much has been forgotten."""
    loop.optimizer.zero_grad()
    hidden = loop.model[1](loop.model[0](loop.x))
    for _ in range(400):
        loop.model(loop.x)
    F.mse_loss(loop.model[2](hidden), loop.y).backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


def test_activations_are_freed_when_the_user_frees_them(loop: Loop) -> None:
    """The record holds names in place of activations."""
    loop.optimizer.zero_grad()
    hidden = loop.model[1](loop.model[0](loop.x))
    loss = F.mse_loss(loop.model[2](hidden), loop.y)
    loss.backward()
    references = weakref.ref(hidden), weakref.ref(loss)
    del hidden, loss
    assert [r() for r in references] == [None, None]
    loop.optimizer.step()
    loop.assert_was_replayed()


def test_batches_are_freed_after_step(loop: Loop) -> None:
    """At most the last two batches (the last program, and the one before) stay after a step."""
    batches = Batches(10)
    for _ in range(10):
        loop.optimizer.zero_grad()
        F.mse_loss(loop.model(batches.one()), torch.zeros(10, 1, dtype=torch.float64)).backward()
        loop.optimizer.step()
        assert loop.optimizer.stats.engine in RECORDED, loop.optimizer.stats.engine_reason
        assert batches.n_alive <= 2


def test_number_of_objects_is_constant_over_500_steps() -> None:
    """Python objects after 100 steps and after 600."""
    loop = Loop(lr=1e-4, n=4, check=False)
    counts = []
    for i in range(601):
        loop.step()
        if i in (100, 600):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert loop.optimizer.stats.engine in RECORDED
    assert counts[1] - counts[0] < 50


@pytest.mark.slow
def test_memory_is_flat_over_10_000_steps() -> None:
    """Resident memory after 2,000 steps and after 12,000."""
    loop = Loop(lr=1e-4, n=4, check=False)
    sizes = []
    for i in range(12_001):
        loop.step()
        if i % 20 == 0:
            with torch.no_grad():
                loop.loss()
            loop.loss()
        if i in (2_000, 12_000):
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
    assert loop.optimizer.stats.engine in RECORDED
    assert sizes[1] - sizes[0] < 4 * 2**20


def test_memory_is_flat_over_exceptions(loop: Loop) -> None:
    """500 passes that fail after their forward pass."""
    counts = []
    for i in range(501):
        loop.optimizer.zero_grad()
        loop.loss()
        with pytest.raises(KeyError):
            raise KeyError
        if i in (50, 500):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 50
    loop.step()
    loop.assert_was_replayed()


# Copies


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("moment", ["after zero_grad", "after forward", "after backward"])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("what", ["optimizer", "pair"])
def test_copies_in_mid_recording(make_copy: Callable[[Any], Any], moment: str, what: str) -> None:
    """The copy steps, the original is replayed as if nothing had happened."""
    loop = Loop()
    loop.step()
    loop.optimizer.zero_grad()
    twins: list[Any] = []

    def copy_at(now: str) -> None:
        if now == moment:
            thing = loop.optimizer if what == "optimizer" else (loop.model, loop.optimizer)
            twins.append(make_copy(thing))

    copy_at("after zero_grad")
    loss = loop.loss()
    copy_at("after forward")
    loss.backward()
    copy_at("after backward")
    loop.optimizer.step()
    assert stack() == []
    assert loop.optimizer.stats.engine in RECORDED, loop.optimizer.stats.engine_reason
    loop.assert_is_right(2, rtol=1e-6)
    [twin] = twins
    if what == "optimizer":
        assert isinstance(twin, GradientFlow)
        assert twin._loop.recording is None
        assert twin.flow_time == pytest.approx(0.1)
        parameters = [p for group in twin.param_groups for p in group["params"]]
        # The copy's parameters belong to nobody else.
        twin.zero_grad()
        sum((p**2).sum() for p in parameters).backward()
        twin.step()
        assert twin.stats.engine in RECORDED, twin.stats.engine_reason
        loop.assert_is_right(2, rtol=1e-6)
        return
    model, optimizer = twin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)
        if moment == "after backward" and make_copy is copy.deepcopy:
            optimizer.step()  # torch copies parameters without .grad: nothing moves
        optimizer.zero_grad()
        F.mse_loss(model(loop.x), loop.y).backward()
        optimizer.step()
    assert optimizer.stats.engine in RECORDED, optimizer.stats.engine_reason
    assert stack() == []
    loop.assert_is_right(2, rtol=1e-6)
    if not (moment == "after backward" and make_copy is copy.deepcopy):
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(theta, loop.theta, rtol=1e-6, atol=1e-8)


def test_copying_the_model_between_forward_and_backward(loop: Loop) -> None:
    """An average of the weights, a target network: the loss is not computed from it."""
    loop.optimizer.zero_grad()
    twin = copy.deepcopy(loop.model)
    loss = loop.loss()
    buffer = io.BytesIO()
    torch.save(loop.model.state_dict(), buffer)
    loss.backward()
    loop.optimizer.step()
    loop.assert_was_replayed()
    assert not torch.equal(next(twin.parameters()), next(loop.model.parameters()))


def test_frozen_copy_of_the_model_as_target(loop: Loop) -> None:
    """A target network made between ``zero_grad()`` and the loss: right, or a named fallback."""
    loop.optimizer.zero_grad()
    target = copy.deepcopy(loop.model).requires_grad_(False)
    with torch.no_grad():
        y = target(loop.x) + 1
    F.mse_loss(loop.model(loop.x), y).backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loop.optimizer.step()
    stats = loop.optimizer.stats
    assert stats.engine in RECORDED or (stats.engine_reason and said)


@pytest.mark.parametrize("fallback", ["bdf-secant", "adams-bashforth"])
def test_state_dict_in_mid_fallback_continues_bit_for_bit(fallback: str) -> None:
    """Saved, loaded into a new optimizer, and continued: the same parameters to the last bit."""
    whole, half = Loop(record=False, fallback=fallback), Loop(record=False, fallback=fallback)
    for _ in range(12):
        whole.step()
    for _ in range(5):
        half.step()
    half.optimizer.zero_grad()
    other = Loop(seed=1, record=False)
    other.x, other.y = half.x, half.y
    other.model.load_state_dict(saved(half.model.state_dict()))
    other.optimizer.load_state_dict(saved(half.optimizer.state_dict()))
    for _ in range(7):
        other.step()
    assert torch.equal(whole.theta, other.theta)
    assert whole.optimizer.flow_time == other.optimizer.flow_time


def test_load_state_dict_in_mid_recording(loop: Loop) -> None:
    """Loading ends the record; the next loop is right."""
    state = copy.deepcopy(loop.optimizer.state_dict())
    loop.optimizer.zero_grad()
    loop.loss()
    loop.optimizer.load_state_dict(state)
    assert stack() == []
    loop.step()
    loop.assert_was_replayed()


# recording_paused


def test_paused_evaluations_are_not_recorded(loop: Loop) -> None:
    """With gradients, reading numbers: none of it counts."""
    loop.optimizer.zero_grad()
    batches = Batches(5)
    with loop.optimizer.recording_paused():
        for _ in range(10):
            loop.model(batches.one()).sum().item()
        assert batches.n_alive == 0
    loop.loss().backward()
    loop.optimizer.step()
    assert loop.optimizer.stats.n_recorded == 4
    loop.assert_was_replayed()


def test_pausing_is_undone_by_an_exception_and_may_be_nested(loop: Loop) -> None:
    """Recording goes on after the outermost block, also after an exception."""
    loop.optimizer.zero_grad()
    with contextlib.suppress(KeyError), loop.optimizer.recording_paused():
        with loop.optimizer.recording_paused():
            loop.loss()
        loop.loss()
        raise KeyError
    loop.loss().backward()
    loop.optimizer.step()
    assert loop.optimizer.stats.n_recorded == 4
    loop.assert_was_replayed()


def test_loss_computed_while_paused_is_a_named_fallback(loop: Loop) -> None:
    """Nothing to replay: the step is that of one gradient, and says why."""
    loop.optimizer.zero_grad()
    with loop.optimizer.recording_paused():
        loss = loop.loss()
    loss.backward()
    with pytest.warns(GradientFlowWarning, match="one gradient per call"):
        loop.optimizer.step()
    assert loop.optimizer.stats.engine == "fallback"
    assert loop.optimizer.stats.engine_reason
    assert stack() == []


def test_part_of_the_loss_computed_while_paused_is_not_replayed_wrongly(loop: Loop) -> None:
    """The hidden layer is not in the record, so its gradient is missing there: a named fallback."""
    loop.optimizer.zero_grad()
    with loop.optimizer.recording_paused():
        hidden = loop.model[0](loop.x)
    F.mse_loss(loop.model[2](torch.tanh(hidden)), loop.y).backward()
    with pytest.warns(GradientFlowWarning, match="one gradient per call"):
        loop.optimizer.step()
    assert loop.optimizer.stats.engine == "fallback"


def test_zero_grad_while_paused(loop: Loop) -> None:
    """A new record begun in the block of the old one: right or a named fallback, and the next pass is replayed."""
    with loop.optimizer.recording_paused():
        loop.step()
        loop.optimizer.zero_grad()
    loop.optimizer.zero_grad()
    with loop.optimizer.recording_paused():
        loop.optimizer.zero_grad()
        loss = loop.loss()
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)
        loop.optimizer.step()
    assert loop.optimizer.stats.engine in RECORDED or loop.optimizer.stats.engine_reason
    loop.step()
    assert loop.optimizer.stats.engine in RECORDED


def test_pausing_without_a_record_does_nothing(loop: Loop) -> None:
    """Before ``zero_grad()`` and with ``record=False``."""
    for one in (loop, Loop(record=False)):
        with one.optimizer.recording_paused():
            assert stack() == []
            one.loss()
    with loop.optimizer.recording_paused():
        loop.optimizer.zero_grad()
        loop.loss().backward()
        loop.optimizer.step()
    loop.assert_was_replayed()


# Hooks


def test_step_hooks(loop: Loop) -> None:
    """Step hooks that compute with the parameters."""

    def hook(*_: Any) -> None:
        loop.loss()

    loop.optimizer.register_step_pre_hook(hook)
    loop.optimizer.register_step_post_hook(hook)
    for _ in range(3):
        loop.step()
        assert stack() == []
    loop.assert_is_right(3)


def test_evaluation_under_no_grad_in_a_step_pre_hook(loop: Loop) -> None:
    """An evaluation after backward does not matter."""

    def hook(*_: Any) -> None:
        with torch.no_grad():
            assert float(loop.loss()) > 0

    loop.optimizer.register_step_pre_hook(hook)
    for _ in range(3):
        loop.step()
    loop.assert_was_replayed(3)


STEP_IN_BACKWARD = """
parameters = [nn.Parameter(torch.tensor([0.3, -0.2])), nn.Parameter(torch.tensor([1.0, 0.5]))]
optimizers = {p: GradientFlow([p], lr=0.1) for p in parameters}

def hook(parameter):
    optimizers[parameter].step()
    optimizers[parameter].zero_grad()

for parameter in parameters:
    parameter.register_post_accumulate_grad_hook(hook)
warnings.simplefilter("ignore")
before = [float(p.detach().norm()) for p in parameters]
for _ in range(3):
    if ZEROED:
        optimizers[parameters[0]].zero_grad()
    ((parameters[0] ** 2).sum() + (parameters[1] ** 4).sum()).backward()
# Not at every call: with one gradient per call a point may be a correction of the one before.
assert all(0 < float(p.detach().norm()) < old for p, old in zip(parameters, before)), parameters
for optimizer in optimizers.values():
    assert optimizer.stats.engine in ("perceptron", "replay") or optimizer.stats.engine_reason
assert stack().count("TapeRecorder") <= 1, stack()
del optimizer
optimizers.clear()
gc.collect()
model, optimizer, x, y = make()
optimizer.zero_grad(); loss_of(model, x, y).backward(); optimizer.step()
assert optimizer.stats.engine in ("perceptron", "replay"), optimizer.stats.engine_reason
assert stack() == [], stack()
"""


@pytest.mark.parametrize("zeroed", [False, True])
def test_step_in_backward(zeroed: bool) -> None:
    """One optimizer per parameter that steps and zeroes in a hook: right or named fallback, and a clean stack at the end."""
    assert_quiet(run_script(STEP_IN_BACKWARD.replace("ZEROED", str(zeroed))))


def test_hook_of_a_tensor_that_changes_the_gradient(loop: Loop) -> None:
    """``.grad`` is not the gradient of the recorded loss: a named fallback."""
    next(loop.model.parameters()).register_hook(lambda g: 2 * g)
    with pytest.warns(GradientFlowWarning, match="one gradient per call"):
        loop.step()
    assert loop.optimizer.stats.engine == "fallback"
    assert stack() == []


# Interleavings


def test_generators_interleaved() -> None:
    """Two training loops as generators, each with a mode of its own around zero_grad and forward."""
    loops = [Loop(seed=0), Loop(seed=1)]

    def train(one: Loop) -> Generator[None, None, None]:
        for _ in range(3):
            one.optimizer.zero_grad()
            yield
            loss = one.loss()
            yield
            with Mode():
                loss.backward()
            yield
            one.optimizer.step()

    a, b = (train(one) for one in loops)
    next(b)
    for _ in a:
        next(b, None)
    for _ in b:
        pass
    assert stack() == []
    for seed, one in enumerate(loops):
        one.assert_was_replayed(3, seed=seed)


def test_generator_closed_early(loop: Loop) -> None:
    """A generator that was left inside a mode, with the recorder above it."""
    mode = Mode()

    def work() -> Generator[None, None, None]:
        with mode:
            loop.optimizer.zero_grad()
            yield

    generator = work()
    next(generator)
    assert stack() == ["Mode", RECORDER]
    hidden = loop.model[0](loop.x)
    generator.close()
    assert stack() == [RECORDER]
    F.mse_loss(loop.model[2](torch.tanh(hidden)), loop.y).backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


def test_asyncio_tasks() -> None:
    """Three tasks that give way between all calls."""
    loops = [Loop(seed=seed) for seed in range(3)]

    async def train(one: Loop) -> None:
        for _ in range(3):
            one.optimizer.zero_grad()
            await asyncio.sleep(0)
            loss = one.loss()
            await asyncio.sleep(0)
            loss.backward()
            await asyncio.sleep(0)
            one.optimizer.step()

    async def main() -> None:
        await asyncio.gather(*(train(one) for one in loops))

    asyncio.run(main())
    assert stack() == []
    for seed, one in enumerate(loops):
        one.assert_was_replayed(3, seed=seed)


# torch.compile


def compiled_loop(**settings: Any) -> tuple[Loop, Any]:
    """A loop and its model compiled in one graph."""
    torch._dynamo.reset()
    loop = Loop(**settings)
    return loop, torch.compile(loop.model, backend="eager", fullgraph=True)


def test_compiled_model_is_replayed() -> None:
    """Compiled while the recorder stands, without breaks, and not again and again."""
    loop, compiled = compiled_loop()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(loop.model, backend=counter, fullgraph=True)
    for _ in range(12):
        loop.optimizer.zero_grad()
        F.mse_loss(compiled(loop.x), loop.y).backward()
        loop.optimizer.step()
        assert stack() == []
        assert loop.optimizer.stats.engine in RECORDED, loop.optimizer.stats.engine_reason
    assert counter.frame_count <= 2
    loop.assert_was_replayed(12)


def test_compiled_model_called_several_times_in_a_row() -> None:
    """Nothing but calls of compiled code between ``zero_grad()`` and the loss, more than dynamo's limit of recompilations."""
    loop, compiled = compiled_loop()
    for _ in range(2):
        loop.optimizer.zero_grad()
        outs = [compiled(part) for part in loop.x.split(1)]
        F.mse_loss(torch.cat(outs), loop.y).backward()
        loop.optimizer.step()
    loop.assert_was_replayed(2)


def test_compiled_model_evaluated_under_no_grad_keeps_nothing() -> None:
    """What compiled code computes between the steps is freed."""
    loop, compiled = compiled_loop()
    loop.optimizer.zero_grad()
    batches = Batches(5)
    with torch.no_grad():
        for _ in range(20):
            compiled(batches.one())
    assert batches.n_alive <= 1
    F.mse_loss(compiled(loop.x), loop.y).backward()
    loop.optimizer.step()
    loop.assert_was_replayed()


def test_results_of_compiled_code_under_no_grad_are_freed() -> None:
    """The same without a plain torch call between the calls of compiled code."""
    loop, compiled = compiled_loop()
    loop.optimizer.zero_grad()
    loop.loss()
    batches = Batches(5)
    given = [batches.one() for _ in range(6)]
    with torch.no_grad():
        while given:
            compiled(given.pop())
    assert batches.n_alive <= 1


def test_compiled_model_evaluated_while_paused_is_not_recorded() -> None:
    """Neither at once nor when the pause is over."""
    loop, compiled = compiled_loop()
    loop.optimizer.zero_grad()
    batches = Batches(5)
    with loop.optimizer.recording_paused():
        compiled(batches.one())
    F.mse_loss(loop.model(loop.x), loop.y).backward()
    assert batches.n_alive == 0
    loop.optimizer.step()
    assert loop.optimizer.stats.n_recorded == 4
    loop.assert_was_replayed()


def test_compiled_model_evaluated_with_the_recorder_inert() -> None:
    """Below a user's mode the recorder stays after the step; compiled code leaves its last call with it."""
    loop, compiled = compiled_loop()
    loop.optimizer.zero_grad()
    batches = Batches(5)
    with Mode():
        loop.loss().backward()
        loop.optimizer.step()
        assert stack() == [RECORDER, "Mode"]
    assert stack() == [RECORDER]
    for _ in range(6):
        compiled(batches.one())
    assert batches.n_alive == 0
    loop.step()
    loop.assert_was_replayed(2)


def test_compiled_model_after_step_in_another_thread_keeps_no_more_than_the_last_call() -> None:
    """The recording ended where this thread's recorder was not told; compiled code leaves its last call with it."""
    loop, compiled = compiled_loop()
    loop.optimizer.zero_grad()
    loop.loss().backward()
    thread = threading.Thread(target=loop.optimizer.step)
    thread.start()
    thread.join()
    batches = Batches(5)
    for _ in range(5):
        compiled(batches.one())
    assert batches.n_alive <= 1  # the last one, until the next torch call
    loop.step()
    loop.assert_was_replayed(2)


def test_compiling_inside_a_user_mode_entered_before(loop: Loop) -> None:
    """Dynamo takes the modes off and puts them on again; the recorder is not mistaken."""
    loop, compiled = compiled_loop()
    with Mode():
        loop.optimizer.zero_grad()
        out = compiled(loop.x)
        assert stack() == ["Mode", RECORDER]
    assert stack() == [RECORDER]
    F.mse_loss(out, loop.y).backward()
    loop.optimizer.step()
    assert stack() == []
    loop.assert_was_replayed()


def test_compiled_evaluation_in_a_forked_child() -> None:
    """A worker that calls compiled code again and again."""
    loop, compiled = compiled_loop()
    loop.optimizer.zero_grad()
    F.mse_loss(compiled(loop.x), loop.y).backward()

    def work() -> bool:
        batches = Batches(20)
        for _ in range(10):
            compiled(batches.one())
        return batches.n_alive <= 1  # the last one, until the next torch call

    assert in_child(work) == 0
    loop.optimizer.step()
    loop.assert_was_replayed()


# What may stand in a forward pass


class Cube(torch.autograd.Function):
    """x³ with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


CUBE: Callable[[Tensor], Tensor] = Cube.apply


def with_cube(loop: Loop) -> Tensor:
    return F.mse_loss(loop.model[2](CUBE(loop.model[0](loop.x))), loop.y)


def with_cube_written_out(loop: Loop) -> Tensor:
    return F.mse_loss(loop.model[2](loop.model[0](loop.x) ** 3), loop.y)


def with_vmap(loop: Loop) -> Tensor:
    return F.mse_loss(torch.vmap(loop.model)(loop.x), loop.y)


def with_grad(loop: Loop) -> Tensor:
    """A loss with the derivative of the model with respect to its input (as in physics-informed networks)."""
    slopes = torch.func.vmap(torch.func.grad(lambda x: loop.model(x).sum()))(loop.x)
    penalty: Tensor = (slopes**2).mean()
    return loop.loss() + penalty


def with_grad_written_out(loop: Loop) -> Tensor:
    x = loop.x.detach().clone().requires_grad_()
    (slopes,) = torch.autograd.grad(loop.model(x).sum(), x, create_graph=True)
    return loop.loss() + (slopes**2).mean()


def with_jvp(loop: Loop) -> Tensor:
    out, slope = torch.func.jvp(loop.model, (loop.x,), (torch.ones_like(loop.x),))[:2]
    penalty: Tensor = (slope**2).mean()
    return F.mse_loss(out, loop.y) + penalty


def with_jvp_written_out(loop: Loop) -> Tensor:
    x = loop.x.detach().clone().requires_grad_()
    (slopes,) = torch.autograd.grad(loop.model(x).sum(), x, create_graph=True)
    return loop.loss() + (slopes.sum(1) ** 2).mean()


def with_functional_call(loop: Loop) -> Tensor:
    return F.mse_loss(torch.func.functional_call(loop.model, dict(loop.model.named_parameters()), (loop.x,)), loop.y)


def with_checkpoint(loop: Loop) -> Tensor:
    return F.mse_loss(checkpoint(loop.model, loop.x, use_reentrant=False), loop.y)


def with_reentrant_checkpoint(loop: Loop) -> Tensor:
    x = loop.x.detach().clone().requires_grad_()
    return F.mse_loss(checkpoint(loop.model, x, use_reentrant=True), loop.y)


Loss = Callable[[Loop], Tensor]


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (with_cube, with_cube_written_out),
        (with_vmap, Loop.loss),
        (with_grad, with_grad_written_out),
        (with_grad_written_out, with_grad_written_out),
        (with_jvp, with_jvp_written_out),
        (with_functional_call, Loop.loss),
        (with_checkpoint, Loop.loss),
        (with_reentrant_checkpoint, Loop.loss),
    ],
)
def test_special_forward_passes_are_right_or_named_fallbacks(loss: Loss, wanted: Loss) -> None:
    """Replayed steps are those of the loss written out; else the reason is given, and the gradient was the right one."""
    loop, other = Loop(), Loop(engine="closure")

    def closure() -> Tensor:
        other.optimizer.zero_grad()
        value = wanted(other)
        value.backward()
        return value

    for _ in range(3):
        loop.optimizer.zero_grad()
        loss(loop).backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loop.optimizer.step()
        assert stack() == []
        other.optimizer.step(closure)
        if loop.optimizer.stats.engine == "fallback":
            assert any("one gradient per call" in str(w.message) for w in said)
            assert loop.optimizer.stats.engine_reason
            return
        torch.testing.assert_close(loop.theta, other.theta, rtol=1e-8, atol=1e-10)
