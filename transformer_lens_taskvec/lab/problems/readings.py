"""What findings read in a model's residual stream: the task by layer, and the effect of a swap.

A swap replaces the representation of a sequence's task by another task's mean, as ``swap_matrix``
does. Here the question is where the predictions go: towards what the best predictor of the other
task would say about the same sequence, or away from both?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Activations, Source
from transformer_lens_taskvec.interventions.intervention import Intervention, inject
from transformer_lens_taskvec.lab.problems.base import Batch, Problem, balanced_labels
from transformer_lens_taskvec.models.protocol import hook_name, model_name
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    FIGURE_SIZE,
    figure_of,
    legend_beside,
    styled,
    whole_numbers,
)
from transformer_lens_taskvec.vectors.means import task_vectors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def spread(steps: Sequence[int], n: int) -> tuple[int, ...]:
    """Return about ``n`` of some steps, evenly spread over their list, with the first and last.

    Args:
        steps: The steps, in order.
        n: How many to choose, at least 2; all if there are no more.

    Example:
        >>> spread(range(10), 4)
        (0, 3, 6, 9)
    """
    if len(steps) <= n:
        return tuple(steps)
    last = len(steps) - 1
    return tuple(steps[round(last * index / (n - 1))] for index in range(n))


def drawn(problem: Problem, n: int, seed: int) -> Batch:
    """Return ``n`` sequences of each task, task by task.

    Args:
        problem: What they are drawn from.
        n: Sequences per task.
        seed: Their seed.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> drawn(lab.SparseLinearMixture.small(), 2, seed=0).labels.tolist()
        [0, 0, 1, 1, 2, 2, 3, 3]
    """
    labels = balanced_labels(len(problem.tasks), n)
    return problem.sample(len(labels), torch.Generator().manual_seed(seed), labels=labels)


def read_stream(
    model: Any, problem: Problem, batch: Batch, *, places: Sequence[int]
) -> list[Activations]:
    """Return the residual stream of sequences after each block, at some tokens.

    Args:
        model: A model of the lab.
        problem: What the sequences are drawn from.
        batch: The sequences.
        places: The tokens, counted from 0.

    Returns:
        For each place the activations, ``[example, layer, d_model]``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> batch = run.config.problem.sample(6, torch.Generator().manual_seed(0))
        >>> [found] = read_stream(run.model(), run.config.problem, batch, places=[30])
        >>> found.values.shape
        torch.Size([6, 5, 64])
    """
    names = [hook_name("resid_post", layer) for layer in range(model.cfg.n_layers)]
    kept: dict[str, Tensor] = {}

    def keep(residual: Tensor, hook: Any) -> None:
        kept[hook.name] = residual[:, list(places)].float().cpu()

    with torch.no_grad():
        forward = partial(model.run_with_hooks, fwd_hooks=[(name, keep) for name in names])
        problem.predict(forward, batch)
    values = torch.stack([kept[name] for name in names])
    source = partial(
        Source, model_name(model), "resid_post", template=type(problem).__name__, bos=False
    )
    return [
        Activations(
            rearrange(values[:, :, index], "layer example d_model -> example layer d_model"),
            batch.labels.cpu(),
            problem.tasks,
            tuple(range(len(names))),
            source(position=place),
        )
        for index, place in enumerate(places)
    ]


def probe_r2(train: Activations, test: Activations, values: Sequence[float]) -> list[float]:
    """Return how well a number that each task stands for can be read linearly, by layer.

    Args:
        train: Activations that the linear map, with an intercept, is fitted to.
        test: Activations of other sequences that it is tested on.
        values: The number of each task.

    Returns:
        ``R^2`` on the test sequences at each layer: 1 if all numbers are read exactly, 0 if no
        better than their mean.

    Raises:
        ValueError: If there is not one value per task.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> problem, seeded = run.config.problem, torch.Generator().manual_seed
        >>> batches = [problem.sample(300, seeded(seed)) for seed in (0, 1)]
        >>> read = [read_stream(run.model(), problem, one, places=[30])[0] for one in batches]
        >>> len(probe_r2(*read, values=[0.0, 1.0, 2.0, 3.0]))
        5
    """
    if len(values) != len(train.tasks):
        raise ValueError(
            f"values has {len(values)} numbers for {len(train.tasks)} tasks; give one per task"
        )
    numbers = torch.tensor(values, dtype=torch.float64)
    target, held = numbers[train.labels], numbers[test.labels]
    found = []
    for layer in train.layers:
        features, held_features = (
            torch.nn.functional.pad(one.at(layer).double(), (0, 1), value=1.0)
            for one in (train, test)
        )
        weights = torch.linalg.lstsq(features, target[:, None], driver="gelsd").solution
        left = held - (held_features @ weights)[:, 0]
        found.append(float(1 - left.square().mean() / held.var(correction=0)))
    return found


@dataclass(frozen=True, repr=False)
class SwapDistances(Shown):
    """Where predictions go when the representation of the task is swapped.

    The axes ``source``, ``target`` and ``oracle`` are tasks: of the sequences, of the mean that is
    swapped in, and of the predictor that predictions are compared with.

    Attributes:
        distance: The mean squared distance of the swapped predictions from the oracle's,
            ``[layer, source, target, oracle]``.
        unedited: The same without a swap, ``[source, oracle]``.
        moved: How far predictions move from the source's oracle towards another, 1 being all the
            way: the slope of the change on the difference of the two oracles. NaN where the oracle
            is the source's. ``[layer, source, target, oracle]``.
        tasks: The tasks.
        n: Sequences.

    Example:
        >>> nan = float("nan")
        >>> moved = torch.tensor([[[[nan, 0.0], [nan, 0.5]], [[0.0, nan], [0.7, nan]]]])
        >>> SwapDistances(moved, moved[0, 0], moved.clone(), ("a", "b"), 10).best_layer()
        0
    """

    distance: Float[Tensor, "layer source target oracle"]
    unedited: Float[Tensor, "source oracle"]
    moved: Float[Tensor, "layer source target oracle"]
    tasks: tuple[str, ...]
    n: int

    def share(self, layer: int, *, control: bool = False) -> list[float]:
        """How far each task's sequences move towards the farthest other task's oracle.

        Args:
            layer: The layer of the swap.
            control: Whether the task's own mean is swapped in, in place of the other's.
        """
        pairs = [(source, self.opposite(source)) for source in range(len(self.tasks))]
        return [
            float(self.moved[layer, source, source if control else other, other])
            for source, other in pairs
        ]

    def opposite(self, source: int) -> int:
        """The task that is listed farthest from a task."""
        return max(range(len(self.tasks)), key=lambda task: abs(task - source))

    def best_layer(self) -> int:
        """The layer at which a swap moves predictions most, less the move with the own mean."""

        def effect(layer: int) -> float:
            return sum(self.share(layer)) - sum(self.share(layer, control=True))

        return max(range(len(self.distance)), key=effect)

    def numbers(self, layer: int) -> dict[str, Any]:
        """What a finding says about the swaps in one layer, by name."""
        return {
            "swap_layer": layer,
            "swap_moved": self.share(layer),
            "swap_moved_own_mean": self.share(layer, control=True),
            "swap_distance": self.distance[layer].flatten().tolist(),
            "swap_distance_unedited": self.unedited.flatten().tolist(),
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, source, target and oracle: ``distance``, ``unedited``, ``moved``."""
        axes = {
            "layer": range(len(self.distance)),
            "source": self.tasks,
            "target": self.tasks,
            "oracle": self.tasks,
        }
        unedited = rearrange(self.unedited, "source oracle -> 1 source 1 oracle")
        columns = {
            "distance": self.distance,
            "unedited": unedited.expand_as(self.distance),
            "moved": self.moved,
        }
        return grid_frame(axes, columns)

    def __repr__(self) -> str:
        layer = self.best_layer()
        shares = ", ".join(
            f"{task} {moved:.2f} (own mean {own:.2f})"
            for task, moved, own in zip(
                self.tasks, self.share(layer), self.share(layer, control=True), strict=True
            )
        )
        return f"SwapDistances(n = {self.n}; moved towards the other at layer {layer}: {shares})"


