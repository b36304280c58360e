"""What a run on concepts shows: how its error falls, where it attends, and what it transfers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.model import lengthened
from transformer_lens_taskvec.lab.problems.base import Batch, Finding, Problem
from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import COLOURS, GREY, legend_beside, new_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SEED = 51
_ORACLES = ("nearest demonstration", "Bayes", "known concept")
_CHANCE = 0.5


def concepts_finding(run: Any, *, n: int = 1_000) -> Finding:
    """Return how the error falls over training, where the query attends, and the OOD errors.

    Errors are shares of wrong signs over the late points; attention is the last query's. The
    exponential fall that the paper proves for its model is tested by two straight lines: of the
    logarithm of the error in the step (exponential), and in the logarithm of the step (a power
    law), over the checkpoints from where the error first is below 0.4 to where it comes within
    twice the lowest.

    Args:
        run: A run on :class:`Concepts`.
        n: Sequences of each kind.

    Returns:
        The finding, with the figures ``error`` (over steps), ``attention`` and ``transfer``.

    Example:
        >>> import dataclasses, tempfile
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.concepts import Concepts
        >>> from transformer_lens_taskvec.lab.problems.concepts.finding import concepts_finding
        >>> config = lab.TrainConfig(
        ...     problem=Concepts(n_points=5), n_layers=1, n_heads=1, d_model=8, n_checkpoints=1
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = lab.train(config, folder, steps=2, progress=False)
        ...     found = concepts_finding(run, n=20)
        >>> sorted(found.figures)
        ['attention', 'error', 'transfer']
    """
    problem = run.config.problem
    batch = problem.sample(n, torch.Generator().manual_seed(_SEED))
    errors = [
        _late_error(problem, _predicted(run.model(step), problem, batch), batch)
        for step in run.steps
    ]
    fits = _fits(run.steps, errors, lowest=1 / (n * (problem.n_points - problem.late_from)))
    model = run.model()
    attention = same_sign_attention(model, problem, n=n)
    transfer = _transfer(model, problem, n)
    layer, head = divmod(int(attention.same.argmax()), attention.same.shape[1])
    numbers: dict[str, Any] = {
        "error, last checkpoint": errors[-1],
        **{f"error, {kind}, {who}": e for kind, by in transfer.items() for who, e in by.items()},
        **fits,
        "steps": list(run.steps),
        "error by step": errors,
        "attention on same-sign demonstrations, best head": float(attention.same.max()),
        "attention on demonstrations, the same head": float(attention.demos[layer, head]),
        "best head": f"layer {layer}, head {head}",
        "same-sign demonstrations, by chance": attention.chance,
    }
    better = "the step (exponential)" if _exponential(fits) else "the log of the step (power law)"
    fit = (
        f"the fall of its logarithm is straighter in {better}: R^2 "
        f"{fits['R^2, exponential']:.2f} (exponential) and {fits['R^2, power law']:.2f} (power "
        f"law) over {fits['checkpoints in the fall']} checkpoints"
        if fits["checkpoints in the fall"] >= 3
        else "too few checkpoints lie in its fall to say how it falls"
    )
    transfers = ", ".join(
        f"{kind} {by['model']:.4f} (nearest demonstration {by['nearest demonstration']:.4f})"
        for kind, by in transfer.items()
    )
    sentence = (
        f"The late 0-1 error falls from {errors[0]:.3f} to {errors[-1]:.4f}; {fit}. "
        f"Layer {layer}, head {head} puts {attention.same.max():.1%} of its attention to "
        f"demonstrations on those of the query's sign (by chance {attention.chance:.1%}). "
        f"Errors: {transfers}."
    )
    figures = {
        "error": _error_figure(run.steps, errors, transfer["as trained"]),
        "attention": _attention_figure(attention),
        "transfer": _transfer_figure(transfer),
    }
    return Finding(sentence, numbers, figures)


@dataclass(frozen=True, repr=False)
class SameSignAttention(Shown):
    """Where the query's token attends.

    Attributes:
        same: Of the attention to demonstrations, the share on those of the query's sign,
            ``[layer, head]``, in the mean over sequences.
        demos: The attention to demonstrations, ``[layer, head]``; the rest is the query's own.
        chance: The share of demonstrations that are of the query's sign.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.concepts.finding import SameSignAttention
        >>> SameSignAttention(torch.tensor([[0.5]]), torch.tensor([[0.9]]), 0.5)
        SameSignAttention(1 layers, 1 heads: at most 0.50 on the query's sign, 0.50 by chance)
    """

    same: Float[Tensor, "layer head"]
    demos: Float[Tensor, "layer head"]
    chance: float

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and head, with columns ``layer, head, same, demos``."""
        axes = {"layer": range(self.same.shape[0]), "head": range(self.same.shape[1])}
        return grid_frame(axes, {"same": self.same, "demos": self.demos})

    def __repr__(self) -> str:
        layers, heads = self.same.shape
        return (
            f"SameSignAttention({layers} layers, {heads} heads: at most {self.same.max():.2f} on "
            f"the query's sign, {self.chance:.2f} by chance)"
        )


def same_sign_attention(
    model: Any, problem: Problem, *, n: int = 1_000, seed: int = 0
) -> SameSignAttention:
    """Return the attention of the last query to demonstrations of its own sign.

    A demonstration's two tokens count together.

    Args:
        model: A model of the lab.
        problem: A problem whose outputs are signs and whose inputs and outputs alternate.
        n: Sequences.
        seed: Their seed.

    Raises:
        ValueError: If the outputs are not signs.

    Example:
        >>> from transformer_lens_taskvec.lab.model import RegressionConfig, RegressionTransformer
        >>> from transformer_lens_taskvec.lab.problems.concepts import Concepts
        >>> from transformer_lens_taskvec.lab.problems.concepts.finding import same_sign_attention
        >>> model = RegressionTransformer(RegressionConfig(d_input=32, n_points=16, n_layers=2))
        >>> found = same_sign_attention(model, Concepts(), n=200)
        >>> bool((found.same - found.chance).abs().max() < 0.02)  # untrained
        True
    """
    batch = problem.sample(n, torch.Generator().manual_seed(1_000 * seed + _SEED + 1))
    if batch.ys.ndim != 2 or not bool((batch.ys.abs() == 1).all()):
        raise ValueError(
            f"the outputs of {type(problem).__name__} are not signs; give a problem whose ys are "
            "1 and -1"
        )
    agree = (batch.ys[:, :-1] == batch.ys[:, -1:]).float()
    patterns: list[Tensor] = []

    def note(pattern: Tensor, hook: Any) -> None:
        patterns.append(pattern[:, :, -1])

    names = [hook_name("pattern", layer) for layer in range(model.cfg.n_layers)]
    forward = partial(model.run_with_hooks, fwd_hooks=[(name, note) for name in names])
    with torch.no_grad():
        problem.predict(forward, batch)
    on = rearrange(
        torch.stack(patterns)[..., :-1],
        "layer batch head (demo two) -> layer head batch demo two",
        two=2,
    ).sum(-1)
    demos = on.sum(-1)
    same = (on * agree).sum(-1) / demos.clamp(min=1e-9)
    return SameSignAttention(same.mean(-1), demos.mean(-1), float(agree.mean()))


def _predicted(model: Any, problem: Problem, batch: Batch) -> Float[Tensor, "batch point"]:
    with torch.no_grad():
        return problem.predict(model, batch)


def _late_error(problem: Problem, predictions: Float[Tensor, "batch point"], batch: Batch) -> float:
    """The share of wrong signs over the late points."""
    right = problem.right(predictions, batch.ys, batch.labels[:, None])
    return 1 - float(right[:, problem.late_from :].double().mean())


def _transfer(model: Any, problem: Any, n: int) -> dict[str, dict[str, float]]:
    """The late error of the model and of the oracles, as trained and out of distribution."""
    kinds = {
        "as trained": problem,
        "skewed": problem.skewed(),
        "switched": problem.switched(),
        "twice as long": replace(problem, n_points=2 * problem.n_points),
    }
    found = {}
    for name, kind in kinds.items():
        batch = kind.sample(n, torch.Generator().manual_seed(_SEED))
        able = lengthened(model, kind.n_points) if kind.n_points > problem.n_points else model
        by = {"model": _late_error(kind, _predicted(able, kind, batch), batch)}
        oracles = kind.oracles(batch)
        found[name] = by | {who: _late_error(kind, oracles[who], batch) for who in _ORACLES}
    return found


def _fits(steps: Sequence[int], errors: Sequence[float], lowest: float) -> dict[str, Any]:
    """The straightness of the log error in the step and in its log, over the fall."""
    from scipy.stats import linregress

    floor = 2 * max(min(errors), lowest)
    low = [index for index, error in enumerate(errors) if error < 0.4 and steps[index] > 0]
    start = low[0] if low else len(errors)
    end = next((i for i in range(start, len(errors)) if errors[i] <= floor), len(errors))
    span = range(start, end)
    found: dict[str, Any] = {"checkpoints in the fall": len(span)}
    if len(span) < 3:
        return found
    logs = torch.tensor([errors[index] for index in span]).double().log().numpy()
    at = torch.tensor([steps[index] for index in span]).double()
    straight, power = linregress(at.numpy(), logs), linregress(at.log().numpy(), logs)
    return found | {
        "R^2, exponential": float(straight.rvalue**2),
        "R^2, power law": float(power.rvalue**2),
        "rate per 1000 steps": float(-1000 * straight.slope),
        "exponent of the power law": float(-power.slope),
    }


def _exponential(fits: dict[str, Any]) -> bool:
    return bool(fits.get("R^2, exponential", 0.0) > fits.get("R^2, power law", 0.0))


@styled
def _error_figure(
    steps: Sequence[int], errors: Sequence[float], oracles: dict[str, float]
) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.0, 2.9), layout="constrained", sharey=True)
    pairs = zip(steps, errors, strict=True)
    shown = [(step, error) for step, error in pairs if step > 0 and error > 0]
    for ax, scale in zip(axes, ("linear", "log"), strict=True):
        ax.plot(*zip(*shown, strict=True), color=COLOURS[0], marker="o", label="model")
        for name, line in zip(_ORACLES[:2], ("--", ":"), strict=True):
            if oracles[name] > 0:
                ax.axhline(oracles[name], color=GREY, linestyle=line, label=name)
        ax.set(xlabel=f"training step ({scale} axis)", xscale=scale, yscale="log")
    axes[0].set_ylabel("0-1 error, late points (if not 0)")
    axes[0].set_title("Straight if exponential")
    axes[1].set_title("Straight if a power law")
    legend_beside(axes[1])
    return figure


