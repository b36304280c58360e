"""Linear probes: what can be read off a model's residual stream, by layer and kind of token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.problems.base import Batch, Problem, balanced_labels
from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import GREY, legend_beside, task_style, two_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Targets = Callable[[Batch], Mapping[str, Tensor]]
"""Gives what to look for in a model, by name: ``[batch, point]`` or ``[batch, point, feature]``."""

Kind = Literal["x", "y"]
KINDS: tuple[Kind, ...] = ("x", "y")
"""The kinds of token: of an input ``x``, where the model predicts, and of an output ``y``."""

_UNTRAINED_SEED = 1_000_003


@dataclass(frozen=True, repr=False)
class ProbeErrors(Shown):
    """The relative errors of linear probes: 0 if the target can be read off, 1 for its mean.

    The relative error is the sum of squared errors on held-out sequences divided by that of the
    target's mean, over all of the target's numbers. Layers are counted from 0; layer -1 is the
    embedding, before the first block.

    Attributes:
        targets: What is looked for.
        error: ``[kind, layer + 1, target]``; kinds are ``KINDS``, the tokens ``x`` and ``y``.
        untrained: The same in the model before training, which tells what its size alone gives.
        shuffled: The same with each sequence's targets in training replaced by another's; about 1.
        points: The first point, and the one after the last, that the probes see.
        n_sequences: Held-out sequences per latent task.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.represented import Represented
        >>> from transformer_lens_taskvec.lab.problems.represented import probe_targets
        >>> problem = Represented.single()
        >>> model = lab.RegressionTransformer(lab.RegressionConfig(6, 16, n_layers=2, d_model=64))
        >>> found = probe_targets(model, problem, n=40)
        >>> found.targets, found.error.shape
        (('x', 'Phi(x)', 'prediction', 'y'), torch.Size([2, 3, 4]))
        >>> bool(found.of("x", "x")[0] < 0.01)  # the embedding is linear in x
        True
    """

    targets: tuple[str, ...]
    error: Float[Tensor, "kind stage target"]
    untrained: Float[Tensor, "kind stage target"]
    shuffled: Float[Tensor, "kind stage target"]
    points: tuple[int, int]
    n_sequences: int

    def of(self, target: str, kind: Kind) -> Float[Tensor, " stage"]:
        """A target's errors at one kind of token, ``[layer + 1]``.

        Raises:
            ValueError: If there is no such target or kind of token.
        """
        return self._at(self.error, target, kind)

    def gain(self, target: str, kind: Kind) -> Float[Tensor, " stage"]:
        """How much lower a target's errors are than before training, ``[layer + 1]``."""
        return self._at(self.untrained, target, kind) - self.of(target, kind)

    def best_layer(self, target: str, kind: Kind) -> int:
        """The layer at which a target's error is lowest; -1 for the embedding."""
        return int(self.of(target, kind).argmin()) - 1

    def to_frame(self) -> pd.DataFrame:
        """One row per kind of token, layer and target.

        Columns ``token, layer, target, error, untrained, shuffled``.
        """
        import pandas as pd

        names = ("error", "untrained", "shuffled")
        return pd.DataFrame(
            {
                "token": kind,
                "layer": layer - 1,
                "target": target,
                **{name: float(getattr(self, name)[at, layer, column]) for name in names},
            }
            for at, kind in enumerate(KINDS)
            for layer in range(self.error.shape[1])
            for column, target in enumerate(self.targets)
        )

    def __repr__(self) -> str:
        best = ", ".join(
            f"{target} at {kind} {float(self.of(target, kind).min()):.3f} (layer "
            f"{self.best_layer(target, kind)})"
            for target in self.targets
            for kind in KINDS
        )
        return f"ProbeErrors({best})"

    def _at(
        self, errors: Float[Tensor, "kind stage target"], target: str, kind: Kind
    ) -> Float[Tensor, " stage"]:
        for value, known, name in ((target, self.targets, "target"), (kind, KINDS, "token")):
            if value not in known:
                raise ValueError(f"no {name} {value!r} here; there are: {', '.join(known)}")
        return errors[KINDS.index(kind), :, self.targets.index(target)]


