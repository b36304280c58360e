"""State vectors: what attention writes after each demonstration, averaged and carried on.

After every separator of a prompt the model has seen one demonstration more. Li et al. (2024) take
the outputs of attention there for a parameter that each demonstration updates: they average the
last of them, as weight averaging does, and go on in the direction in which they moved, as momentum
does. Both are weighted sums of the outputs, with the weights of :func:`state_weights`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import check_finite, collect, source_of
from transformer_lens_taskvec.prompts import Episode
from transformer_lens_taskvec.vectors.base import LayerwiseVectors, TaskVectors, warn_of_shared
from transformer_lens_taskvec.vectors.separators import up_to_each_separator

MOMENTUM = (1.0, 2.0, 4.0, 8.0, 16.0, 0.0)
"""The paper's weights of the last differences, the oldest first; they are divided by their sum."""


def state_weights(
    n_shots: int,
    *,
    last: int = 7,
    momentum: Sequence[float] | None = MOMENTUM,
    rate: float = 1.0,
) -> Float[Tensor, " separator"]:
    """Return the weights of the states at a prompt's separators in its state vector.

    With the states ``v_0`` to ``v_k``, of which ``v_i`` has seen ``i`` demonstrations, the vector
    is the mean of the last states plus ``rate * sum_i w_i (v_i - v_{i-1})``, over as many of the
    last differences as there are weights ``w``, which are divided by their sum. The state without a
    demonstration has no part in either, so short prompts give fewer states and differences.

    Args:
        n_shots: The number of demonstrations, ``k``.
        last: The most states that are averaged.
        momentum: The weights of the last differences, the oldest first; None for the mean alone.
        rate: The factor of the momentum.

    Returns:
        ``[separator]``, which sums to one.

    Raises:
        ValueError: If ``n_shots`` is negative, or ``last`` less than 1, or a weight of ``momentum``
            is negative.

    Example:
        >>> state_weights(3, momentum=None)
        tensor([0.0000, 0.3333, 0.3333, 0.3333])
        >>> state_weights(3, momentum=(1.0, 1.0))  # plus (v_3 - v_1) / 2
        tensor([ 0.0000, -0.1667,  0.3333,  0.8333])
    """
    if n_shots < 0:
        raise ValueError(f"n_shots is {n_shots}; it must be 0 or more")
    if last < 1:
        raise ValueError(f"last is {last}; it must be 1 or more")
    if any(not weight >= 0 for weight in momentum or ()):
        raise ValueError(f"momentum is {momentum}; its weights must be 0 or more")
    found = torch.zeros(n_shots + 1, dtype=torch.float64)
    earliest = min(1, n_shots)
    start = max(earliest, n_shots + 1 - last)
    found[start:] = 1 / (n_shots + 1 - start)
    steps = list(zip(range(n_shots, earliest, -1), reversed(momentum or ()), strict=False))
    total = sum(weight for _, weight in steps)
    for at, weight in steps if total else ():
        found[at] += rate * weight / total
        found[at - 1] -= rate * weight / total
    return found.float()


def state_vectors(
    model: Any,
    episodes: Sequence[Episode],
    *,
    last: int = 7,
    momentum: Sequence[float] | None = MOMENTUM,
    rate: float = 1.0,
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> LayerwiseVectors:
    """Return state vectors, which replace attention's outputs up to a layer (Li et al. 2024).

    Each prompt's outputs of attention at its separators are weighed by :func:`state_weights`, and
    the vectors of a task's prompts are averaged; the paper has one prompt of ten demonstrations.
    Injecting at a layer replaces the outputs in all layers up to and including it, at the last
    prompt token. The paper's models have no bias in attention's output projection; where there is
    one, it is part of the output here.

    Args:
        model: Any model with TransformerLens' hook API and the hook point ``attn_out``.
        episodes: Few-shot episodes with other queries than those that the vectors will be tested
            on.
        last: As for :func:`state_weights`.
        momentum: As for :func:`state_weights`; None is the paper's inner optimisation alone.
        rate: As for :func:`state_weights`.
        layers: The layers, counted from 0; None for all.
        progress: Whether to show a progress bar.

    Returns:
        The vectors, with mode ``"replace"``.

    Raises:
        ValueError: If an activation is NaN or infinite, or as for :func:`state_weights` and
            :func:`collect`.

    Warns:
        UserWarning: If episodes share their demonstrations.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 5, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=6, seed=0)
        >>> vectors = state_vectors(model, sets["train"])
        >>> [len(vectors.inject("XOR", layer)) for layer in vectors.layers]
        [1, 2, 3, 4]
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors)
        >>> bool((sweep.at(1) > sweep.baseline_accuracy).all())
        True
    """
    weights = {
        n: state_weights(n, last=last, momentum=momentum, rate=rate)
        for n in {episode.n_shots for episode in episodes}
    }
    cut, parts = [], []
    for episode in episodes:
        for one, weight in zip(
            up_to_each_separator([episode]), weights[episode.n_shots].tolist(), strict=True
        ):
            if weight:
                cut.append(one)
                parts.append(weight)
    found = collect(model, cut, hook="attn_out", layers=layers, progress=progress)
    check_finite(found)
    warn_of_shared(episodes)
    counts = Counter(episode.task for episode in episodes)
    shares = torch.zeros(len(found), len(found.tasks), dtype=torch.float64)
    shares[torch.arange(len(found)), found.labels] = torch.tensor(parts, dtype=torch.float64)
    shares /= torch.tensor([counts[task] for task in found.tasks], dtype=torch.float64)
    values = einsum(
        shares, found.values.double(), "example task, example layer d -> task layer d"
    ).float()
    source = source_of(model, episodes, hook="attn_out", position=-1, bos=found.source.bos)
    vectors = TaskVectors(values, found.tasks, found.layers, source)
    return LayerwiseVectors(vectors, layers=found.layers)