def swap_distances(
    model: Any,
    problem: Problem,
    train: Batch,
    test: Batch,
    oracles: Float[Tensor, "task example"],
    *,
    places: Sequence[int] | None = None,
) -> SwapDistances:
    """Swap the tasks' representations and return how far predictions are from each task's oracle.

    The component in the span of the differences of the tasks' means is replaced by a task's mean,
    in one layer at a time.

    Args:
        model: A model of the lab.
        problem: What the sequences are drawn from; its outputs are single numbers.
        train: Sequences that the means are taken from, of all tasks.
        test: Sequences whose last point is predicted, of all tasks.
        oracles: What the best predictor of each task predicts at the last point of each of the test
            sequences, whatever their task, ``[task, example]``.
        places: The tokens to swap at, each with means of its own; by default those that
            ``Problem.swapped_at`` names for the last point.

    Raises:
        ValueError: If there is not one prediction per task and test sequence, or one of the two
            batches lacks a task.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.oracles import bayes_mixture
        >>> run = lab.shipped_run()
        >>> problem, seeded = run.config.problem, torch.Generator().manual_seed
        >>> train, test = (problem.sample(80, seeded(seed)) for seed in (0, 1))
        >>> found = bayes_mixture(test.xs, test.ys, bases=problem.bases, noise_variance=0.01)
        >>> swap_distances(run.model(), problem, train, test, found.by_basis[:, -1].T).moved.shape
        torch.Size([5, 4, 4, 4])
    """
    n_tasks, n = len(problem.tasks), len(test.labels)
    if oracles.shape != (n_tasks, n):
        raise ValueError(
            f"oracles has shape {list(oracles.shape)}; give one prediction per task and test "
            f"sequence, {[n_tasks, n]}"
        )
    for name, batch in (("train", train), ("test", test)):
        missing = set(range(n_tasks)) - set(batch.labels.tolist())
        if missing:
            raise ValueError(f"{name} has no sequence of {problem.tasks[min(missing)]}; add some")
    places = problem.swapped_at(problem.n_points - 1) if places is None else places
    vectors = [task_vectors(one) for one in read_stream(model, problem, train, places=places)]

    def predicted(edits: Sequence[Intervention]) -> Float[Tensor, " example"]:
        forward = partial(model.run_with_hooks, fwd_hooks=[tuple(edit) for edit in edits])
        with torch.no_grad():
            return problem.predict(forward, test)[:, -1].cpu()

    def swapped(task: str, layer: int) -> Float[Tensor, " example"]:
        edits = [
            inject(own[task, layer], layer, mode=own.subspace(layer), position=place)
            for own, place in zip(vectors, places, strict=True)
        ]
        return predicted(edits)

    before, by_task = predicted([]), oracles.cpu()
    after = torch.stack(
        [
            torch.stack([swapped(task, layer) for task in problem.tasks])
            for layer in range(model.cfg.n_layers)
        ]
    )
    distances, moved, unedited = [], [], []
    for source in range(n_tasks):
        rows = test.labels.cpu() == source
        apart = (
            rearrange(after[..., rows], "layer target row -> layer target 1 row") - by_task[:, rows]
        )
        distances.append(
            reduce(apart.square(), "layer target oracle row -> layer target oracle", "mean")
        )
        unedited.append((before[rows] - by_task[:, rows]).square().mean(-1))
        way = by_task[:, rows] - by_task[source, rows]
        change = rearrange(after - before, "layer target example -> layer target 1 example")[
            ..., rows
        ]
        moved.append((change * way).sum(-1) / way.square().sum(-1))  # 0 / 0 for the source's own
    return SwapDistances(
        torch.stack(distances, 1), torch.stack(unedited), torch.stack(moved, 1), problem.tasks, n
    )


