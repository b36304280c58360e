"""Pruning of MLP neurons, and what is left of the accuracy and of the task vectors.

In the one-layer transformer of Li et al. (2024), a constant share of the MLP's neurons has output
weights near zero after training: pruning the smallest costs nothing, and pruning the largest costs
the more, the more are pruned. Here the same is asked of deeper models, and also of *task-vector
accuracy*: what the task's mean vector restores where the demonstrations say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.lab.problems.base import Batch, Problem, balanced_labels
from transformer_lens_taskvec.models.protocol import hook_name, model_name
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import COLOURS, MARKERS, legend_beside
from transformer_lens_taskvec.vectors.base import TaskVectors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ORDERS = ("smallest", "largest", "random")
"""Which neurons are pruned first."""

SIZES = ("magnitude", "product")
"""What a neuron's size is: the norm of its output weights, or that times its input weights'."""

PLACES = ("query", "outputs")
"""Where vectors are injected: at the query, or at the tokens ``Problem.swapped_at`` names."""

M = TypeVar("M", bound=Any)

_MEANS, _CHOOSE, _TEST = 31, 32, 33
_FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def neuron_norms(model: Any, *, by: str = "magnitude") -> Float[Tensor, "layer neuron"]:
    """Return the size of every MLP neuron, by its weights.

    Args:
        model: A model of the lab.
        by: ``"magnitude"`` for the norm of the neuron's output weights; ``"product"`` for that
            times the norm of its input weights.

    Returns:
        ``[layer, neuron]``, on the CPU.

    Raises:
        ValueError: If the model has no ``blocks[l].mlp.w_out``, or there is no such size.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.patterns import neuron_norms
        >>> neuron_norms(lab.shipped_run().model()).shape
        torch.Size([5, 256])
    """
    if by not in SIZES:
        raise ValueError(f"by must be one of {SIZES}, got {by!r}")
    norms = []
    for mlp in _mlps(model):
        size = mlp.w_out.detach().norm(dim=0)
        norms.append(size * mlp.w_in.detach().norm(dim=1) if by == "product" else size)
    return torch.stack(norms).cpu()


def prune_neurons(
    model: M,
    fraction: float,
    *,
    by: str = "magnitude",
    order: str = "smallest",
    seed: int = 0,
) -> M:
    """Return a copy of a model in which a share of each MLP's neurons has no output.

    Args:
        model: A model of the lab; it is left as it is.
        fraction: The share of each layer's neurons, 0 to 1, rounded to whole neurons.
        by: The size that decides; see :func:`neuron_norms`.
        order: Which neurons are pruned: the smallest, the largest, or random ones.
        seed: Seed of the random ones.

    Returns:
        The copy; the output weights of the pruned neurons are zero.

    Raises:
        ValueError: If the fraction is not a share, there is no such size or order, or the model has
            no ``blocks[l].mlp.w_out``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.patterns import neuron_norms, prune_neurons
        >>> pruned = prune_neurons(lab.shipped_run().model(), 0.25)
        >>> (neuron_norms(pruned) == 0).sum(1).tolist()  # of 256
        [64, 64, 64, 64, 64]
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be 0 to 1, got {fraction}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    sizes = neuron_norms(model, by=by)
    if order == "random":
        sizes = torch.rand(sizes.shape, generator=torch.Generator().manual_seed(seed))
    ranked = sizes.argsort(dim=-1, descending=order == "largest")
    pruned = deepcopy(model)
    with torch.no_grad():
        for mlp, first in zip(_mlps(pruned), ranked, strict=True):
            mlp.w_out[:, first[: round(fraction * len(first))].to(mlp.w_out.device)] = 0.0
    return pruned


def _mlps(model: Any) -> list[Any]:
    """The MLPs of a model of the lab."""
    mlps = [getattr(block, "mlp", None) for block in getattr(model, "blocks", ())]
    if not mlps or not all(hasattr(mlp, "w_out") and hasattr(mlp, "w_in") for mlp in mlps):
        raise ValueError(
            f"model is a {type(model).__name__} without blocks[l].mlp.w_in and w_out; give a model "
            "of the lab, such as run.model()"
        )
    return mlps


