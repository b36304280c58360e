"""LEGO: chains of variables whose values follow from one another (Zhang et al., 2206.04301)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_taskvec.lab.problems.base import QUICK, Batch, Finding, draw_labels
from transformer_lens_taskvec.lab.problems.lego.chains import (
    CLAUSE,
    FIRST_LETTER,
    NOT,
    draw_chains,
    even_chance,
    query_places,
    read_chains,
    shuffled_letters,
)
from transformer_lens_taskvec.lab.problems.lego.finding import chain_finding
from transformer_lens_taskvec.lab.problems.tokens import TokenProblem


@dataclass(frozen=True)
class Lego(TokenProblem):
    """Chains of variables: ``a = 1, b = a, c = not b, ...`` (Zhang et al. 2022).

    A sequence holds the clauses in random order, and then asks for every variable, in another
    random order. A query is a letter alone. The value is predicted at it and never fed, so that no
    query sees an earlier answer, and nothing but the clauses tells where in the chain a letter
    stands. The points are the positions in the chain, whatever the order of the queries.

    Only the first ``n_supervised`` positions count in losses (``Batch.weights``). What a model says
    of the later ones is length extrapolation: :func:`chain_accuracy`. The latent task is the value
    of the last supervised variable, and an episode ends with its query.

    The paper's model is an encoder with 12 variables, 6 of them supervised, 26 letters, and clauses
    of five tokens, two of which are constant. Here a clause is three tokens, ``a not b`` for
    "b = not a", so that a causal model has read it all at the variable that it defines.

    Every bit is uniform, as in the paper. A ``negation`` below 0.5 makes a shift of distribution to
    test: accuracy and the decodability of values are measured with uniform bits all the same.

    Attributes:
        n_vars: Variables in a chain.
        n_supervised: The positions in the chain, from the first, that training counts.
        n_letters: Letters that variables are drawn from, each used once at most in a sequence.
        negation: The chance that a clause after the first holds ``not``; the paper's is 0.5.
        tasks: The values of the last supervised variable.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego import Lego
        >>> problem = Lego(n_vars=3, n_supervised=2)
        >>> batch = problem.sample(1, torch.Generator().manual_seed(0))
        >>> problem.spell(batch.xs[0])
        'a is b, b not h, 0 is a; a? b? h?'
        >>> batch.ys.tolist(), batch.labels.tolist(), batch.weights.tolist()
        ([[0, 0, 1]], [0], [[1.0, 1.0, 0.0]])
    """

    n_vars: int = 6
    n_supervised: int = 4
    n_letters: int = 8
    negation: float = 0.5
    tasks: tuple[str, ...] = ("0", "1")

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 5,
            "n_heads": 4,
            "d_model": 48,
            "steps": 4_000,
            "learning_rate": 2e-3,
            "muon_learning_rate": 6e-3,
            "warmup": 100,
            "n_checkpoints": 30,
        }
    )

    def __post_init__(self) -> None:
        if self.n_vars < 2:
            raise ValueError(f"n_vars must be at least 2, got {self.n_vars}")
        if not 2 <= self.n_supervised <= self.n_vars:
            raise ValueError(
                f"n_supervised must be from 2 to n_vars, {self.n_vars}; got {self.n_supervised}"
            )
        if self.n_letters < self.n_vars:
            raise ValueError(
                f"n_letters is {self.n_letters}; {self.n_vars} variables need a letter each"
            )
        if not 0 <= self.negation <= 1:
            raise ValueError(f"negation is a chance, from 0 to 1; got {self.negation}")
        if len(self.tasks) != 2:
            raise ValueError(f"tasks must be two, for the values 0 and 1; got {self.tasks}")

    @property
    def n_points(self) -> int:  # type: ignore[override]
        """One for each position in the chain."""
        return self.n_vars

    @property
    def d_vocab(self) -> int:
        """The values ``0`` and ``1``, ``is``, ``not``, and the letters."""
        return FIRST_LETTER + self.n_letters

    @property
    def n_tokens(self) -> int:
        """Three for each clause, and one for each query."""
        return (CLAUSE + 1) * self.n_vars

    @property
    def late_from(self) -> int:
        """The second half of the supervised positions is late."""
        return self.n_supervised // 2

    @property
    def query_point(self) -> int:
        """The last supervised position."""
        return self.n_supervised - 1

    def query_at(self, point: int) -> int:
        """The place of the query in the prompt of an episode: right after the clauses.

        In a batch queries are in random order, and :func:`query_places` finds them.
        """
        return CLAUSE * self.n_vars

    def inputs_until(self, point: int) -> int:
        """All tokens: which of them the query is, the clauses say."""
        return self.n_tokens

    def tokens(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The token ids; if the last outputs are missing, the clauses and the next point's query.

        That is how an episode's sequence is written: its query is the first that is asked.
        """
        point = batch.ys.shape[1]
        if point == self.n_points:
            return batch.xs
        letters = read_chains(batch.xs, self.n_vars).letters
        return torch.cat([batch.xs[:, : CLAUSE * self.n_vars], letters[:, point : point + 1]], 1)

    def predict(
        self, forward: Callable[..., Any], batch: Batch
    ) -> Float[Tensor, "batch point token"]:
        """A model's logits at the query of every variable, in the order of the chain."""
        logits: Tensor = forward(batch.xs)
        at = repeat(
            query_places(batch.xs, self.n_vars),
            "batch point -> batch point token",
            token=logits.shape[-1],
        )
        return logits.gather(1, at)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        device, last = generator.device, self.query_point
        labels = draw_labels(batch_size, len(self.tasks), generator, labels)
        shape = (batch_size, self.n_vars - 1)
        negated = (torch.rand(shape, generator=generator, device=device) < self.negation).long()
        first = (labels + negated[:, :last].sum(1)) % 2
        clauses, letters = draw_chains(first, negated.bool(), self.n_letters, generator)
        tokens = torch.cat([clauses, shuffled_letters(letters, generator)], 1)
        values = torch.cat([first[:, None], negated], 1).cumsum(1) % 2
        counted = (torch.arange(self.n_vars, device=device) <= last).float()
        weights = repeat(counted, "point -> batch point", batch=batch_size)
        return Batch(tokens, values, labels, weights)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point token"]]:
        """Log-probabilities of three predictors that read the clauses, and of none.

        ``"chain"`` follows the chain to its end, ``"supervised steps"`` as far as training asks and
        knows nothing beyond. ``"counts"`` is the shortcut: it counts the clauses with ``not`` and
        follows none (:func:`even_chance`), so that it knows the last variable of the chain and
        little of the others. ``"chance"`` is a coin.
        """
        chains = read_chains(batch.xs, self.n_vars)
        exact = chains.values.double()
        beyond = torch.arange(self.n_vars, device=exact.device) > self.query_point
        coin = torch.full_like(exact, 0.5)
        n_not = (batch.xs[:, : CLAUSE * self.n_vars] == NOT).sum(1)
        even = even_chance(self.n_vars - 1).to(exact)[:, n_not]
        same = rearrange(even, "position batch -> batch position")
        first = exact[:, :1]
        chances = {
            "chain": exact,
            "supervised steps": torch.where(beyond, coin, exact),
            "counts": first * same + (1 - first) * (1 - same),
            "chance": coin,
        }
        return {name: self._logits(chance) for name, chance in chances.items()}

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """One for the true task: the clauses tell it, and they come before every query."""
        values = read_chains(batch.xs, self.n_vars).values[:, self.query_point]
        certain = F.one_hot(values, len(self.tasks)).float()
        return repeat(certain, "batch task -> batch point task", point=batch.ys.shape[1])

    def finding(self, run: Any) -> Finding:
        """Accuracy by position in the chain, and the layer at which each value is readable.

        See :func:`chain_finding`.

        Args:
            run: A :class:`Run` on this problem.
        """
        return chain_finding(run)

    def spell(self, tokens: Int[Tensor, " token"]) -> str:
        """A row of tokens in words."""
        names = ["0", "1", "is", "not", *(_letter(index) for index in range(self.n_letters))]
        words = [names[token] for token in tokens.tolist()]
        end = CLAUSE * self.n_vars
        clauses = [" ".join(words[at : at + CLAUSE]) for at in range(0, end, CLAUSE)]
        return f"{', '.join(clauses)}; {' '.join(f'{word}?' for word in words[end:])}"

    def _logits(self, ones: Float[Tensor, "batch point"]) -> Float[Tensor, "batch point token"]:
        """Log-probabilities of all tokens, given how likely each value is 1."""
        logits = ones.new_full((*ones.shape, self.d_vocab), -torch.inf)
        logits[..., 0], logits[..., 1] = (1 - ones).log(), ones.log()
        return logits.float()


def _letter(index: int) -> str:
    """``a``, ..., ``z``, ``a1``, ..."""
    return chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")
