"""The few-shot model and variants of the zero-shot one, fed the same tokens after their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import METRICS
from transformer_lens_taskvec.activations import label
from transformer_lens_taskvec.generation import continue_ids
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.packed import Chunk, answer_logits
from transformer_lens_taskvec.interventions.variants import (
    Variant,
    Variants,
    at_separators,
    grouped,
)
from transformer_lens_taskvec.models.carried import taking_along
from transformer_lens_taskvec.models.decoding import decoding_of
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.tokens import encode_prompts
from transformer_lens_taskvec.prompts import AnyEpisode, Episode, demo_sets_of
from transformer_lens_taskvec.scoring import Scores

DISTANCES = ("kl", "tv", "discrepancy")
"""What is measured at each position of an answer."""

_HELD = 1 << 25
"""The most few-shot log-probabilities that are held at a time."""


def compare_forced(
    model: Any,
    few_shot: Sequence[Episode],
    zero: Sequence[Episode],
    variants_of: Callable[[str], Sequence[Variant]],
    answers: Sequence[Sequence[int]],
    *,
    stop: str | None,
    max_tokens: int | None,
) -> tuple[dict[str, Float[Tensor, "variant example pos"]], list[Scores]]:
    """Return the distances of variants from the few-shot model, and how all fit the tokens fed in.

    The few-shot model's distributions are held for a portion of the episodes at a time.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        few_shot: Few-shot episodes.
        zero: The same episodes without demonstrations.
        variants_of: The variants of each task.
        answers: The token ids that are fed in after each prompt.
        stop: What the scores say of the end of answers.
        max_tokens: The most tokens per pass.

    Returns:
        By name in :data:`DISTANCES`, NaN past the end of an answer; and the scores of the few-shot
        model, then of each variant, as if what is fed in were the right answers.
    """
    n_variants = len(variants_of(few_shot[0].task))
    shape = n_variants, len(few_shot), max(map(len, answers))
    distances = {name: torch.full(shape, torch.nan) for name in DISTANCES}
    measured = {
        "correct": torch.zeros(1 + n_variants, len(few_shot), dtype=torch.bool),
        "loss": torch.zeros(1 + n_variants, len(few_shot)),
    }
    for some in _portions(answers, int(model.cfg.d_vocab)):
        fed = [answers[row] for row in some]
        held: dict[int, Tensor] = {}
        for chunk in _answered(model, [few_shot[row] for row in some], [[]], fed, max_tokens):
            _write(measured, chunk, some, first=0)
            for row, logits in zip(chunk.rows, chunk.logits, strict=True):
                held[row] = logits[0].float().log_softmax(dim=-1)
        for chunk in _answered(model, [zero[row] for row in some], variants_of, fed, max_tokens):
            _write(measured, chunk, some, first=1)
            places = torch.tensor(chunk.variants)
            for at, row in enumerate(chunk.rows):
                for name, values in _distances(chunk, at, held[row]).items():
                    distances[name][places, some[row], : values.shape[-1]] = values.cpu()
    tasks, labels = label(few_shot)
    queries = torch.tensor([episode.query_id for episode in few_shot])
    about = labels, tasks, queries, "nll", stop, encode_prompts(model, few_shot)[1]
    scores = [
        Scores({name: values[index] for name, values in measured.items()}, *about)
        for index in range(1 + n_variants)
    ]
    scores[0] = replace(scores[0], demo_sets=demo_sets_of(few_shot))
    return distances, scores


def said_after(
    model: Any, episodes: Sequence[Episode], n_tokens: int, **options: Any
) -> list[list[int]]:
    """Return the token ids that the model says after each prompt."""
    prompts, _ = encode_prompts(model, episodes)
    found: list[list[int]] = [[] for _ in episodes]
    for stop in dict.fromkeys(episode.separator for episode in episodes):
        rows = [row for row, episode in enumerate(episodes) if episode.separator == stop]
        own = [prompts[row] for row in rows]
        decoding = decoding_of(model, max_new_tokens=n_tokens, stop=stop or None, **options)
        said = continue_ids(model, own, decoding)
        for row, ids in zip(rows, said, strict=True):
            found[row] = ids
    return found


def divergence(
    here: Float[Tensor, "*many vocab"], there: Float[Tensor, "*of vocab"]
) -> Float[Tensor, "*many"]:
    """Return ``KL(there || here)`` of log-probabilities, in nats."""
    there = there.expand_as(here)
    terms = torch.nn.functional.kl_div(here, there, reduction="none", log_target=True)
    summed: Tensor = terms.masked_fill(there.isneginf(), 0.0).sum(dim=-1)
    return summed


def _answered(
    model: Any,
    episodes: Sequence[AnyEpisode],
    variants: Variants,
    answers: Sequence[Sequence[int]],
    max_tokens: int | None,
) -> Iterator[Chunk]:
    """Yield the logits of some token ids after prompts, with the episodes' numbers as rows."""
    tasks, labels = label(episodes)
    prompts, _ = encode_prompts(model, episodes)
    with inference(model), taking_along(model, Intervention) as carried:
        for rows, of_rows in grouped(variants, labels, tasks):
            own = rows.tolist()
            given = [[*carried, *variant] for variant in of_rows]
            edits = at_separators(model, given, [episodes[row] for row in own])
            asked, said = ([of[row] for row in own] for of in (prompts, answers))
            for chunk in answer_logits(model, asked, said, edits, max_tokens=max_tokens):
                yield replace(chunk, rows=tuple(own[row] for row in chunk.rows))


def _distances(
    chunk: Chunk, at: int, few_shot: Float[Tensor, "padded vocab"]
) -> dict[str, Float[Tensor, "variant pos"]]:
    """Return the distances of one row's variants from the few-shot model."""
    n = int(chunk.mask[at].sum())
    here = chunk.logits[at, :, :n].float().log_softmax(dim=-1)
    there = few_shot[:n].to(here)
    q, p = there.exp(), here.exp()
    fed = chunk.answers[at, :n]
    of_fed = (q - p)[:, torch.arange(n, device=fed.device), fed]
    tv = (q - p).abs().sum(dim=-1) / 2
    return {"kl": divergence(here, there), "tv": tv, "discrepancy": of_fed.abs()}


def _write(
    measured: Mapping[str, Shaped[Tensor, "variant example"]],
    chunk: Chunk,
    some: Sequence[int],
    *,
    first: int,
) -> None:
    """Keep whether the chunk's answers are right, and their loss."""
    grid = (
        torch.tensor(chunk.variants)[:, None] + first,
        torch.tensor([some[r] for r in chunk.rows]),
    )
    for name, values in measured.items():
        values[grid] = METRICS[name](chunk).cpu().T.to(values.dtype)


def _portions(answers: Sequence[Sequence[int]], n_vocab: int) -> Iterator[list[int]]:
    """Yield the rows whose few-shot distributions are held at a time."""
    size = max(1, _HELD // (n_vocab * max(map(len, answers))))
    for start in range(0, len(answers), size):
        yield list(range(start, min(start + size, len(answers))))