@styled
def plot_swap_distances(found: SwapDistances) -> Figure:
    """Draw, for each task's sequences, the distance of swapped predictions from two oracles.

    The two are the task's own and the farthest other task's; by layer, with the other's mean
    swapped in, with the task's own mean, and without a swap.

    Args:
        found: From :func:`swap_distances`.

    Example:
        >>> ones = torch.ones(3, 2, 2, 2)
        >>> figure = plot_swap_distances(SwapDistances(ones, ones[0, 0], ones, ("a", "b"), 10))
        >>> len(figure.axes)
        2
    """
    import matplotlib.pyplot as plt

    chosen = range(len(found.tasks)) if len(found.tasks) <= 2 else (0, len(found.tasks) - 1)
    width, height = FIGURE_SIZE
    axes = plt.subplots(1, 2, figsize=(1.7 * width, height), layout="constrained", sharey=True)[1]
    layers = range(len(found.distance))
    for ax, source in zip(axes, chosen, strict=True):
        other = found.opposite(source)
        for oracle, colour, name in ((source, COLOURS[0], "own"), (other, COLOURS[1], "other's")):
            to = f"to {name} oracle"
            swapped = found.distance[:, source, other, oracle].tolist()
            control = found.distance[:, source, source, oracle].tolist()
            ax.plot(layers, swapped, color=colour, marker="o", label=f"{to}, other's mean")
            ax.plot(layers, control, color=colour, ls="--", marker="s", label=f"{to}, own mean")
            level = float(found.unedited[source, oracle])
            ax.axhline(level, color=colour, ls=":", label=f"{to}, no swap")
        ax.set(
            yscale="log", xlabel="layer of the swap", title=f"sequences of {found.tasks[source]}"
        )
        whole_numbers(ax)
    axes[0].set_ylabel("mean squared distance")
    legend_beside(axes[1])
    return figure_of(axes[0])
