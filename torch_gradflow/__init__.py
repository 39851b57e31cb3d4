"""The gradient flow of neural networks, followed accurately from PyTorch training loops."""

from torch_gradflow.flow.integrate import integrate
from torch_gradflow.minimize.minimize import minimize
from torch_gradflow.optim.gradient_flow import GradientFlow
from torch_gradflow.optim.newton_polish import NewtonPolish

__all__ = ["GradientFlow", "NewtonPolish", "integrate", "minimize"]
