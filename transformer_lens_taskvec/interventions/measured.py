"""Metrics of the answers that the engine gives, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import ALWAYS, Answered
from transformer_lens_taskvec.interventions.packed import (
    Chunk,
    NumberChunk,
    answer_logits,
    answer_numbers,
)
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.tokens import encode_answers


def text_parts(
    model: Any,
    episodes: Sequence[Any],
    prompts: Sequence[Any],
    variants: Sequence[Variant],
    measures: Mapping[str, Callable[[Answered], Tensor]],
    stop: str | None,
    **options: Any,
) -> Iterator[tuple[Chunk, dict[str, Tensor]]]:
    """Yield chunks of answers of tokens, and their metrics ``[row, variant]`` by name."""
    answers = encode_answers(model, episodes, stop=stop)
    for chunk in answer_logits(model, prompts, answers, variants, **options):
        chunk = replace(chunk, queries=tuple(episodes[row].query_id for row in chunk.rows))
        yield chunk, {name: measure(chunk) for name, measure in measures.items()}


def number_parts(
    model: Any,
    episodes: Sequence[Any],
    prompts: Sequence[Any],
    variants: Sequence[Variant],
    measures: Mapping[str, Callable[[Answered], Tensor]],
    stop: str | None,
    **options: Any,
) -> Iterator[tuple[NumberChunk, dict[str, Tensor]]]:
    """Yield chunks of answers that are numbers, and whether they are right and their loss.

    Raises:
        ValueError: If there is any other metric.
    """
    other = [name for name in measures if name not in ALWAYS]
    if other:
        raise ValueError(
            f"the metric {other[0]!r} is of answers of tokens, and these answers are numbers; "
            "ask for 'correct' and 'loss', the problem's"
        )
    for chunk in answer_numbers(model, prompts, variants, **options):
        some = [episodes[row] for row in chunk.rows]
        pairs = list(zip(some, chunk.predictions.cpu(), strict=True))
        correct = torch.stack([episode.right(predictions) for episode, predictions in pairs])
        loss = torch.stack([episode.losses(predictions) for episode, predictions in pairs])
        yield chunk, {"correct": correct, "loss": loss}
