"""Task vectors by contrast: prompts that show the task against those that do not.

- :func:`contrast_vectors`: the mean over few-shot prompts, minus that over the same queries without
  demonstrations.
- :func:`in_context_vectors`: what sets outputs apart from their inputs, both read alone (Liu et al.
  2023).
- :func:`instruction_vectors`: the mean over prompts that name the task and show nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import Activations, check_finite, collect, source_of
from transformer_lens_taskvec.interventions.modes import KeepNorm
from transformer_lens_taskvec.prompts import (
    Episode,
    PromptTemplate,
    with_instructions,
    zero_shot,
)
from transformer_lens_taskvec.tasks.base import Example
from transformer_lens_taskvec.vectors.base import LayerwiseVectors, TaskVectors, warn_of_shared
from transformer_lens_taskvec.vectors.means import task_means


def contrast_vectors(
    model: Any,
    episodes: Sequence[Episode],
    *,
    hook: str = "resid_post",
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> TaskVectors:
    """Return what demonstrations change: few-shot means minus zero-shot means, to be added.

    Both means are over the same queries at the last prompt token, so that what the queries have in
    common cancels. This is the vanilla extracted vector of Yang, Cho et al. (2026).

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: Few-shot episodes with other queries than those that the vectors will be tested
            on. Of zero-shot episodes the vectors are zero.
        hook: The hook point within a block, as TransformerLens names it.
        layers: The layers, counted from 0; None for all.
        progress: Whether to show a progress bar.

    Returns:
        The vectors, with mode ``"add"``.

    Raises:
        ValueError: If an activation is NaN or infinite, or as for :func:`collect`.

    Warns:
        UserWarning: If episodes share their demonstrations.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=4, seed=0)
        >>> vectors = contrast_vectors(model, sets["train"])
        >>> vectors.inject("XOR", 1)
        [Intervention(blocks.1.hook_resid_post, add, |v|=4.62, position=-1)]
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors)
        >>> bool((sweep.at(1) > sweep.baseline_accuracy).all())
        True
    """
    few, zero = few_and_zero(model, episodes, hook=hook, layers=layers, progress=progress)
    warn_of_shared(few)
    source = replace(few.source, mode="add")
    return TaskVectors(task_means(few) - task_means(zero), few.tasks, few.layers, source)


def few_and_zero(
    model: Any,
    episodes: Sequence[Episode],
    *,
    hook: str,
    layers: Sequence[int] | None,
    progress: bool,
) -> tuple[Activations, Activations]:
    """Return activations of episodes with and without their demonstrations, in the same order.

    Raises:
        ValueError: If an activation is NaN or infinite, or as for :func:`collect`.
    """
    both = (
        collect(model, some, hook=hook, layers=layers, progress=progress)
        for some in (episodes, zero_shot(episodes))
    )
    few, zero = both
    check_finite(few)
    check_finite(zero)
    return few, zero


def in_context_vectors(
    model: Any,
    episodes: Sequence[Episode],
    *,
    layers: Sequence[int] | None = None,
    length: float = 0.1,
    progress: bool = False,
) -> LayerwiseVectors:
    """Return in-context vectors, which turn what every MLP writes towards outputs (ICV).

    Each distinct example of a task's episodes is read twice, its input alone and its output alone,
    as plain text. The states at their last tokens, after all layers and concatenated, differ by
    ``h(y) - h(x)``. The vector is the first principal component of these differences, of length
    one, plus their mean; then each layer's part is cut out and given one length (Liu et al. 2023).
    A component has no sign of its own: here it is such that it does not point against the mean.

    The vectors of all layers act together on the MLPs' outputs, at every token, in the mode
    :class:`~transformer_lens_taskvec.interventions.modes.KeepNorm`.

    This follows the authors' code. The paper's text has the principal component alone, and adds the
    vectors to the states after the layers. Their code further takes the sign that makes the largest
    of the examples' coordinates positive, and has the embeddings in the concatenation.

    Args:
        model: Any model with TransformerLens' hook API and the hook point ``mlp_out``.
        episodes: Episodes whose demonstrations and queries are the examples, at least two different
            ones per task.
        layers: The layers, counted from 0; None for all.
        length: The length of each layer's vector, next to activations taken to have length one: the
            paper's lambda, about 0.1.
        progress: Whether to show a progress bar.

    Returns:
        The vectors; their only choice of layer is None, for all of them together.

    Raises:
        ValueError: If ``length`` is not a finite number above 0, a task has one example only, an
            activation is NaN or infinite, or as for :func:`collect`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> found = in_context_vectors(model, episodes)
        >>> found.layers, len(found.inject("XOR", None))
        ((None,), 4)
        >>> found.inject("XOR", None)[0].position is None  # at every token
        True
    """
    if not (isfinite(length) and length > 0):
        raise ValueError(f"length is {length}; it must be a finite number above 0, such as 0.1")
    examples: dict[str, dict[Example, PromptTemplate]] = {}
    for episode in episodes:
        own = examples.setdefault(episode.task, {})
        own.update(dict.fromkeys((*episode.demos, episode.query), episode.template))
    for task, own in examples.items():
        if len(own) < 2:
            raise ValueError(
                f"the episodes of {task!r} have {len(own)} distinct example; a principal component "
                "needs two or more. Give more episodes or shots"
            )
    pairs = [(task, *pair) for task, own in examples.items() for pair in own.items()]
    read, written = (
        collect(
            model,
            [
                _plain(task, *((one.x, one.y) if inputs else (one.y, one.x)), template)
                for task, one, template in pairs
            ],
            layers=layers,
            progress=progress,
        )
        for inputs in (True, False)
    )
    check_finite(read)
    check_finite(written)
    differences = written.values.double() - read.values.double()
    values = torch.stack(
        [_direction(differences[read.labels == index]) for index in range(len(read.tasks))]
    )
    values = length * torch.nn.functional.normalize(values, dim=-1)
    source = source_of(
        model, episodes, hook="mlp_out", position=-1, bos=read.source.bos, mode="add"
    )
    vectors = TaskVectors(values.float(), read.tasks, read.layers, source)
    return LayerwiseVectors(vectors, position=None, mode=KeepNorm())


def _plain(task: str, text: str, rest: str, template: PromptTemplate) -> Episode:
    """Return an episode whose prompt is the text alone."""
    return Episode(task, (), Example(text, rest), PromptTemplate("{x} {y}", bos=template.bos))


def _direction(differences: Float[Tensor, "example layer d"]) -> Float[Tensor, "layer d"]:
    """Return the first principal component of the differences, plus their mean."""
    flat = rearrange(differences, "example layer d -> example (layer d)")
    mean = flat.mean(dim=0)
    _, _, components = torch.linalg.svd(flat - mean, full_matrices=False)
    component = components[0] if components[0] @ mean >= 0 else -components[0]
    layer = differences.shape[1]
    return torch.as_tensor(rearrange(component + mean, "(layer d) -> layer d", layer=layer))


def instruction_vectors(
    model: Any,
    episodes: Sequence[Episode],
    *,
    instructions: Mapping[str, str] | Sequence[str] | None = None,
    hook: str = "resid_post",
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> TaskVectors:
    """Return the mean of each task over prompts that name it and show no demonstration.

    Next to vectors of few-shot prompts they ask whether a task told and a task shown are one
    direction (Luo et al. 2024).

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: Episodes whose queries the prompts ask; their demonstrations are left out.
        instructions: As for :func:`with_instructions`; by default each task's name, with spaces for
            underscores.
        hook: The hook point within a block, as TransformerLens names it.
        layers: The layers, counted from 0; None for all.
        progress: Whether to show a progress bar.

    Returns:
        The vectors.

    Raises:
        KeyError: If a task has no instruction.
        ValueError: If an instruction is empty, a list does not have one text per episode, an
            activation is NaN or infinite, or as for :func:`collect`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> told = {"XOR": "one of two", "OR": "any of two"}
        >>> instruction_vectors(model, episodes, instructions=told)
        TaskVectors(2 tasks x 4 layers x 64, resid_post of toy@1500: XOR, OR)
    """
    if instructions is None:
        instructions = {episode.task: episode.task.replace("_", " ") for episode in episodes}
    told = with_instructions(zero_shot(episodes), instructions)
    for episode in told:
        if not (episode.template.instruction or "").strip():
            raise ValueError(
                f"the instruction for {episode.task!r} is empty; name the task, or leave "
                "instructions out to give its name"
            )
    found = collect(model, told, hook=hook, layers=layers, progress=progress)
    check_finite(found)
    return TaskVectors(task_means(found), found.tasks, found.layers, found.source)
