"""What a run on triggered bigrams shows: when the context wins, and where the meaning is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.activations import Activations, Source
from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.interventions.intervention import inject
from transformer_lens_taskvec.lab.problems.base import Batch, Finding, balanced_labels
from transformer_lens_taskvec.lab.problems.bigrams.formula import hand_set, predicted_logits
from transformer_lens_taskvec.lab.problems.bigrams.hijack import (
    SWEEPS,
    HijackCurve,
    hijack_curve,
    plot_hijack,
)
from transformer_lens_taskvec.lab.problems.bigrams.lengths import LengthTest, length_test
from transformer_lens_taskvec.lab.problems.bigrams.memory import Positions
from transformer_lens_taskvec.models.protocol import hook_name, inference, model_name
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import COLOURS, GREY, MARKERS, heat_map, task_style
from transformer_lens_taskvec.vectors.means import task_vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BETA, _GAMMA = 3.0, 8.0
_KINDS: tuple[Positions, ...] = ("relative", "absolute")
_MEANS, _TEST = 31, 32


@dataclass(frozen=True)
class Meaning:
    """Where a model holds what the first trigger means, at the trigger itself.

    Attributes:
        td: Task decodability after each layer, ``[layer, task]``.
        loss: The mean NLL at the query, ``[task]``.
        swapped: The same when the last layer's representation is replaced by the mean of another
            task, in the subspace of the means, ``[source, target]``.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams.finding import meaning_of
        >>> problem = TriggeredBigrams()
        >>> found = meaning_of(hand_set(problem), problem, n=20)
        >>> found.td.shape, found.swapped.shape
        (torch.Size([2, 8]), torch.Size([8, 8]))
    """

    td: Float[Tensor, "layer task"]
    loss: Float[Tensor, " task"]
    swapped: Float[Tensor, "source target"]

    @property
    def own(self) -> float:
        """The mean change in NLL with the task's own mean."""
        return float((self.swapped.diagonal() - self.loss).mean())

    @property
    def other(self) -> float:
        """The mean change in NLL with another task's mean."""
        off = ~torch.eye(len(self.loss), dtype=torch.bool)
        return float((self.swapped - self.loss[:, None])[off].mean())


def meaning_of(model: Any, problem: Any, *, n: int = 100, k: int = 10) -> Meaning:
    """Return how decodable the first trigger's meaning is at the trigger, and what a swap does.

    Args:
        model: A model with TransformerLens' hook API.
        problem: A :class:`TriggeredBigrams`.
        n: Sequences per task, for the means and again for the test.
        k: Neighbours that vote in TD.

    Raises:
        ValueError: If there are too few sequences for ``k`` neighbours.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams.finding import meaning_of
        >>> problem = TriggeredBigrams()
        >>> found = meaning_of(hand_set(problem), problem, n=20)
        >>> bool(found.td[1].mean() > 0.8), found.other > 1 > found.own
        (True, True)
    """
    labels = balanced_labels(len(problem.tasks), n)
    draw = [torch.Generator().manual_seed(seed) for seed in (_MEANS, _TEST)]
    train, test = (problem.sample(len(labels), one, labels=labels) for one in draw)
    decoded = task_decodability(_activations(model, problem, test), k=k)
    vectors = task_vectors(_activations(model, problem, train))
    layer = model.cfg.n_layers - 1

    def losses(hooks: list[Any]) -> Float[Tensor, " task"]:
        with inference(model):
            logits = model.run_with_hooks(test.xs, fwd_hooks=hooks)[:, -1]
        each: Tensor = problem.losses(logits, test.ys[:, -1], labels)
        return each.view(-1, n).mean(1)

    mode = vectors.subspace(layer)
    edits = [inject(vectors[task, layer], layer, mode=mode) for task in problem.tasks]
    swapped = torch.stack([losses([tuple(edit)]) for edit in edits], dim=1)
    return Meaning(decoded.scores, losses([]), swapped)


def _activations(model: Any, problem: Any, batch: Batch) -> Activations:
    """The residual stream after each layer at the query."""
    layers = tuple(range(model.cfg.n_layers))
    names = [hook_name("resid_post", layer) for layer in layers]
    with inference(model):
        _, cache = model.run_with_cache(batch.xs, names_filter=names)
    values = torch.stack([cache[name][:, -1] for name in names], dim=1).float()
    source = Source(model_name(model), "resid_post", -1, "", bos=False)
    return Activations(values, batch.labels, problem.tasks, layers, source)


