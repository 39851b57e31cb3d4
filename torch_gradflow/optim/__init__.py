"""Optimizers: what a user puts where Adam stood."""
