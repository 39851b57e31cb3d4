"""Callbacks for Lightning's Trainer, under either of its package names, ``lightning`` and ``pytorch_lightning``.

They need the extra ``torch-gradflow[lightning]``; the rest of the package does not import Lightning. What they cannot make
right (gradient accumulation, gradient clipping, loss scaling, sharded models) they refuse before training starts.

A Trainer knows only the Callback class of its own package: import ``pytorch_lightning`` first, if both packages are installed
and the Trainer is that one's.
"""

from torch_gradflow.lightning.monitor import FlowMonitor
from torch_gradflow.lightning.polish import NewtonPolishCallback
from torch_gradflow.lightning.stopping import StopAtFixedPoint

__all__ = ["FlowMonitor", "NewtonPolishCallback", "StopAtFixedPoint"]
