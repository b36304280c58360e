"""How much of the answer a single vector carries, by the layer at which it is taken and put in.

The prompt without demonstrations is a blank token and the query's ``x``; after a block the blank
token's residual stream is replaced by the one that the few-shot prompt has at its last ``y``. A
model trained with a :class:`VectorLoss` was asked for this at one layer; any other was not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.scores import LOSS_LABELS
from transformer_lens_taskvec._utils.statistics import mean_interval
from transformer_lens_taskvec.lab.problems.base import balanced_labels
from transformer_lens_taskvec.lab.training.on_problem import Run
from transformer_lens_taskvec.lab.training.vector_loss import answers_from_vectors
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import COLOURS, legend_beside, new_axes, whole_numbers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_SEED = 31


@dataclass(frozen=True, repr=False)
class VectorErrors(Shown):
    """The loss of the answers from the vector alone, beside those with and without demonstrations.

    All are means over the problem's late points.

    Attributes:
        step: The checkpoint.
        own: With the sequence's own vector, by the layer after which it is put in, ``[layer]``.
            After the last layer nothing can read it, and the loss is that without demonstrations.
        intervals: The 95 % interval of ``own`` over sequences, ``[layer, 2]``.
        same_task: With the vector of another sequence of the same task, ``[layer]``.
        other_task: With the vector of a sequence of another task, ``[layer]``.
        few_shot: With the demonstrations.
        without: Without demonstrations and vector: a blank token and the query.
        n_sequences: The number of sequences.
        loss_kind: What the losses are, as ``Scores.loss_kind``.
        trained_layer: The layer of the run's :class:`VectorLoss`; None if it had none.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.vector_errors import vector_error_by_layer
        >>> found = vector_error_by_layer(lab.shipped_run(), n=20)
        >>> found.to_frame()["layer"].tolist()
        [0, 1, 2, 3, 4]
    """

    step: int
    own: Float[Tensor, " layer"]
    intervals: Float[Tensor, "layer 2"]
    same_task: Float[Tensor, " layer"]
    other_task: Float[Tensor, " layer"]
    few_shot: float
    without: float
    n_sequences: int
    loss_kind: str
    trained_layer: int | None

    @property
    def best_layer(self) -> int:
        """The layer at which the sequence's own vector gives the lowest loss."""
        return int(self.own.argmin())

    @property
    def recovered(self) -> Float[Tensor, " layer"]:
        """The share of what demonstrations gain that the own vector gains, ``[layer]``.

        One where the vector is as good as the demonstrations, zero where it brings nothing, and
        negative where it harms.
        """
        return (self.without - self.own) / (self.without - self.few_shot)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer.

        Columns ``layer, own, low, high, same_task, other_task, few_shot, without, recovered``.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": range(len(self.own)),
                "own": self.own.tolist(),
                "low": self.intervals[:, 0].tolist(),
                "high": self.intervals[:, 1].tolist(),
                "same_task": self.same_task.tolist(),
                "other_task": self.other_task.tolist(),
                "few_shot": self.few_shot,
                "without": self.without,
                "recovered": self.recovered.tolist(),
            }
        )

    def __repr__(self) -> str:
        best = self.best_layer
        trained = "" if self.trained_layer is None else f", trained at layer {self.trained_layer}"
        return (
            f"VectorErrors(step {self.step}: {LOSS_LABELS[self.loss_kind]} "
            f"{self.few_shot:.4f} with demonstrations, {self.without:.4f} without, "
            f"{self.own[best]:.4f} from the vector of layer {best}{trained}; "
            f"n = {self.n_sequences} sequences)"
        )


