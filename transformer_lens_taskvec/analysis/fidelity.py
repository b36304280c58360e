"""How close answers under interventions are to those after real demonstrations.

The yardstick is the distribution of the first answer token after a few-shot prompt. What an
intervention leaves of the gap to it is the discrepancy of Kwon et al. (2026).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import ALWAYS, Answered
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import Scores, evaluate


@dataclass(frozen=True, eq=False)
class Divergence:
    """A metric: the divergence ``KL(few-shot || here)`` at the first answer token, in nats.

    Attributes:
        few_shot: For each query's number, the log-probabilities of the first answer token after
            demonstrations, ``[vocab]``; the mean probability where a query has several episodes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> _, divergence = few_shot_answers(model, episodes)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> xor = [e for e in tv.zero_shot(episodes) if e.task == "XOR"]
        >>> variants = [[], vectors.inject("XOR", layer=1)]
        >>> plain, injected = tv.evaluate_many(model, xor, variants, metrics=[divergence])
        >>> injected.mean("divergence") < plain.mean("divergence") / 10
        True
    """

    few_shot: Mapping[int, Float[Tensor, " vocab"]]
    __name__ = "divergence"

    def of_answered(self, answered: Answered) -> Float[Tensor, "row variant"]:
        """Return the divergence of each answer.

        Raises:
            KeyError: If a query has no few-shot distribution.
        """
        rows = []
        for query, logits in zip(answered.queries, answered.logits, strict=True):
            if query not in self.few_shot:
                raise KeyError(
                    "an episode asks a query that few_shot_answers was not given; give it few-shot "
                    "episodes of the same tasks and queries"
                )
            here = logits[:, 0].float().log_softmax(dim=-1)
            there = self.few_shot[query].to(here).expand_as(here)
            apart = torch.nn.functional.kl_div(here, there, reduction="none", log_target=True)
            rows.append(apart.sum(dim=-1))
        return torch.stack(rows)


def few_shot_answers(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> tuple[Scores, Divergence]:
    """Return the scores of few-shot episodes, and the metric of the divergence from their answers.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        episodes: Few-shot episodes; a query is known by its task, input and answer.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.

    Raises:
        ValueError: If answers are numbers, or as for :func:`evaluate`.
    """
    if episodes and isinstance(episodes[0].prompt, Tensor):
        raise ValueError("these episodes' answers are numbers, which have no distribution")
    kept = _Kept({})
    scores = evaluate(model, episodes, metrics=[kept], stop=stop, max_tokens=max_tokens)
    few_shot = {
        query: torch.stack(some).logsumexp(dim=0) - math.log(len(some))
        for query, some in kept.by_query.items()
    }
    metrics = {name: scores.metrics[name] for name in ALWAYS}
    return replace(scores, metrics=metrics), Divergence(few_shot)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A metric that keeps the distributions it is given: the entropy of the first answer token."""

    by_query: dict[int, list[Tensor]]
    __name__ = "kept"

    def of_answered(self, answered: Answered) -> Float[Tensor, "row variant"]:
        logp = answered.logits[:, :, 0].float().log_softmax(dim=-1)
        for query, rows in zip(answered.queries, logp.cpu(), strict=True):
            self.by_query.setdefault(query, []).extend(rows)
        entropy: Tensor = torch.special.entr(logp.exp()).sum(dim=-1)
        return entropy
