"""Task vectors from all separators of a prompt, and for all separators of a prompt.

A few-shot prompt has a separator before every output, and the model answers after each. The states
there are further samples of the task (:func:`separator_means`), and places for further vectors
(:func:`separator_vectors`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import (
    Source,
    check_finite,
    collect,
    layer_index,
    source_of,
)
from transformer_lens_taskvec.interventions.intervention import Intervention, inject
from transformer_lens_taskvec.interventions.modes import MODES, Mode
from transformer_lens_taskvec.models.tokens import Separator
from transformer_lens_taskvec.prompts import Episode
from transformer_lens_taskvec.vectors.base import (
    OWN,
    Place,
    TaskVectors,
    at_place,
    warn_of_shared,
)
from transformer_lens_taskvec.vectors.means import task_means


def up_to_each_separator(episodes: Sequence[Episode], *, first: int = 0) -> list[Episode]:
    """Return each episode cut after every one of its separators, the shortest first.

    Of an episode with ``k`` demonstrations these are ``k + 1`` episodes with 0 to ``k`` of them:
    each asks what the next demonstration shows, and the last is the episode itself. Their last
    prompt tokens are its separators, unless the tokenizer merges a separator with the output after
    it: in a prompt that ends there it cannot.

    Args:
        episodes: Few-shot episodes.
        first: How many separators of each to leave out, from the first on.

    Returns:
        New episodes, those of one episode in sequence.

    Raises:
        ValueError: If ``first`` is negative, or an episode has no more separators than that.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.find_tasks(["upper_case"]), 1, 2, seed=0)
        >>> for cut in up_to_each_separator(episodes, first=1):
        ...     print(cut.n_shots, cut.query.x, cut.answer)
        1 bean BEAN
        2 floor FLOOR
    """
    for episode in episodes:
        if not 0 <= first <= episode.n_shots:
            raise ValueError(
                f"first is {first}; it must be 0 to {episode.n_shots} for an episode of "
                f"{episode.task!r} with {episode.n_shots} demonstration(s), which has "
                f"{episode.n_shots + 1} separator(s)"
            )
    return [
        episode
        if at == episode.n_shots
        else replace(episode, demos=episode.demos[:at], query=episode.demos[at], demo_set=None)
        for episode in episodes
        for at in range(first, episode.n_shots + 1)
    ]


def separator_means(
    model: Any,
    episodes: Sequence[Episode],
    *,
    first: int = 0,
    hook: str = "resid_pre",
    layers: Sequence[int] | None = None,
    mode: str = "add",
    progress: bool = False,
) -> TaskVectors:
    """Return the mean of each task over all separators of its prompts (Kharlapenko et al. 2025).

    One long prompt gives as many states as it has examples, the early ones of a task that is hardly
    shown yet: ``first=2`` leaves out those after no and one demonstration. The paper reads and adds
    the vectors before a block, whence the defaults.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: Few-shot episodes with other queries than those that the vectors will be tested
            on.
        first: How many separators of each prompt to leave out, from the first on.
        hook: The hook point within a block, as TransformerLens names it.
        layers: The layers, counted from 0; None for all.
        mode: ``"add"``, or another name of a mode, as for :func:`inject`.
        progress: Whether to show a progress bar.

    Returns:
        The vectors.

    Raises:
        ValueError: If ``first`` leaves nothing of an episode, an activation is NaN or infinite, or
            as for :func:`collect`.

    Warns:
        UserWarning: If episodes share their demonstrations.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 5, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=6, seed=0)
        >>> vectors = separator_means(model, sets["train"], first=2)
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors)
        >>> bool(sweep.at(2).mean() > sweep.baseline_accuracy.mean())  # before layer 2
        True
    """
    _check_mode(mode)
    cut = up_to_each_separator(episodes, first=first)
    found = collect(model, cut, hook=hook, layers=layers, progress=progress)
    check_finite(found)
    warn_of_shared(episodes)
    source = source_of(model, episodes, hook=hook, position=-1, bos=found.source.bos, mode=mode)
    return TaskVectors(task_means(found), found.tasks, found.layers, source)


@dataclass(frozen=True, repr=False)
class SeparatorVectors:
    """Several vectors per task and layer, one for each separator of a prompt.

    Injecting at a layer puts them at the last separators of the prompt, in order: the last vector
    at the query's. So a prompt has as many separators or more, that is one more than it has
    demonstrations.

    Attributes:
        values: ``[task, layer, separator, d]``, float32 on the CPU.
        tasks: The tasks' names.
        layers: The layers, counted from 0.
        source: The model, hook point and prompt format they come from.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> vectors = separator_vectors(model, episodes, n_separators=3)
        >>> vectors.values.shape
        torch.Size([2, 4, 3, 64])
        >>> [edit.position for edit in vectors.inject("XOR", 1)]
        [Separator(-3), Separator(-2), Separator(-1)]
    """

    values: Float[Tensor, "task layer separator d"]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    source: Source

    @property
    def n_separators(self) -> int:
        """The number of vectors per task and layer."""
        return self.values.shape[2]

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Mode | None = None,
        scale: float = 1.0,
        relative: bool = False,
        position: Place = OWN,
    ) -> list[Intervention]:
        """Return an intervention per separator; as for :meth:`Injectable.inject`.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer, several vectors are given one position, or as for
                :func:`inject`.
        """
        if task not in self.tasks:
            raise KeyError(f"no vectors for task {task!r}; there are: {', '.join(self.tasks)}")
        own = self.values[self.tasks.index(task), layer_index(self.layers, layer)]
        given = at_place(position)
        if given and self.n_separators > 1:
            raise ValueError(
                f"position is {position!r}, and there are {self.n_separators} vectors, one for "
                f"each separator; leave position at {OWN!r}, or make vectors with n_separators=1"
            )
        assert layer is not None
        mode = self.source.mode if mode is None else mode
        return [
            inject(
                vector,
                layer,
                mode=mode,
                scale=scale,
                relative=relative,
                hook=self.source.hook,
                **{"position": Separator(index - self.n_separators), **given},
            )
            for index, vector in enumerate(own)
        ]

    def __repr__(self) -> str:
        return (
            f"SeparatorVectors({len(self.tasks)} tasks x {len(self.layers)} layers x "
            f"{self.n_separators} separators x {self.values.shape[-1]}, {self.source.hook} of "
            f"{self.source.model}: {', '.join(self.tasks)})"
        )


def separator_vectors(
    model: Any,
    episodes: Sequence[Episode],
    *,
    n_separators: int = 1,
    one_prompt: bool = False,
    hook: str = "resid_post",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SeparatorVectors:
    """Return vectors that replace the states at all separators of a prompt (Dong et al. 2026).

    A task vector stands in for one demonstration; several, each from another prompt, for several.
    Every vector is the state at the last token of one prompt of the task: TaskV-M of the paper,
    and with ``n_separators=1`` its TaskV.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: Few-shot episodes with other queries than those that the vectors will be tested
            on.
        n_separators: How many: one more than the prompts have demonstrations in which the vectors
            will be injected, so 1 for zero-shot prompts.
        one_prompt: Whether to take the states at the last separators of one prompt instead:
            TaskV-MS.
        hook: The hook point within a block, as TransformerLens names it.
        layers: The layers, counted from 0; None for all.
        seed: Seed of the choice of prompts. A task with fewer prompts than separators gives each
            more than once.
        progress: Whether to show a progress bar.

    Returns:
        The vectors, with mode ``"replace"``.

    Raises:
        ValueError: If ``n_separators`` is less than 1, with ``one_prompt`` a chosen prompt has
            fewer separators, an activation is NaN or infinite, or as for :func:`collect`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=1, seed=0)
        >>> vectors = separator_vectors(model, sets["train"], n_separators=2)
        >>> sweep = tv.layer_sweep(model, sets["test"], vectors)
        >>> sweep.accuracy.shape  # [layer, task], in one-shot prompts
        torch.Size([4, 2])
    """
    if n_separators < 1:
        raise ValueError(
            f"n_separators is {n_separators}; it must be 1 or more, one more than a prompt has "
            "demonstrations"
        )
    by_task: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task, []).append(episode)
    chosen: list[Episode] = []
    for task, own in by_task.items():
        order = random.Random(f"{seed}/{task}").sample(own, len(own))
        if one_prompt:
            fewest = n_separators - 1
            if order[0].n_shots < fewest:
                raise ValueError(
                    f"n_separators is {n_separators}, and a prompt of {task!r} has "
                    f"{order[0].n_shots + 1}; give episodes with {fewest} demonstrations or more"
                )
            chosen += up_to_each_separator(order[:1], first=order[0].n_shots - fewest)
        else:
            chosen += [order[index % len(order)] for index in range(n_separators)]
    found = collect(model, chosen, hook=hook, layers=layers, progress=progress)
    check_finite(found)
    values = rearrange(
        found.values,
        "(task separator) layer d -> task layer separator d",
        separator=n_separators,
    )
    source = source_of(model, episodes, hook=hook, position=-1, bos=found.source.bos)
    return SeparatorVectors(values, found.tasks, found.layers, source)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
