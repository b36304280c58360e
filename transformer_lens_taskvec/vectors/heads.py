"""Attention heads: what each of them does for a task, and function vectors made of the best.

A head's mean output over clean few-shot prompts is put in its place in prompts whose labels are
shuffled, at the last prompt token; the change in the answer's probability is its average indirect
effect (AIE). The sum of the top heads' mean outputs, each through its own part of ``W_O``, is the
task's *function vector*, which triggers the task when it is added to the residual stream of a
zero-shot prompt (Todd et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import bootstrap_interval
from transformer_lens_taskvec.activations import collect
from transformer_lens_taskvec.interventions.intervention import ablate, inject
from transformer_lens_taskvec.interventions.packed import Variant
from transformer_lens_taskvec.prompts import AnyEpisode, shuffle_labels
from transformer_lens_taskvec.scoring import Scores, evaluate_by_task


@dataclass(frozen=True, repr=False)
class HeadEffects(Shown):
    """What every head does to the answers.

    Attributes:
        probability_by_task: ``[task, layer, head]``, mean change in the answer's probability.
        log_probability_by_task: ``[task, layer, head]``, mean change in its log-probability,
            in nats.
        baseline: Scores of the prompts that the heads were changed in, unchanged.
        means: ``[task, layer, head, d_head]``, each head's mean output over the clean prompts.
        ablation: None where means were put into shuffled prompts, else ``"zero"`` or ``"mean"``.
        log_probability_interval: ``[task, layer, head, 2]``, the 95 % interval of
            ``log_probability_by_task`` by a bootstrap over episodes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> effects = tv.head_effects(model, episodes)
        >>> effects.probability.shape  # [layer, head], mean over tasks
        torch.Size([4, 4])
        >>> effects.top(1)  # (layer, head)
        ((1, 0),)
        >>> effects.to_frame().columns.tolist()
        ['task', 'layer', 'head', 'probability', 'log_probability', 'low', 'high']
    """

    probability_by_task: Float[Tensor, "task layer head"]
    log_probability_by_task: Float[Tensor, "task layer head"]
    baseline: Scores
    means: Float[Tensor, "task layer head d_head"]
    ablation: str | None
    log_probability_interval: Float[Tensor, "task layer head 2"]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.baseline.tasks

    @property
    def probability(self) -> Float[Tensor, "layer head"]:
        """``[layer, head]``, the mean over tasks of the effect on the probability."""
        return self.probability_by_task.mean(dim=0)

    @property
    def log_probability(self) -> Float[Tensor, "layer head"]:
        """``[layer, head]``, the mean over tasks of the effect on the log-probability, in nats."""
        return self.log_probability_by_task.mean(dim=0)

    def top(self, n: int) -> tuple[tuple[int, int], ...]:
        """The ``n`` heads that matter most to the answer's probability, as (layer, head).

        Those whose means help most; or, of ablated heads, those whose absence does most harm.

        Raises:
            ValueError: If there are not so many heads.
        """
        effects = self.probability if self.ablation is None else -self.probability
        if not 1 <= n <= effects.numel():
            raise ValueError(f"{n} heads are asked for; the model has {effects.numel()}")
        best = effects.flatten().topk(n).indices.tolist()
        return tuple(divmod(index, effects.shape[1]) for index in best)

    def to_frame(self) -> pd.DataFrame:
        """One row a task, layer and head: ``task, layer, head, probability, log_probability``.

        ``low`` and ``high`` are the 95 % interval of ``log_probability``.
        """
        low, high = self.log_probability_interval.unbind(dim=-1)
        return pd.DataFrame(
            [
                {
                    "task": task,
                    "layer": layer,
                    "head": head,
                    "probability": float(self.probability_by_task[index, layer, head]),
                    "log_probability": float(self.log_probability_by_task[index, layer, head]),
                    "low": float(low[index, layer, head]),
                    "high": float(high[index, layer, head]),
                }
                for index, task in enumerate(self.tasks)
                for layer in range(self.means.shape[1])
                for head in range(self.means.shape[2])
            ]
        )

    def __repr__(self) -> str:
        best = ", ".join(
            f"{layer}.{head} {float(self.probability[layer, head]):+.3f}"
            for layer, head in self.top(min(5, self.probability.numel()))
        )
        what = (
            "means into shuffled prompts" if self.ablation is None else f"{self.ablation} ablation"
        )
        return f"HeadEffects({what}, {len(self.tasks)} tasks; largest on P(answer): {best})"


@dataclass(frozen=True, repr=False)
class FunctionVector(Shown):
    """The sum of some heads' mean contributions to the residual stream, for each task.

    Attributes:
        values: ``[task, d_model]``, float32 on the CPU.
        tasks: The tasks' names.
        heads: The heads it is made of, as (layer, head), the most effective first.
        effects: What the heads were chosen by.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vector = tv.function_vector(model, episodes, n_heads=2)
        >>> vector["XOR"].shape, vector.heads[0]
        (torch.Size([64]), (1, 0))
    """

    values: Float[Tensor, "task d_model"]
    tasks: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    effects: HeadEffects

    def __getitem__(self, task: str) -> Float[Tensor, " d_model"]:
        """The vector of one task, to be injected with ``mode="add"``.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.tasks:
            raise KeyError(f"no vector for task {task!r}; there are: {', '.join(self.tasks)}")
        return self.values[self.tasks.index(task)]

    def to_frame(self) -> pd.DataFrame:
        """One row a head it is made of, with its effects: as ``HeadEffects``' without the task."""
        of_heads = tuple(zip(*self.heads, strict=True))
        return pd.DataFrame(
            {
                "layer": of_heads[0],
                "head": of_heads[1],
                "probability": self.effects.probability[of_heads].tolist(),
                "log_probability": self.effects.log_probability[of_heads].tolist(),
            }
        )

    def __repr__(self) -> str:
        heads = ", ".join(f"{layer}.{head}" for layer, head in self.heads)
        return f"FunctionVector({', '.join(self.tasks)}; heads {heads})"


