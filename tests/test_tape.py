"""The recorder between ``zero_grad()`` and ``step()``: torch's stack of modes, threads, forks, memory, copies."""

from __future__ import annotations

import asyncio
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
        super().__init__()
        self.n_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_seen += 1
        return func(*args, **(kwargs or {}))


Optimizer = GradientFlow | NewtonPolish


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
        assert self.optimizer.stats.engine == "replay", self.optimizer.stats.engine_reason
        self.assert_is_right(n_steps, seed=seed)

    def assert_is_right(self, n_steps: int = 1, *, seed: int = 0) -> None:
        """The parameters are where ``n_steps`` steps with a closure lead."""
        other = Loop(seed=seed)

        def closure() -> Tensor:
            other.optimizer.zero_grad()
            loss = other.loss()
            loss.backward()
            return loss

        for _ in range(n_steps):
            other.optimizer.step(closure)
        torch.testing.assert_close(self.theta, other.theta, rtol=1e-9, atol=1e-11)


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
    assert RECORDER not in sum(seen, [])
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
    assert loops[0].optimizer.stats.engine == loops[1].optimizer.stats.engine == "replay"
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


@pytest.mark.parametrize("kind", [Swallowing, Refusing])
@pytest.mark.parametrize("where", ["around zero_grad", "around forward", "around step", "around all"])
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
    with pytest.raises(KeyError), Mode():
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
    """``step()`` inside: the recorder goes, the device stays until it is left."""
    loop.optimizer.zero_grad()
    loop.loss().backward()
    with torch.device("cpu"):
        loop.optimizer.step()
        assert stack() == ["DeviceContext"]
    assert stack() == []
    loop.assert_was_replayed()


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


@pytest.mark.parametrize("repeat", [False, True])
def test_script_that_ends_while_recording(repeat: bool) -> None:
    """Exit code 0 and no word on stderr."""
    text = "model, optimizer, x, y = make()\n"
    text += "for _ in range(3):\n    optimizer.zero_grad(); loss_of(model, x, y).backward(); optimizer.step()\n" * repeat
    assert_quiet(run_script(text + "optimizer.zero_grad()\nloss_of(model, x, y).backward()\n"))


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
        assert optimizer.stats.engine == "replay", optimizer.stats.engine_reason
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
        assert optimizer.stats.engine in {"replay", "fallback"}
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
    assert loop.optimizer.stats.engine == "replay" or loop.optimizer.stats.engine_reason
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
    recording = loop.optimizer._recording
    assert recording is not None

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
        recording = loop.optimizer._recording
        assert recording is not None

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
        assert loop.optimizer.stats.engine == "replay", loop.optimizer.stats.engine_reason
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
