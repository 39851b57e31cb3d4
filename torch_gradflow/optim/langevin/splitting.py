"""Splittings as words: one letter for each part of the dynamics, in the order in which a sweep of length h runs them.

The dynamics is cut into parts that are solved exactly, each by one of the letters (θ parameters, p momenta, ξ friction of an
adaptive thermostat, L loss, τ temperature, γ friction, σ noise, ε coupling, N number of elements of the tensor, R ~ N(0, I)),
for a time t:

    A   θ += t p                                          B   p −= t ∇L(θ)
    O   p = c p + √(τ(1 − c²)) R,  c = exp(−γt)           C   p *= exp(−tξ)
    D   p += σ √t R                                       E   ξ += tε(p·p − Nτ)
    V   p *= exp(−t h v/(2τ)),  v the variance of the gradient's noise in each element
    G   θ −= t ∇L(θ)                                      W   θ += √(2τt) R

A letter that occurs m times in a word runs for h/m each time: "BAOAB" is B for h/2, A for h/2, O for h, A for h/2, B for h/2.
A word that reads the same backwards is a symmetric method, of weak order two if it has no G; ``mirrored`` makes such words.

**One gradient per step.** A training loop evaluates ∇L where the parameters are, and only then calls ``step``. So the sweep is
rotated: repeated for ever, BAOAB BAOAB ... is the same sequence whether one cuts it before the first B or between two sweeps'
Bs, and a step runs from one evaluation of the gradient to the next, here "B(h) A(h/2) O(h) A(h/2)". The first half of its kick
closes the last sweep, the second half opens the next one; they are one kick, because nothing between them moves θ. In the same
way neighbouring Os become one, with a single draw (OBABO is run as "B O B A" with O for h), which is exact. This
works if in the endless sequence no letter that moves θ stands between two that need the gradient, apart from one place, where
a step begins. Words that need several evaluations per sweep, like BABAB, are refused.

**What the parameters show.** Between two steps they stand where the next gradient is needed. Where the word has its kick
across the boundary of two sweeps (BAOAB, BACDEDCAB, BAB), that is the end of a sweep: θ is exactly the sweep's θ, the momenta
still lack the closing part, for BAOAB half a kick, for which the next gradient is needed. The very first step has nothing to
close, and runs the word from its beginning. Where the kick is inside the word (ABOBA), parameters show θ in the middle of the
sweep, and the first step begins there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

GRADIENT = frozenset("BG")
MOVING = frozenset("AGW")

Part = tuple[str, float]


def mirrored(half: str) -> str:
    """The symmetric word whose first half, with the letter in the middle, is ``half``: "BAO" gives "BAOAB"."""
    return half + half[-2::-1]


# The thermostats, and the splitting that each uses unless another one is named.
SPLITTINGS = {
    "langevin": mirrored("BAO"),
    "adaptive-langevin": mirrored("BACDE"),
    "covariance-controlled": mirrored("BACDEV"),
    "overdamped": "GW",
    "none": mirrored("BA"),
}
# Other orders of the letters of "langevin", by the names that they have in the literature.
GLA1, GLA2, BAOAB = "BAO", "BABO", mirrored("BAO")


@dataclass(frozen=True)
class Program:
    """What a step runs: letters and the fraction of the step size for which each runs.

    Attributes:
        opening: The parts of the very first step.
        cycle: Those of all others, from one evaluation of the gradient to the next.
    """

    opening: tuple[Part, ...]
    cycle: tuple[Part, ...]

    @property
    def letters(self) -> frozenset[str]:
        """Which parts of the dynamics it has."""
        return frozenset(letter for letter, _ in self.cycle)


@cache
def program(word: str) -> Program:
    """The word rotated to begin where the gradient is needed.

    Raises:
        ValueError: If the word needs no gradient, or more than one per sweep.
    """
    parts = [(letter, 1.0 / word.count(letter)) for letter in word]
    starts = [i for i, letter in enumerate(word) if word[i - 1] in MOVING and _one_gradient(word[i:] + word[:i])]
    if len(starts) != 1:
        raise ValueError(
            f"splitting must need the gradient (a B or a G) at one place of the parameters per sweep, not {word!r}: "
            "in its endless repetition a letter that moves them (A, G, W) stands between two kicks, or there is none. "
            "Use a word like 'BAOAB'."
        )
    start = starts[0]
    closing = [] if MOVING & set(word[start:]) else parts[start:]
    cycle = parts[start:] + parts[:start]
    return Program(opening=_merged(cycle[len(closing) :]), cycle=_merged(cycle))


def _one_gradient(word: str) -> bool:
    """Whether all letters that need the gradient come before any other that moves the parameters."""
    needs = [i for i, letter in enumerate(word) if letter in GRADIENT]
    return bool(needs) and not MOVING & set(word[: needs[-1]])


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Equal neighbours as one: each part is solved exactly, so twice a half is the whole."""
    return tuple((letter, sum(fraction for _, fraction in same)) for letter, same in groupby(parts, key=lambda part: part[0]))
