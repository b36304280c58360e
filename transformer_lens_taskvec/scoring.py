"""Does the model answer right, as it is and under interventions?

An answer counts as right if greedy decoding would produce exactly its tokens. Greedy decoding does
so if and only if, with the answer's tokens fed in one after the other, each is the argmax where it
is predicted; so one teacher-forced pass tells it, and the negative log-likelihood (NLL) of the
answer as well.

Where the answer is a number (the lab's episodes) it counts as right within the episode's tolerance,
and the place of the NLL is taken by the squared error: the NLL under a Gaussian of variance 1/2
about the prediction, less a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import wilson_interval
from transformer_lens_taskvec.activations import Activations, Source, label
from transformer_lens_taskvec.interventions.intervention import inject
from transformer_lens_taskvec.interventions.packed import (
    Chunk,
    Variant,
    answer_logits,
    answer_numbers,
    check_variants,
)
from transformer_lens_taskvec.models.protocol import check_layers, inference, model_name
from transformer_lens_taskvec.models.tokens import encode, encode_answers
from transformer_lens_taskvec.prompts import AnyEpisode


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """How each episode was answered.

    Attributes:
        correct: ``[example]``, whether greedy decoding gives exactly the answer.
        nll: ``[example]``, negative log-likelihood of the whole answer, in nats; the squared error
            where answers are numbers.
        labels: ``[example]``, each an index into ``tasks``.
        tasks: The tasks' names, in order of first appearance.
        stop: None, or ``"separator"`` where the separator had to follow the answer.
        prepend_bos: Whether a beginning-of-sequence token stood before the prompts.
        loss: What ``nll`` is, for the labels of figures.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> scores = tv.evaluate(model, episodes)
        >>> round(scores.accuracy, 1), len(scores), scores.mean_nll < 0.1  # NLL in nats
        (1.0, 60, True)
        >>> round(scores.by_task()["XOR"], 1), len(scores.of("XOR"))
        (1.0, 10)
        >>> low, high = scores.interval()
        >>> 0.8 < low < high <= 1
        True
    """

    correct: Bool[Tensor, " example"]
    nll: Float[Tensor, " example"]
    labels: Int[Tensor, " example"]
    tasks: tuple[str, ...]
    stop: str | None
    prepend_bos: bool
    loss: str = "NLL (nats)"

    @property
    def accuracy(self) -> float:
        """The share of episodes answered right."""
        return float(self.correct.double().mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy.

        Args:
            confidence: Its coverage, between 0 and 1.

        Returns:
            The lower and the upper end.
        """
        share = self.correct.double().mean()
        low, high = wilson_interval(share, len(self), confidence)
        return float(low), float(high)

    @property
    def mean_nll(self) -> float:
        """The mean of ``nll``: in nats, or squared error where answers are numbers."""
        return float(self.nll.double().mean())

    def of(self, task: str) -> Scores:
        """The scores of one task's episodes.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.tasks:
            raise KeyError(f"no scores for task {task!r}; there are: {', '.join(self.tasks)}")
        chosen = self.labels == self.tasks.index(task)
        return replace(
            self,
            correct=self.correct[chosen],
            nll=self.nll[chosen],
            labels=torch.zeros(int(chosen.sum()), dtype=torch.long),
            tasks=(task,),
        )

    def by_task(self) -> dict[str, float]:
        """The accuracy of each task."""
        return {task: self.of(task).accuracy for task in self.tasks}

    def to_frame(self) -> pd.DataFrame:
        """One row an episode: ``task, correct, nll``."""
        return pd.DataFrame(
            {
                "task": [self.tasks[index] for index in self.labels.tolist()],
                "correct": self.correct.tolist(),
                "nll": self.nll.tolist(),
            }
        )

    def __len__(self) -> int:
        return len(self.correct)

    def __repr__(self) -> str:
        per_task = ", ".join(f"{task} {share:.2f}" for task, share in self.by_task().items())
        return (
            f"Scores(accuracy {self.accuracy:.3f}, {self.loss} {self.mean_nll:.3f}, "
            f"{len(self)} episodes; {per_task})"
        )


def evaluate(
    model: Any,
    episodes: Sequence[AnyEpisode],
    interventions: Variant = (),
    *,
    stop: str | None = None,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Scores:
    """Greedy exact match and NLL of the whole answer of every episode.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their order is kept.
        interventions: Done together, in order. Besides those of :func:`inject` and
            :func:`ablate`, any pair of a hook name and a hook function; such a function gets the
            whole activation, prompt and answer.
        stop: None, or ``"separator"`` to ask for the template's separator after the answer too.
        prepend_bos: Whether to put a beginning-of-sequence token before each prompt.
        max_tokens: The most tokens in one pass; by default from the model and the free memory.
        progress: Whether to show a progress bar.

    Returns:
        The scores, one an episode.

    Raises:
        ValueError: If there are no episodes, a prompt or an answer has no tokens, the model has no
            place for an intervention, or ``stop`` is unknown.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> xor = [e for e in tv.zero_shot(sets["test"]) if e.task == "XOR"]
        >>> plain = tv.evaluate(model, xor)
        >>> injected = tv.evaluate(model, xor, [tv.inject(vectors.at("XOR", 1), layer=1)])
        >>> plain.accuracy < injected.accuracy, round(injected.accuracy, 1)
        (True, 1.0)
    """
    return evaluate_many(
        model,
        episodes,
        [interventions],
        stop=stop,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
        progress=progress,
    )[0]


def evaluate_many(
    model: Any,
    episodes: Sequence[AnyEpisode],
    variants: Sequence[Variant],
    *,
    stop: str | None = None,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
) -> list[Scores]:
    """Scores under many variants, each a list of interventions, in as few passes as possible.

    Interventions at ``position=-1`` share the pass over the prompt; others run one at a time.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their order is kept.
        variants: For each variant its interventions; the empty list is the model as it is.
        stop: As for :func:`evaluate`.
        prepend_bos: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
        progress: As for :func:`evaluate`.

    Returns:
        The scores, one a variant.

    Raises:
        ValueError: As for :func:`evaluate`, or if there are no variants.

    Warns:
        UserWarning: If the model cannot share the pass; results are the same, only slower.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> xor = [e for e in tv.zero_shot(sets["test"]) if e.task == "XOR"]
        >>> variants = [[], *([tv.inject(vectors.at("XOR", layer), layer)] for layer in range(4))]
        >>> [scores.accuracy > 0.9 for scores in tv.evaluate_many(model, xor, variants)]
        [False, False, True, False, False]
    """
    if not episodes:
        raise ValueError("episodes is empty; give at least one episode")
    if not variants:
        raise ValueError("variants is empty; [[]] is the model without interventions")
    check_variants(model, variants)
    tasks, labels = label(episodes)
    prompts = encode(model, [episode.prompt for episode in episodes], prepend_bos=prepend_bos)
    if isinstance(prompts[0], Tensor):
        with inference(model):
            numbers = answer_numbers(model, prompts, variants, max_tokens=max_tokens)
        return [_number_scores(row, episodes, labels, tasks) for row in numbers]
    answers = encode_answers(model, episodes, stop=stop)
    found = [_unscored(labels, tasks, stop, prepend_bos) for _ in variants]
    total = len(variants) * len(episodes)
    with inference(model), tqdm(total=total, disable=not progress, leave=False) as bar:
        for chunk in answer_logits(model, prompts, answers, variants, max_tokens=max_tokens):
            _fill(found, chunk, torch.tensor(chunk.rows))
            bar.update(len(chunk.rows) * len(chunk.variants))
    return found


def _number_scores(
    predicted: Float[Tensor, " example"],
    episodes: Sequence[Any],
    labels: Int[Tensor, " example"],
    tasks: tuple[str, ...],
) -> Scores:
    """Scores where answers are numbers."""
    off = predicted - torch.tensor([episode.answer for episode in episodes])
    pairs = zip(episodes, predicted.tolist(), strict=True)
    right = torch.tensor([episode.is_right(value) for episode, value in pairs])
    return Scores(right, off.square(), labels, tasks, None, False, "squared error")


def collect_and_evaluate(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    variants_of: Callable[[str], Sequence[Variant]] | None = None,
    layers: Sequence[int] | None = None,
    hook: str = "resid_post",
    stop: str | None = None,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
) -> tuple[Activations, list[Scores]]:
    """Activations at the last prompt token and scores of the answers, in one pass.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their order is kept.
        variants_of: Gives variants of each task to score beside the model as it is, as many for
            each task; by default none.
        layers: As for :func:`collect`.
        hook: As for :func:`collect`.
        stop: As for :func:`evaluate`.
        prepend_bos: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        What ``collect`` returns, and the scores: of the model as it is, then of each variant.

    Raises:
        ValueError: As for both.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> activations, [scores] = tv.collect_and_evaluate(model, episodes)
        >>> activations.values.shape, len(scores)
        (torch.Size([60, 4, 64]), 60)
    """
    if not episodes:
        raise ValueError("episodes is empty; give at least one episode")
    chosen = check_layers(model, layers, hook)
    reader = _Reader(chosen, hook, int(model.cfg.d_model))
    tasks, labels = label(episodes)
    groups = [(task, torch.where(labels == index)[0]) for index, task in enumerate(tasks)]
    if variants_of is None:  # nothing depends on the task, and like lengths go together
        groups = [("", torch.arange(len(labels)))]
    scores: list[Scores] = []
    values: Tensor | None = None
    with inference(model), tqdm(total=len(episodes), disable=not progress, leave=False) as bar:
        for task, own in groups:
            some = [episodes[row] for row in own.tolist()]
            variants: list[Variant] = [[], *(variants_of(task) if variants_of else ())]
            check_variants(model, variants)
            if not scores:
                scores = [_unscored(labels, tasks, stop, prepend_bos) for _ in variants]
            prompts = encode(model, [e.prompt for e in some], prepend_bos=prepend_bos)
            answers = encode_answers(model, some, stop=stop)
            for chunk in answer_logits(
                model, prompts, answers, variants, watch=reader.variant, max_tokens=max_tokens
            ):
                rows = own[list(chunk.rows)]
                _fill(scores, chunk, rows)
                if 0 in chunk.variants:
                    read = reader.take()
                    if values is None:
                        values = read.new_empty(len(episodes), *read.shape[1:])
                    values[rows] = read
                    bar.update(len(rows))
    assert values is not None
    templates = sorted({episode.template.example for episode in episodes})
    source = Source(model_name(model), hook, -1, " | ".join(templates), prepend_bos)
    return Activations(values, labels, tasks, chosen, source), scores


class _Reader:
    """A variant that changes nothing and keeps what it sees, float32 on the CPU."""

    def __init__(self, layers: Sequence[int], hook: str, width: int) -> None:
        self._kept: list[list[Tensor]] = [[] for _ in layers]
        self.variant: Variant = [
            inject(torch.zeros(width), layer, mode=self._keeping(place), hook=hook)
            for place, layer in enumerate(layers)
        ]

    def _keeping(self, place: int) -> Callable[[Tensor, Tensor], Tensor]:
        def keep(rows: Tensor, _: Tensor) -> Tensor:
            self._kept[place].append(rows.detach().to("cpu", torch.float32))
            return rows

        return keep

    def take(self) -> Float[Tensor, "row layer *rest"]:
        """What was seen since the last time."""
        read = torch.stack([torch.cat(parts) for parts in self._kept], dim=1)
        for parts in self._kept:
            parts.clear()
        return read


def _unscored(
    labels: Int[Tensor, " example"], tasks: tuple[str, ...], stop: str | None, prepend_bos: bool
) -> Scores:
    """Scores to be filled in."""
    n = len(labels)
    correct, nll = torch.zeros(n, dtype=torch.bool), torch.zeros(n)
    return Scores(correct, nll, labels, tasks, stop, prepend_bos)


def _fill(scores: Sequence[Scores], chunk: Chunk, rows: Int[Tensor, " row"]) -> None:
    """Score a chunk's rows into those of the episodes."""
    right, loss = score(chunk)
    for column, variant in enumerate(chunk.variants):
        scores[variant].correct[rows] = right[:, column].cpu()
        scores[variant].nll[rows] = loss[:, column].float().cpu()


