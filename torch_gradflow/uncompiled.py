"""Methods that ``torch.compile`` leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def uncompiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """As ``torch.compiler.disable``, but without importing the compiler (a second) where nothing is compiled."""

    @wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if "torch._dynamo" in sys.modules:
            result: Result = _disabled(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return wrapper


@cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    found: Callable[..., Any] = torch.compiler.disable(function)
    return found
