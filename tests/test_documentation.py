"""The reference of the documentation site is complete."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import torch_gradflow
import torch_gradflow.lightning
import torch_gradflow.plotting

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "module", [torch_gradflow, torch_gradflow.lightning, torch_gradflow.plotting], ids=lambda module: module.__name__
)
def test_every_public_name_has_its_place_in_the_reference(module: ModuleType) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    documented = set(re.findall(r"^\.\. auto(?:class|function|exception):: (?:[\w.]+\.)?(\w+)$", pages, flags=re.MULTILINE))
    assert set(module.__all__) <= documented