@dataclass(frozen=True, repr=False)
class PruningCurve(Shown):
    """Accuracy at the query, and task-vector accuracy, by the share of neurons that is pruned.

    Attributes:
        fractions: The shares of each layer's neurons that are pruned.
        orders: Which neurons are pruned first.
        accuracy: With true demonstrations, ``[order, fraction]``.
        no_vector: With demonstrations whose outputs are shuffled, ``[order, fraction]``.
        own_vector: The same sequences, with the mean vector of their task, ``[order, fraction]``.
        other_vector: The same, with the mean vector of another task, ``[order, fraction]``.
        layer: The layer of the vectors, the best of the whole model.
        place: Where they are injected.
        n: Sequences in each mean.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.patterns import pruning_curve
        >>> curve = pruning_curve(lab.shipped_run(), fractions=(0, 0.5), n=10, n_random=1)
        >>> curve.accuracy.shape, bool(curve.accuracy[0, 1] >= curve.accuracy[1, 1])
        (torch.Size([3, 2]), True)
    """

    fractions: tuple[float, ...]
    orders: tuple[str, ...]
    accuracy: Float[Tensor, "order fraction"]
    no_vector: Float[Tensor, "order fraction"]
    own_vector: Float[Tensor, "order fraction"]
    other_vector: Float[Tensor, "order fraction"]
    layer: int
    place: str
    n: int

    @property
    def gain(self) -> Float[Tensor, "order fraction"]:
        """What the own task's vector adds to the accuracy with shuffled demonstrations."""
        return self.own_vector - self.no_vector

    def free_fraction(self, order: str, *, within: float = 0.02) -> float:
        """The largest share up to which the accuracy stays near that of the whole model.

        Args:
            order: One of ``orders``.
            within: How far below it may be.

        Raises:
            ValueError: If there is no such order.
        """
        if order not in self.orders:
            raise ValueError(f"no order {order!r}; there are {', '.join(self.orders)}")
        curve = self.accuracy[self.orders.index(order)]
        low = (curve < curve[0] - within).tolist()
        return self.fractions[(low.index(True) if True in low else len(low)) - 1]

    def to_frame(self) -> pd.DataFrame:
        """One row per order and share.

        Columns ``order, fraction, accuracy, no_vector, own_vector, other_vector``.
        """
        names = ("accuracy", "no_vector", "own_vector", "other_vector")
        columns = {name: getattr(self, name) for name in names}
        return grid_frame({"order": self.orders, "fraction": self.fractions}, columns)

    def __repr__(self) -> str:
        free = ", ".join(f"{order} {self.free_fraction(order):.0%}" for order in self.orders)
        return (
            f"PruningCurve(accuracy {self.accuracy[0, 0]:.3f}, own task's vector at layer "
            f"{self.layer} ({self.place}) {self.own_vector[0, 0]:.3f}, no vector "
            f"{self.no_vector[0, 0]:.3f}; pruned within 0.02: {free}; n = {self.n} sequences)"
        )


