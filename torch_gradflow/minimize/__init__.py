"""Minimisers of an Objective, and the certificate of the critical point that they find."""
