"""Several processes with a part of the data each: the flow of the whole loss, and what becomes of failures.

Two and three processes (gloo, loopback) go through all scenarios; tests look at what each of them brought back, and compare
it with the same in this process alone with all data.
"""

from __future__ import annotations

import copy
import faulthandler
import multiprocessing
import os
import pickle
import runpy
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import flat, make_closure, teacher_student
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from torch_gradflow import GradientFlow, NewtonPolish
from torch_gradflow.objectives.base import ClosureError
from torch_gradflow.objectives.distributed import find_processes
from torch_gradflow.objectives.opened import GradientFlowWarning
from torch_gradflow.objectives.processes import OneProcess, ProcessError

N_SAMPLES = 30
# Where the data are cut for so many processes: into parts of different sizes.
CUTS = {1: (0, 30), 2: (0, 7, 30), 3: (0, 7, 11, 30)}
# Seconds after which a process that does not end is taken to hang.
PATIENCE = 200
Closure = Callable[[], Tensor]
Found = dict[str, Any]


def problem(rank: int, size: int, *, equal: bool = False) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The model, and one's own part of the data; all of them where there is one process."""
    model, x, y = teacher_student(0, n_student=3, n_samples=N_SAMPLES)
    cuts = [N_SAMPLES * k // size for k in range(size + 1)] if equal else CUTS[size]
    return model, x[cuts[rank] : cuts[rank + 1]], y[cuts[rank] : cuts[rank + 1]]


def group() -> Any:
    """That of all processes; None in one process."""
    return distributed.group.WORLD if distributed.is_initialized() else None


def advanced(optimizer: GradientFlow, model: nn.Module, x: Tensor, y: Tensor, *, loop: bool, n_steps: int = 3) -> None:
    """A few steps with a closure, or in a plain loop."""
    closure = make_closure(optimizer, model, x, y)
    for _ in range(n_steps):
        if loop:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)


def flowing(rank: int, size: int, *, loop: bool = False, ddp: bool = False, **settings: Any) -> Found:
    """Three steps of a flow; with ``ddp`` in a loop on shards of the same size."""
    equal = ddp and loop
    model, x, y = problem(rank, size, equal=equal)
    wrapped = DistributedDataParallel(model) if ddp and size > 1 else model
    shard_size = None if equal else len(x)
    optimizer = GradientFlow(model.parameters(), lr=0.5, process_group=group(), shard_size=shard_size, **settings)
    advanced(optimizer, wrapped, x, y, loop=loop)
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    stats = optimizer.stats
    return {"theta": flat(model), "t": optimizer.flow_time, "grad": gradient, "loss": stats.loss, "engine": stats.engine}


def falling_back(rank: int, size: int, *, ddp: bool = False) -> Found:
    """One gradient per call."""
    model, x, y = problem(rank, size, equal=ddp)
    wrapped = DistributedDataParallel(model) if ddp and size > 1 else model
    settings: Found = {"process_group": group(), "shard_size": None if ddp else len(x)}
    optimizer = GradientFlow(model.parameters(), lr=0.1, record=False, **settings)
    advanced(optimizer, wrapped, x, y, loop=True, n_steps=25)
    return {"theta": flat(model), "t": optimizer.flow_time, "engine": optimizer.stats.engine}


def falling_back_together(rank: int, size: int) -> Found:
    """One gradient per call, because nothing is recorded in process 0."""
    model, x, y = problem(rank, size)
    optimizer = GradientFlow(model.parameters(), lr=0.1, process_group=group(), shard_size=len(x))

    def train() -> None:
        for _ in range(25):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            torch.autograd.backward(loss) if rank == 0 else loss.backward()
            optimizer.step()

    with pytest.warns(GradientFlowWarning, match="one gradient per call"):
        train()
    return {"theta": flat(model), "t": optimizer.flow_time, "engine": optimizer.stats.engine}


