"""The population loss of networks with one hidden layer under standard normal input: value and derivatives in closed form.

With neurons z_i = u_i·x + b_i, x ~ N(0, I), the student f = Σ_i a_i g_i(z_i) + c and a teacher f* likewise, the losses are

    L = L₀ + Σ_i a_i Σ_j α_j E[g_i(z_i) f_j(z_j)] + (terms of the constants c),

where j runs over the teacher's neurons and, in the squared error, the student's own. With T^kl_ij = E[g_i⁽ᵏ⁾(z_i) f_j⁽ˡ⁾(z_j)]
all derivatives are sums over pairs of such numbers times input weights, for instance

    ∇_{u_i} E[g f] = T²⁰ u_i + T¹¹ v_j,
    ∇²_{u_i v_j} E[g f] = T¹¹ I + T³¹ u uᵀ + T²² (u vᵀ + v uᵀ) + T¹³ v vᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_gradflow.perceptron.activations import Activation
from torch_gradflow.population.neurons import Neurons, neurons
from torch_gradflow.population.pairs import Order, pair_moments

PopulationLossName = Literal["mse", "correlation"]
_OF_GRADIENT: tuple[Order, ...] = ((0, 0), (2, 0), (1, 1))
_OF_HESSIAN: tuple[Order, ...] = (*_OF_GRADIENT, (4, 0), (3, 1), (2, 2))
_WITH_BIASES: dict[tuple[Order, ...], tuple[Order, ...]] = {
    _OF_GRADIENT: (*_OF_GRADIENT, (1, 0)),
    _OF_HESSIAN: (*_OF_HESSIAN, (1, 0), (2, 1), (3, 0)),
}


@dataclass(frozen=True)
class HiddenLayer:
    """What a network with one hidden layer is, besides its parameters.

    Attributes:
        n_inputs: d.
        activations: That of each neuron, as runs of (number of neurons, activation).
        bias: Whether neurons have biases.
        output_bias: Whether the output has one.
    """

    n_inputs: int
    activations: tuple[tuple[int, Activation], ...]
    bias: bool
    output_bias: bool

    @property
    def n_neurons(self) -> int:
        """How many."""
        return sum(n for n, _ in self.activations)

    @property
    def n_parameters(self) -> int:
        """Of u, b, a and c."""
        return self.n_neurons * (self.n_inputs + 1 + self.bias) + self.output_bias

    def split(self, rows: Tensor) -> Parts:
        """Parameters, or columns of them, shape ``(P, ...)``, as their parts."""
        r, rest = self.n_neurons, rows.shape[1:]
        sizes = [r * self.n_inputs, r * self.bias, r, int(self.output_bias)]
        u, b, a, c = rows.split(sizes)
        zero = rows.new_zeros(rest)
        return Parts(u.reshape(r, self.n_inputs, *rest), b if self.bias else None, a, c[0] if self.output_bias else zero)

    def groups(self, parts: Parts) -> list[Neurons]:
        """Its neurons, by activation."""
        found, begin = [], 0
        for n, activation in self.activations:
            end = begin + n
            found.append(neurons(activation, parts.u[begin:end], None if parts.b is None else parts.b[begin:end]))
            begin = end
        return found


@dataclass(frozen=True)
class Parts:
    """The parameters of a network with one hidden layer, or directions of them with a last dimension more.

    Attributes:
        u: Input weights, shape ``(r, d)``.
        b: Biases, shape ``(r,)``; None where there are none.
        a: Output weights, shape ``(r,)``.
        c: The bias of the output, 0-dimensional.
    """

    u: Tensor
    b: Tensor | None
    a: Tensor
    c: Tensor

    def joined(self, layer: HiddenLayer) -> Tensor:
        """As one vector, or columns."""
        rows = [self.u.reshape(layer.n_neurons * layer.n_inputs, *self.u.shape[2:]), *([] if self.b is None else [self.b])]
        return torch.cat([*rows, self.a, *([self.c[None]] if layer.output_bias else [])])


@dataclass(frozen=True)
class _Pairs:
    """The student's neurons, and all that they are paired with: the columns.

    Attributes:
        student: Parameters.
        v: Input weights of the columns, shape ``(n, d)``: the student's own (in the squared error), the teacher's, and zeros
            for the constant.
        alpha: α of the columns.
        tables: T^kl, shapes ``(r, n)``. A neuron paired with itself is a function of one argument: there, half of
            E[(g²)⁽ᵏ⁾] stands for k > 0 and l = 0, and zero for l > 0.
    """

    student: Parts
    v: Tensor
    alpha: Tensor
    tables: dict[Order, Tensor]

    def weighted(self, order: Order) -> Tensor:
        """Σ_j T_ij α_j, shape ``(r,)``."""
        return self.tables[order] @ self.alpha

    def swapped(self, order: Order) -> Tensor:
        """T^lk of the student's neurons with one another."""
        r = len(self.student.a)
        return self.tables[order][:, :r].T


