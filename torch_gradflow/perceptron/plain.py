"""Derivatives of perceptrons in plain torch: the readable reference, and what runs on any device and in any floating type.

With δ_l = ∂L/∂z_l, backpropagation is δ_l = (W_{l+1}ᵀ δ_{l+1}) ∘ g_l′, ∇W_l = Σ_n δ_l a_{l−1}ᵀ. Its derivative along a
direction (Pearlmutter 1994, "Fast exact multiplication by the Hessian") gives Hessian–vector products. For the Hessian,
let B_l = ∂²L/∂z_l∂z_l, per sample: B_l = (W_{l+1}ᵀ B_{l+1} W_{l+1}) ∘ g_l′ g_l′ᵀ + diag((W_{l+1}ᵀ δ_{l+1}) ∘ g_l″),
and C_lq = (∂z_q/∂z_l)ᵀ B_q for l < q. Then, with ã the activations with a 1 for the bias,

    ∂²L / ∂W_l[p,m] ∂W_q[r,s] = Σ_n C_lq[p,r] ã_{l−1}[m] ã_{q−1}[s]  +  Σ_n ã_{l−1}[m] δ_q[r] ∂a_{q−1}[s]/∂z_l[p],

the second sum for l < q only (Bishop 1992, "Exact calculation of the Hessian matrix for the multilayer perceptron"). Each sum
over samples is one matrix product; those of l = q use the symmetry in (m, s) and in (p, r), a quarter of the work.

The squared error is L = ½‖r‖² with the residuals r_on = √(2 w_n) (f_on − t_on), output by output; the row of their Jacobian
for W_l is Σ_o δ_l a_{l−1}ᵀ where δ comes from √(2 w_n) at that output instead of from ℓ.

Samples go through in chunks, one column each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples

# What one chunk's intermediate results may take in bytes (measured: smaller chunks cost more calls than caches save).
GRADIENT_CHUNK, HESSIAN_CHUNK = 2**23, 2**24
# Samples, per parameter, of a block of the Jacobian: the triangular factor of those before is updated once per block.
JACOBIAN_ROWS = 4


class PlainKernel:
    """Loss, gradient, Hessian–vector products and Hessian of a perceptron, as functions of φ, shape ``(P,)``.

    Args:
        network: The perceptron.
        loss: Its loss.
        samples: The data; their device and floating type are those of φ and of all results.
    """

    name = "torch"

    def __init__(self, network: Perceptron, loss: Loss, samples: Samples) -> None:
        self._network, self._loss, self._samples = network, loss, samples
        self._offsets = network.offsets()
        self._pairs = {n: _pairs(n, samples.x.device) for n in {*network.sizes, *(n + 1 for n in network.sizes)}}

    def loss_and_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L."""
        total, gradient = phi.new_zeros(()), torch.zeros_like(phi)
        for chunk in self._chunks(phi, order=1):
            total += chunk.loss
            self._add_gradient(chunk.a, chunk.deltas, gradient)
        return total, gradient

    def hvp(self, phi: Tensor, vectors: Tensor) -> Tensor:
        """H V for V of shape ``(P, k)``."""
        rows = vectors.T.contiguous()
        products = torch.zeros_like(rows)
        tangents = [
            (v, None if c is None else c.unsqueeze(2)) for v, c in (self._parameters(rows, layer) for layer in self._layers)
        ]
        for chunk in self._chunks(phi, order=2, factor=rows.shape[0]):
            self._add_products(chunk, tangents, products)
        return products.T

    def loss_gradient_hessian(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H, in one pass."""
        total, gradient = phi.new_zeros(()), torch.zeros_like(phi)
        sums: dict[tuple[str, int, int], Tensor] = {}
        for chunk in self._chunks(phi, order=2, hessian=True):
            total += chunk.loss
            self._add_gradient(chunk.a, chunk.deltas, gradient)
            self._add_blocks(chunk, sums)
        return total, gradient, self._assemble(phi, sums)

    def residuals(self, phi: Tensor) -> Tensor:
        """r of the squared error, shape ``(O N,)``."""
        parts = []
        for part in self._parts(sum(self._network.sizes) * phi.element_size(), GRADIENT_CHUNK):
            output = self._forward(phi, part, 0)[0][-1]
            parts.append(self._roots(part) * (output - self._samples.targets[:, part]))
        return torch.cat(parts, dim=1).flatten()

    def pull_back(self, phi: Tensor, cotangent: Tensor) -> Tensor:
        """Jᵀu for the Jacobian J of r and u of shape ``(O N,)``."""
        gradient, outputs = torch.zeros_like(phi), cotangent.view(self._network.sizes[-1], -1)
        for part in self._parts(2 * sum(self._network.sizes) * phi.element_size(), GRADIENT_CHUNK):
            a, weights, derivatives = self._forward(phi, part, 1)
            deltas, _ = self._backward(weights, derivatives[0], self._roots(part) * outputs[:, part])
            self._add_gradient(a, deltas, gradient)
        return gradient

    def jacobian_blocks(self, phi: Tensor) -> Iterator[Tensor]:
        """J and r, some residuals at a time: blocks of shape ``(P + 1, m)``, Jᵀ with r as its last row."""
        n = self._network.n_parameters
        for part in self._parts((n + 1) * phi.element_size(), GRADIENT_CHUNK, least=JACOBIAN_ROWS * n):
            a, weights, derivatives = self._forward(phi, part, 1)
            roots = self._roots(part)
            residuals = roots * (a[-1] - self._samples.targets[:, part])
            for output, residual in enumerate(residuals):
                pull = torch.zeros_like(residuals)
                pull[output] = roots
                deltas, _ = self._backward(weights, derivatives[0], pull)
                rows = []
                for layer in self._layers:
                    rows.append((deltas[layer].unsqueeze(1) * a[layer]).flatten(0, 1))
                    if self._network.biases[layer]:
                        rows.append(deltas[layer])
                yield torch.cat([*rows, residual.unsqueeze(0)])

    @property
    def _layers(self) -> range:
        return range(self._network.n_layers)

    def _parameters(self, phi: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_l and b_l as views of φ; of each row, where φ has several."""
        fan_in, fan_out = self._network.sizes[layer], self._network.sizes[layer + 1]
        start, bias = self._offsets[layer]
        weights = phi[..., start : start + fan_in * fan_out].unflatten(-1, (fan_out, fan_in))
        return weights, None if bias is None else phi[..., bias : bias + fan_out]

    def _chunks(self, phi: Tensor, *, order: int, factor: int = 0, hessian: bool = False) -> Iterator[_Chunk]:
        """The forward and the backward pass of one chunk after the other."""
        sizes = self._network.sizes
        if hessian:
            widest = max((a + 1) * (b + 1) for a in sizes for b in sizes[1:])
            parts = self._parts(widest * phi.element_size(), HESSIAN_CHUNK)
        else:
            parts = self._parts(sum(sizes) * (order + 1) * (factor + 1) * phi.element_size(), GRADIENT_CHUNK)
        for part in parts:
            yield self._pass(phi, part, order)

    def _parts(self, per_sample: int, budget: int, *, least: int = 64) -> Iterator[slice]:
        """The samples in parts that take at most ``budget`` bytes, or in parts of ``least`` samples."""
        size = max(least, budget // per_sample)
        for start in range(0, self._samples.x.shape[1], size):
            yield slice(start, start + size)

    def _roots(self, part: slice) -> Tensor:
        """√(2 w), by which f − t becomes the residual."""
        return (2 * self._samples.weights[part]).sqrt()

    def _pass(self, phi: Tensor, part: slice, order: int) -> _Chunk:
        a, weights, derivatives = self._forward(phi, part, order)
        value, slope, curvature = _loss_terms(self._loss, a[-1], self._samples.targets[:, part], self._samples.weights[part])
        deltas, backs = self._backward(weights, derivatives[0], slope)
        return _Chunk(value, a, weights, derivatives, deltas, backs, curvature)

    def _forward(self, phi: Tensor, part: slice, order: int) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """a_0, …, a_L; W_1, …, W_L; and the derivatives of g at each z_l up to ``order``."""
        a, weights = [self._samples.x[:, part]], []
        derivatives: list[list[Tensor]] = [[] for _ in range(order)]
        for layer in self._layers:
            w, b = self._parameters(phi, layer)
            weights.append(w)
            z = w @ a[-1] if b is None else torch.addmm(b.unsqueeze(1), w, a[-1])
            value, *rest = self._activate(layer, z, order)
            a.append(value)
            for kept, derivative in zip(derivatives, rest, strict=True):
                kept.append(derivative)
        return a, weights, derivatives

    def _backward(self, weights: list[Tensor], slopes: list[Tensor], pull: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """δ_1, …, δ_L, and what they are before the factor g_l′, from that of the output, ``pull``."""
        deltas, backs = [pull * slopes[-1]], [pull]
        for layer in reversed(self._layers[1:]):
            backs.append(weights[layer].T @ deltas[-1])
            deltas.append(backs[-1] * slopes[layer - 1])
        return deltas[::-1], backs[::-1]

    def _activate(self, layer: int, z: Tensor, order: int) -> tuple[Tensor, ...]:
        runs = self._network.activations[layer]
        if len(runs) == 1:
            return runs[0][1].derivatives(z, order)
        parts = z.split([count for count, _ in runs])
        results = [kind.derivatives(part, order) for (_, kind), part in zip(runs, parts, strict=True)]
        return tuple(torch.cat(columns) for columns in zip(*results, strict=True))

    def _add_gradient(self, a: list[Tensor], deltas: list[Tensor], gradient: Tensor) -> None:
        for layer in self._layers:
            w, b = self._parameters(gradient, layer)
            w.addmm_(deltas[layer], a[layer].T)
            if b is not None:
                b += deltas[layer].sum(1)

    def _add_products(self, chunk: _Chunk, tangents: list[tuple[Tensor, Tensor | None]], products: Tensor) -> None:
        """H v for each row v of the tangents: the derivative of both passes along v."""
        a, (first, second) = chunk.a, chunk.derivatives
        dz: list[Tensor] = []
        da: Tensor | None = None  # the input has none
        das: list[Tensor | None] = []
        for layer in self._layers:
            das.append(da)
            v, c = tangents[layer]
            z = v @ a[layer]
            if c is not None:
                z = z + c
            if da is not None:
                z = z + chunk.weights[layer] @ da
            dz.append(z)
            da = first[layer] * z
        assert da is not None
        dback = chunk.curvature.times(da)
        for layer in reversed(self._layers):
            ddelta = dback * first[layer] + chunk.backs[layer] * second[layer] * dz[layer]
            w, b = self._parameters(products, layer)
            w += ddelta @ a[layer].T
            before = das[layer]
            if before is not None:
                w += chunk.deltas[layer] @ before.transpose(1, 2)
                dback = chunk.weights[layer].T @ ddelta + tangents[layer][0].transpose(1, 2) @ chunk.deltas[layer]
            if b is not None:
                b += ddelta.sum(2)

    def _add_blocks(self, chunk: _Chunk, sums: dict[tuple[str, int, int], Tensor]) -> None:
        """Add a chunk's share to the sums over samples of which the blocks of H consist; see ``_assemble``."""
        first, second = chunk.derivatives
        n_samples = chunk.a[0].shape[1]
        one = chunk.a[0].new_ones(1, n_samples)
        extended = [torch.cat([a, one]) if has else a for a, has in zip(chunk.a, self._network.biases, strict=False)]
        b = chunk.curvature.matrix() * (first[-1].unsqueeze(0) * first[-1].unsqueeze(1))
        b.diagonal(dim1=0, dim2=1).add_((chunk.backs[-1] * second[-1]).T)
        for q in reversed(self._layers):
            i, j = self._pairs[b.shape[0]]
            m, s = self._pairs[extended[q].shape[0]]
            products = extended[q].index_select(0, m).mul_(extended[q].index_select(0, s))
            _accumulate(sums, ("same", q, q), b.flatten(0, 1).index_select(0, i * b.shape[0] + j), products)
            c, slopes = b, None
            for layer in reversed(range(q)):
                w = chunk.weights[layer + 1]
                c = _times(w.T, c).mul_(first[layer].unsqueeze(1))
                outer = (extended[layer].unsqueeze(1) * extended[q].unsqueeze(0)).flatten(0, 1)
                _accumulate(sums, ("second", layer, q), c.flatten(0, 1), outer)
                # ∂a_{q−1}/∂z_l, indexed (p, s): diagonal for the layer just below.
                if layer == q - 1:
                    change = first[layer]
                else:
                    above = w.T.unsqueeze(2) * first[layer + 1].unsqueeze(0) if slopes is None else _times(w.T, slopes)
                    slopes = above * first[layer].unsqueeze(1)
                    change = slopes.flatten(0, 1)
                outer = (extended[layer].unsqueeze(1) * chunk.deltas[q].unsqueeze(0)).flatten(0, 1)
                _accumulate(sums, ("first", layer, q), change, outer)
            if q > 0:
                w = chunk.weights[q]
                # c is now of no use; B of the layer below from B of this one.
                b = torch.matmul(w.T, _times(w.T, b)).mul_(first[q - 1].unsqueeze(0)).mul_(first[q - 1].unsqueeze(1))
                b.diagonal(dim1=0, dim2=1).add_((chunk.backs[q - 1] * second[q - 1]).T)

    def _assemble(self, phi: Tensor, sums: dict[tuple[str, int, int], Tensor]) -> Tensor:
        """H from the sums over samples."""
        n = phi.numel()
        hessian = phi.new_empty(n, n)
        for q in self._layers:
            self._write_diagonal_block(hessian, q, sums["same", q, q])
            for layer in range(q):
                self._write_block(hessian, layer, q, self._block(layer, q, sums))
        return hessian

    def _write_diagonal_block(self, hessian: Tensor, q: int, packed: Tensor) -> None:
        """Unpack the symmetric (p, r) and (m, s), one neuron p at a time."""
        fan_in, fan_out = self._network.sizes[q], self._network.sizes[q + 1]
        start, bias = self._offsets[q]
        width, end = fan_in + (bias is not None), start + fan_in * fan_out
        rows, columns = _unpacking(fan_out, packed.device), _unpacking(width, packed.device).flatten()
        for p in range(fan_out):
            block = packed.index_select(0, rows[p]).index_select(1, columns).view(fan_out, width, width)  # (r, m, s)
            mine = slice(start + p * fan_in, start + (p + 1) * fan_in)
            hessian[mine, start:end].unflatten(1, (fan_out, fan_in)).copy_(block[:, :fan_in, :fan_in].transpose(0, 1))
            if bias is not None:
                hessian[end + p, start:end] = block[:, fan_in, :fan_in].flatten()
                hessian[mine, end : end + fan_out] = block[:, :fan_in, fan_in].T
                hessian[end + p, end : end + fan_out] = block[:, fan_in, fan_in]

    def _block(self, layer: int, q: int, sums: dict[tuple[str, int, int], Tensor]) -> Tensor:
        """∂²L/∂W_l∂W_q as (p, m, r, s), biases being the last m and s."""
        sizes, biases = self._network.sizes, self._network.biases
        p, r = sizes[layer + 1], sizes[q + 1]
        m, s = sizes[layer] + biases[layer], sizes[q] + biases[q]
        block = sums["second", layer, q].view(p, r, m, s).permute(0, 2, 1, 3).contiguous()
        rest = sums["first", layer, q]
        if layer == q - 1:
            i = torch.arange(p, device=block.device)
            block[i, :, :, i] += rest.view(p, m, r)
        else:
            block[..., : sizes[q]] += rest.view(p, sizes[q], m, r).permute(0, 2, 3, 1)
        return block

    def _write_block(self, hessian: Tensor, layer: int, q: int, block: Tensor) -> None:
        (start, bias), (start_q, bias_q) = self._offsets[layer], self._offsets[q]
        p, fan_in, r, fan_q = block.shape[0], self._network.sizes[layer], block.shape[2], self._network.sizes[q]
        parts = [(slice(start, start + p * fan_in), slice(0, fan_in))]
        parts += [] if bias is None else [(slice(bias, bias + p), slice(fan_in, fan_in + 1))]
        parts_q = [(slice(start_q, start_q + r * fan_q), slice(0, fan_q))]
        parts_q += [] if bias_q is None else [(slice(bias_q, bias_q + r), slice(fan_q, fan_q + 1))]
        for rows, m in parts:
            for columns, s in parts_q:
                piece = block[:, m, :, s].flatten(2).flatten(0, 1)
                hessian[rows, columns] = piece
                hessian[columns, rows] = piece.T


@dataclass(frozen=True)
class _Chunk:
    """Both passes through some samples, one column each.

    Attributes:
        loss: Their share of L.
        a: a_0, …, a_L.
        weights: W_1, …, W_L.
        derivatives: g_l′(z_l), and g_l″(z_l) where they were asked for.
        deltas: δ_1, …, δ_L.
        backs: What δ_l is before the factor g_l′.
        curvature: w ∂²ℓ/∂f∂f.
    """

    loss: Tensor
    a: list[Tensor]
    weights: list[Tensor]
    derivatives: list[list[Tensor]]
    deltas: list[Tensor]
    backs: list[Tensor]
    curvature: _Curvature


@dataclass(frozen=True)
class _Curvature:
    """w ∂²ℓ/∂f∂f of each sample: diag(d), or diag(d) − (d pᵀ) for the cross entropy, whose d is w Σt p.

    Attributes:
        diagonal: d, shape ``(O, n)``.
        p: Probabilities, shape ``(O, n)``, or None.
    """

    diagonal: Tensor
    p: Tensor | None

    def times(self, tangent: Tensor) -> Tensor:
        """Its products with tangents of the output, shape ``(k, O, n)``."""
        product = self.diagonal * tangent
        if self.p is not None:
            product = product - self.p * product.sum(1, keepdim=True)
        return product

    def matrix(self) -> Tensor:
        """Dense, shape ``(O, O, n)``."""
        dense = torch.diag_embed(self.diagonal.T).permute(1, 2, 0)
        return dense if self.p is None else dense - self.diagonal.unsqueeze(1) * self.p.unsqueeze(0)


def _loss_terms(loss: Loss, f: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, _Curvature]:
    """Σ w ℓ, w ∂ℓ/∂f, shape ``(O, n)``, and w ∂²ℓ/∂f∂f."""
    p: Tensor | None = None
    if loss.name == "cross entropy":
        total, p = targets.sum(0), torch.softmax(f, 0)
        value = total * torch.logsumexp(f, 0) - (targets * f).sum(0)
        slope, second = total * p - targets, total * p
    elif loss.name == "binary cross entropy":
        yes, no = targets.chunk(2)
        s, other = torch.sigmoid(f), torch.sigmoid(-f)
        value = -(yes * F.logsigmoid(f) + no * F.logsigmoid(-f)).sum(0)
        slope, second = no * s - yes * other, (yes + no) * s * other
    else:
        r = f - targets
        if loss.name == "huber":
            value = torch.where(r.abs() <= loss.delta, 0.5 * r * r, loss.delta * (r.abs() - 0.5 * loss.delta)).sum(0)
            slope, second = r.clamp(-loss.delta, loss.delta), (r.abs() <= loss.delta).to(r.dtype)
        else:
            value, slope, second = (r * r).sum(0), 2 * r, torch.full_like(r, 2.0)
    return value @ weights, slope * weights, _Curvature(second * weights, p)


def _accumulate(sums: dict[tuple[str, int, int], Tensor], key: tuple[str, int, int], left: Tensor, right: Tensor) -> None:
    """Add left rightᵀ, the sum over samples."""
    if key in sums:
        sums[key].addmm_(left, right.T)
    else:
        sums[key] = left @ right.T


def _times(matrix: Tensor, stack: Tensor) -> Tensor:
    """The matrix times each sample's matrix, shape ``(i, j, n)``, in one product."""
    return (matrix @ stack.flatten(1)).view(-1, *stack.shape[1:])


def _pairs(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """i ≥ j."""
    i, j = torch.tril_indices(n, n, device=device)
    return i, j


def _unpacking(n: int, device: torch.device) -> Tensor:
    """Where each (i, j) stands among ``_pairs``, shape ``(n, n)``."""
    i = torch.arange(n, device=device)
    large, small = torch.maximum(i[:, None], i), torch.minimum(i[:, None], i)
    return large * (large + 1) // 2 + small
