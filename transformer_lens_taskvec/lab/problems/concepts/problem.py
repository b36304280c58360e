"""Signs within a concept: sparse codes over pairs of opposite words (after Bu et al. 2024).

Concept ``k`` has two words and two labels, which share a part and differ in the sign of another::

    mu_k^+-  =  a_k +- b_k,   |mu| = 1,   <mu_k^+, mu_k^-> = kappa_x > 0,   orthogonal across k
    q_k^+-   likewise, with kappa_y

A prompt is of one concept, whose words are in all of its inputs. The formulas of this file are a
design in the spirit of the paper; they have not been checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_taskvec.lab.model import interleave
from transformer_lens_taskvec.lab.problems.base import (
    QUICK,
    Batch,
    Finding,
    Problem,
    check_sizes,
    draw_labels,
    normal,
)
from transformer_lens_taskvec.lab.problems.concepts.finding import concepts_finding

_VOTE = 2.0
"""The logit that the nearest demonstration gives to its output."""


@dataclass(frozen=True)
class Concepts(Problem):
    """The sign of a prompt's concept, among other concepts' signs (after Bu et al. 2024).

    A design, not verified against the paper: an input is the word ``mu_k^e`` of the prompt's
    concept with a random sign ``e``, the words of other concepts with random signs, each present
    with probability ``presence``, and Gaussian noise. The token after it holds the labels of the
    same features, ``q_k^e`` among them, each with its noise. The output is ``e``. Since inputs hold
    several concepts' signs, the model must find the concept that all demonstrations share.

    Attributes:
        n_concepts: The number of concepts, which are the tasks.
        kappa_x: The inner product of a concept's two words.
        kappa_y: The inner product of a concept's two labels.
        presence: The probability with which another concept is in an input.
        noise: The standard deviation of the noise on each coordinate of a word.
        n_points: Pairs in a sequence, the query included.
        dim: The dimension of a token: four coordinates per concept, for ``a_k`` and ``b_k`` of
            words and of labels, and any others are zero.
        shares: The frequency of each concept, as the prompt's and in others' inputs; empty for
            equal ones.
        opposite: Whether the words' signs go with the labels of the opposite signs. The output is
            then ``-e``.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.concepts import Concepts
        >>> Concepts(n_concepts=3).tasks
        ('concept 1', 'concept 2', 'concept 3')
        >>> words = Concepts(kappa_x=0.5).words()  # [concept, sign, coordinate]
        >>> [round(float(words[0, 0] @ words[k, 1]), 3) for k in (0, 1)]
        [0.5, 0.0]
    """

    n_concepts: int = 8
    kappa_x: float = 0.5
    kappa_y: float = 0.5
    presence: float = 0.3
    noise: float = 0.1
    n_points: int = 16
    dim: int = 32
    shares: tuple[float, ...] = ()
    opposite: bool = False

    loss_kind: ClassVar[str] = "logistic"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 3,
            "n_heads": 2,
            "d_model": 64,
            "steps": 800,
            "warmup": 50,
            "n_checkpoints": 40,
            "n_eval": 40,
        }
    )

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, 0.0)
        if self.n_concepts < 2 or self.dim < 4 * self.n_concepts:
            raise ValueError(
                f"n_concepts must be at least 2 and dim at least 4 times as much; got "
                f"{self.n_concepts} and {self.dim}"
            )
        for name in ("kappa_x", "kappa_y", "presence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.noise <= 0:
            raise ValueError(f"noise must be positive, got {self.noise}")
        if self.shares and (
            len(self.shares) != self.n_concepts
            or min(self.shares) <= 0
            or abs(sum(self.shares) - 1) > 1e-4
        ):
            raise ValueError(
                f"shares must be {self.n_concepts} positive numbers that add up to 1; got "
                f"{self.shares}"
            )

    def skewed(self, exponent: float = 1.0) -> Concepts:
        """The problem with unequal concepts: concept ``k`` has a share in proportion to ``1/k^e``.

        Args:
            exponent: ``e``.
        """
        weights = [(k + 1) ** -exponent for k in range(self.n_concepts)]
        return replace(self, shares=tuple(weight / sum(weights) for weight in weights))

    def switched(self) -> Concepts:
        """The problem with the other pairing of the words' signs with the labels'."""
        return replace(self, opposite=not self.opposite)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("concept 1", ...)``."""
        return tuple(f"concept {k + 1}" for k in range(self.n_concepts))

    @property
    def frequencies(self) -> Float[Tensor, " concept"]:
        """The frequency of each concept as the prompt's."""
        return torch.tensor(self.shares or (1 / self.n_concepts,) * self.n_concepts)

    @property
    def presences(self) -> Float[Tensor, " concept"]:
        """The probability with which each concept is in another's input, at most 0.9."""
        return (self.presence * self.n_concepts * self.frequencies).clamp(max=0.9)

    def words(self) -> Float[Tensor, "concept sign dim"]:
        """``mu_k^-`` and ``mu_k^+``."""
        return self._features(self.kappa_x, 0)

    def label_features(self) -> Float[Tensor, "concept sign dim"]:
        """``q_k^-`` and ``q_k^+``."""
        return self._features(self.kappa_y, 2 * self.n_concepts)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`; the concepts are drawn by their shares."""
        device, k = generator.device, self.n_concepts
        if labels is None:
            labels = torch.multinomial(
                self.frequencies.to(device), batch_size, replacement=True, generator=generator
            )
        labels = draw_labels(batch_size, k, generator, labels)
        shape = (batch_size, self.n_points, k)
        present = torch.rand(shape, generator=generator, device=device) < self.presences.to(device)
        present |= rearrange(F.one_hot(labels, k) > 0, "batch concept -> batch 1 concept")
        signs = 2.0 * torch.randint(2, shape, generator=generator, device=device) - 1
        shared, opposite = _lengths(self.kappa_x)
        clean = torch.cat([present * shared, present * signs * opposite], dim=-1)
        words = clean + self.noise * normal(generator, *clean.shape)
        ys = self._pairing * signs.gather(2, _column(labels, self.n_points))[..., 0]
        return Batch(F.pad(words, (0, self.dim - 2 * k)), ys, labels)

    def tokens(self, batch: Batch) -> Float[Tensor, "batch token dim"]:
        """Inputs, and after each the labels of its features: the prompt's concept as in ``ys``."""
        a, b = self._coordinates(batch.xs)
        column = _column(batch.labels.to(a.device), batch.ys.shape[1])
        n_demos = batch.ys.shape[1]
        opposite = self._pairing * b[:, :n_demos]
        own = opposite.gather(2, column).abs() * batch.ys[..., None]
        (a_x, b_x), (a_y, b_y) = _lengths(self.kappa_x), _lengths(self.kappa_y)
        labels = [a[:, :n_demos] * a_y / a_x, opposite.scatter(2, column, own) * b_y / b_x]
        outputs = F.pad(
            torch.cat(labels, dim=-1), (2 * self.n_concepts, self.dim - 4 * self.n_concepts)
        )
        return interleave(batch.xs, outputs)

    def losses(
        self,
        predictions: Float[Tensor, "*rows"],
        targets: Float[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Float[Tensor, "*rows"]:
        """The logistic loss in nats, ``log(1 + exp(-y f))``."""
        return F.softplus(-targets * predictions)

    def right(
        self,
        predictions: Float[Tensor, "*rows"],
        targets: Float[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Bool[Tensor, "*rows"]:
        """Whether each prediction has the output's sign."""
        return targets * predictions > 0

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """Logits of the known concept, of the exact posterior over concepts, and of a neighbour.

        "known concept" is told the concept and reads its sign off the query; "Bayes" infers the
        concept from the inputs up to the query. Both know how signs are paired with labels.
        "nearest demonstration" gives a logit of 2 to the output of the demonstration whose input
        has the largest inner product with the query's, whatever the pairing.
        """
        _, b = self._coordinates(batch.xs)
        by_concept = 2 * self._pairing * b * _lengths(self.kappa_x)[1] / self.noise**2
        known = by_concept.gather(2, _column(batch.labels, batch.xs.shape[1]))[..., 0]
        evidence = self._evidence(batch.xs)
        posterior = (evidence.cumsum(1) + self.frequencies.to(evidence).log()).softmax(-1)
        positive, negative = (
            (posterior * (sign * by_concept).sigmoid()).sum(-1).clamp(min=1e-30).log()
            for sign in (1, -1)
        )
        products = einsum(batch.xs, batch.xs, "batch point dim, batch demo dim -> batch point demo")
        later = torch.ones(products.shape[1:], dtype=torch.bool, device=products.device).triu()
        nearest = products.masked_fill(later, -torch.inf).argmax(-1)
        voted = _VOTE * batch.ys.gather(1, nearest)
        voted[:, 0] = 0.0
        return {
            "nearest demonstration": voted,
            "Bayes": positive - negative,
            "known concept": known,
        }

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """As for :meth:`Problem.posterior`, given the tokens before the point.

        The tokens with the labels of an input's features add nothing to the input, so only the
        inputs count.
        """
        evidence = self._evidence(batch.xs)
        before = torch.cat([torch.zeros_like(evidence[:, :1]), evidence[:, :-1].cumsum(1)], dim=1)
        return (before + self.frequencies.to(evidence).log()).softmax(-1)

    def finding(self, run: Any) -> Finding:
        """How the error falls, where attention goes, and the errors out of distribution.

        See :func:`concepts_finding`.
        """
        return concepts_finding(run)

    @property
    def _pairing(self) -> float:
        return -1.0 if self.opposite else 1.0

    def _features(self, kappa: float, first: int) -> Float[Tensor, "concept sign dim"]:
        shared, opposite = _lengths(kappa)
        basis = torch.eye(self.dim)[first : first + 2 * self.n_concepts]
        a, b = shared * basis[: self.n_concepts], opposite * basis[self.n_concepts :]
        return torch.stack([a - b, a + b], dim=1)

    def _coordinates(
        self, xs: Shaped[Tensor, "batch point dim"]
    ) -> tuple[Float[Tensor, "batch point concept"], Float[Tensor, "batch point concept"]]:
        """The components of the inputs along ``a_k`` and along ``b_k``."""
        return xs[..., : self.n_concepts], xs[..., self.n_concepts : 2 * self.n_concepts]

    def _evidence(
        self, xs: Float[Tensor, "batch point dim"]
    ) -> Float[Tensor, "batch point concept"]:
        """The log-probability density of each input if a concept is the prompt's, less a constant.

        With ``r = p(x | k present) / p(x | k absent)`` it is ``log r / (p r + 1 - p)``, ``p`` being
        the presence of ``k`` where it is not the prompt's concept.
        """
        a, b = self._coordinates(xs)
        shared, opposite = _lengths(self.kappa_x)
        along, across = a * shared / self.noise**2, b * opposite / self.noise**2
        length = (shared**2 + opposite**2) / (2 * self.noise**2)
        ratio = along - length + torch.logaddexp(across, -across) - math.log(2)
        presence = self.presences.to(xs)
        return ratio - torch.logaddexp(presence.log() + ratio, (1 - presence).log())


def _lengths(kappa: float) -> tuple[float, float]:
    """The lengths of the part that opposite features share, and of that in which they differ."""
    return math.sqrt((1 + kappa) / 2), math.sqrt((1 - kappa) / 2)


def _column(labels: Int[Tensor, " batch"], n_points: int) -> Int[Tensor, "batch point 1"]:
    """Each sequence's concept at each of its points, as an index."""
    return labels[:, None, None].expand(-1, n_points, 1)