def summing(rank: int, size: int) -> Found:
    """Losses that are sums, with penalties and different speeds."""
    model, x, y = problem(rank, size)
    groups = [
        {"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.3},
        {"params": model[2].parameters(), "lr": 0.01},
    ]
    optimizer = GradientFlow(groups, method="bdf", max_norm=0.1, process_group=group(), reduction="sum")
    closure = make_closure(optimizer, model, x, y, partial(nn.functional.mse_loss, reduction="sum"))
    for _ in range(2):
        optimizer.step(closure)
    return {"theta": flat(model), "t": optimizer.flow_time, "loss": optimizer.stats.loss}


def widened(rank: int, size: int) -> Found:
    """A float32 model, computed in float64."""
    model, x, y = problem(rank, size)
    model, x, y = model.float(), x.float(), y.float()
    settings: Found = {"process_group": group(), "shard_size": len(x), "method": "bdf"}
    optimizer = GradientFlow(model.parameters(), lr=0.5, dtype=torch.float64, **settings)
    advanced(optimizer, model, x, y, loop=False)
    return {"theta": torch.cat([optimizer.state[p]["theta"].reshape(-1) for p in model.parameters()])}


def integrating(rank: int, size: int, *, method: str = "bdf") -> Found:
    """A longer flow in one go, with samples and a stopping rule."""
    model, x, y = problem(rank, size)
    optimizer = GradientFlow(model.parameters(), method=method, process_group=group(), shard_size=len(x))
    asked: list[float] = []
    solution = optimizer.integrate(
        make_closure(optimizer, model, x, y), 20.0, t_eval=[0.5, 5.0, 20.0], progress=lambda report: asked.append(report.t)
    )
    choices = [choice.method for choice in optimizer.stats.choices]
    found = {"theta": flat(model), "samples": solution.theta, "loss": solution.loss, "t": optimizer.flow_time}
    return {**found, "asked": len(asked), "choices": choices, "n_grad": solution.n_grad, "status": solution.status}


def polishing(rank: int, size: int, *, method: str = "trust-region") -> Found:
    """To an isolated minimum, with its certificate."""
    model, x, y = problem(rank, size)
    polish = NewtonPolish(model.parameters(), method=method, weight_decay=0.1, process_group=group(), shard_size=len(x))
    loss = polish.step(make_closure(polish, model, x, y))
    assert polish.result is not None
    point = polish.result.certificate
    assert point is not None
    found = {"theta": flat(model), "loss": float(loss), "status": polish.result.status}
    return {**found, "kind": point.kind, "eigenvalues": point.eigenvalues}


def resuming(rank: int, size: int) -> Found:
    """A flow that goes on from a state_dict, and one that does in a deep copy."""
    ends = []
    for how in ("through", "resumed", "copied"):
        model, x, y = problem(rank, size)
        settings: Found = {"lr": 0.3, "method": "bdf", "process_group": group(), "shard_size": len(x)}
        optimizer = GradientFlow(model.parameters(), **settings)
        advanced(optimizer, model, x, y, loop=False, n_steps=2)
        if how == "resumed":
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = GradientFlow(model.parameters(), **settings)
            optimizer.load_state_dict(state)
        if how == "copied":
            model, optimizer = copy.deepcopy((model, optimizer))
        advanced(optimizer, model, x, y, loop=False, n_steps=2)
        ends.append(flat(model))
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)
    return {"ends": torch.stack(ends)}


def as_in_the_example(rank: int, size: int) -> Found:
    """What ``examples/distributed.py`` prints."""
    loss, kind = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "distributed.py"))["train"]()
    return {"loss": loss, "kind": kind}


def failing_late(rank: int, size: int) -> Found:
    """The last process's closure raises an exception at some evaluation; the flow then goes on."""
    model, x, y = problem(rank, size)
    settings: Found = {"process_group": group(), "shard_size": len(x), "engine": "closure", "method": "dopri5"}
    optimizer = GradientFlow(model.parameters(), lr=0.5, check=False, **settings)
    plain, calls = make_closure(optimizer, model, x, y), [0]

    def closure() -> Tensor:
        calls[0] += 1
        if rank == size - 1 and calls[0] == 30:
            raise KeyError("broken disk")
        return plain()

    error = raised(lambda: optimizer.step(closure), KeyError)
    found = {"error": error, "theta at failure": flat(model), "t at failure": optimizer.flow_time}
    calls[0] = 100
    optimizer.step(closure)
    return {**found, "theta": flat(model), "t": optimizer.flow_time}


def failing_in_ddp(rank: int, size: int) -> Found:
    """An exception before ``backward``, where DistributedDataParallel would have the others wait."""
    model, x, y = problem(rank, size)
    start, wrapped = flat(model), DistributedDataParallel(model)
    optimizer = GradientFlow(model.parameters(), process_group=group(), shard_size=len(x))

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        if rank == size - 1:
            raise MemoryError("no room")
        return nn.functional.mse_loss(prediction, target)

    error = raised(lambda: optimizer.step(make_closure(optimizer, wrapped, x, y, loss_fn)), MemoryError)
    assert torch.equal(flat(model), start)
    return {"error": error}