def probe_targets(
    model: Any,
    problem: Problem,
    *,
    targets: Targets | None = None,
    n: int = 500,
    penalty: float = 1e-6,
    seed: int = 0,
) -> ProbeErrors:
    """Return how well ridge regression reads targets off the residual stream (Guo et al. 2024).

    One probe per layer, kind of token and target, over all late points together, fitted on ``n``
    sequences per latent task and tested on as many others.

    Args:
        model: A model of the lab, such as ``run.model()``.
        problem: What the sequences are drawn from.
        targets: What to look for: a function of a :class:`Batch` that gives values
            ``[batch, point]`` or ``[batch, point, feature]`` by name; by default the problem's
            method ``targets``.
        n: Sequences per latent task.
        penalty: Of ridge regression, in units of the activations' mean variance.
        seed: Seed of the sequences.

    Raises:
        ValueError: If the problem has no targets of its own and none are given, a target has the
            wrong shape, or ``n`` or the penalty is not positive.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> def sums(batch):
        ...     return {"sum of squares": batch.xs.square().sum(-1)}
        >>> found = probe_targets(run.model(), run.config.problem, targets=sums, n=50)
        >>> bool(found.of("sum of squares", "x").min() < 0.8)
        True
    """
    if n < 1:
        raise ValueError(f"n is {n}; ask for 1 sequence or more")
    if penalty <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}")
    if targets is None:
        if not hasattr(problem, "targets"):
            raise ValueError(
                f"{type(problem).__name__} has no targets of its own; give targets=, a function of "
                "a Batch that returns values [batch, point] by name"
            )
        targets = problem.targets
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    labels = balanced_labels(len(problem.tasks), n, device)
    train, test = (problem.sample(len(labels), generator, labels=labels) for _ in range(2))
    wanted, held_out = (_checked(targets(batch), batch) for batch in (train, test))
    order = torch.randperm(len(labels), generator=generator, device=device)
    mixed = {name: of[order] for name, of in wanted.items()}
    untrained = type(model)(model.cfg, seed=_UNTRAINED_SEED).to(device)
    before, after = (
        [residuals(of, problem, b) for b in (train, test)] for of in (untrained, model)
    )
    errors_of = partial(_errors_of, problem=problem, penalty=penalty)
    errors = {
        "error": errors_of(after, (wanted, held_out)),
        "untrained": errors_of(before, (wanted, held_out)),
        "shuffled": errors_of(after, (mixed, held_out)),
    }
    seen = (problem.late_from, problem.n_points)
    return ProbeErrors(tuple(wanted), **errors, points=seen, n_sequences=n)


def residuals(
    model: Any, problem: Problem, batch: Batch
) -> Float[Tensor, "stage batch token d_model"]:
    """Return the residual stream before the first block and after each.

    Args:
        model: A model of the lab.
        problem: What the sequences are of.
        batch: The sequences.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> batch = run.config.problem.sample(3, torch.Generator())
        >>> residuals(run.model(), run.config.problem, batch).shape
        torch.Size([6, 3, 31, 64])
    """
    after = [hook_name("resid_post", layer) for layer in range(model.cfg.n_layers)]
    found: list[Tensor] = []

    def note(residual: Tensor, hook: Any) -> None:
        found.append(residual)

    hooks = [(name, note) for name in (hook_name("resid_pre", 0), *after)]
    with torch.no_grad():
        problem.predict(partial(model.run_with_hooks, fwd_hooks=hooks), batch)
    return torch.stack(found)