def bigrams_finding(run: Any) -> Finding:
    """Return when the context wins over the bigrams, and where the meaning of a trigger is.

    Args:
        run: A run on :class:`TriggeredBigrams`.

    Raises:
        ValueError: If the run has no checkpoint yet.
    """
    problem, trained = run.config.problem, run.model()
    hand = {kind: hand_set(problem, _BETA, _GAMMA, positions=kind) for kind in _KINDS}
    memory = hand["relative"]
    batch = problem.sample(64, torch.Generator().manual_seed(_TEST))
    expected = predicted_logits(problem, batch.xs, _BETA, _GAMMA)
    with torch.no_grad():
        error = float((memory(batch.xs) - expected).abs().max())
    curves = {
        "hand-set": hijack_curve(memory, problem, beta=_BETA, gamma=_GAMMA),
        "trained": hijack_curve(trained, problem),
    }
    bayes = None
    if problem.usual:  # without, contradicting contexts are impossible
        bayes = hijack_curve(_bayes_of(problem), problem, beta=_BETA, gamma=_GAMMA)
    own = f"trained, {problem.positions}"
    models = {own: trained, **{f"hand-set, {kind}": model for kind, model in hand.items()}}
    lengths = length_test(models, problem)
    meaning, by_hand = meaning_of(trained, problem), meaning_of(memory, problem)
    numbers = _numbers(error, curves, lengths, meaning)
    untrained = meaning_of(run.model(run.steps[0]), problem)
    numbers["td_untrained"], numbers["swap_untrained"] = (
        float(untrained.td[-1].mean()),
        untrained.other,
    )
    numbers["hand_set_td"] = by_hand.td.mean(1).tolist()
    numbers["hand_set_swap_other"] = by_hand.other
    if bayes is not None:
        numbers["bayes_slope"] = bayes.slope
    late = run.late_loss[-1]
    numbers["late_loss"] = dict(zip(problem.tasks, late.tolist(), strict=True))
    figure = _figure(problem, curves, bayes, lengths, (meaning, by_hand))
    return Finding(_sentence(numbers, lengths), numbers, {"bigrams": figure})


def _bayes_of(problem: Any) -> Callable[[Int[Tensor, "batch token"]], Tensor]:
    """The Bayes-optimal predictor as a function of tokens."""

    def predict(tokens: Int[Tensor, "batch token"]) -> Tensor:
        labels = torch.zeros(len(tokens), dtype=torch.long)
        found: Tensor = problem.oracles(Batch(tokens, tokens, labels))["Bayes"]
        return found

    return predict


def _numbers(
    error: float, curves: Mapping[str, HijackCurve], lengths: LengthTest, meaning: Meaning
) -> dict[str, Any]:
    hand, trained = curves["hand-set"], curves["trained"]
    numbers: dict[str, Any] = {
        "formula_error": error,
        "hand_set_agreement": hand.agreement,
        "trained_agreement": trained.agreement,
        "trained_r_squared": trained.r_squared,
        "trained_beta": trained.beta,
        "trained_gamma": trained.gamma,
        "hand_set_slope": hand.slope,
        "trained_slope": trained.slope,
        "td_layer_0": float(meaning.td[0].mean()),
        "td_last_layer": float(meaning.td[-1].mean()),
        "swap_own": meaning.own,
        "swap_other": meaning.other,
        "lengths": list(lengths.lengths),
    }
    for name, loss, accuracy in zip(lengths.names, lengths.loss, lengths.accuracy, strict=True):
        numbers[f"loss, {name}"] = loss.tolist()
        numbers[f"accuracy, {name}"] = accuracy.tolist()
    return numbers