@styled
def _attention_figure(attention: SameSignAttention) -> Figure:
    import matplotlib.pyplot as plt

    ax = new_axes(None)
    n_layers, n_heads = attention.same.shape
    width = 0.8 / n_heads
    for head in range(n_heads):
        places = [layer + width * (head - (n_heads - 1) / 2) for layer in range(n_layers)]
        values = attention.same[:, head].tolist()
        ax.bar(
            places, values, 0.9 * width, color=COLOURS[head % len(COLOURS)], label=f"head {head}"
        )
    ax.axhline(attention.chance, color="black", linestyle=":", linewidth=0.9, label="chance")
    ax.set_xticks(range(n_layers))
    ax.set(
        xlabel="layer (from 0)",
        ylabel="share on the query's sign",
        ylim=(0, 1),
        title="Attention of the query to demonstrations",
    )
    figure: Figure = plt.gcf()
    legend_beside(ax)
    return figure


@styled
def _transfer_figure(transfer: dict[str, dict[str, float]]) -> Figure:
    import matplotlib.pyplot as plt

    ax = new_axes(None, (6.0, 2.9))
    names = ("model", *_ORACLES)
    for index, name in enumerate(names):
        places = [place + 0.2 * (index - 1.5) for place in range(len(transfer))]
        values = [by[name] for by in transfer.values()]
        bars = ax.bar(places, values, 0.18, color=(*COLOURS[:3], GREY)[index], label=name)
        ax.bar_label(bars, fmt=lambda value: f"{value:.2f}".lstrip("0") if value else "0", size=6)
    ax.axhline(_CHANCE, color="black", linestyle=":", linewidth=0.9, label="chance")
    ax.set_xticks(range(len(transfer)), list(transfer))
    ax.set(ylim=(0, 1.1), ylabel="0-1 error, late points", title="Out of distribution")
    figure: Figure = plt.gcf()
    legend_beside(ax)
    return figure
