"""All integrators by name."""

from __future__ import annotations

from torch_gradflow.flow import explicit
from torch_gradflow.flow.bdf import Bdf
from torch_gradflow.flow.method import FlowMethod

METHODS: dict[str, FlowMethod] = {
    **explicit.METHODS,
    "bdf": Bdf(),
}


def find_method(name: str) -> FlowMethod:
    """The method of that name; "auto" is dopri5, the best of torchdiffeq's at the tolerances 1e-4 to 1e-8.

    Raises:
        ValueError: For an unknown name.
    """
    if name == "auto":
        return METHODS["dopri5"]
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be 'auto' or one of {', '.join(map(repr, METHODS))}, not {name!r}.")
    return METHODS[name]
