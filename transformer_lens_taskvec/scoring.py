"""Scores of a model's answers, with and without interventions.

An answer is right if greedy decoding would produce exactly its tokens. That is so if and only if,
with the answer fed in, each of its tokens is the argmax where it is predicted. So one
teacher-forced pass is enough, and gives every other metric of the answer too.

Where answers are numbers (the lab's episodes), the episode decides whether a prediction is right,
and the loss is the squared error: up to a constant, the NLL under a Gaussian of variance 1/2 around
the prediction. Such answers have no probability, and asking for one is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.metrics import ALWAYS, Answered, Metric, measures_of
from transformer_lens_taskvec._utils.scores import (
    LOSS_LABELS,
    Scores,
    intervals_by_task,
    mean_by_task,
    stack,
)
from transformer_lens_taskvec.activations import Activations, Observe, label, labelled
from transformer_lens_taskvec.interventions.checks import check_variants
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.packed import (
    Chunk,
    NumberChunk,
    answer_logits,
    answer_numbers,
)
from transformer_lens_taskvec.interventions.variants import Variant, at_separators
from transformer_lens_taskvec.models.carried import taking_along
from transformer_lens_taskvec.models.layouts import check_readable
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.tokens import encode_answers, encode_prompts
from transformer_lens_taskvec.prompts import AnyEpisode, demo_sets_of

__all__ = [
    "LOSS_LABELS",
    "Scores",
    "Variants",
    "evaluate",
    "evaluate_many",
    "intervals_by_task",
    "mean_by_task",
    "stack",
]

Variants = Sequence[Variant] | Callable[[str], Sequence[Variant]]
"""Variants for all episodes, or a function from a task to its variants, equally many per task."""


def evaluate(
    model: Any,
    episodes: Sequence[AnyEpisode],
    interventions: Variant = (),
    *,
    metrics: Iterable[str | Metric] = ALWAYS,
    stop: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Scores:
    """Return the greedy exact match, the loss and other metrics of every episode's answer.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their order is kept.
        interventions: Applied together, in order: those of :func:`inject` and :func:`ablate`, or
            any pair of a hook name and a hook function, which gets the whole activation, prompt and
            answer.
        metrics: As for :func:`evaluate_many`.
        stop: None, or ``"separator"`` if the template's separator must follow the answer.
        max_tokens: The most tokens per pass; by default from the model and the free memory.
        progress: Whether to show a progress bar.

    Returns:
        The scores, one per episode.

    Raises:
        ValueError: If there are no episodes, a prompt or an answer has no tokens, an intervention
            does not fit the model, or ``stop`` or a metric is unknown.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> intact = tv.evaluate(model, episodes)
        >>> ablated = tv.evaluate(model, episodes, [tv.ablate(2)])
        >>> ablated.accuracy < intact.accuracy
        True
    """
    (found,) = evaluate_many(
        model,
        episodes,
        [interventions],
        metrics=metrics,
        stop=stop,
        max_tokens=max_tokens,
        progress=progress,
    )
    return found


@overload
def evaluate_many(
    model: Any,
    episodes: Sequence[AnyEpisode],
    variants: Variants,
    *,
    observe: None = None,
    metrics: Iterable[str | Metric] = ALWAYS,
    stop: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> list[Scores]: ...


@overload
def evaluate_many(
    model: Any,
    episodes: Sequence[AnyEpisode],
    variants: Variants,
    *,
    observe: Observe,
    metrics: Iterable[str | Metric] = ALWAYS,
    stop: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> tuple[Activations, list[Scores]]: ...


def evaluate_many(
    model: Any,
    episodes: Sequence[AnyEpisode],
    variants: Variants,
    *,
    observe: Observe | None = None,
    metrics: Iterable[str | Metric] = ALWAYS,
    stop: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> list[Scores] | tuple[Activations, list[Scores]]:
    """Return the scores under many variants, each a list of interventions, in few passes.

    Interventions at ``position=-1`` share the pass over the prompt; others run one at a time.
    Prompts that occur several times run once, unless a variant has a function of the caller's own.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their order is kept.
        variants: The interventions of each variant, an empty list for the unedited model; or a
            function from a task's name to its variants, equally many per task.
        observe: What to keep of the unedited pass, at the last prompt token; nothing by default.
        metrics: What to measure besides ``correct`` and ``loss``: names (``rank``, ``probability``,
            ``entropy``, ``margin``), and functions ``(logits [answer_pos, vocab], answer
            [answer_pos]) -> float``, listed under their own names.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
        progress: As for :func:`evaluate`.

    Returns:
        One result per variant; with ``observe``, the pair of activations and results.

    Raises:
        ValueError: As for :func:`evaluate`, or if there are no variants, tasks have different
            numbers of them, or a metric is not defined for answers that are numbers.

    Warns:
        UserWarning: If the model cannot share the pass; results are the same, only slower. If a
            loss is NaN.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> xor = [e for e in tv.zero_shot(sets["test"]) if e.task == "XOR"]
        >>> variants = [[], *(vectors.inject("XOR", layer) for layer in range(4))]
        >>> [scores.accuracy > 0.9 for scores in tv.evaluate_many(model, xor, variants)]
        [False, False, True, False, False]
    """
    if not episodes:
        raise ValueError("episodes is empty; give at least one episode")
    measures = measures_of(metrics)
    tasks, labels = label(episodes)
    groups = _groups(variants, labels, tasks)
    for _, some in groups:
        check_variants(model, some)
    layers: tuple[int, ...] = ()
    names: list[str] = []
    if observe is not None:
        layers, names = check_readable(model, observe.layers, observe.hook)
    prompts, bos = encode_prompts(model, episodes)
    numbers = isinstance(prompts[0], Tensor)
    parts_of = _number_parts if numbers else _text_parts
    options = {"observe": names, "max_tokens": max_tokens}
    found: dict[str, Tensor] = {}
    values: Tensor | None = None
    n_variants = len(groups[0][1])
    total = n_variants * len(episodes)
    with (
        inference(model),
        taking_along(model, Intervention) as carried,
        tqdm(total=total, disable=not progress, leave=False) as bar,
    ):
        for rows, variants_here in groups:
            some = [[*carried, *variant] for variant in variants_here]
            alike = _alike(rows.tolist(), episodes, prompts, some)
            some_episodes = [episodes[copies[0]] for copies in alike]
            some_prompts = [prompts[copies[0]] for copies in alike]
            some = at_separators(model, some, some_episodes)
            for chunk, measured in parts_of(
                model, some_episodes, some_prompts, some, measures, stop, **options
            ):
                at = [copy for row in chunk.rows for copy in alike[row]]
                of = [place for place, row in enumerate(chunk.rows) for _ in alike[row]]
                grid = torch.tensor(chunk.variants, dtype=torch.long)[:, None], torch.tensor(at)
                for name, one in measured.items():
                    if name not in found:
                        found[name] = one.new_zeros(n_variants, len(episodes))
                    found[name][grid] = one[of].T
                if chunk.observed is not None:
                    kept = chunk.observed.to("cpu", torch.float32)
                    if values is None:
                        values = kept.new_empty(len(episodes), *kept.shape[1:])
                    values[at] = kept[of]
                bar.update(len(at) * len(chunk.variants))
        found = {name: many.cpu() for name, many in found.items()}
    unknown = found["loss"].isnan()
    if bool(unknown.any()):
        warnings.warn(
            f"the loss is NaN in {int(unknown.sum())} of {unknown.numel()} answers, so the logits "
            "are, and these answers count as wrong. Check the model's dtype and the scale of the "
            "interventions.",
            stacklevel=2,
        )
    queries = torch.tensor([episode.query_id for episode in episodes])
    kind, sets = "squared_error" if numbers else "nll", demo_sets_of(episodes)
    scores = [
        Scores(
            {name: many[index] for name, many in found.items()},
            *(labels, tasks, queries, kind, stop, bos, sets),
        )
        for index in range(n_variants)
    ]
    if observe is None or values is None:
        return scores
    return labelled(model, episodes, values, hook=observe.hook, layers=layers, bos=bos), scores


def _text_parts(
    model: Any,
    episodes: Sequence[Any],
    prompts: Sequence[Any],
    variants: Sequence[Variant],
    measures: Mapping[str, Callable[[Answered], Tensor]],
    stop: str | None,
    **options: Any,
) -> Iterator[tuple[Chunk, dict[str, Tensor]]]:
    answers = encode_answers(model, episodes, stop=stop)
    for chunk in answer_logits(model, prompts, answers, variants, **options):
        chunk = replace(chunk, queries=tuple(episodes[row].query_id for row in chunk.rows))
        yield chunk, {name: measure(chunk) for name, measure in measures.items()}


def _number_parts(
    model: Any,
    episodes: Sequence[Any],
    prompts: Sequence[Any],
    variants: Sequence[Variant],
    measures: Mapping[str, Callable[[Answered], Tensor]],
    stop: str | None,
    **options: Any,
) -> Iterator[tuple[NumberChunk, dict[str, Tensor]]]:
    other = [name for name in measures if name not in ALWAYS]
    if other:
        raise ValueError(
            f"the metric {other[0]!r} is of answers of tokens, and these answers are numbers; "
            "ask for 'correct' and 'loss', the squared error"
        )
    for chunk in answer_numbers(model, prompts, variants, **options):
        some = [episodes[row] for row in chunk.rows]
        answers = torch.tensor([episode.answer for episode in some])
        correct = [
            [episode.is_right(prediction) for prediction in predictions]
            for episode, predictions in zip(some, chunk.predictions.tolist(), strict=True)
        ]
        loss = (chunk.predictions - rearrange(answers, "row -> row 1")).square()
        yield chunk, {"correct": torch.tensor(correct), "loss": loss}


def _groups(
    variants: Variants, labels: Int[Tensor, " example"], tasks: Sequence[str]
) -> list[tuple[Int[Tensor, " row"], Sequence[Variant]]]:
    """Return the episodes that share variants, and these variants."""
    if callable(variants):
        groups = [
            (torch.where(labels == index)[0], _listed(variants(task)))
            for index, task in enumerate(tasks)
        ]
    else:
        groups = [(torch.arange(len(labels)), _listed(variants))]
    sizes = {len(some) for _, some in groups}
    if len(sizes) > 1:
        raise ValueError(f"variants gives {sorted(sizes)} variants; give each task the same number")
    if 0 in sizes:
        raise ValueError("variants is empty; [[]] is the model without interventions")
    return groups


def _listed(variants: Iterable[Iterable[Any]]) -> Sequence[Variant]:
    """Return variants that can be read more than once, such as those of generators."""
    return [list(variant) for variant in variants]


def _alike(
    rows: Sequence[int],
    episodes: Sequence[AnyEpisode],
    prompts: Sequence[Any],
    variants: Sequence[Variant],
) -> list[list[int]]:
    """Return the rows in lists whose episodes get the same scores, so that one of them will do.

    Every row stands alone if prompts are vectors, or if a function of the caller's may tell them
    apart.
    """
    known = all(
        isinstance(hook, Intervention) and isinstance(hook.mode, str)
        for variant in variants
        for hook in variant
    )
    if not known or isinstance(prompts[0], Tensor):
        return [[row] for row in rows]
    alike: dict[Any, list[int]] = {}
    for row in rows:
        key = (*prompts[row],), episodes[row].answer, episodes[row].template
        alike.setdefault(key, []).append(row)
    return list(alike.values())
