"""Task vectors as mean activations (Han et al. 2025, App. C)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import Activations, check_finite
from transformer_lens_taskvec.vectors.base import TaskVectors, warn_of_shared


def task_vectors(activations: Activations) -> TaskVectors:
    """Return the mean activation of each task at each layer, summed in float64.

    Args:
        activations: Activations of other episodes than those the vectors will be tested on.

    Returns:
        The vectors; ``vectors["AND"]`` is ``[layer, d_model]``.

    Raises:
        ValueError: If an activation is NaN or infinite.

    Warns:
        UserWarning: If episodes share their demonstrations, of which the mean is then over few.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> activations = tv.collect(model, episodes)
        >>> vectors = tv.task_vectors(activations)
        >>> mean = activations.values[activations.labels == 0].mean(dim=0)
        >>> bool((vectors["AND"] - mean).abs().max() < 1e-5)
        True
    """
    check_finite(activations)
    warn_of_shared(activations)
    return TaskVectors(
        task_means(activations), activations.tasks, activations.layers, activations.source
    )


def task_means(activations: Activations) -> Float[Tensor, "task layer ..."]:
    """Return the mean activation of each task at each layer, summed in float64.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> task_means(tv.collect(model, episodes)).shape
        torch.Size([6, 4, 64])
    """
    means = [
        activations.values[activations.labels == index].double().mean(dim=0)
        for index in range(len(activations.tasks))
    ]
    return torch.stack(means).float()