def head_effects(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    on: Sequence[AnyEpisode] | None = None,
    ablation: str | None = None,
    position: int | None = -1,
    seed: int = 0,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
) -> HeadEffects:
    """The effect of every attention head on the answers.

    By default each head's mean output over clean prompts replaces its output in prompts with
    shuffled labels: the average indirect effect (Todd et al. 2023). With ``ablation`` each head
    is pruned instead, in the clean prompts (Han et al. 2025, Figures 17 and 18).

    Args:
        model: A model with attention heads (``attn.hook_z``).
        episodes: Clean few-shot episodes that the means are taken from.
        on: Clean episodes to measure on, of the same tasks; by default the second half of each
            task's ``episodes``, and the means are taken from the first half, so that no answer
            leaks into its own measurement.
        ablation: None, ``"zero"``, or ``"mean"`` (the mean over all tasks).
        position: Where the head is changed: -1, the last prompt token, is by far the fastest;
            None is every token, the whole head. Means are of the last prompt token in any case.
        seed: Seed of the shuffling.
        prepend_bos: Whether to put a beginning-of-sequence token before each prompt.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show progress bars.

    Returns:
        Effects on the answer's probability and log-probability, ``[layer, head]``: the changed
        prompt's less the unchanged one's, so that a head whose ablation harms has a negative one.

    Raises:
        ValueError: If ``ablation`` is unknown, a task has one episode only and there is no ``on``,
            an episode has too few demonstrations to shuffle or a task of ``on`` no clean episodes
            (neither matters to ablation), or as for :func:`collect` and :func:`evaluate`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> tv.head_effects(model, episodes).top(1)  # (layer, head) of the largest effect
        ((1, 0),)
        >>> pruned = tv.head_effects(model, episodes, ablation="zero")
        >>> bool(pruned.log_probability[1, 0] < -1)  # nats: it is needed, too
        True
    """
    if ablation not in (None, "zero", "mean"):
        raise ValueError(f"ablation is {ablation!r}; it must be None, 'zero' or 'mean'")
    clean, measured = (episodes, on) if on is not None else _halves(episodes)
    if ablation is None:
        measured = shuffle_labels(measured, seed)
    found = collect(model, clean, hook="z", prepend_bos=prepend_bos, progress=progress)
    means = torch.stack(
        [found.values[found.labels == index].mean(dim=0) for index in range(len(found.tasks))]
    )
    places = [(layer, head) for layer in found.layers for head in range(means.shape[2])]

    def variants_of(task: str) -> list[Variant]:
        if ablation == "zero":
            edits = [
                ablate(layer, hook="z", head=head, position=position) for layer, head in places
            ]
        else:
            mean = means[found.tasks.index(task)] if ablation is None else means.mean(dim=0)
            edits = [
                inject(mean[layer, head], layer, hook="z", head=head, position=position)
                for layer, head in places
            ]
        return [[], *([edit] for edit in edits)]

    missing = {episode.task for episode in measured} - set(found.tasks)
    if missing:
        raise ValueError(f"no clean episodes for {', '.join(sorted(missing))}")
    baseline, *scores = evaluate_by_task(
        model,
        measured,
        variants_of,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
        progress=progress,
    )
    order = [found.tasks.index(task) for task in baseline.tasks]
    shape = (len(baseline.tasks), len(found.layers), means.shape[2])
    probability = _changes(baseline, scores, lambda nll: (-nll).exp())
    log_probability = _changes(baseline, scores, lambda nll: -nll)
    return HeadEffects(
        torch.stack([own.mean(dim=1) for own in probability]).float().view(shape),
        torch.stack([own.mean(dim=1) for own in log_probability]).float().view(shape),
        baseline,
        means[order],
        ablation,
        torch.stack([bootstrap_interval(own) for own in log_probability]).view(*shape, 2),
    )


