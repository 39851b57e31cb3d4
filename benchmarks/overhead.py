"""What a step costs beyond the loop's own gradient, against torch.optim.LBFGS and a bare odeint; what recording costs.

Three small perceptrons (float64, mean squared error); for recording also one of 1e6 parameters. All candidates run
interleaved in one process; medians of the rounds. The unit is one plain gradient of the same network: zero_grad, forward,
backward. Recording is measured as that gradient with GradientFlow's zero_grad() instead of SGD's, and no step at all.

    python benchmarks/overhead.py [--rounds 30] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq
from _environment import environment
from torch import Tensor, nn

from torch_gradflow import GradientFlow, NewtonPolish

RESULTS = Path(__file__).parent / "results" / "overhead.json"
NETWORKS = {"2-8-1, N=1000": (2, 8, 1000), "10-50-1, N=1000": (10, 50, 1000), "10-100-1, N=10000": (10, 100, 10_000)}
RECORDED = {"2-8-1, N=100": (2, 8, 100), "784-1272-1 (1e6 parameters), N=128": (784, 1272, 128)}
# The flow time over which whole integrations are compared.
T_END = 2.0

Closure = Callable[[], Tensor]


def build(n_in: int, n_hidden: int, n_samples: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A softplus network and a smooth target."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_hidden), nn.Softplus(), nn.Linear(n_hidden, 1)).double()
    x = torch.randn(n_samples, n_in, dtype=torch.float64)
    return model, x, torch.sin(x.sum(1, keepdim=True))


def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> Closure:
    """The closure of every training loop."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def stepper(make: Callable[[nn.Module], torch.optim.Optimizer], network: tuple[int, int, int]) -> Callable[[], None]:
    """One step of an optimizer, warmed up."""
    model, x, y = build(*network)
    optimizer = make(model)
    closure = closure_of(optimizer, model, x, y)
    for _ in range(5):
        optimizer.step(closure)
    return lambda: optimizer.step(closure)


def looper(make: Callable[[nn.Module], torch.optim.Optimizer], network: tuple[int, int, int]) -> Callable[[], None]:
    """One iteration of the loop without a closure, warmed up."""
    model, x, y = build(*network)
    optimizer = make(model)
    gradient = closure_of(optimizer, model, x, y)

    def iterate() -> None:
        gradient()
        optimizer.step()

    for _ in range(5):
        iterate()
    return iterate


def recording(network: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """A gradient that is recorded, against one that is not."""
    model, x, y = build(*network)
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}

    def timed(optimizer: torch.optim.Optimizer) -> float:
        gradient = closure_of(optimizer, model, x, y)
        gradient()
        began = time.perf_counter()
        for _ in range(10):
            gradient()
        return (time.perf_counter() - began) / 10

    for _ in range(rounds):
        seconds["plain"].append(timed(torch.optim.SGD(model.parameters())))
        seconds["recorded"].append(timed(GradientFlow(model.parameters())))  # recording ends with the optimizer
    plain, recorded = (statistics.median(values) for values in seconds.values())
    return {"gradient (microseconds)": 1e6 * plain, "recorded gradient / gradient": recorded / plain}


def integration(network: tuple[int, int, int]) -> tuple[Callable[[], int], Callable[[], int]]:
    """One ``integrate``, and one bare odeint with the loop's own gradients; each returns its number of gradients."""

    def ours() -> int:
        model, x, y = build(*network)
        optimizer = GradientFlow(model.parameters(), method="dopri5")
        optimizer.integrate(closure_of(optimizer, model, x, y), T_END)
        return optimizer.stats.n_grad

    def bare() -> int:
        model, x, y = build(*network)
        parameters, n_grad = list(model.parameters()), 0

        def field(t: Tensor, theta: Tensor) -> Tensor:
            nonlocal n_grad
            n_grad += 1
            with torch.enable_grad():
                nn.utils.vector_to_parameters(theta, parameters)
                gradients = torch.autograd.grad(nn.functional.mse_loss(model(x), y), parameters)
            return -torch.cat([g.reshape(-1) for g in gradients])

        theta0 = nn.utils.parameters_to_vector(parameters).detach()
        times = torch.tensor([0.0, T_END], dtype=torch.float64)
        with torch.no_grad():
            torchdiffeq.odeint(field, theta0, times, method="dopri5", rtol=1e-6, atol=1e-8)
        return n_grad

    return ours, bare


def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in interleaved rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(network: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Costs in units of one gradient, and ratios of whole integrations."""
    model, x, y = build(*network)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    steps = {
        "gradient": closure_of(sgd, model, x, y),
        "SGD step": stepper(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3), network),
        "Adam step": stepper(lambda m: torch.optim.Adam(m.parameters(), lr=1e-3), network),
        "LBFGS step, one evaluation": stepper(lambda m: torch.optim.LBFGS(m.parameters(), 1e-3, max_iter=1), network),
        "GradientFlow step, lr=1e-3": stepper(lambda m: GradientFlow(m.parameters(), lr=1e-3), network),
        "GradientFlow step, lr=1e-3, plain loop": looper(lambda m: GradientFlow(m.parameters(), lr=1e-3), network),
        "GradientFlow step, lr=1e-3, closure called again": stepper(
            lambda m: GradientFlow(m.parameters(), lr=1e-3, engine="closure"), network
        ),
    }
    seconds = measure(steps, 10 * rounds)
    found = {f"{name} / gradient": seconds[name] / seconds["gradient"] for name in steps if name != "gradient"}
    found["gradient (microseconds)"] = 1e6 * seconds["gradient"]
    ours, bare = integration(network)
    whole = measure({"ours": ours, "bare": bare}, max(3, rounds // 5))
    found["integrate / bare odeint, seconds"] = whole["ours"] / whole["bare"]
    found["integrate / bare odeint, gradients"] = ours() / bare()
    if sum(p.numel() for p in model.parameters()) < 1000:
        polish = NewtonPolish(model.parameters(), max_iter=1, certificate=False, check=False)
        closure = closure_of(polish, model, x, y)
        found["NewtonPolish iteration / gradient"] = measure({"p": lambda: polish.step(closure)}, 5)["p"] / seconds["gradient"]
    return found


def show(name: str, found: dict[str, float]) -> None:
    """Print the results of one network."""
    print(f"\n{name}")
    for what, value in found.items():
        print(f"  {what:62s} {value:10.2f}")


def main() -> None:
    """Measure, print and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for name, network in NETWORKS.items():
        results[name] = compare(network, arguments.rounds)
        show(name, results[name])
    for name, network in RECORDED.items():
        results[f"recording, {name}"] = recording(network, 5 * arguments.rounds)
        show(f"recording, {name}", results[f"recording, {name}"])
    around = environment(("torch-gradflow", "torch", "torchdiffeq"), arguments.threads, rounds=arguments.rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": around, "results": results}, indent=2) + "\n")
    print(f"\nKept in {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


if __name__ == "__main__":
    main()