def vector_error_by_layer(
    run: Run, step: int | None = None, *, n: int = 500, seed: int = 0
) -> VectorErrors:
    """Return the loss of the answers from the vector alone, by the layer of the injection.

    Two controls are measured as well: the vector of another sequence of the same task, which tells
    whether the vector carries more than the task, and the vector of another task.

    Args:
        run: A run on a problem, trained with a :class:`VectorLoss` or not.
        step: The checkpoint; by default the last.
        n: Sequences per task, at least 2.
        seed: Their seed.

    Raises:
        ValueError: If the problem's prompt without demonstrations is not defined, ``n`` is below 2,
            or there is no such checkpoint.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.vector_errors import vector_error_by_layer
        >>> found = vector_error_by_layer(lab.shipped_run(), n=50)
        >>> bool(found.few_shot < found.own.min())  # it was never asked for this
        True
    """
    if n < 2:
        raise ValueError(f"n is {n}; ask for 2 sequences per task or more")
    problem, step = run.config.problem, run.checkpoint(step)
    model = run.model(step)
    labels = balanced_labels(len(problem.tasks), n)
    generator = torch.Generator().manual_seed(1_000 * seed + _SEED)
    batch = problem.sample(len(labels), generator, labels=labels)
    points = list(range(max(1, problem.late_from), problem.n_points))
    weights = torch.ones(batch.ys.shape[:2]) if batch.weights is None else batch.weights
    counted = weights[:, points]
    rows = rearrange(labels, "batch -> batch 1")

    def by_sequence(predictions: Tensor) -> Float[Tensor, " batch"]:
        losses = problem.losses(predictions, batch.ys[:, points], rows) * counted
        return reduce(losses, "batch point -> batch", "sum") / counted.sum(1)

    def injected(
        layer: int | None, donors: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch"]:
        given = model, problem, batch, layer
        return by_sequence(answers_from_vectors(*given, points=points, donors=donors))

    place = torch.arange(len(labels))
    same = labels * n + (place + 1) % n
    other = (place + n) % len(labels)
    layers = range(model.cfg.n_layers)
    with torch.no_grad():
        without = injected(None)
        few_shot = by_sequence(problem.predict(model, batch)[:, points])
        own = torch.stack([injected(layer) for layer in layers])
        mean = torch.stack([injected(layer, same).nanmean() for layer in layers])
        others = torch.stack([injected(layer, other).nanmean() for layer in layers])
    asked = run.config.vector_loss
    return VectorErrors(
        step,
        own.nanmean(-1),
        mean_interval(own[:, own[0].isfinite()]).float(),
        mean,
        others,
        float(few_shot.nanmean()),
        float(without.nanmean()),
        len(labels),
        problem.loss_kind,
        None if asked is None else asked.layer,
    )


@styled
def plot_vector_errors(
    found: VectorErrors | Mapping[str, VectorErrors], ax: Axes | None = None
) -> Axes:
    """Draw the error of the answers from the vector alone by layer, for one run or several.

    Solid lines, with a 95 % interval, are of the sequence's own vector; dash-dotted ones of another
    sequence's of the same task. Dashed is the error with demonstrations, dotted without.

    Args:
        found: From :func:`vector_error_by_layer`, by the runs' names if they are several.
        ax: Where to draw; by default on new axes.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.vector_errors import (
        ...     plot_vector_errors, vector_error_by_layer,
        ... )
        >>> plot_vector_errors(vector_error_by_layer(lab.shipped_run(), n=20)).get_xlabel()
        'layer after which the vector is put in'
    """
    runs = found if isinstance(found, Mapping) else {"own vector": found}
    ax = new_axes(ax)
    for colour, (name, one) in zip(COLOURS, runs.items(), strict=False):
        layers, prefix = range(len(one.own)), f"{name}: " if len(runs) > 1 else ""
        low, high = one.intervals.T.tolist()
        ax.plot(layers, one.own.tolist(), color=colour, marker="o", label=name)
        ax.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
        others, label = one.same_task.tolist(), f"{prefix}another sequence's"
        ax.plot(layers, others, color=colour, linestyle="-.", linewidth=0.9, label=label)
        ax.axhline(one.few_shot, color=colour, linestyle="--", label=f"{prefix}demonstrations")
        ax.axhline(one.without, color=colour, linestyle=":", label=f"{prefix}neither")
        if one.trained_layer is not None:
            at, label = one.trained_layer, f"{prefix}trained layer"
            ax.scatter([at], [float(one.own[at])], 60, marker="*", color=colour, label=label)
    kind = next(iter(runs.values())).loss_kind
    ax.set(
        yscale="log",
        xlabel="layer after which the vector is put in",
        ylabel=f"{LOSS_LABELS[kind]}, late points",
        title="The answer from the vector alone",
    )
    whole_numbers(ax)
    return legend_beside(ax)
