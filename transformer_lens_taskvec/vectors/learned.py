"""Learned task vectors: trained by gradient against the answers' loss, with the model frozen.

The vector is a free parameter at one layer, and the loss is that of the answers with the vector
injected (Yang, Cho et al. 2026). It shows how much of a task one vector can carry, and so is a
ceiling for vectors that are extracted. Vectors of all layers are trained at once, as branches of
one packed pass: what stands before the last prompt token runs once, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import reduce, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec.activations import Activations, collect, source_of
from transformer_lens_taskvec.interventions.gradients import descend
from transformer_lens_taskvec.interventions.intervention import altered, inject
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.layouts import check_readable
from transformer_lens_taskvec.models.tokens import bos_of
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.vectors.base import TaskVectors, check_tasks, check_vectors

TRAINABLE = ("replace", "add")
"""The modes in which vectors are trained."""

Report = Callable[[str, int, Float[Tensor, " layer"]], None]
"""Gets the task, the step, and the mean loss of a batch by layer before the step."""


def learn_vectors(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    layers: Sequence[int] | None = None,
    hook: str = "resid_post",
    mode: str = "replace",
    start: TaskVectors | None = None,
    steps: int = 40,
    batch_size: int = 10,
    rate: float = 0.1,
    stop: str | None = None,
    seed: int = 0,
    report: Report | None = None,
    progress: bool = False,
) -> TaskVectors:
    """Return vectors trained to give the episodes' answers, one per task and layer.

    Each is trained by itself with Adam, on the same batches. A step changes each entry by about
    ``rate`` times the root mean square of the residual stream's entries there.

    Args:
        model: Any model with TransformerLens' hook API through which gradients flow; its weights
            are not changed.
        episodes: What to train on, as they are: usually zero-shot episodes, since then nothing but
            the vector tells the task.
        layers: The layers, counted from 0; None for all.
        hook: The hook point within the block that the vector is written to.
        mode: ``"replace"`` or ``"add"``.
        start: Where training begins, such as mean vectors; by default the mean activation over the
            episodes of all tasks where the vector replaces one, and zero where it is added.
        steps: The number of steps per task.
        batch_size: Episodes per step.
        rate: The size of a step.
        stop: As for :func:`evaluate`.
        seed: Seed of the order of the episodes.
        report: Called in every step.
        progress: Whether to show a progress bar.

    Returns:
        The vectors, with the mode they were trained in.

    Raises:
        ValueError: If the mode cannot be trained, a number is out of range, ``start`` lacks a task
            or layer, or as for :func:`evaluate`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=4, seed=0)
        >>> vectors = tv.vectors.learn_vectors(model, tv.zero_shot(sets["train"]), layers=[1])
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors)
        >>> bool((sweep.at(1) > sweep.baseline_accuracy).all())
        True
    """
    if mode not in TRAINABLE:
        raise ValueError(f"mode is {mode!r}; vectors are trained to {' or to '.join(TRAINABLE)}")
    chosen, _ = check_readable(model, layers, hook)
    here = collect(model, episodes, hook=hook, layers=chosen)
    begin = _start(here, start, model, episodes, mode)
    size = reduce(here.values.double().square(), "example layer d -> layer 1", "mean").sqrt()
    places = [inject(begin[0, place], at, mode=mode, hook=hook) for place, at in enumerate(chosen)]
    found = []
    with tqdm(total=len(here.tasks) * steps, disable=not progress, leave=False) as bar:
        for task, first in zip(here.tasks, begin, strict=True):

            def variants_of(change: Tensor, first: Tensor = first) -> list[Variant]:
                vectors = first.to(change) + size.to(change) * change
                return [
                    [altered(place, vector=vector)]
                    for place, vector in zip(places, vectors, strict=True)
                ]

            def of_step(step: int, losses: Tensor, task: str = task) -> None:
                bar.update()
                if report is not None:
                    report(task, step, losses)

            change = descend(
                model,
                [episode for episode in episodes if episode.task == task],
                torch.zeros_like(first),
                variants_of,
                steps=steps,
                batch_size=batch_size,
                rate=rate,
                stop=stop,
                seed=seed,
                report=of_step,
            )
            found.append(first + size.float() * change)
    source = source_of(
        model, episodes, hook=hook, position=-1, bos=bos_of(model, episodes), mode=mode
    )
    return TaskVectors(torch.stack(found), here.tasks, tuple(chosen), source)


def _start(
    here: Activations,
    start: TaskVectors | None,
    model: Any,
    episodes: Sequence[AnyEpisode],
    mode: str,
) -> Float[Tensor, "task layer d"]:
    """Return the vectors that training begins with, float32 on the CPU."""
    if start is None:
        mean = reduce(here.values.double(), "example layer d -> layer d", "mean").float()
        first = mean if mode == "replace" else torch.zeros_like(mean)
        return repeat(first, "layer d -> task layer d", task=len(here.tasks))
    check_tasks(start, episodes)
    check_vectors(start, model, episodes)
    if (start.source.hook, start.source.mode) != (here.hook, mode):
        raise ValueError(
            f"start is of hook {start.source.hook!r} and mode {start.source.mode!r}, and vectors "
            f"of hook {here.hook!r} and mode {mode!r} are to be trained; give both alike"
        )
    return torch.stack(
        [torch.stack([start[task, layer] for layer in here.layers]) for task in here.tasks]
    )
