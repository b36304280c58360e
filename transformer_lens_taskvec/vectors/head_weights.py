"""Task vectors whose weights over attention heads are learned (Saglam et al. 2025).

The vector of layer ``l`` is ``sum_h w_lh o_lh``: what each head of that layer adds to the residual
stream at the last prompt token, in the mean over a task's clean prompts, times a weight. The
vectors of all layers are added together, each after its layer, and the weights, one per layer and
head, are trained against the answers' loss with the model frozen.

This is the paper's formula; the code published with it weighs slices of what all heads add
together, and adds the output projection's bias once per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Source, check_finite, collect, source_of
from transformer_lens_taskvec.interventions.gradients import descend
from transformer_lens_taskvec.interventions.intervention import Intervention, altered, inject
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.tokens import bos_of
from transformer_lens_taskvec.prompts import AnyEpisode, shuffle_labels
from transformer_lens_taskvec.vectors.base import LayerwiseVectors, TaskVectors, warn_of_shared
from transformer_lens_taskvec.vectors.outputs import head_means, what_heads_add


@dataclass(frozen=True, repr=False)
class HeadWeights(Shown):
    """Vectors made of weighted heads, which act at all layers at once.

    Attributes:
        joint: The vectors, ``joint.vectors[task, layer]``.
        weights: ``[task, layer, head]``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
        >>> found = tv.vectors.learn_head_weights(model, episodes, steps=1)
        >>> found.weights.shape
        torch.Size([2, 4, 4])
    """

    joint: LayerwiseVectors
    weights: Float[Tensor, "task layer head"]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.joint.tasks

    @property
    def layers(self) -> tuple[None]:
        """The one choice, all layers: None."""
        return (None,)

    @property
    def source(self) -> Source:
        """Where the vectors come from."""
        return self.joint.source

    def inject(self, task: str, layer: int | None = None, **options: Any) -> list[Intervention]:
        """Return the interventions of all layers; as for :meth:`Injectable.inject`."""
        return self.joint.inject(task, layer, **options)

    def __repr__(self) -> str:
        return f"HeadWeights({self.joint.vectors!r})"


def learn_head_weights(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    on: Sequence[AnyEpisode] | None = None,
    steps: int = 60,
    batch_size: int = 10,
    rate: float = 0.05,
    stop: str | None = None,
    seed: int = 0,
    report: Callable[[str, int, float], None] | None = None,
    progress: bool = False,
) -> HeadWeights:
    """Return each task's vectors of weighted heads, the weights trained with Adam.

    Args:
        model: A model with attention heads and ``blocks[l].attn.W_O``, through which gradients
            flow.
        episodes: Clean few-shot episodes that the heads' mean outputs are taken from.
        on: What to train on; by default the same episodes with shuffled labels, as in the paper's
            language track.
        steps: The number of steps per task.
        batch_size: Episodes per step.
        rate: Adam's; the paper's is 5e-5 for up to 100,000 steps.
        stop: As for :func:`evaluate`.
        seed: Seed of the first weights, drawn from a standard normal distribution divided by the
            number of heads in the model, of the shuffling and of the batches.
        report: Called in every step with the task, the step and the loss before it.
        progress: Whether to show a progress bar.

    Returns:
        The vectors, all of which are added together: ``layer`` is None.

    Raises:
        ValueError: If what attention adds to the residual stream is not the sum of the heads'
            outputs, a task of ``on`` has no clean episodes, or as for :func:`descend`.

    Warns:
        UserWarning: If clean episodes share their demonstrations.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=4, seed=0)
        >>> vectors = tv.vectors.learn_head_weights(model, sets["train"], steps=20)
        >>> vectors.layers, vectors.weights.shape  # [task, layer, head]
        ((None,), torch.Size([2, 4, 4]))
    """
    clean = collect(model, episodes, hook="z", progress=progress)
    check_finite(clean)
    warn_of_shared(clean)
    trained_on = shuffle_labels(episodes, seed) if on is None else on
    missing = {episode.task for episode in trained_on} - set(clean.tasks)
    if missing:
        raise ValueError(f"no clean episodes for {', '.join(sorted(missing))}")
    outputs = what_heads_add(model, episodes, *head_means(model, clean), clean.layers)
    shape = outputs.shape[:3]
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator) / shape[1:].numel()
    places = [inject(outputs[0, place, 0], at, mode="add") for place, at in enumerate(clean.layers)]
    found = []
    with tqdm(total=len(clean.tasks) * steps, disable=not progress, leave=False) as bar:
        for index, task in enumerate(clean.tasks):

            def variants_of(weights: Tensor, own: Tensor = outputs[index]) -> list[Variant]:
                vectors = einsum(weights, own.to(weights), "layer head, layer head d -> layer d")
                return [
                    [
                        altered(place, vector=vector)
                        for place, vector in zip(places, vectors, strict=True)
                    ]
                ]

            def of_step(step: int, losses: Tensor, task: str = task) -> None:
                bar.update()
                if report is not None:
                    report(task, step, float(losses))

            weights = descend(
                model,
                [episode for episode in trained_on if episode.task == task],
                first[index],
                variants_of,
                steps=steps,
                batch_size=batch_size,
                rate=rate,
                stop=stop,
                seed=seed,
                report=of_step,
            )
            found.append(weights)
    weights = torch.stack(found)
    values = einsum(weights, outputs, "task layer head, task layer head d -> task layer d")
    bos = bos_of(model, episodes)
    source = source_of(model, episodes, hook="resid_post", position=-1, bos=bos, mode="add")
    vectors = TaskVectors(values, clean.tasks, clean.layers, source)
    return HeadWeights(LayerwiseVectors(vectors), weights)