def pruning_curve(
    run: Any,
    *,
    fractions: Sequence[float] = _FRACTIONS,
    by: str = "magnitude",
    step: int | None = None,
    n: int = 100,
    n_random: int = 3,
    layer: int | None = None,
    place: str | None = None,
    seed: int = 0,
) -> PruningCurve:
    """Measure accuracy and task-vector accuracy as neurons are pruned in three orders.

    Task-vector accuracy is asked of sequences whose demonstrations' outputs are shuffled, so that
    they say nothing of the task. Into these the mean vector of their task is injected, within the
    subspace in which the tasks' means differ. The means are the pruned model's own, and the same
    sequences without a vector, and with another task's, are the controls.

    Args:
        run: A run on a problem whose outputs are not tokens.
        fractions: The shares of each layer's neurons to prune, ascending from 0.
        by: The size that decides; see :func:`neuron_norms`.
        step: The checkpoint; by default the last.
        n: Sequences per task, separately for the means, the choice of the layer, and the test.
        n_random: Draws of random neurons to average over.
        layer: The layer of the vectors; by default the one at which they help the whole model
            most, on separate sequences.
        place: Where to inject them; by default chosen with the layer.
        seed: Seed of the sequences and of the random neurons.

    Raises:
        ValueError: If the fractions do not ascend from 0, the problem is one of tokens or has one
            task, there is no such layer or place, or as for :func:`prune_neurons`.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.patterns import pruning_curve
        >>> pruning_curve(lab.shipped_run(), fractions=(0,), n=10, n_random=1, layer=3).layer
        3
    """
    shares, problem = tuple(map(float, fractions)), run.config.problem
    if shares[:1] != (0.0,) or list(shares) != sorted(set(shares)) or shares[-1] > 1:
        raise ValueError(f"fractions must ascend from 0 to at most 1, got {tuple(fractions)}")
    if len(problem.tasks) < 2:
        raise ValueError("the problem has one task; task vectors need two or more")
    if min(n, n_random) < 1:
        raise ValueError(f"n is {n} and n_random {n_random}; ask for 1 or more of each")
    model = run.model(step)
    layers: Sequence[int] = range(len(_mlps(model)))
    if layer is not None and layer not in layers:
        raise ValueError(f"layer {layer} is out of range: there are 0 to {layers[-1]}")
    if place is not None and place not in PLACES:
        raise ValueError(f"place must be one of {PLACES}, got {place!r}")
    layers = layers if layer is None else (layer,)
    places = PLACES if place is None else (place,)
    sequences = partial(_Sequences.drawn, problem, n, seed)
    means, chosen, test = sequences(_MEANS), sequences(_CHOOSE), sequences(_TEST)

    def helps(at: tuple[int, str]) -> float:
        found = _scores(model, problem, means, chosen, *at)
        return float(found[2] - found[3])

    best = max(((one, where) for one in layers for where in places), key=helps)

    @cache
    def pruned(share: float, order: str) -> Float[Tensor, " four"]:
        if order != "smallest" and share in (0, 1):  # then the order makes no difference
            return pruned(share, "smallest")
        found = []
        for draw in range(n_random if order == "random" else 1):
            rest = prune_neurons(model, share, by=by, order=order, seed=seed + draw)
            found.append(_scores(rest, problem, means, test, *best))
        return torch.stack(found).mean(0)

    rows = [pruned(share, order) for order in ORDERS for share in shares]
    true, none, own, other = torch.stack(rows).view(len(ORDERS), len(shares), 4).unbind(-1)
    return PruningCurve(shares, ORDERS, true, none, own, other, *best, len(test.labels))


@dataclass(frozen=True)
class _Sequences:
    """Sequences of all tasks, with true and with shuffled demonstrations."""

    true: Batch
    shuffled: Batch

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        return self.true.labels

    @classmethod
    def drawn(cls, problem: Problem, n: int, seed: int, kind: int) -> _Sequences:
        generator = torch.Generator().manual_seed(1_000 * seed + kind)
        labels = balanced_labels(len(problem.tasks), n)
        true = problem.sample(len(labels), generator, labels=labels)
        if not true.xs.is_floating_point():
            raise ValueError(
                f"a sequence of {type(problem).__name__} is a row of tokens, whose outputs cannot "
                "be shuffled; give a run on a problem of vectors"
            )
        order = torch.rand(true.ys.shape[:2], generator=generator)
        order[:, -1] = 2.0  # the query's output, to be predicted, stays last
        rows = torch.arange(len(labels))[:, None]
        return cls(true, replace(true, ys=true.ys[rows, order.argsort(-1)]))