def failing_early(rank: int, size: int) -> Found:
    """Exceptions and NaN before anything moves, in one process; each leaves all as they were."""
    model, x, y = problem(rank, size)
    start = flat(model)
    last = rank == size - 1

    def optimizer(**settings: Any) -> GradientFlow:
        return GradientFlow(model.parameters(), **{"lr": 0.5, "process_group": group(), "shard_size": len(x), **settings})

    def attempt(error: type[Exception], broken: Callable[[Tensor], Tensor], *, loop: bool = False) -> str:
        flow = optimizer()

        def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
            return broken(nn.functional.mse_loss(prediction, target)) if last else nn.functional.mse_loss(prediction, target)

        closure = make_closure(flow, model, x, y, loss_fn)
        if loop:
            closure()
        text = raised(partial(flow.step, None if loop else closure), error)
        assert torch.equal(flat(model), start) and flow.flow_time == 0.0
        return text

    def no_room(loss: Tensor) -> Tensor:
        raise MemoryError("no room")

    def run(flow: GradientFlow, *, loop: bool = False) -> None:
        advanced(flow, model, x, y, loop=loop, n_steps=1)

    found = {
        "raises": attempt(MemoryError, no_room),
        "nan": attempt(FloatingPointError, lambda loss: loss * float("nan")),
        "nan in a loop": attempt(FloatingPointError, lambda loss: loss * float("nan"), loop=True),
        "other lr": raised(lambda: run(optimizer(lr=0.25 if last else 0.5)), ProcessError),
        "loop and closure": raised(lambda: run(optimizer(), loop=last), ProcessError),
        "a size missing": raised(lambda: run(optimizer(shard_size=None if last else 5)), ValueError),
        "sizes left out": raised(lambda: run(optimizer(shard_size=None)), ValueError),
        "without a group": raised(lambda: run(optimizer(process_group=None)), ValueError),
    }
    assert torch.equal(flat(model), start)
    return found


def apart(rank: int, size: int) -> Found:
    """Other parameters in one process."""
    model, x, y = problem(rank, size)
    optimizer = GradientFlow(model.parameters(), process_group=group(), shard_size=len(x))
    if rank == size - 1:
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-15
    start = flat(model)
    error = raised(lambda: optimizer.step(make_closure(optimizer, model, x, y)), ProcessError)
    assert torch.equal(flat(model), start)
    polish = NewtonPolish(model.parameters(), process_group=group(), shard_size=len(x))
    again = raised(lambda: polish.step(make_closure(polish, model, x, y)), ProcessError)
    return {"error": error, "polish": again}


def averaged_unequally(rank: int, size: int) -> Found:
    """DistributedDataParallel weights processes equally, whatever their shards."""
    model, x, y = problem(rank, size)
    wrapped = DistributedDataParallel(model)
    optimizer = GradientFlow(model.parameters(), process_group=group(), shard_size=len(x))
    error = raised(lambda: advanced(optimizer, wrapped, x, y, loop=True, n_steps=1), ValueError)
    advanced(optimizer, wrapped.module, x, y, loop=True, n_steps=1)  # the remedy
    return {"error": error, "t": optimizer.flow_time}


