"""Versions, devices, engines and methods of this installation."""

from __future__ import annotations

import argparse
import importlib
import platform
from importlib import metadata

import torch

from torch_gradflow.flow.methods import METHODS as INTEGRATORS
from torch_gradflow.minimize.methods import METHODS as MINIMISERS

# Packages that are used where they are installed, with the extra that brings them.
OPTIONAL = {
    "scipy": "scipy",
    "nlopt": "nlopt",
    "python-flint": "proof",
    "matplotlib": "plotting",
    "scikit-learn": "examples",
    "lightning": "lightning",
}
REQUIRED = ("torch-gradflow", "torch", "torchdiffeq", "numba", "numpy")

USAGE = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Print it."""
    print("\n".join([*versions(), "", *devices(), "", *engines(), "", *methods()]))
    return 0


def versions() -> list[str]:
    """A line per package."""
    lines = [f"{'Python':15s} {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:15s} {version(name) or 'not installed'}" for name in REQUIRED]
    for name, extra in OPTIONAL.items():
        missing = f"not installed: pip install 'torch-gradflow[{extra}]'"
        lines.append(f"{name:15s} {version(name) or missing}")
    return lines


def version(name: str) -> str | None:
    """That of an installed package, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """A line per device."""
    lines = [f"cpu: {torch.get_num_threads()} threads"]
    lines += [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return lines + (["mps: available (float32 only)"] if torch.backends.mps.is_available() else [])


def engines() -> list[str]:
    """How derivatives are computed."""
    try:
        importlib.import_module("torch_gradflow.perceptron.compiled")
    except Exception as error:  # as where kernels are chosen: Numba may fail in many ways
        kernel = f"plain torch; the compiled kernels cannot be had: {type(error).__name__}: {error}"
    else:
        kernel = "compiled by Numba on CPUs, plain torch elsewhere"
    return [
        f"perceptron: recognised multi-layer perceptrons in closed form ({kernel})",
        "replay: what was recorded of the closure or of the loop, by torch.func",
        "closure: the closure itself, called again",
    ]


def methods() -> list[str]:
    """Integrators and minimisers by name."""
    lines = ["integrators (GradientFlow, integrate, 'flow --method'):"]
    for name, integrator in INTEGRATORS.items():
        needs = {"gradient": "gradients", "hvp": "products with the Hessian", "hessian": "Hessians"}[integrator.needs]
        lines.append(
            f"  {name:16s} order {integrator.order}, takes {needs}" if name != "auto" else "  auto             chooses"
        )
    return [*lines, "minimisers (NewtonPolish, minimize, 'polish --method'):", f"  {', '.join(MINIMISERS)}"]
