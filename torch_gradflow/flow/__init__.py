"""Integrators of the gradient flow dθ/dt = −∇L(θ); they know objectives, but neither modules nor optimizers."""
