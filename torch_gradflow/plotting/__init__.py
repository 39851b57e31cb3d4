"""Figures of flows, spectra and loss landscapes.

Every function draws into ``ax``, or into a new figure of pyplot's, and returns the Axes, on which everything can be changed
afterwards. Lines differ in dashes and signs in markers, so that print in grey shows them too. They need matplotlib (the extra
``torch-gradflow[plotting]``), which is imported when the first figure is drawn.
"""

from torch_gradflow.plotting.landscape import plot_line, plot_trajectory
from torch_gradflow.plotting.runs import plot_loss, plot_order, plot_step_size
from torch_gradflow.plotting.spectrum import plot_spectrum

__all__ = ["plot_line", "plot_loss", "plot_order", "plot_spectrum", "plot_step_size", "plot_trajectory"]
