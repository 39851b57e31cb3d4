"""The gradient flow of neural networks, followed accurately from PyTorch training loops."""

from torch_gradflow.flow.comparison import TrajectoryDistance, trajectory_distance
from torch_gradflow.flow.ensemble import Ensemble, EnsembleReport, integrate_many
from torch_gradflow.flow.integrate import integrate
from torch_gradflow.flow.solution import FlowReport, FlowSolution
from torch_gradflow.flow.stopping import Evaluations, FlowTime, GradientNorm, LossPlateau, LossValue, WallTime
from torch_gradflow.minimize.certificate import CriticalPoint, certify
from torch_gradflow.minimize.escape import leave_saddle
from torch_gradflow.minimize.minimize import minimize
from torch_gradflow.minimize.proof import Proof
from torch_gradflow.minimize.result import MinimizeResult
from torch_gradflow.objectives.base import ClosureError, DerivativeError, Objective
from torch_gradflow.objectives.full_batch import FullBatch
from torch_gradflow.objectives.module import ModuleObjective, gradient, hessian, hessian_spectrum, hvp
from torch_gradflow.objectives.opened import GradientFlowWarning
from torch_gradflow.objectives.perceptron import Merging, PerceptronObjective
from torch_gradflow.objectives.population import PopulationObjective, TeacherStudent
from torch_gradflow.objectives.processes import ProcessError
from torch_gradflow.objectives.unit_rows import UnitRows
from torch_gradflow.optim.gradient_flow import GradientFlow
from torch_gradflow.optim.langevin.annealing import TemperatureScheduler
from torch_gradflow.optim.langevin.hmc import HMC
from torch_gradflow.optim.langevin.layers import layer_groups
from torch_gradflow.optim.langevin.observables import Average, Observables, integrated_autocorrelation_time, time_average
from torch_gradflow.optim.langevin.optimizer import PartitionedLangevin
from torch_gradflow.optim.langevin.presets import LOL, SGLD, AdLaLa, CCAdL, Langevin, MultiLayerLangevin
from torch_gradflow.optim.newton_polish import NewtonPolish
from torch_gradflow.optimizer_comparison import Comparison, compare
from torch_gradflow.perceptron.activations import Activation, register_activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples
from torch_gradflow.population.hermite import gauss_hermite_data, hermite_coefficients
from torch_gradflow.population.theory import (
    copy_average,
    copy_average_loss,
    critical_overlap,
    information_exponent,
    relu_average,
)

__all__ = [
    "HMC",
    "LOL",
    "SGLD",
    "Activation",
    "AdLaLa",
    "Average",
    "CCAdL",
    "ClosureError",
    "Comparison",
    "CriticalPoint",
    "DerivativeError",
    "Ensemble",
    "EnsembleReport",
    "Evaluations",
    "FlowReport",
    "FlowSolution",
    "FlowTime",
    "FullBatch",
    "GradientFlow",
    "GradientFlowWarning",
    "GradientNorm",
    "Langevin",
    "Loss",
    "LossPlateau",
    "LossValue",
    "Merging",
    "MinimizeResult",
    "ModuleObjective",
    "MultiLayerLangevin",
    "NewtonPolish",
    "Objective",
    "Observables",
    "PartitionedLangevin",
    "Perceptron",
    "PerceptronObjective",
    "PopulationObjective",
    "ProcessError",
    "Proof",
    "Samples",
    "TeacherStudent",
    "TemperatureScheduler",
    "TrajectoryDistance",
    "UnitRows",
    "WallTime",
    "certify",
    "compare",
    "copy_average",
    "copy_average_loss",
    "critical_overlap",
    "gauss_hermite_data",
    "gradient",
    "hermite_coefficients",
    "hessian",
    "hessian_spectrum",
    "hvp",
    "information_exponent",
    "integrate",
    "integrate_many",
    "integrated_autocorrelation_time",
    "layer_groups",
    "leave_saddle",
    "minimize",
    "register_activation",
    "relu_average",
    "time_average",
    "trajectory_distance",
]
