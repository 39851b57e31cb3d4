"""L(θ) of one flat parameter vector: loss, gradient, Hessian–vector products, Hessian."""