class PopulationLoss:
    """E[(f − f*)²] + σ², or E[1 − f f*], as a function of the student's parameters (u, b, a, c), in float64.

    Args:
        student: Its shape.
        teacher: Its shape.
        parameters: The teacher's, shape ``(P*,)``.
        loss: "mse" or "correlation".
        noise: σ, that of the target.
    """

    def __init__(
        self, student: HiddenLayer, teacher: HiddenLayer, parameters: Tensor, loss: PopulationLossName, noise: float
    ) -> None:
        self.student = student
        self._squared = loss == "mse"
        self._factor = 2.0 if self._squared else 1.0
        self._orders = _WITH_BIASES if student.bias else {orders: orders for orders in _WITH_BIASES}
        self._noise = noise
        self._teacher = teacher.split(parameters)
        self._groups = teacher.groups(self._teacher)
        self._mean = self._teacher.a @ torch.cat([group.mean(0) for group in self._groups])
        table = _table(self._groups, self._groups, 0, ((0, 0),))[0, 0]
        self._square = self._teacher.a @ table @ self._teacher.a

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L and its gradient, shape ``(P,)``."""
        return self._loss_and_gradient(self._pairs(theta, self._orders[_OF_GRADIENT]))

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, its gradient and its Hessian, shape ``(P, P)``."""
        pairs = self._pairs(theta, self._orders[_OF_HESSIAN])
        return *self._loss_and_gradient(pairs), self._hessian(pairs)

    def hvp(self, theta: Tensor, columns: Tensor) -> Tensor:
        """H V for V of shape ``(P, m)``, without H: O(r (r + k) (d + 1) m)."""
        return self._products(self._pairs(theta, self._orders[_OF_HESSIAN]), self.student.split(columns))

    def _pairs(self, theta: Tensor, orders: Sequence[Order]) -> _Pairs:
        parts = self.student.split(theta)
        own = self.student.groups(parts)
        teacher, zero = self._teacher, theta.new_zeros(1, self.student.n_inputs)
        tables = _table(own, (own if self._squared else []) + self._groups, len(own), orders)
        constant = parts.c - teacher.c if self._squared else -teacher.c
        if not self._squared:
            return _Pairs(parts, torch.cat([teacher.u, zero]), torch.cat([-teacher.a, constant[None]]), tables)
        alpha = torch.cat([parts.a, -teacher.a, constant[None]])
        return _Pairs(parts, torch.cat([parts.u, teacher.u, zero]), alpha, tables)

    def _loss_and_gradient(self, pairs: _Pairs) -> tuple[Tensor, Tensor]:
        parts, c = pairs.student, self._teacher.c
        to_a, outer = pairs.weighted((0, 0)), self._factor * parts.a
        if self._squared:
            r = len(parts.a)
            itself = parts.a @ (pairs.tables[0, 0][:, :r] @ parts.a)
            means, gap = parts.a @ pairs.tables[0, 0][:, -1] - self._mean, parts.c - c
            # Both signs of the student's own part: to_a holds it once, the loss once, and the teacher's part twice.
            loss = 2 * (parts.a @ to_a) - itself + self._square - 2 * gap * self._mean + gap * gap + self._noise**2
            to_c = 2 * (means + gap)
        else:
            loss, to_c = 1 + parts.a @ to_a - parts.c * (self._mean + c), -(self._mean + c)
        to_u = outer[:, None] * (pairs.weighted((2, 0))[:, None] * parts.u + (pairs.tables[1, 1] * pairs.alpha) @ pairs.v)
        to_b = None if parts.b is None else outer * pairs.weighted((1, 0))
        return loss, Parts(to_u, to_b, self._factor * to_a, to_c).joined(self.student)

    def _hessian(self, pairs: _Pairs) -> Tensor:
        parts, tables, factor = pairs.student, pairs.tables, self._factor
        u, a, (r, d) = parts.u, parts.a, parts.u.shape
        weights, biases, n = r * d, r * self.student.bias, self.student.n_parameters
        end = weights + biases
        hessian = u.new_zeros(n, n)
        neuron = torch.arange(r, device=u.device)
        block = hessian[:weights, :weights].unflatten(0, (r, d)).unflatten(2, (r, d))
        if self._squared:
            self._mixed_blocks(pairs, hessian)
        outer = (factor * a)[:, None]
        crossed = outer * ((tables[3, 1] * pairs.alpha) @ pairs.v)
        own = u[:, :, None] * crossed[:, None, :]
        own = own + own.mT + (outer * pairs.weighted((4, 0))[:, None] * u)[:, :, None] * u[:, None, :]
        scaled = (outer * tables[2, 2] * pairs.alpha)[:, :, None] * pairs.v
        own = own + pairs.v.T @ scaled
        own.diagonal(dim1=1, dim2=2).add_(outer * pairs.weighted((2, 0))[:, None])
        block[neuron, :, neuron, :] += own
        to_a = hessian[:weights, end : end + r].unflatten(0, (r, d))
        to_a[neuron, :, neuron] += factor * (pairs.weighted((2, 0))[:, None] * u + (tables[1, 1] * pairs.alpha) @ pairs.v)
        if self._squared:
            to_a += self._mixed(a, tables[2, 0], tables[1, 1], u)
            hessian[end : end + r, end : end + r] = factor * tables[0, 0][:, :r]
        if parts.b is not None:
            to_b = hessian[:weights, weights:end].unflatten(0, (r, d))
            to_b[neuron, :, neuron] += outer * (pairs.weighted((3, 0))[:, None] * u + (tables[2, 1] * pairs.alpha) @ pairs.v)
            bias, bias_a = hessian[weights:end, weights:end], hessian[weights:end, end : end + r]
            bias.diagonal().add_(outer[:, 0] * pairs.weighted((2, 0)))
            bias_a.diagonal().add_(factor * pairs.weighted((1, 0)))
            if self._squared:
                to_b += self._mixed(a, tables[2, 1], pairs.swapped((2, 1)), u) * a
                bias += torch.outer(factor * a, a) * tables[1, 1][:, :r]
                bias_a += outer * tables[1, 0][:, :r]
        if self.student.output_bias and self._squared:
            hessian[:weights, -1] = (outer * tables[2, 0][:, -1:] * u).reshape(-1)
            if parts.b is not None:
                hessian[weights:end, -1] = factor * a * tables[1, 0][:, -1]
            hessian[end : end + r, -1] = factor * tables[0, 0][:, -1]
            hessian[-1, -1] = factor
        _mirror(hessian, max(d, 64))
        return hessian

    def _mixed(self, a: Tensor, first: Tensor, second: Tensor, u: Tensor) -> Tensor:
        """κ a_i (first_ij u_i + second_ij u_j) over the student's neurons, shape ``(r, d, r)``."""
        r = len(a)
        both = first[:, None, :r] * u[:, :, None] + second[:, None, :r] * u.T
        return (self._factor * a)[:, None, None] * both

    def _mixed_blocks(self, pairs: _Pairs, hessian: Tensor) -> None:
        """∂²/∂u_i ∂u_j of different neurons, into the rows and columns of the input weights above the diagonal blocks."""
        u, (r, d) = pairs.student.u, pairs.student.u.shape
        scale = self._factor * torch.outer(pairs.student.a, pairs.student.a)
        straight, both, first = (scale * pairs.tables[order][:, :r] for order in ((1, 1), (2, 2), (3, 1)))
        second = scale * pairs.swapped((3, 1))
        of_u = first[:, :, None] * u[:, None, :] + both[:, :, None] * u
        of_v = both[:, :, None] * u[:, None, :] + second[:, :, None] * u
        for i in range(r - 1):  # row by row: the matrix is larger than what a processor keeps at hand
            rows = hessian[i * d : (i + 1) * d, (i + 1) * d : r * d].unflatten(1, (-1, d))
            torch.mul(u[i, :, None, None], of_u[i, i + 1 :], out=rows)
            rows.addcmul_(u[i + 1 :].T[:, :, None], of_v[i, i + 1 :])
            rows.diagonal(dim1=0, dim2=2).add_(straight[i, i + 1 :, None])

    def _products(self, pairs: _Pairs, moved: Parts) -> Tensor:
        parts, tables, factor = pairs.student, pairs.tables, self._factor
        u, a, r = parts.u, parts.a, len(parts.a)
        own = r if self._squared else 0
        # How variances, covariances and means of the pairs move: shapes (r, m) and (r, n, m).
        of_p = 2 * torch.einsum("id,idm->im", u, moved.u)
        of_q = torch.einsum("idm,jd->ijm", moved.u, pairs.v)
        of_alpha = u.new_zeros(len(pairs.alpha), of_p.shape[1])
        if self._squared:
            of_q[:, :r] += torch.einsum("id,jdm->ijm", u, moved.u)
            of_alpha[:r], of_alpha[-1] = moved.a, moved.c

        def change(p: Order, q: Order, r_: Order, b: Order, c: Order) -> Tensor:
            """Of a table, by those that are its derivatives."""
            total = 0.5 * tables[p][:, :, None] * of_p[:, None] + tables[q][:, :, None] * of_q
            if own:
                total[:, :r] += 0.5 * self._own(pairs, r_)[:, :, None] * of_p
            if moved.b is not None:
                total += tables[b][:, :, None] * moved.b[:, None]
                if own:
                    total[:, :r] += self._own(pairs, c)[:, :, None] * moved.b
            return total

        of_20 = change((4, 0), (3, 1), (2, 2), (3, 0), (2, 1))
        of_11 = change((3, 1), (2, 2), (1, 3), (2, 1), (1, 2))
        of_00 = change((2, 0), (1, 1), (0, 2), (1, 0), (0, 1))
        alpha, v = pairs.alpha, pairs.v
        to_u = pairs.weighted((2, 0))[:, None] * u + (tables[1, 1] * alpha) @ v
        weight = torch.einsum("ijm,j->im", of_20, alpha) + tables[2, 0] @ of_alpha
        moved_u = weight[:, None] * u[:, :, None] + pairs.weighted((2, 0))[:, None, None] * moved.u
        pulls = of_11 * alpha[:, None] + tables[1, 1][:, :, None] * of_alpha
        moved_u += torch.einsum("ijm,jd->idm", pulls, v)
        if own:
            moved_u += torch.einsum("ij,jdm->idm", tables[1, 1][:, :r] * a, moved.u)
        product_u = factor * (moved.a[:, None] * to_u[:, :, None] + a[:, None, None] * moved_u)
        product_a = factor * (torch.einsum("ijm,j->im", of_00, alpha) + tables[0, 0] @ of_alpha)
        product_b = None
        if parts.b is not None:
            of_10 = change((3, 0), (2, 1), (1, 2), (2, 0), (1, 1))
            slope = torch.einsum("ijm,j->im", of_10, alpha) + tables[1, 0] @ of_alpha
            product_b = factor * (moved.a * pairs.weighted((1, 0))[:, None] + a[:, None] * slope)
        product_c = (
            factor * (moved.a.T @ tables[0, 0][:, -1] + a @ of_00[:, -1] + moved.c) if own else torch.zeros_like(moved.c)
        )
        return Parts(product_u, product_b, product_a, product_c).joined(self.student)

    @staticmethod
    def _own(pairs: _Pairs, order: Order) -> Tensor:
        """T^kl of the student's neurons with one another, for any k and l."""
        k, j = order
        return pairs.tables[order][:, : len(pairs.student.a)] if k >= j else pairs.swapped((j, k))


