"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torch_gradflow.perceptron.activations import FORMULAS, REGISTERED

# Small tensors gain nothing from threads, and lose much where other processes share the cores.
torch.set_num_threads(1)


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = set(FORMULAS)
    yield
    for name in set(FORMULAS) - before:
        del FORMULAS[name], REGISTERED[name]