def interrupted(rank: int, size: int) -> Found:
    """Ctrl-C in one process, somewhere in its closure, and then in all of them."""
    model, x, y = problem(rank, size)
    settings: Found = {"process_group": group(), "shard_size": len(x), "engine": "closure", "method": "dopri5"}
    optimizer = GradientFlow(model.parameters(), check=False, **settings)
    plain, calls = make_closure(optimizer, model, x, y), [0]

    def closure() -> Tensor:
        calls[0] += 1
        if (rank == size - 1 and calls[0] == 50) or calls[0] == 51:
            os.kill(os.getpid(), signal.SIGINT)
        return plain()

    solution = optimizer.integrate(closure, 100.0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return {"status": solution.status, "theta": flat(model), "end": solution.theta[-1], "t": optimizer.flow_time}


def uneven_records(rank: int, size: int) -> Found:
    """A record that serves in some processes only: all call their closures again."""
    model, x, y = problem(rank, size)

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(prediction, target)
        return loss * 1.0 if rank == 0 or loss.item() < 0 else loss

    optimizer = GradientFlow(model.parameters(), lr=0.5, method="dopri5", process_group=group(), shard_size=len(x))
    closure = make_closure(optimizer, model, x, y, loss_fn)
    for _ in range(3):
        optimizer.step(closure)
    engine = optimizer.stats.engine
    polish = NewtonPolish(model.parameters(), engine="replay", process_group=group(), shard_size=len(x))
    error = raised(lambda: polish.step(make_closure(polish, model, x, y, loss_fn)), ClosureError)
    return {"theta": flat(model), "engine": engine, "error": error}


def raised(action: Callable[[], Any], kind: type[Exception]) -> str:
    """The text of the exception that ``action`` raises."""
    with pytest.raises(kind) as info:
        action()
    return str(info.value)


# Those that are compared with one process, to this relative accuracy.
COMPARED: dict[str, Callable[[int, int], Found]] = {
    "dopri5, perceptron": partial(flowing, method="dopri5", engine="perceptron"),
    "dopri5, loop": partial(flowing, method="dopri5", engine="replay", loop=True),
    "dopri5, closure": partial(flowing, method="dopri5", engine="closure"),
    "bdf, loop": partial(flowing, method="bdf", loop=True),
    "bdf, closure": partial(flowing, method="bdf", engine="closure"),
    "bdf-secant": partial(flowing, method="bdf-secant", engine="replay"),
    "bdf-cg": partial(flowing, method="bdf-cg", engine="replay"),
    "DDP": partial(flowing, method="bdf", ddp=True),
    "DDP, loop": partial(flowing, method="dopri5", ddp=True, loop=True),
    "DDP, closure": partial(flowing, method="bdf", ddp=True, engine="closure"),
    "fallback": falling_back,
    "fallback, DDP": partial(falling_back, ddp=True),
    "fallback of one": falling_back_together,
    "sums": summing,
    "float64 of float32": widened,
    "integrate": integrating,
    "polish": polishing,
    "polish, bfgs": partial(polishing, method="bfgs"),
    "example": as_in_the_example,
}
OTHERS: dict[str, Callable[[int, int], Found]] = {
    "auto": partial(integrating, method="auto"),
    "resuming": resuming,
    "failing late": failing_late,
    "failing early": failing_early,
    "failing in DDP": failing_in_ddp,
    "apart": apart,
    "averaged unequally": averaged_unequally,
    "interrupted": interrupted,
    "uneven records": uneven_records,
}
# With three processes what depends on their number; the perceptron's kernels take seconds to load in each.
LEFT_OUT: dict[int, tuple[str, ...]] = {
    2: (),
    3: (
        *("dopri5, perceptron", "dopri5, closure", "bdf, closure", "DDP, loop", "DDP, closure", "fallback, DDP"),
        *("sums", "float64 of float32", "polish, bfgs", "resuming", "uneven records", "example", "fallback of one"),
    ),
}


def worker(rank: int, size: int, folder: str, scenarios: Sequence[str] | None) -> None:
    """One process: all scenarios, and what they found into a file."""
    faulthandler.dump_traceback_later(PATIENCE - 10, exit=True)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    settings: Found = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=PATIENCE)}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **settings)
    found: Found = {}
    for name, scenario in (COMPARED | OTHERS | LOSSES).items():
        if (scenarios is None and name not in LEFT_OUT[size] and name not in LOSSES) or name in (scenarios or ()):
            try:
                found[name] = scenario(rank, size)
            except BaseException:
                found[name] = traceback.format_exc()
                break  # the others are somewhere else now
    torch.save(found, f"{folder}/{rank}")
    if scenarios is None:
        distributed.destroy_process_group()
    else:
        os._exit(0)  # the group is broken