def _sentence(numbers: Mapping[str, Any], lengths: LengthTest) -> str:
    held = ", ".join(
        f"{name} {one[0]:.2f} to {one[-1]:.2f}"
        for name, one in zip(lengths.names[:-1], lengths.accuracy.tolist(), strict=False)
    )
    return (
        f"The hand-set memory's logits are the formula's within {numbers['formula_error']:.0e}, "
        f"and the context wins as predicted in {100 * numbers['hand_set_agreement']:.0f} % of "
        "contexts. With two fitted strengths the formula explains "
        f"{100 * numbers['trained_r_squared']:.0f} % of the variance of the trained model's logit "
        f"gap and {100 * numbers['trained_agreement']:.0f} % of its winners. Per nat by "
        "which the rival's bigram is likelier, after one occurrence, the gap changes by "
        f"{numbers['hand_set_slope']:+.2f} in the hand-set memory and by "
        f"{numbers['trained_slope']:+.2f} in the trained model"
        + (f" ({numbers['bayes_slope']:+.2f} for Bayes)" if "bayes_slope" in numbers else "")
        + ". From "
        f"{lengths.lengths[0]} to {lengths.lengths[-1]} tokens the accuracy goes from {held}. At "
        f"the trigger its meaning has a TD of {numbers['td_layer_0']:.2f} after layer 0 and "
        f"{numbers['td_last_layer']:.2f} after the last layer, where the mean of another meaning "
        f"adds {numbers['swap_other']:.1f} nats and its own {numbers['swap_own']:.1f}; before "
        f"training, TD there is {numbers['td_untrained']:.2f} and another meaning's mean adds "
        f"{numbers['swap_untrained']:.1f}."
    )


@styled
def _figure(
    problem: Any,
    curves: Mapping[str, HijackCurve],
    bayes: HijackCurve | None,
    lengths: LengthTest,
    meanings: tuple[Meaning, Meaning],
) -> Figure:
    import matplotlib.pyplot as plt

    change = meanings[0].swapped - meanings[0].loss[:, None]

    figure = plt.figure(figsize=(13, 11.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3, 1.1])
    above, below = parts
    grid, last = above.subplots(3, 4), below.subplots(1, 4)
    for row, value in zip(grid, ("p_output", "p_rival", "logit_gap"), strict=True):
        for ax, sweep in zip(row, SWEEPS, strict=True):
            plot_hijack(curves, sweep, ax, value=value)
            if bayes is not None:
                frame = bayes.to_frame()
                frame = frame[frame.sweep == sweep].sort_values(sweep)
                ax.plot(frame[sweep], frame[value], ":", color="black", label="Bayes")
            if value != "logit_gap":
                ax.set_ylim(-0.04, 1.04)
            if ax is not row[0]:
                ax.set_ylabel("")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    _plot_agreement(curves, last[0])
    _plot_lengths(lengths, last[1])
    _plot_td(problem.tasks, *meanings, last[2])
    heat_map(
        change,
        problem.tasks,
        problem.tasks,
        last[3],
        label="change in NLL (nats)",
        colours="Reds",
        ends=(0.0, float(change.max())),
    )
    last[3].set(title="Swap at the trigger, last layer", xlabel="mean of", ylabel="sequences")
    return figure


def _plot_agreement(curves: Mapping[str, HijackCurve], ax: Axes) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        found, expected = curve.logit_gap.mean(1), curve.predicted_gap.mean(1)
        ax.plot(expected.tolist(), found.tolist(), MARKERS[index], color=COLOURS[index], label=name)
    ends = [min(*ax.get_xlim(), *ax.get_ylim()), max(*ax.get_xlim(), *ax.get_ylim())]
    ax.plot(ends, ends, color=GREY, linewidth=0.8)
    ax.set(xlabel="log P(o) / P(b), formula", ylabel="measured", title="All conditions")


def _plot_lengths(lengths: LengthTest, ax: Axes) -> None:
    for index, (name, accuracy) in enumerate(zip(lengths.names, lengths.accuracy, strict=True)):
        style = {"color": "black", "linestyle": ":"} if name == "Bayes" else task_style(index + 1)
        ax.plot(lengths.lengths, accuracy.tolist(), label=name, **style)
    ax.set(xlabel="tokens", ylabel="accuracy of the output", title="Longer sequences")
    ax.set_xticks(lengths.lengths)
    ax.legend(loc="lower left")


def _plot_td(tasks: tuple[str, ...], meaning: Meaning, by_hand: Meaning, ax: Axes) -> None:
    for index, task in enumerate(tasks):
        layers = range(len(meaning.td))
        ax.plot(layers, meaning.td[:, index].tolist(), label=task, **task_style(index, task))
    mean = by_hand.td.mean(1).tolist()
    ax.plot(range(len(mean)), mean, color="black", linewidth=2, label="hand-set, mean")
    ax.axhline(1 / len(tasks), color=GREY, linestyle="--", linewidth=0.9, label="chance")
    ax.set_xticks(range(len(meaning.td)))
    ax.set(xlabel="layer", ylabel="task decodability", ylim=(-0.03, 1.03), title="At the trigger")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