def _table(rows: Sequence[Neurons], columns: Sequence[Neurons], n_own: int, orders: Sequence[Order]) -> dict[Order, Tensor]:
    """T^kl of all rows with all columns and the constant 1, see ``_Pairs``; without the constant where ``n_own`` is 0."""
    found: dict[Order, list[Tensor]] = {order: [] for order in orders}
    for row in rows:
        parts: dict[Order, list[Tensor]] = {order: [] for order in orders}
        for column in columns:
            for order, table in pair_moments(row, column, orders).items():
                if row is column:
                    k, j = order
                    table.diagonal().copy_(torch.zeros_like(row.variance) if j else row.mean_of_square(k) / (2 if k else 1))
                parts[order].append(table)
        for (k, j), tables in parts.items():
            if n_own:
                mean = torch.zeros_like(row.variance) if j else row.mean(k)
                tables.append(mean[:, None])
            found[k, j].append(torch.cat(tables, 1))
    return {order: torch.cat(tables) for order, tables in found.items()}


def _mirror(hessian: Tensor, block: int) -> None:
    """Copy what lies above the diagonal, in blocks of so many rows, to below it."""
    for begin in range(0, len(hessian), block):
        end = min(begin + block, len(hessian))
        hessian[end:, begin:end] = hessian[begin:end, end:].T
        corner = hessian[begin:end, begin:end]
        corner.copy_(torch.triu(corner) + torch.triu(corner, 1).T)