def run_world(size: int, folder: Path, scenarios: Sequence[str] | None = None) -> list[Found]:
    """What each process found; a test fails where one does not end in time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # two seconds each otherwise
    workers = [context.Process(target=worker, args=(rank, size, str(folder), scenarios)) for rank in range(size)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(timeout=PATIENCE)
    late = [process for process in workers if process.is_alive()]
    for process in late:
        process.kill()
    files = [folder / str(rank) for rank in range(size)]
    found = [torch.load(file, weights_only=False) if file.exists() else {} for file in files]
    errors = [text for results in found for text in results.values() if isinstance(text, str)]
    assert not late and not errors, "\n".join(["a process did not end in time" if late else "", *errors])
    return found


@cache
def alone(name: str) -> Found:
    """The same in this process, with all data."""
    return COMPARED[name](0, 1)


def same_everywhere(found: Sequence[Found]) -> Found:
    """What all processes found, to the last bit."""
    for other in found[1:]:
        for key, value in found[0].items():
            if isinstance(value, Tensor):
                assert torch.equal(value, other[key]), key
            elif key not in ("asked", "error"):
                assert value == other[key], key
    return found[0]


def check_as_in_one_process(world: list[Found]) -> None:
    """Trajectories, losses, gradients and spectra are those of one process with all data; all processes have the same."""
    for name in COMPARED.keys() - LEFT_OUT[len(world)]:
        found, expected = same_everywhere([results[name] for results in world]), alone(name)
        for key, value in expected.items():
            if isinstance(value, Tensor):
                error = torch.linalg.vector_norm(found[key] - value) / torch.linalg.vector_norm(value)
                assert error <= 1e-10, (name, key)
            elif isinstance(value, float):
                assert found[key] == pytest.approx(value, rel=1e-10), (name, key)
            elif key not in ("asked", "n_grad"):
                assert found[key] == value, (name, key)


def check_progress_is_shown_once(world: list[Found]) -> None:
    """Process 0 integrates, and reports."""
    assert [results["integrate"]["asked"] > 0 for results in world] == [True, *[False] * (len(world) - 1)]


def check_auto_chooses_the_same_everywhere(world: list[Found]) -> None:
    """Choices are process 0's, by its clock; the solution is that of any method, within the tolerance."""
    found, expected = same_everywhere([results["auto"] for results in world]), alone("integrate")
    assert found["choices"] and found["status"] == "t_end"
    assert torch.allclose(found["theta"], expected["theta"], rtol=1e-4, atol=1e-5)


def check_state_dict_and_copies(world: list[Found]) -> None:
    """A flow goes on bit for bit from its state_dict and in a deep copy; pickling says what to do instead."""
    if "resuming" in LEFT_OUT[len(world)]:
        return
    through, resumed, copied = same_everywhere([results["resuming"] for results in world])["ends"]
    assert torch.equal(through, resumed) and torch.equal(through, copied)


def check_failure_of_one_is_that_of_all(world: list[Found]) -> None:
    """All raise the exception, stand at the same accepted point of the flow, and go on from there."""
    last = len(world) - 1
    found = [results["failing late"] for results in world]
    same_everywhere(found)
    assert ["broken disk" in results["error"] for results in found] == [True] * len(world)
    assert [f"process {last}" in results["error"] for results in found] == [True] * len(world)
    model, x, y = problem(0, 1)
    optimizer = GradientFlow(model.parameters(), method="dopri5", rtol=1e-9)
    closure = make_closure(optimizer, model, x, y)
    optimizer.integrate(closure, found[0]["t"], t_eval=[found[0]["t at failure"], found[0]["t"]])
    assert optimizer.solution is not None
    assert 0 < found[0]["t at failure"] < 0.5
    for key, expected in zip(("theta at failure", "theta"), optimizer.solution.theta, strict=True):
        assert torch.allclose(found[0][key], expected, rtol=1e-5, atol=1e-6), key


def check_failures_before_anything_moves(world: list[Found]) -> None:
    """Exceptions, NaN and arguments that do not go together are refused in all processes, with the reason."""
    last = len(world) - 1
    for rank, results in enumerate(world):
        found, where = results["failing early"], "" if rank == last else f"process {last}: "
        assert found["raises"] == results["failing in DDP"]["error"] == f"{where}no room"
        assert found["nan"].startswith(f"{where}the closure gives loss nan")
        assert found["nan in a loop"].startswith(f"{where}the gradient in .grad is not finite")
        assert "lr" in found["other lr"] and "closure or loop" in found["loop and closure"]
        assert "shard_size must be given in all" in found["a size missing"]
        assert "pass shard_size=" in found["sizes left out"] and "7" in found["sizes left out"]
        assert "process_group=" in found["without a group"]
        assert f"process {last}" in results["apart"]["error"] and "seed" in results["apart"]["polish"]