def evaluate_by_task(
    model: Any,
    episodes: Sequence[AnyEpisode],
    variants_of: Callable[[str], Sequence[Variant]],
    *,
    stop: str | None = None,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
) -> list[Scores]:
    """As ``evaluate_many``, with variants that depend on the episode's task.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their order is kept.
        variants_of: Gives the variants of a task, as many for each task.
        stop: As for :func:`evaluate`.
        prepend_bos: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        The scores, one a variant, of all the episodes.
    """
    if not episodes:
        raise ValueError("episodes is empty; give at least one episode")
    tasks, labels = label(episodes)
    parts = []
    for task in tqdm(tasks, disable=not progress, leave=False, desc="tasks"):
        own = [episode for episode in episodes if episode.task == task]
        parts.append(
            evaluate_many(
                model,
                own,
                variants_of(task),
                stop=stop,
                prepend_bos=prepend_bos,
                max_tokens=max_tokens,
            )
        )
    back = torch.cat([torch.where(labels == index)[0] for index in range(len(tasks))]).argsort()
    return [
        replace(
            scores[0],
            correct=torch.cat([score.correct for score in scores])[back],
            nll=torch.cat([score.nll for score in scores])[back],
            labels=labels,
            tasks=tasks,
        )
        for scores in zip(*parts, strict=True)
    ]


def score(chunk: Chunk) -> tuple[Bool[Tensor, "row variant"], Float[Tensor, "row variant"]]:
    """Whether each answer is the greedy one, and its NLL in nats."""
    answers = chunk.answers[:, None].expand(chunk.logits.shape[:3])
    behind = ~chunk.mask[:, None]
    right = ((chunk.logits.argmax(dim=-1) == answers) | behind).all(dim=-1)
    # A row at a time, which fits a CPU's cache: the vocabulary is most of a small model's numbers.
    picked = [
        logits.float().log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
        for logits, ids in zip(chunk.logits, answers, strict=True)
    ]
    return right, -torch.stack(picked).masked_fill(behind, 0.0).sum(dim=-1)
