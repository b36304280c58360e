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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.errors import reply_to
from transformer_lens_taskvec._utils.metrics import ALWAYS, Metric, measures_of
from transformer_lens_taskvec._utils.scores import (
    LOSS_LABELS,
    Scores,
    intervals_by_task,
    mean_by_task,
    stack,
)
from transformer_lens_taskvec.activations import Activations, Observe, label, labelled
from transformer_lens_taskvec.generation import answers
from transformer_lens_taskvec.interventions.checks import check_variants
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.measured import number_parts, text_parts
from transformer_lens_taskvec.interventions.variants import (
    Variant,
    Variants,
    alike_in_scores,
    at_separators,
    grouped,
)
from transformer_lens_taskvec.models.carried import taking_along
from transformer_lens_taskvec.models.layouts import check_readable
from transformer_lens_taskvec.models.limits import limits
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.tokens import (
    continuing_ids,
    decode,
    encode_answers,
    encode_prompts,
)
from transformer_lens_taskvec.prompts import AnyEpisode, Episode, demo_sets_of

__all__ = [
    "LOSS_LABELS",
    "Scores",
    "Variants",
    "evaluate",
    "evaluate_many",
    "intervals_by_task",
    "mean_by_task",
    "stack",
    "with_texts",
]

_MORE = 4
"""How many tokens a generated answer may have more than the longest right one."""


def evaluate(
    model: Any,
    episodes: Sequence[AnyEpisode],
    interventions: Variant = (),
    *,
    metrics: Iterable[str | Metric] = ALWAYS,
    stop: str | None = None,
    max_tokens: int | None = None,
    keep_text: bool = False,
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
        keep_text: Whether to keep what the model answers, for :meth:`Scores.errors`. Wrong answers
            are generated as by :func:`with_texts`.
        progress: Whether to show a progress bar.

    Returns:
        The scores, one per episode.

    Raises:
        ValueError: If there are no episodes, a prompt or an answer has no tokens, an intervention
            does not fit the model, ``stop`` or a metric is unknown, or answers shall be kept that
            are not texts.

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
        keep_text=keep_text,
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
    keep_text: bool = False,
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
    keep_text: bool = False,
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
    keep_text: bool = False,
    progress: bool = False,
) -> list[Scores] | tuple[Activations, list[Scores]]:
    """Return the scores under many variants, each a list of interventions, in few passes.

    Variants share the pass over the prompt up to the first token that one of them edits. Those that
    edit every token, or tokens counted from the beginning, run one at a time.
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
        keep_text: As for :func:`evaluate`, for every variant.
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
    if keep_text:
        _check_texts(episodes)
    tasks, labels = label(episodes)
    groups = grouped(variants, labels, tasks)
    for _, some in groups:
        check_variants(model, some)
    layers: tuple[int, ...] = ()
    names: list[str] = []
    if observe is not None:
        layers, names = check_readable(model, observe.layers, observe.hook)
    prompts, bos = encode_prompts(model, episodes)
    numbers = isinstance(prompts[0], Tensor)
    parts_of = number_parts if numbers else text_parts
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
            alike = alike_in_scores(rows.tolist(), episodes, prompts, some)
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
    kind = getattr(episodes[0], "loss_kind", "squared_error") if numbers else "nll"
    sets = demo_sets_of(episodes)
    scores = [
        Scores(
            {name: many[index] for name, many in found.items()},
            *(labels, tasks, queries, kind, stop, bos, sets),
        )
        for index in range(n_variants)
    ]
    if keep_text:
        scores = [
            _with_texts(model, episodes, one, [(rows, some[index]) for rows, some in groups])
            for index, one in enumerate(scores)
        ]
    if observe is None or values is None:
        return scores
    return labelled(model, episodes, values, hook=observe.hook, layers=layers, bos=bos), scores


def with_texts(
    model: Any,
    episodes: Sequence[AnyEpisode],
    scores: Scores,
    interventions: Variant | Callable[[str], Variant] = (),
) -> Scores:
    """Return scores with what the model answered, for :meth:`Scores.errors`.

    Where the model is right its answer is known. Where it is wrong a continuation is generated:
    greedily, under the same interventions, up to the separator, and at most four tokens longer than
    the task's longest answer here. Equal prompts are continued once.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes.
        scores: Their scores under the interventions.
        interventions: As for :func:`evaluate`, or a function from a task to them. A function of the
            caller's own gets the prompt and all of the continuation in every pass.

    Raises:
        ValueError: If answers are not texts, or the scores are of other episodes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 2, 4, seed=0)
        >>> scores = with_texts(model, episodes, tv.evaluate(model, episodes))
        >>> scores.texts == tuple(episode.query.y for episode in episodes)
        True
    """
    _check_texts(episodes)
    if scores.queries.tolist() != [episode.query_id for episode in episodes]:
        raise ValueError("scores are of other episodes; give those that they were measured on")
    variants = (lambda task: [interventions(task)]) if callable(interventions) else [interventions]
    groups = grouped(variants, scores.labels, scores.tasks)
    for _, some in groups:
        check_variants(model, some)
    return _with_texts(model, episodes, scores, [(rows, some[0]) for rows, some in groups])


def _check_texts(episodes: Sequence[AnyEpisode]) -> None:
    """Raise ``ValueError`` if the answers of episodes are not texts."""
    for episode in episodes:
        if not isinstance(episode, Episode):
            raise ValueError(
                f"keep_text is for answers that are texts, and a {type(episode).__name__} has none "
                "that can be kept; leave it out"
            )


def _with_texts(
    model: Any,
    episodes: Sequence[Any],
    scores: Scores,
    groups: Sequence[tuple[Tensor, Variant]],
) -> Scores:
    """Return scores with answers, generated under one variant per group of rows."""
    texts = {row: episode.answer for row, episode in enumerate(episodes)}
    prompts, _ = encode_prompts(model, episodes)
    lengths = list(map(len, encode_answers(model, episodes)))
    context = limits(model).context
    longest: dict[str, int] = {}
    for episode, n in zip(episodes, lengths, strict=True):
        longest[episode.task] = max(n, longest.get(episode.task, 0))
    for rows, variant in groups:
        wrong = [row for row in rows.tolist() if not scores.correct[row]]
        alike = alike_in_scores(wrong, episodes, prompts, [variant])
        together: dict[tuple[str, int], list[list[int]]] = {}
        for copies in alike:
            row = copies[0]
            most = _MORE + longest[episodes[row].task]
            if context is not None:
                most = min(most, context + 1 - len(prompts[row]))
            together.setdefault((episodes[row].separator, most), []).append(copies)
        for (separator, most), some in together.items():
            ours = all(isinstance(hook, Intervention) for hook in variant)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what there is to say was said of the scores
                found = answers(
                    model,
                    [episodes[copies[0]] for copies in some],
                    variant,
                    max_new_tokens=most,
                    stop=_visible(model, separator),
                    use_cache=None if ours else False,
                )
            for copies, text in zip(some, found, strict=True):
                texts.update(dict.fromkeys(copies, text))
    replies = (reply_to(episode, texts[row]) for row, episode in enumerate(episodes))
    return replace(scores, replies=tuple(replies))


def _visible(model: Any, separator: str) -> str | None:
    """Return what is left of a separator in a text that is decoded without special tokens."""
    if not separator:
        return None
    (ids,) = continuing_ids(model.tokenizer, [separator])
    text = decode(model, ids)
    return text if text == separator or text.strip(" ") else None
