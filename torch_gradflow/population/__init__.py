"""Expectations over Gaussian input: of one neuron, of pairs of neurons, of the loss of whole networks."""