@styled
def plot_probes(errors: ProbeErrors, axes: Any = None) -> tuple[Axes, Axes]:
    """Draw the probes' errors by layer, at the tokens ``x`` and, below, at the tokens ``y``.

    Dashed lines are the same probes before training.

    Args:
        errors: From :func:`probe_targets`.
        axes: Two axes to draw on, one above the other; by default new ones.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.represented import Represented
        >>> model = lab.RegressionTransformer(lab.RegressionConfig(6, 16, n_layers=2, d_model=64))
        >>> above, _ = plot_probes(probe_targets(model, Represented.single(), n=20))
        >>> above.get_ylabel()
        'relative error at x tokens'
    """
    above, below = two_axes(axes)
    stages = list(range(errors.error.shape[1]))
    for ax, kind in zip((above, below), KINDS, strict=True):
        for index, target in enumerate(errors.targets):
            style = task_style(index)
            ax.plot(stages, errors.of(target, kind).tolist(), label=target, **style)
            before = errors.untrained[KINDS.index(kind), :, index].tolist()
            ax.plot(stages, before, color=style["color"], linestyle="--", linewidth=0.8, alpha=0.7)
        ax.plot([], [], color=GREY, linestyle="--", linewidth=0.8, label="before training")
        ax.set(ylabel=f"relative error at {kind} tokens", ylim=(-0.03, 1.13))
    name_stages(below, len(stages))
    above.set_title("Linear probes by layer")
    legend_beside(above)
    return above, below


def name_stages(ax: Axes, n_stages: int) -> None:
    """Name the places on the horizontal axis: the embedding, and each layer.

    Args:
        ax: The axes, on which the places are 0, 1, and so on.
        n_stages: How many there are.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plt.subplots()[1]
        >>> name_stages(ax, 3)
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['embed', '0', '1']
        >>> plt.close()
    """
    ax.set_xticks(range(n_stages), ["embed", *map(str, range(n_stages - 1))])
    ax.set_xlabel("after layer")


def _checked(
    found: Mapping[str, Tensor], batch: Batch
) -> dict[str, Float[Tensor, "batch point _"]]:
    """The targets, each with an axis of features."""
    shape = tuple(batch.ys.shape[:2])
    for name, values in found.items():
        if values.shape[:2] != shape or values.ndim not in (2, 3):
            raise ValueError(
                f"target {name!r} has shape {tuple(values.shape)}; expected [batch, point], "
                f"{shape}, or [batch, point, feature]"
            )
    return {name: of[..., None] if of.ndim == 2 else of for name, of in found.items()}


def _tokens(problem: Problem, kind: Kind) -> tuple[list[int], list[int]]:
    """The places of the late points' tokens of a kind, and those points; the last y is not read."""
    last = problem.n_points - (kind == "y")
    points = list(range(min(problem.late_from, last - 1), last))
    return [problem.query_at(point) + (kind == "y") for point in points], points


def _flat(values: Float[Tensor, "batch point d"]) -> Float[Tensor, "example d"]:
    return rearrange(values, "batch point d -> (batch point) d").double()


def _errors_of(
    read: list[Float[Tensor, "stage batch token d_model"]],
    wanted: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    *,
    problem: Problem,
    penalty: float,
) -> Float[Tensor, "kind stage target"]:
    """Probes' relative errors, given what is read and wanted on training and held-out sequences."""
    by_kind = []
    for kind in KINDS:
        at, points = _tokens(problem, kind)
        goals, truths = ([_flat(of[:, points]) for of in part.values()] for part in wanted)
        rows = [
            _relative_errors(_flat(train[:, at]), goals, _flat(test[:, at]), truths, penalty)
            for train, test in zip(*read, strict=True)
        ]
        by_kind.append(torch.stack(rows))
    return torch.stack(by_kind).float().cpu()


def _relative_errors(
    read: Float[Tensor, "example d"],
    wanted: list[Float[Tensor, "example _"]],
    unseen: Float[Tensor, "other d"],
    held_out: list[Float[Tensor, "other _"]],
    penalty: float,
) -> Float[Tensor, " target"]:
    """Of ridge regression with an intercept: all targets of one layer and kind of token at once."""
    mean = reduce(read, "example d -> d", "mean")
    centred = read - mean
    gram = einsum(centred, centred, "example row, example column -> row column")
    scale = gram.diagonal().mean().clamp(min=1e-30)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + penalty * scale * identity)
    errors = []
    for goal, truth in zip(wanted, held_out, strict=True):
        offset = goal.mean(0)
        weights = torch.cholesky_solve(centred.T @ (goal - offset), factor)
        missed = truth - offset - (unseen - mean) @ weights
        errors.append(missed.square().sum() / (truth - truth.mean(0)).square().sum())
    return torch.stack(errors)
