"""Metrics of an answer: numbers from the logits that predict its tokens.

To add a metric, write one function and one entry of :data:`METRICS` here, or give a function to
``evaluate_many(..., metrics=[...])``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Measure(Protocol):
    """A metric that is measured of many answers at once, and may ask for their queries."""

    @property
    def __name__(self) -> str:
        """Its name in ``Scores.metrics``."""
        ...

    def of_answered(self, answered: Answered) -> Float[Tensor, "row variant"]:
        """Return one number per answer and variant."""
        ...


Metric = Callable[[Float[Tensor, "answer_pos vocab"], Int[Tensor, " answer_pos"]], float] | Measure
"""A number per episode, from the logits that predict its answer and the answer's token ids."""

ALWAYS = ("correct", "loss")
"""The metrics that are always measured."""


@dataclass(frozen=True)
class Answered:
    """Answers of some episodes under some variants, and quantities that metrics share.

    Attributes:
        logits: ``[row, variant, answer_pos, vocab]``, at the positions that predict the answers.
        answers: ``[row, answer_pos]`` token ids.
        mask: ``[row, answer_pos]``, False past the end of shorter answers.
        queries: The rows' queries, where a metric may need to know them.
    """

    logits: Float[Tensor, "row variant answer_pos vocab"]
    answers: Int[Tensor, "row answer_pos"]
    mask: Bool[Tensor, "row answer_pos"]
    queries: tuple[int, ...] = field(default=(), kw_only=True)

    @cached_property
    def ids(self) -> Int[Tensor, "row variant answer_pos"]:
        """The answers' token ids, the same for every variant."""
        n_variants = self.logits.shape[1]
        return repeat(self.answers, "row pos -> row variant pos", variant=n_variants)

    @cached_property
    def past(self) -> Bool[Tensor, "row 1 answer_pos"]:
        """True past the end of an answer that is shorter than others."""
        return ~rearrange(self.mask, "row pos -> row 1 pos")

    @cached_property
    def nll(self) -> Float[Tensor, "row variant"]:
        """The negative log-likelihood of the whole answer, in nats."""
        whole: Tensor = self.nll_by_token.sum(dim=-1)
        return whole

    @cached_property
    def nll_by_token(self) -> Float[Tensor, "row variant answer_pos"]:
        """The negative log-likelihood of each token, in nats; 0 past the end of an answer."""
        nll = self.by_row(
            lambda logits, ids: -logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
        )
        return nll.masked_fill(self.past, 0.0)

    @cached_property
    def right_by_token(self) -> Bool[Tensor, "row variant answer_pos"]:
        """Whether each token has the highest logit; True past the end of an answer."""
        greedy = self.logits.argmax(dim=-1) == self.ids
        # Of logits that are NaN the argmax is some token too.
        return (greedy | self.past) & ~self.nll_by_token.isnan()

    def by_row(self, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the stacked values of a function of each row's float32 logits and answers.

        One row at a time fits a CPU's cache; the vocabulary is large.
        """
        pairs = zip(self.logits, self.ids, strict=True)
        return torch.stack([of(logits.float(), ids) for logits, ids in pairs])


def _correct(answered: Answered) -> Bool[Tensor, "row variant"]:
    return answered.right_by_token.all(dim=-1)


def _rank(answered: Answered) -> Float[Tensor, "row variant"]:
    higher = answered.by_row(
        lambda logits, ids: (logits > logits.gather(-1, ids[..., None])).sum(dim=-1)
    )
    highest = higher.masked_fill(answered.past, 0).amax(dim=-1).float()
    return highest.masked_fill(answered.nll.isnan(), torch.nan)


def _entropy(answered: Answered) -> Float[Tensor, "row variant"]:
    def of_row(logits: Tensor, ids: Tensor) -> Tensor:
        entropies: Tensor = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
        return entropies

    entropies = answered.by_row(of_row).masked_fill(answered.past, 0.0)
    return entropies.sum(dim=-1) / (~answered.past).sum(dim=-1)


def _margin(answered: Answered) -> Float[Tensor, "row variant"]:
    def of_row(logits: Tensor, ids: Tensor) -> Tensor:
        own = logits.gather(-1, ids[..., None])
        best_other = logits.scatter(-1, ids[..., None], -torch.inf).amax(dim=-1)
        return own[..., 0] - best_other

    return answered.by_row(of_row).masked_fill(answered.past, torch.inf).amin(dim=-1)


METRICS: Mapping[str, Callable[[Answered], Tensor]] = {
    "correct": _correct,
    "loss": lambda answered: answered.nll,
    "probability": lambda answered: (-answered.nll).exp(),
    "rank": _rank,
    "entropy": _entropy,
    "margin": _margin,
}
"""The named metrics of an answer, ``[row, variant]`` each.

- ``correct``: whether greedy decoding gives exactly the answer; not where the loss is NaN;
- ``loss``: the negative log-likelihood of the whole answer, in nats;
- ``probability``: the probability of the whole answer;
- ``rank``: the highest rank of any of its tokens, 0 if none has a more likely other one;
- ``entropy``: the mean entropy of the distributions that predict its tokens, in nats;
- ``margin``: the smallest lead of any of its tokens over the best other one, in logits; positive if
  the answer is correct, negative if not, and 0 where another token is just as likely.
"""


def measures_of(metrics: Iterable[str | Metric]) -> dict[str, Callable[[Answered], Tensor]]:
    """Return the metrics by name, starting with those that are always measured.

    Args:
        metrics: Names in :data:`METRICS`, functions, and objects that measure a whole chunk with
            ``of_answered``.

    Raises:
        ValueError: If a name is unknown, or a function has no name of its own.
    """
    asked = [metrics] if isinstance(metrics, str) else list(metrics)
    found = {name: METRICS[name] for name in ALWAYS}
    for metric in asked:
        if isinstance(metric, str):
            if metric not in METRICS:
                raise ValueError(f"no metric {metric!r}; there are: {', '.join(METRICS)}")
            found[metric] = METRICS[metric]
            continue
        name = getattr(metric, "__name__", "")
        if not name.isidentifier() or name in METRICS or name in found:
            raise ValueError(
                f"a metric needs a name of its own, and {metric!r} is called {name!r}; define it "
                "with def, under another name"
            )
        measure = getattr(metric, "of_answered", None)
        found[name] = _of_function(metric) if measure is None else measure
    return found


def _of_function(metric: Any) -> Callable[[Answered], Tensor]:
    """Return a function of one episode's logits and answer as one of a whole chunk."""

    def measure(answered: Answered) -> Float[Tensor, "row variant"]:
        lengths = answered.mask.sum(dim=1).tolist()
        rows = zip(answered.logits, answered.answers, lengths, strict=True)
        return torch.tensor(
            [
                [float(metric(logits[:n].float(), answer[:n])) for logits in by_variant]
                for by_variant, answer, n in rows
            ]
        )

    return measure
