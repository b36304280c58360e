"""Whether an equaliser remembers its training's channels or infers any (Zecchin et al. 2023).

With few channels in training, a model can do as the estimator that knows the set: it recognises
the channel, and fails on a fresh one. With many it comes to estimate any channel from the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.analysis.classifiers import readout
from transformer_lens_taskvec.lab.problems.base import Finding, balanced_labels
from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import (
    COLOURS,
    GREY,
    legend_beside,
    whole_numbers,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CHANNELS = ("training's channels", "fresh channels")
"""What the rows of an :class:`Equaliser`'s measurements are."""

_K = 10
_TICKS = (0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
_STYLES: Mapping[str, Mapping[str, Any]] = {
    "model": {"color": COLOURS[0], "linewidth": 1.8},
    "finite prior": {"color": COLOURS[1], "linestyle": "--"},
    "true prior": {"color": COLOURS[2], "linestyle": "-."},
    "known channel": {"color": GREY, "linestyle": ":"},
    "linear, known channel": {"color": GREY, "linewidth": 0.9},
}


@dataclass(frozen=True, repr=False)
class Equaliser(Shown):
    """How a model equalises its training's channels and fresh ones, next to the estimators.

    Every measurement has a first axis for the two kinds of channels, :data:`CHANNELS`.

    Attributes:
        errors: By predictor, the model and the problem's oracles, the mean squared error per real
            number, ``[channels, point]``.
        distance: By oracle, the mean squared difference between the model's predictions and the
            oracle's per real number, over the late points, ``[channels]``.
        td: Task decodability at the query, the share of its tokens whose channel is that of most
            of the 10 nearest neighbours, ``[channels, layer]``; among the problem's tasks, and as
            many fresh channels.
        td_of_input: The same from the query's received numbers alone, ``[channels]``: 16 clusters
            that depend on the channel.
        td_of_output: The same at the token of the symbols sent last, which are the same for all
            channels, ``[channels, layer]``; chance is one over the number of tasks.
        late_from: The first of the late points.
        n_sequences: Sequences for the errors and distances.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import MimoEqualisation
        >>> from transformer_lens_taskvec.lab import TrainConfig
        >>> problem = MimoEqualisation(n_channels=2, n_points=6)
        >>> model = TrainConfig(problem=problem, n_layers=1, d_model=8).model()
        >>> found = measure_equaliser(model, problem, n_sequences=50, n_per_task=20)
        >>> found.td.shape, [round(error, 1) for error in found.late("model")]  # predicts about 0
        (torch.Size([2, 1]), [0.5, 0.5])
    """

    errors: Mapping[str, Float[Tensor, "channels point"]]
    distance: Mapping[str, Float[Tensor, " channels"]]
    td: Float[Tensor, "channels layer"]
    td_of_input: Float[Tensor, " channels"]
    td_of_output: Float[Tensor, "channels layer"]
    late_from: int
    n_sequences: int

    def late(self, predictor: str) -> tuple[float, float]:
        """The mean error over the late points, on the training's channels and on fresh ones.

        Raises:
            KeyError: If there is no such predictor.
        """
        if predictor not in self.errors:
            raise KeyError(f"no predictor {predictor!r}; there are {', '.join(self.errors)}")
        own, fresh = self.errors[predictor][:, self.late_from :].mean(1).tolist()
        return own, fresh

    @property
    def best_layer(self) -> int:
        """The layer with the highest TD of the training's channels at the symbols sent last."""
        return int(self.td_of_output[0].argmax())

    def to_frame(self) -> pd.DataFrame:
        """One row per predictor: late errors, and the model's distances from it."""
        import pandas as pd

        rows = []
        for name in self.errors:
            own, fresh = self.late(name)
            apart = self.distance.get(name, torch.full((2,), torch.nan)).tolist()
            rows.append((name, own, fresh, *apart))
        columns = ["predictor", "error", "error_fresh", "distance", "distance_fresh"]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        own, fresh = self.late("model")
        td, td_fresh = self.td_of_output[:, self.best_layer].tolist()
        return (
            f"Equaliser(late error {own:.3f} on its channels and {fresh:.3f} on fresh ones, "
            f"TD at layer {self.best_layer} {td:.2f} and {td_fresh:.2f}; "
            f"n = {self.n_sequences} sequences each)"
        )


def measure_equaliser(
    model: Any, problem: Any, *, n_sequences: int = 500, n_per_task: int = 100, seed: int = 0
) -> Equaliser:
    """Measure a model's errors, its distance from the estimators, and the channels' decodability.

    Args:
        model: A model of the lab.
        problem: The :class:`MimoEqualisation` that it was trained on.
        n_sequences: Sequences for the errors and distances, of each kind of channels.
        n_per_task: Sequences per channel for TD.
        seed: Seed of all sequences.

    Raises:
        ValueError: If there are no sequences, or too few for 10 neighbours.
    """
    if n_sequences < 1 or n_per_task <= _K:
        raise ValueError(
            f"n_sequences is {n_sequences} and n_per_task {n_per_task}; ask for 1 or more and for "
            f"more than {_K}"
        )
    errors: dict[str, list[Tensor]] = {}
    apart: dict[str, list[Tensor]] = {}
    for place, source in enumerate((problem, replace(problem, n_channels=None))):
        batch = source.sample(n_sequences, torch.Generator().manual_seed(1_000 * seed + place))
        oracles = problem.oracles(batch)  # the finite prior is that of the training
        with torch.no_grad():
            predicted = problem.predict(model, batch)
        for name, one in {"model": predicted, **oracles}.items():
            losses = problem.losses(one, batch.ys, batch.labels[:, None])
            errors.setdefault(name, []).append(losses.mean(0))
        for name, one in oracles.items():
            far = problem.distance(predicted, one)[:, problem.late_from :]
            apart.setdefault(name, []).append(far.mean())
    others = fresh_tasks(problem)
    decoded = [_decodability(model, one, n_per_task, 1_000 * seed + 2) for one in (problem, others)]
    query, of_input, output = zip(*decoded, strict=True)
    return Equaliser(
        {name: torch.stack(both) for name, both in errors.items()},
        {name: torch.stack(both) for name, both in apart.items()},
        torch.stack(query),
        torch.stack(of_input),
        torch.stack(output),
        problem.late_from,
        n_sequences,
    )


def fresh_tasks(problem: Any) -> Any:
    """Return the problem of as many channels as the given one has tasks, none of them its own.

    Args:
        problem: A :class:`MimoEqualisation`.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import MimoEqualisation
        >>> fresh_tasks(MimoEqualisation(n_channels=1024)).tasks[-1]
        'H8'
    """
    return replace(problem, n_channels=len(problem.tasks), seed=problem.seed + 1)


def _decodability(
    model: Any, problem: Any, n: int, seed: int
) -> tuple[Float[Tensor, " layer"], Float[Tensor, ""], Float[Tensor, " layer"]]:
    """TD at the last query by layer, of what was received there, and at the token before it."""
    labels = balanced_labels(len(problem.tasks), n)
    batch = problem.sample(len(labels), torch.Generator().manual_seed(seed), labels=labels)
    hits = readout("knn", _K)
    names = [hook_name("resid_post", layer) for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(problem.tokens(batch), names_filter=names)

    def share(points: Tensor) -> Tensor:
        return hits(points, labels).float().mean()

    query, output = (
        torch.stack([share(cache[name][:, place]) for name in names]) for place in (-1, -2)
    )
    return query, share(batch.xs[:, -1]), output


def finding_of(run: Any, *, n_sequences: int = 500) -> Finding:
    """Return what a run on a :class:`MimoEqualisation` shows; see :meth:`Problem.finding`.

    Args:
        run: The run.
        n_sequences: As for :func:`measure_equaliser`.
    """
    problem = run.config.problem
    found = measure_equaliser(run.model(), problem, n_sequences=n_sequences)
    own, fresh = found.late("model")
    true, known = found.late("true prior"), found.late("known channel")
    layer = found.best_layer
    n = problem.n_channels
    count = "a fresh channel in every sequence" if n is None else f"{n} channels"
    sentence = f"Trained on {count}, the model has an error of {own:.3f} on such sequences"
    numbers: dict[str, Any] = {
        "n_channels": n,
        "steps": run.checkpoint(),
        "error": own,
        "error_fresh": fresh,
        "true_prior": true[0],
        "true_prior_fresh": true[1],
        "known_channel_fresh": known[1],
        "linear_fresh": found.late("linear, known channel")[1],
    }
    if n is None:
        sentence += f", where the true prior has {true[0]:.3f}. "
    else:
        finite = found.late("finite prior")
        to_finite, to_true = (
            float(found.distance[f"{one} prior"][1]) for one in ("finite", "true")
        )
        nearer = "finite" if to_finite < to_true else "true"
        sentence += (
            f" (finite prior {finite[0]:.3f}) and of {fresh:.3f} on fresh channels (true prior "
            f"{true[1]:.3f}, finite prior {finite[1]:.3f}). There its predictions are nearer to "
            f"the {nearer} prior's: {to_finite:.3f} from the finite prior's, {to_true:.3f} from "
            "the true prior's. "
        )
        numbers |= {"finite_prior": finite[0], "finite_prior_fresh": finite[1]}
        numbers |= {"distance_fresh_to_finite": to_finite, "distance_fresh_to_true": to_true}
    measures = {
        "td_of_output": found.td_of_output[:, layer],
        "td_at_query": found.td[:, layer],
        "td_of_input": found.td_of_input,
    }
    for name, both in measures.items():
        numbers[name], numbers[f"{name}_fresh"] = both.tolist()
    numbers["td_layer"] = layer
    tasks = len(problem.tasks)
    sentence += (
        f"At layer {layer} the channel is decoded from the symbols sent last with TD "
        f"{numbers['td_of_output']:.2f} among {tasks} of the training's channels and "
        f"{numbers['td_of_output_fresh']:.2f} among {tasks} fresh ones (chance {1 / tasks:.2f}); "
        f"at the query with {numbers['td_at_query']:.2f} and {numbers['td_at_query_fresh']:.2f}, "
        f"where the received numbers alone have {numbers['td_of_input']:.2f} and "
        f"{numbers['td_of_input_fresh']:.2f}."
    )
    figures = {"errors": plot_errors(found), "decodability": plot_td(found)}
    return Finding(sentence, numbers, figures)


@styled
def plot_errors(found: Equaliser) -> Figure:
    """Draw the errors by position on the training's channels and on fresh ones.

    Args:
        found: From :func:`measure_equaliser`.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained", sharey=True)
    for place, (ax, kind) in enumerate(zip(axes, CHANNELS, strict=True)):
        for name, style in _STYLES.items():
            if name in found.errors:
                curve = found.errors[name][place].tolist()
                ax.plot(range(len(curve)), curve, label=name, **style)
        ax.set(yscale="log", title=kind, xlabel="pairs before the query")
        whole_numbers(ax)
    axes[0].set_ylabel("squared error per real number")
    axes[0].set_yticks(_TICKS, [str(tick) for tick in _TICKS])
    axes[0].minorticks_off()
    legend_beside(axes[1])
    return figure


@styled
def plot_td(found: Equaliser) -> Figure:
    """Draw the channels' decodability by layer at the query and at the symbols sent last.

    The dotted lines are that of the query's received numbers alone.

    Args:
        found: From :func:`measure_equaliser`.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained", sharey=True)
    titles = ("at the query", "at the symbols sent last")
    for ax, title, td in zip(axes, titles, (found.td, found.td_of_output), strict=True):
        for place, kind in enumerate(CHANNELS):
            style: dict[str, Any] = {"color": COLOURS[place]}
            ax.plot(td[place].tolist(), marker="os"[place], label=kind, **style)
            if ax is axes[0]:
                level = float(found.td_of_input[place])
                ax.axhline(level, linestyle=":", **style)
        ax.set(title=title, xlabel="layer", ylim=(0, 1.03))
        whole_numbers(ax)
    axes[1].plot([], [], color="black", linestyle=":", label="received numbers alone")
    axes[0].set_ylabel("task decodability")
    legend_beside(axes[1])
    return figure