def check_unequal_shards_and_ddp_do_not_go_together(world: list[Found]) -> None:
    """It averages with equal weights; its bare model serves."""
    for results in world:
        assert "model.module" in results["averaged unequally"]["error"]
        assert results["averaged unequally"]["t"] == 1.0


def check_interrupt_of_one_is_that_of_all(world: list[Found]) -> None:
    """Ctrl-C anywhere ends the integration in all processes with the same solution."""
    found = same_everywhere([results["interrupted"] for results in world])
    assert found["status"] == "interrupted" and 0 < found["t"] < 100
    assert torch.equal(found["theta"], found["end"])


def check_records_that_serve_in_some_processes_only(world: list[Found]) -> None:
    """All call their closures again then; where the record must serve, all say so."""
    if "uneven records" in LEFT_OUT[len(world)]:
        return
    found = same_everywhere([results["uneven records"] for results in world])
    assert found["engine"] == "closure"
    assert torch.allclose(found["theta"], alone("dopri5, closure")["theta"], rtol=1e-9)
    assert all("engine='replay'" in results["uneven records"]["error"] for results in world)


CHECKS = (
    check_as_in_one_process,
    check_progress_is_shown_once,
    check_auto_chooses_the_same_everywhere,
    check_state_dict_and_copies,
    check_failure_of_one_is_that_of_all,
    check_failures_before_anything_moves,
    check_unequal_shards_and_ddp_do_not_go_together,
    check_interrupt_of_one_is_that_of_all,
    check_records_that_serve_in_some_processes_only,
)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes(size: int, tmp_path: Path) -> None:
    """All that is checked of so many processes."""
    world = run_world(size, tmp_path)
    for check in CHECKS:
        check(world)


def losing_one(rank: int, size: int) -> Found:
    """A process ends in the middle of a step, without a word."""
    model, x, y = problem(rank, size)
    start = flat(model)
    settings: Found = {"process_group": group(), "shard_size": len(x), "engine": "closure", "method": "dopri5"}
    optimizer = GradientFlow(model.parameters(), check=False, **settings)
    plain, calls = make_closure(optimizer, model, x, y), [0]

    def closure() -> Tensor:
        calls[0] += 1
        if rank == size - 1 and calls[0] == 20:
            os._exit(1)
        return plain()

    error = raised(lambda: optimizer.step(closure), ProcessError)
    return {"error": error, "unmoved": torch.equal(flat(model), start), "t": optimizer.flow_time}


LOSSES: dict[str, Callable[[int, int], Found]] = {"losing one": losing_one}


def test_loss_of_a_process(tmp_path: Path) -> None:
    """The other one does not wait for ever, and stands where the step began."""
    survivor, lost = run_world(2, tmp_path, ["losing one"])
    assert not lost
    assert "was lost" in survivor["losing one"]["error"]
    assert survivor["losing one"]["unmoved"] and survivor["losing one"]["t"] == 0.0


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"process_group": "world"}, TypeError, "process_group must .*'world'"),
    ({"process_group": 2}, TypeError, r"process_group must .*WORLD.*2"),
    ({"shard_size": 0}, ValueError, "shard_size must .*0"),
    ({"shard_size": 2.5}, ValueError, "shard_size must .*2.5"),
    ({"reduction": "max"}, ValueError, "reduction must .*'max'"),
    ({"reduction": "sum", "shard_size": 3}, ValueError, "shard_size=3 .*'sum'"),
]


@pytest.mark.parametrize(("settings", "error", "text"), WRONG)
@pytest.mark.parametrize("kind", [GradientFlow, NewtonPolish])
def test_wrong_arguments(kind: type, settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """Refused when the optimizer is made."""
    with pytest.raises(error, match=text):
        kind(nn.Linear(2, 1).parameters(), **settings)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[Any]:
    """A process group with this process alone."""
    settings: Found = {"rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", **settings)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_a_group_of_one_is_one_process(group_of_one: Any) -> None:
    """Nothing is exchanged then, and nothing refused."""
    assert isinstance(find_processes(group_of_one, 10, "mean"), OneProcess)
    model, x, y = problem(0, 1)
    optimizer = GradientFlow(model.parameters(), lr=0.5, method="bdf", process_group=group_of_one)
    advanced(optimizer, model, x, y, loop=True)
    assert torch.equal(flat(model), alone("bdf, loop")["theta"])