def function_vector(
    model: Any,
    episodes: Sequence[AnyEpisode],
    n_heads: int = 10,
    *,
    effects: HeadEffects | None = None,
    seed: int = 0,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
) -> FunctionVector:
    """Each task's function vector: the top heads' mean outputs, through ``W_O``, summed.

    Add it to the residual stream of zero-shot prompts, about a third of the way up:
    ``inject(vector["antonyms"], layer, mode="add")`` (Todd et al. 2023).

    Args:
        model: A model with attention heads and ``blocks[l].attn.W_O``.
        episodes: Clean few-shot episodes, of several tasks for heads that serve tasks in general.
        n_heads: How many heads, by their mean effect over tasks.
        effects: The effects to choose by and the means to sum, when they are known already, from
            :func:`head_effects` without ablation; ``episodes`` are not read then.
        seed: Seed of the shuffling.
        prepend_bos: Whether to put a beginning-of-sequence token before each prompt.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show progress bars.

    Returns:
        The vectors, with the heads they are made of and their effects.

    Raises:
        ValueError: If there are not so many heads, or as for :func:`head_effects`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vector = tv.function_vector(model, sets["train"], n_heads=2)
        >>> edit = tv.inject(vector["XOR"], layer=1, mode="add")
        >>> xor = [e for e in tv.zero_shot(sets["test"]) if e.task == "XOR"]
        >>> plain, added = tv.evaluate_many(model, xor, [[], [edit]])
        >>> added.mean_nll < plain.mean_nll
        True
    """
    if effects is None:
        effects = head_effects(
            model,
            episodes,
            seed=seed,
            prepend_bos=prepend_bos,
            max_tokens=max_tokens,
            progress=progress,
        )
    if effects.ablation is not None:
        raise ValueError(
            f"these are effects of {effects.ablation} ablation; a function vector is made of heads "
            "whose means help in shuffled prompts"
        )
    heads = effects.top(n_heads)
    total = torch.zeros(len(effects.tasks), int(model.cfg.d_model))
    for layer, head in heads:
        weights = model.blocks[layer].attn.W_O.detach()[head].to("cpu", torch.float32)
        total += effects.means[:, layer, head] @ weights
    return FunctionVector(total, effects.tasks, heads, effects)


def _halves(episodes: Sequence[AnyEpisode]) -> tuple[list[AnyEpisode], list[AnyEpisode]]:
    """The first and the second half of each task's episodes."""
    by_task: dict[str, list[AnyEpisode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task, []).append(episode)
    for task, own in by_task.items():
        if len(own) < 2:
            raise ValueError(
                f"task {task!r} has one episode; two or more are needed, for the means and for "
                "the measurement (or give on=...)"
            )
    first = [episode for own in by_task.values() for episode in own[: (len(own) + 1) // 2]]
    second = [episode for own in by_task.values() for episode in own[(len(own) + 1) // 2 :]]
    return first, second


def _changes(
    baseline: Scores, scores: Sequence[Scores], of: Callable[[Tensor], Tensor]
) -> list[Float[Tensor, "variant example"]]:
    """For each task, the change of a function of the answer's NLL of its episodes, by variant."""
    changes = torch.stack([of(score.nll.double()) - of(baseline.nll.double()) for score in scores])
    return [changes[:, baseline.labels == index] for index in range(len(baseline.tasks))]
