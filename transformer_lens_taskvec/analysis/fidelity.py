"""How close answers under interventions are to those after real demonstrations.

The yardstick is the distribution of the first answer token after a few-shot prompt. What an
intervention leaves of the gap to it is the discrepancy of Kwon et al. (2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import Answered
from transformer_lens_taskvec.interventions.packed import answer_logits
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.tokens import encode_answers, encode_prompts
from transformer_lens_taskvec.prompts import AnyEpisode


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
        >>> few_shot = divergence_from(model, episodes)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> xor = [e for e in tv.zero_shot(episodes) if e.task == "XOR"]
        >>> variants = [[], vectors.inject("XOR", layer=1)]
        >>> plain, injected = tv.evaluate_many(model, xor, variants, metrics=[few_shot])
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
                    "an episode asks a query that divergence_from was not given; give it few-shot "
                    "episodes of the same tasks and queries"
                )
            here = logits[:, 0].float().log_softmax(dim=-1)
            there = self.few_shot[query].to(here)
            rows.append((there.exp() * (there - here)).sum(dim=-1))
        return torch.stack(rows)


def divergence_from(
    model: Any, episodes: Sequence[AnyEpisode], *, max_tokens: int | None = None
) -> Divergence:
    """Return the metric that measures the divergence from the answers to few-shot episodes.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        episodes: Few-shot episodes; queries are known again by task, query and answer.
        max_tokens: As for :func:`evaluate`.

    Raises:
        ValueError: If answers are numbers, or as for :func:`evaluate`.
    """
    if not episodes:
        raise ValueError("episodes is empty; give at least one episode")
    if isinstance(episodes[0].prompt, Tensor):
        raise ValueError("these episodes' answers are numbers, which have no distribution")
    prompts, _ = encode_prompts(model, episodes)
    # One answer token is enough to predict it.
    answers = [answer[:1] for answer in encode_answers(model, episodes)]
    found: dict[int, list[Tensor]] = {}
    with inference(model):
        for chunk in answer_logits(model, prompts, answers, [()], max_tokens=max_tokens):
            logp = chunk.logits[:, 0, 0].float().log_softmax(dim=-1).cpu()
            for row, one in zip(chunk.rows, logp, strict=True):
                found.setdefault(episodes[row].query_id, []).append(one)
    means = {
        query: torch.stack(some).logsumexp(dim=0) - torch.tensor(float(len(some))).log()
        for query, some in found.items()
    }
    return Divergence(means)
