"""Bigrams against context: triggers whose successor is new in every sequence.

A seeded random bigram model draws the tokens, except after a few *triggers*: in a sequence, one
output follows each trigger (Bietti et al. 2023; Wang and Sato 2024). What the model has learnt of a
trigger from all sequences, and what it reads in this one, then contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_lens_taskvec.lab.model import ModelSize
from transformer_lens_taskvec.lab.problems.base import QUICK, Batch, Finding, draw_labels
from transformer_lens_taskvec.lab.problems.bigrams.finding import bigrams_finding
from transformer_lens_taskvec.lab.problems.bigrams.formula import follows_like
from transformer_lens_taskvec.lab.problems.bigrams.memory import (
    AssociativeMemory,
    MemoryConfig,
    Positions,
    check_positions,
)
from transformer_lens_taskvec.lab.problems.tokens import TokenProblem

_LONGEST = 4
"""How many times the length of training a model has positions for."""
_TINY = 1e-12
"""The least probability of an oracle's, so that every NLL is finite."""


@dataclass(frozen=True)
class TriggeredBigrams(TokenProblem):
    """Random bigrams in which each trigger has one output per sequence, or its usual successors.

    Tokens are numbered by their frequency ``pi_u``, and the first ``n_triggers`` are the triggers.
    ``x_1 ~ pi_u``; the next token is the output ``o_k`` if the last one is a trigger ``q_k`` that
    has one, and is drawn from ``pi_b(.|last)`` otherwise. The last token is always the first
    trigger, put there, and the latent task is what that trigger means in the sequence: one of
    ``n_candidates`` outputs, or its usual successors. Every other trigger has any token that is not
    a trigger as its output, or its usual successors as often as the first trigger.

    The output at the last point but one is what would have followed, had the trigger not been put
    there.

    The published setting has no usual triggers, ``usual=False``, and draws outputs from all tokens.
    Then ``pi_b`` after a trigger is never seen, so that no trained model can know it. Here outputs
    are no triggers, of which two could otherwise follow each other for ever.

    Attributes:
        n_points: Tokens in a sequence; the model predicts after each.
        d_vocab: Number of tokens.
        n_triggers: Number of triggers.
        n_candidates: Outputs that the first trigger can have.
        usual: Whether a trigger may also have its usual successors.
        loss_on: The points that count: ``"all"`` tokens, or the ``"outputs"`` of triggers from
            their second occurrence on. The last point counts where the trigger has occurred before;
            it alone is the late loss.
        positions: Of the model: ``"relative"`` or ``"absolute"``.
        concentration: Of the Dirichlet distribution that each ``pi_b(.|v)`` is drawn from, with
            mean ``pi_u``; the smaller, the fewer the successors of a token.
        chain_seed: Seed of the bigrams and of the candidates.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> problem = TriggeredBigrams()
        >>> problem.tasks[:3], problem.candidates[:2]
        (('usual', 'to 3', 'to 10'), (3, 10))
        >>> batch = problem.sample(2, torch.Generator().manual_seed(0), labels=torch.tensor([1, 2]))
        >>> batch.xs[:, -1].tolist(), batch.ys[:, -1].tolist()  # the trigger, and its outputs
        ([0, 0], [3, 10])
    """

    n_points: int = 40
    d_vocab: int = 16
    n_triggers: int = 3
    n_candidates: int = 7
    usual: bool = True
    loss_on: Literal["all", "outputs"] = "all"
    positions: Positions = "relative"
    concentration: float = 6.0
    chain_seed: int = 0

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 2,
            "n_heads": 1,
            "d_model": 48,
            "steps": 2_500,
        }
    )

    def __post_init__(self) -> None:
        for name, least in (("n_points", 4), ("n_triggers", 1), ("n_candidates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.n_candidates + self.usual < 2:
            raise ValueError("n_candidates is 1 and usual is False; there is only one task")
        needed = self.n_triggers + max(2, self.n_candidates)
        if self.d_vocab < needed:
            raise ValueError(
                f"d_vocab must be at least {needed}, for n_triggers {self.n_triggers} and "
                f"n_candidates {self.n_candidates} that are no triggers; got {self.d_vocab}"
            )
        if self.loss_on not in ("all", "outputs"):
            raise ValueError(f"loss_on must be 'all' or 'outputs', got {self.loss_on!r}")
        if not (math.isfinite(self.concentration) and self.concentration > 0):
            raise ValueError(f"concentration must be positive, got {self.concentration}")
        check_positions(self.positions)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("usual", "to 9", ...)``: what the first trigger means."""
        outputs = tuple(f"to {token}" for token in self.candidates)
        return ("usual", *outputs) if self.usual else outputs

    @property
    def n_tokens(self) -> int:
        """Tokens in a sequence."""
        return self.n_points

    @property
    def late_from(self) -> int:
        """The last point, after the first trigger."""
        return self.n_points - 1

    def query_at(self, point: int) -> int:
        """The token itself: its successor is predicted."""
        return point

    @cached_property
    def unigrams(self) -> Float[Tensor, " token"]:
        """``pi_u``: token ``v`` is drawn in proportion to ``1 / (v + 5)``."""
        weights = 1 / (torch.arange(self.d_vocab, dtype=torch.float64) + 5)
        return weights / weights.sum()

    @cached_property
    def bigrams(self) -> Float[Tensor, "token next"]:
        """``pi_b(next | token)``, mixed with 3 % of ``pi_u`` so that nothing is impossible."""
        alpha = self.concentration * self.unigrams.numpy()
        rows = np.random.default_rng(self.chain_seed).dirichlet(alpha, size=self.d_vocab)
        return 0.97 * torch.from_numpy(rows) + 0.03 * self.unigrams

    @property
    def log_bigrams(self) -> Float[Tensor, "token next"]:
        """The logarithm of ``bigrams``."""
        return self.bigrams.log()

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """The outputs that the first trigger can have, tokens that are no triggers."""
        order = np.random.default_rng([self.chain_seed, 1]).permutation(
            np.arange(self.n_triggers, self.d_vocab)
        )
        return tuple(order[: self.n_candidates].tolist())

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        device = generator.device
        labels = draw_labels(batch_size, len(self.tasks), generator, labels)
        following = self._cumulated(self._draw_outputs(labels, generator))
        first = self.unigrams.cumsum(-1).float().to(device)
        chances = torch.rand(self.n_points + 1, batch_size, 1, generator=generator, device=device)
        row = self.d_vocab * torch.arange(batch_size, device=device)
        token = torch.searchsorted(first, chances[0, :, 0]).clamp(max=self.d_vocab - 1)
        tokens, successors = [], []
        for place in range(self.n_points):
            if place == self.n_points - 1:
                token = torch.zeros_like(token)  # the query, put there
            tokens.append(token)
            table = following[row + token]
            token = torch.searchsorted(table, chances[place + 1], right=True).squeeze(-1)
            successors.append(token)
        xs, ys = torch.stack(tokens, dim=1), torch.stack(successors, dim=1)
        return Batch(xs, ys, labels, self._weights(xs))

    def make_model(self, size: ModelSize, *, seed: int, device: torch.device | str) -> nn.Module:
        """An untrained :class:`AssociativeMemory`, with places for four times the length."""
        config = MemoryConfig(
            d_vocab=self.d_vocab,
            n_ctx=_LONGEST * self.n_points,
            positions=self.positions,
            n_layers=size.n_layers,
            n_heads=size.n_heads,
            d_model=size.d_model,
            init=size.init,
            device=str(device),
        )
        return AssociativeMemory(config, seed=seed)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point token"]]:
        """Log-probabilities of the Bayes-optimal predictor and of the bigrams alone.

        The Bayes-optimal predictor knows the bigrams, the triggers and their possible outputs, and
        has seen what followed each trigger in this sequence. Without ``usual`` it knows an output
        from its first occurrence on.
        """
        bigrams = self.bigrams.to(batch.xs.device)
        usual, outputs = self._posteriors(batch.xs)
        bayes = usual[..., None] * bigrams[batch.xs] + outputs
        return {
            "Bayes": bayes.clamp(min=_TINY).log().float(),
            "bigrams alone": bigrams.log()[batch.xs].float(),
        }

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """``P(what the first trigger means | the tokens up to the point)``."""
        counts = F.one_hot(batch.xs[:, 1:], self.d_vocab).double() * (batch.xs[:, :-1, None] == 0)
        if batch.xs.shape[1] == self.n_points:
            counts[:, -1] = 0  # the last token was put there
        seen = F.pad(counts.cumsum(1), (0, 0, 1, 0))
        usual, outputs = self._given(seen, torch.zeros_like(batch.xs))
        each = outputs[..., list(self.candidates)]
        return (torch.cat([usual[..., None], each], -1) if self.usual else each).float()

    def finding(self, run: Any) -> Finding:
        """When the context wins over the bigrams: measured against the closed formula.

        Args:
            run: A :class:`Run` on this problem.
        """
        return bigrams_finding(run)

    @property
    def _share_usual(self) -> float:
        """How often a trigger has its usual successors."""
        return 1 / len(self.tasks) if self.usual else 0.0

    def _draw_outputs(
        self, labels: Int[Tensor, " batch"], generator: torch.Generator
    ) -> Int[Tensor, "batch token"]:
        """The output of each token, -1 for its usual successors."""
        size, device = len(labels), generator.device
        outputs = torch.full((size, self.d_vocab), -1, device=device)
        others = torch.randint(
            self.n_triggers,
            self.d_vocab,
            (size, self.n_triggers),
            generator=generator,
            device=device,
        )
        kept = torch.rand(size, self.n_triggers, generator=generator, device=device)
        outputs[:, : self.n_triggers] = torch.where(kept < self._share_usual, -1, others)
        meant = torch.tensor([-1, *self.candidates] if self.usual else self.candidates)
        outputs[:, 0] = meant.to(device)[labels]
        return outputs

    def _cumulated(
        self, outputs: Int[Tensor, "batch token"]
    ) -> Float[Tensor, "batch_and_token next"]:
        """The cumulated probabilities of the successors of each token in each sequence."""
        usual = self.bigrams.cumsum(-1).float().to(outputs.device)
        usual[:, -1] = 1.0
        tokens = torch.arange(self.d_vocab, device=outputs.device)
        own = (tokens >= outputs[..., None]).float()
        return torch.where(outputs[..., None] < 0, usual, own).flatten(0, 1)

    def _weights(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
        seen = self._successors(tokens).sum(-1) > 0
        counted = torch.ones_like(seen)
        if self.loss_on == "outputs":
            counted = seen & (tokens < self.n_triggers)
        counted[:, -1] = seen[:, -1]
        return counted.float()

    def _successors(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token next"]:
        """How often each token followed the earlier occurrences of the token at each place."""
        before = follows_like(tokens).double()
        if tokens.shape[1] == self.n_points:
            before[..., -1] = 0  # the last token was put there
        return before @ F.one_hot(tokens, self.d_vocab).double()

    def _posteriors(
        self, tokens: Int[Tensor, "batch token"]
    ) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token next"]]:
        """The probability that each token has its usual successors, and of each output."""
        return self._given(self._successors(tokens), tokens)

    def _given(
        self, counts: Float[Tensor, "batch token next"], tokens: Int[Tensor, "batch token"]
    ) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token next"]]:
        """The same, given how often each token followed."""
        prior = torch.zeros(self.d_vocab, self.d_vocab, dtype=torch.float64)
        prior[: self.n_triggers, self.n_triggers :] = 1 / (self.d_vocab - self.n_triggers)
        prior[0] = 0.0
        prior[0, list(self.candidates)] = 1 / self.n_candidates
        share = torch.ones(self.d_vocab, dtype=torch.float64)
        share[: self.n_triggers] = self._share_usual
        prior, share = ((1 - share[:, None]) * prior).to(tokens.device), share.to(tokens.device)
        likelihood = (counts * self.log_bigrams.to(tokens.device)[tokens]).sum(-1).exp()
        usual = share[tokens] * likelihood
        outputs = prior[tokens] * (counts == counts.sum(-1, keepdim=True))
        evidence = usual + outputs.sum(-1)
        return usual / evidence, outputs / evidence[..., None]
