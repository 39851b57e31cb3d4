"""What dense matrices take, and what there is."""

from __future__ import annotations

import psutil
import torch

from torch_gradflow.objectives.base import Objective


def matrix_bytes(n_parameters: int, dtype: torch.dtype) -> int:
    """The size of one matrix of shape ``(P, P)``."""
    return n_parameters**2 * torch.finfo(dtype).bits // 8


def free_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def fits(n_matrices: int, objective: Objective) -> bool:
    """Whether so many matrices of shape ``(P, P)`` fit into free memory."""
    return n_matrices * matrix_bytes(objective.n_parameters, objective.dtype) <= free_bytes(objective.device)