def _scores(
    model: Any,
    problem: Problem,
    means: _Sequences,
    test: _Sequences,
    layer: int,
    place: str,
) -> Float[Tensor, " four"]:
    """Accuracy at the query: true, and shuffled without a vector, with the own and with another."""
    query = problem.n_points - 1
    swapped = problem.swapped_at(query)
    at = swapped if place == "outputs" else (problem.query_at(query),)
    kept: list[Tensor] = []
    name, n_tasks = hook_name("resid_post", layer), len(problem.tasks)

    def right(batch: Batch, hook: Any = None) -> Bool[Tensor, " batch"]:
        hooks = [] if hook is None else [(name, hook)]
        with torch.no_grad():
            predicted = problem.predict(partial(model.run_with_hooks, fwd_hooks=hooks), batch)
        return problem.right(predicted[:, query], batch.ys[:, query], batch.labels)

    def keep(activation: Tensor, hook: Any) -> None:
        kept.append(activation[:, list(at)])

    right(means.true, keep)
    # [task, position, d_model]: the positions take the axis of the layers.
    by_task = torch.stack([kept[0][means.labels == task].mean(0) for task in range(n_tasks)])
    source = Source(model_name(model), "resid_post", -1, type(problem).__name__, bos=False)
    vectors = TaskVectors(by_task, problem.tasks, tuple(range(len(at))), source)
    modes = [vectors.subspace(index) for index in range(len(at))]

    def write(labels: Int[Tensor, " batch"], activation: Tensor, hook: Any) -> Tensor:
        edited = activation.clone()
        for task in labels.unique().tolist():
            rows = labels == task
            for index, (token, mode) in enumerate(zip(at, modes, strict=True)):
                edited[rows, token] = mode(activation[rows, token], by_task[task, index])
        return edited

    other = (test.labels + 1) % n_tasks
    shares = [
        right(test.true),
        right(test.shuffled),
        right(test.shuffled, partial(write, test.labels)),
        right(test.shuffled, partial(write, other)),
    ]
    return torch.stack(shares).float().mean(-1)


@styled
def plot_pruning(curve: PruningCurve, *, chance: float | None = None) -> Figure:
    """Draw accuracy and task-vector accuracy by the share of neurons that is pruned.

    Args:
        curve: From :func:`pruning_curve`.
        chance: The accuracy of guessing, drawn as a dotted line; None for no line.

    Example:
        >>> from matplotlib import pyplot as plt
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.patterns import plot_pruning, pruning_curve
        >>> curve = pruning_curve(lab.shipped_run(), fractions=(0, 1), n=10, layer=3)
        >>> plot_pruning(curve).axes[0].get_xlabel()
        'share of neurons pruned'
        >>> plt.close("all")
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11.0, 2.9), layout="constrained", sharey=True)
    shuffled = "Shuffled outputs, {} vector"
    titles = ("True demonstrations", *map(shuffled.format, ("own task's", "another task's")))
    values = (curve.accuracy, curve.own_vector, curve.other_vector)
    for ax, title, solid in zip(axes, titles, values, strict=True):
        for index, order in enumerate(curve.orders):
            style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index]}
            ax.plot(curve.fractions, solid[index].tolist(), label=f"{order} first", **style)
            if solid is not curve.accuracy:
                dashed: dict[str, Any] = {
                    "color": COLOURS[index],
                    "linestyle": "--",
                    "linewidth": 0.8,
                }
                level, label = curve.no_vector[index].tolist(), f"{order} first, no vector"
                ax.plot(curve.fractions, level, label=label, **dashed)
        if chance is not None:
            ax.axhline(chance, color="black", linestyle=":", linewidth=0.8, label="chance")
        ax.set(xlabel="share of neurons pruned", title=title, ylim=(-0.03, 1.03))
    axes[0].set_ylabel(f"accuracy at the query (n = {curve.n})")
    where = "the query" if curve.place == "query" else "the outputs"
    figure.suptitle(f"MLP neurons pruned; vectors at layer {curve.layer}, at {where}", fontsize=9)
    legend_beside(axes[-1])
    return figure
