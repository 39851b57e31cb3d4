"""Multi-layer perceptrons: their structure, and their derivatives in closed form."""
