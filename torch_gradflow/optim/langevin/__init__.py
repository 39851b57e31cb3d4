"""Langevin dynamics of the parameters: partitioned thermodynamic integrators, one gradient per step."""
