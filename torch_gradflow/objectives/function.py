"""L(θ) given as a pure torch function, with derivatives that are confirmed before they are used.

Gradients come from one backward pass (on small networks 2.3 times faster than ``torch.func.grad``, with the same result);
Hessian–vector products and Hessians from torch.func, forward over reverse, over as many vectors at a time as a memory
bound allows. That path is silently wrong for some functions of some torch releases (``torch.func.hessian`` for LayerNorm
and BatchNorm in 2.13), so each path is compared once with a difference of gradients, and the next one serves where it
fails: first torch.func, then double backward for a batch of vectors, then double backward one vector at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_gradflow.objectives.base import DerivativeError, EvaluationCounts, Objective

SecondDerivatives = Literal["torch.func", "batched double backward", "double backward"]
PATHS: tuple[SecondDerivatives, ...] = ("torch.func", "batched double backward", "double backward")
# Memory that the intermediate results of all vectors of one batch may take together.
CHUNK_BYTES = 256 * 2**20
# The same for several points on a CPU: beyond its caches each point takes longer than alone (2-8-1, N = 1000: 1.8 times).
CACHED_BYTES = 8 * 2**20


class FunctionObjective(Objective):
    """The sum of pure functions of θ, for instance one per chunk of the data.

    Args:
        terms: Called at each evaluation; yields functions of θ, shape ``(P,)``, that return a scalar tensor.
        n_parameters: P.
        dtype: The type of θ.
        device: The device of θ.
        counts: Where evaluations are counted; a new object by default.
        second_derivatives: The path to use for second derivatives; None chooses and confirms one on first use.
        resolution: The rounding unit of the functions where it is not that of ``dtype``.
    """

    def __init__(
        self,
        terms: Callable[[], Iterable[Callable[[Tensor], Tensor]]],
        n_parameters: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        counts: EvaluationCounts | None = None,
        second_derivatives: SecondDerivatives | None = None,
        resolution: float | None = None,
    ) -> None:
        self.resolution = torch.finfo(dtype).eps if resolution is None else resolution
        self.n_parameters = n_parameters
        self.dtype = dtype
        self.device = device
        self.counts = counts if counts is not None else EvaluationCounts()
        self.second_derivatives = second_derivatives
        self._terms = terms
        self._chunk: int | None = None
        self._is_mapped: bool | None = None

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ), by one backward pass per term."""
        self.counts.n_grad += 1
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        gradient = torch.zeros_like(theta)
        for term in self._terms():
            try:
                value, part = _value_and_gradient(term, theta)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a factorisation that does not exist at this trial point
                return loss * math.nan, gradient * math.nan
            loss += value.detach()
            if part is not None:
                gradient += part
        return loss, gradient

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V; V of shape ``(P,)`` or ``(P, k)``."""
        columns = vectors.reshape(self.n_parameters, -1)
        path = self.confirmed_path(theta)
        self.counts.n_hvp += columns.shape[1]
        return self._products(theta, columns, path).reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ), symmetrised: its P columns in batches bounded by ``CHUNK_BYTES``."""
        identity = torch.eye(self.n_parameters, dtype=self.dtype, device=self.device)
        path = self.confirmed_path(theta)
        self.counts.n_hessian += 1
        hessian = self._products(theta, identity, path)
        return 0.5 * (hessian + hessian.T)

    def loss_and_gradient_many(self, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L at many points: by torch.func.vmap, where that was confirmed, else one after the other."""
        found = self._by_vmap(thetas, False)
        if found is None:
            return super().loss_and_gradient_many(thetas)
        self.counts.n_grad += len(thetas)
        return found[0], found[1]

    def loss_gradient_hessian_many(self, thetas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H at many points; the same."""
        found = self._by_vmap(thetas, True)
        if found is None:
            return super().loss_gradient_hessian_many(thetas)
        self.counts.n_grad += len(thetas)
        self.counts.n_hessian += len(thetas)
        return found[0], found[1], found[2]

    def _by_vmap(self, thetas: Tensor, with_hessian: bool) -> list[Tensor] | None:
        """L, ∇L and, if asked for, H; None where torch.func.vmap does not serve, which the first points tell."""
        if len(thetas) < 2 or self._is_mapped is False:
            return None
        allowed = CACHED_BYTES if self.device.type == "cpu" else CHUNK_BYTES
        n_vectors = self._chunk_size(thetas[0]) * allowed // CHUNK_BYTES
        n_together = n_vectors // (self.n_parameters if with_hessian else 1)
        if n_together < 2:
            return None
        if self._is_mapped is None:
            self._is_mapped = self._agrees(thetas[:2])
            return self._by_vmap(thetas, with_hessian)
        try:
            return self._mapped(thetas, n_together, with_hessian)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # at one of the points; the loop tells at which
            return None

    def _agrees(self, thetas: Tensor) -> bool:
        """Whether torch.func.vmap gives at these points what comes without it."""
        try:
            found = self._mapped(thetas, len(thetas), True)
        except Exception:  # whatever functions raise that cannot be mapped
            return False
        wanted = super().loss_gradient_hessian_many(thetas)
        self.counts.n_grad -= len(thetas)  # nobody asked for these
        self.counts.n_hessian -= len(thetas)
        near = self.resolution**0.5
        return all(
            torch.allclose(a, b, rtol=near, atol=near * float(b.abs().max())) for a, b in zip(found, wanted, strict=True)
        )

    def _mapped(self, thetas: Tensor, n_together: int, with_hessian: bool) -> list[Tensor]:
        """So many points at a time: a forward pass by torch.func.vmap, and backward passes that all points share."""
        parts = []
        with second_order_kernels(self.device):
            for rows in thetas.split(n_together):
                sums = [torch.zeros_like(rows[:, 0]), torch.zeros_like(rows)]
                sums += [rows.new_zeros(*rows.shape, self.n_parameters)] if with_hessian else []
                for term in self._terms():
                    for total, found in zip(sums, _derivatives_of_many(term, rows, with_hessian), strict=False):
                        total += found
                parts.append(sums)
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def confirmed_path(self, theta: Tensor) -> SecondDerivatives:
        """The way second derivatives are computed, confirmed at θ on first use.

        Raises:
            DerivativeError: If no path agrees with differences of gradients.
        """
        if self.second_derivatives is None:
            self.second_derivatives = self._choose_path(theta)
        return self.second_derivatives

    def _choose_path(self, theta: Tensor) -> SecondDerivatives:
        probe = probe_vectors(theta)
        failures = []
        for path in PATHS:
            try:
                products = self._products(theta, probe, path)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                failures.append(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                continue
            why = disagreement(self, theta, probe, products)
            if not why:
                return path
            failures.append(f"{path}: {why}")
        raise DerivativeError(
            "no way of computing Hessian-vector products agrees with differences of the gradient: "
            + "; ".join(failures)
            + ". Either the loss is not twice differentiable here, or the gradient is not the gradient of the loss "
            "(a detached target, a straight-through estimator)."
        )

    def _products(self, theta: Tensor, columns: Tensor, path: SecondDerivatives) -> Tensor:
        result = torch.zeros_like(columns)
        chunk = self._chunk_size(theta)
        with second_order_kernels(self.device):
            for term in self._terms():
                for start in range(0, columns.shape[1], chunk):
                    part = columns[:, start : start + chunk]
                    result[:, start : start + chunk] += _BY_PATH[path](term, theta, part)
        return result

    def _chunk_size(self, theta: Tensor) -> int:
        """Vectors per batch: each needs about three times what a backward pass keeps (tangents of both passes)."""
        if self._chunk is None:
            kept = max(_bytes_kept(term, theta) for term in self._terms())
            per_vector = 3 * kept + 4 * theta.numel() * theta.element_size()
            self._chunk = max(1, CHUNK_BYTES // per_vector)
        return self._chunk


def _bytes_kept(term: Callable[[Tensor], Tensor], theta: Tensor) -> int:
    """Memory of what one forward pass keeps for its backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor), torch.enable_grad():
        term(theta.detach().requires_grad_(True))
    return kept


def probe_vectors(theta: Tensor) -> Tensor:
    """Two fixed random unit vectors, shape ``(P, 2)``."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(theta.numel(), 2, generator=generator, dtype=torch.float64)
    unit: Tensor = probe / probe.norm(dim=0)
    return unit.to(theta)


def disagreement(objective: Objective, theta: Tensor, probe: Tensor, products: Tensor) -> str:
    """Why ``products`` cannot be H(θ) times the two vectors of ``probe``, or ""."""
    error = hvp_disagreement(objective, theta, probe[:, 0], products[:, 0])
    if error is not None:
        return f"off by {error:.1e} (relative) from differences of the gradient"
    skew = abs(float(probe[:, 0] @ products[:, 1] - probe[:, 1] @ products[:, 0]))
    if skew > max(1e-8, objective.resolution**0.5) * float(products.norm()):
        return f"not symmetric ({skew:.1e}), so that the gradient is not that of a loss"
    return ""


def hvp_disagreement(objective: Objective, theta: Tensor, vector: Tensor, product: Tensor) -> float | None:
    """None if ``product`` is H(θ)v as far as central differences of the gradient can tell, else the relative error.

    The unit vector v is scaled with θ and the step is reduced if the comparison fails, because a step that crosses a
    kink (of a ReLU) sees a jump that no Hessian holds.
    """
    eps = objective.resolution
    scale = float(theta.norm()) + 1.0
    worst = 0.0
    for exponent in (1 / 3, 0.45, 0.6):
        step = scale * eps**exponent
        _, ahead = objective.loss_and_gradient(theta + step * vector)
        _, behind = objective.loss_and_gradient(theta - step * vector)
        difference = (ahead - behind) / (2 * step)
        noise = 4 * eps * float(ahead.norm() + behind.norm()) * theta.numel() ** 0.5 / step
        size = max(float(product.norm()), float(difference.norm()))
        error = float((difference - product).norm())
        # The truncation error of the difference is O(step^2): eps^(2/3) of a fourth derivative that is not known.
        if error <= noise + max(1e-4, 50 * eps ** (2 / 3)) * size or size == 0.0:
            return None
        worst = error / size if size > 0.0 else float("inf")
    return worst


def _value_and_gradient(term: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor | None]:
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_(True)
        value = term(leaf)
        if not value.requires_grad:
            return value, None
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return value, gradient


def _derivatives_of_many(term: Callable[[Tensor], Tensor], thetas: Tensor, with_hessian: bool) -> Iterator[Tensor]:
    """Values at many points, their gradients and Hessians, as far as they are not zero throughout."""
    with torch.enable_grad():
        leaf = thetas.detach().requires_grad_(True)
        values = torch.func.vmap(term)(leaf)
        yield values.detach()
        if not values.requires_grad:
            return
        # As no value depends on another one's point, the derivatives of sums are those of each.
        (gradients,) = torch.autograd.grad(values.sum(), leaf, create_graph=with_hessian, materialize_grads=True)
        yield gradients.detach()
        if with_hessian and gradients.requires_grad:
            m, p = thetas.shape
            identity = torch.eye(p, dtype=thetas.dtype, device=thetas.device)[:, None].expand(p, m, p)
            (rows,) = torch.autograd.grad(gradients, leaf, identity, is_grads_batched=True, materialize_grads=True)
            hessians = rows.transpose(0, 1)
            yield 0.5 * (hessians + hessians.mT)


def _forward_over_reverse(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
    gradient = torch.func.grad(term)

    def product(vector: Tensor) -> Tensor:
        result: Tensor = torch.func.jvp(gradient, (theta.detach(),), (vector,))[1]
        return result

    return torch.func.vmap(product, in_dims=1, out_dims=1)(columns).detach()


def _graph_of_gradient(term: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    leaf = theta.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(term(leaf), leaf, create_graph=True)
    return leaf, gradient


def _batched_double_backward(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf, gradient = _graph_of_gradient(term, theta)
        if not gradient.requires_grad:
            return torch.zeros_like(columns)
        rows = torch.autograd.grad(gradient, leaf, columns.T, is_grads_batched=True, allow_unused=True)[0]
    return torch.zeros_like(columns) if rows is None else rows.T


def _looped_double_backward(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
    products = torch.zeros_like(columns)
    with torch.enable_grad():
        leaf, gradient = _graph_of_gradient(term, theta)
        if gradient.requires_grad:
            for i in range(columns.shape[1]):
                (row,) = torch.autograd.grad(gradient, leaf, columns[:, i], retain_graph=True, allow_unused=True)
                if row is not None:
                    products[:, i] = row
    return products


_BY_PATH: dict[SecondDerivatives, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "torch.func": _forward_over_reverse,
    "batched double backward": _batched_double_backward,
    "double backward": _looped_double_backward,
}


@contextmanager
def second_order_kernels(device: torch.device) -> Iterator[None]:
    """Kernels whose backward pass can be differentiated: mathematical attention, no cuDNN recurrences."""
    with sdpa_kernel(SDPBackend.MATH):
        if device.type == "cuda":
            with torch.backends.cudnn.flags(enabled=False):
                yield
        else:
            yield
