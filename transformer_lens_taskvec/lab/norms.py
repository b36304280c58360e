"""The norm of the residual stream over training, against the error.

That norms tell of an optimiser inside the model is a claim of Wu and Varshney (2023, 2310.05884).
Every run records the norms at each checkpoint. Two quantities that both change steadily with the
step have a high rank correlation whether or not one has to do with the other; the partial
correlation takes out what each owes to the logarithm of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.scores import LOSS_LABELS
from transformer_lens_taskvec.lab.training.on_problem import Run
from transformer_lens_taskvec.plots import figure_of, styled
from transformer_lens_taskvec.plots.style import COLOURS, GREY, legend_beside, whole_numbers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class NormsAndError(Shown):
    """The mean norms of a run's residual stream, and its error, at each checkpoint.

    Attributes:
        steps: The checkpoints.
        norms: Before the first block and after each, ``[checkpoint, layer + 1, token]``.
        late_loss: The mean loss over late points and tasks, ``[checkpoint]``.
        loss_kind: What the loss is, as ``Scores.loss_kind``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.norms import norms_and_error
        >>> norms_and_error(lab.shipped_run()).norms.shape
        torch.Size([12, 6, 31])
    """

    steps: tuple[int, ...]
    norms: Float[Tensor, "checkpoint layer token"]
    late_loss: Float[Tensor, " checkpoint"]
    loss_kind: str

    @property
    def rank_correlation(self) -> Float[Tensor, " layer"]:
        """Spearman's, of the mean norm over tokens and the late loss, over all checkpoints.

        The loss is nearly monotone in the step. If a norm is too, a value near 1 or -1 says little.
        """
        from scipy.stats import spearmanr  # takes half a second to import

        by_layer = self.norms.mean(-1).T.tolist()
        loss = self.late_loss.tolist()
        return torch.tensor([float(spearmanr(norm, loss).statistic) for norm in by_layer])

    @property
    def partial_correlation(self) -> Float[Tensor, " layer"]:
        """Pearson's, of the logarithms of mean norm and loss, given the logarithm of the step.

        A line in ``log step`` is fitted to each and taken out. Step 0, which has no logarithm, is
        left out. NaN with fewer than four other checkpoints. Checkpoints of one run are not
        independent, so there is no test of significance.
        """
        trained = torch.tensor(self.steps) > 0
        steps = torch.tensor(self.steps)[trained].double().log()
        if len(steps) < 4:
            return torch.full(self.norms.shape[1:2], torch.nan)
        line = torch.stack([torch.ones_like(steps), steps], dim=1)
        loss = self.late_loss[trained].double().log()
        values = torch.cat([self.norms[trained].mean(-1).double().log(), loss[:, None]], dim=1)
        left = values - line @ torch.linalg.lstsq(line, values).solution
        return torch.corrcoef(left.T)[-1, :-1].float()

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint and layer, with ``step, layer, norm, late_loss``.

        The layer is 0 for the stream before the first block.
        """
        import pandas as pd

        rows = [
            {"step": step, "layer": layer, "norm": norm, "late_loss": loss}
            for step, norms, loss in zip(
                self.steps, self.norms.mean(-1).tolist(), self.late_loss.tolist(), strict=True
            )
            for layer, norm in enumerate(norms)
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        def spelled(values: Tensor) -> str:
            return ", ".join(f"{value:.2f}" for value in values.tolist())

        return (
            f"NormsAndError({len(self.steps)} checkpoints to step {self.steps[-1]}: rank "
            f"correlation with the late loss {spelled(self.rank_correlation)} before the first "
            f"block and after each; given log step {spelled(self.partial_correlation)})"
        )


def norms_and_error(run: Run) -> NormsAndError:
    """Return the norms and the error that a run recorded at its checkpoints.

    Args:
        run: A run on a problem.

    Raises:
        ValueError: If the run has fewer than two checkpoints, or recorded no norms, as with a model
            that lacks the hook points of the residual stream.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.norms import norms_and_error
        >>> found = norms_and_error(lab.shipped_run())
        >>> found.rank_correlation.shape, found.partial_correlation.shape
        (torch.Size([6]), torch.Size([6]))
    """
    if len(run.steps) < 2:
        raise ValueError(
            f"{run.path} has {len(run.steps)} checkpoints; norms over training need 2 or more"
        )
    if not all(one.numel() for one in run.norms):
        raise ValueError(
            f"{run.path} recorded no norms: its model has no hook points resid_pre and resid_post"
        )
    kind = run.config.problem.loss_kind
    return NormsAndError(run.steps, torch.stack(run.norms), run.late_loss.mean(-1), kind)


@styled
def plot_norms(run: Run) -> Figure:
    """Draw the norm of the residual stream by layer, token and step, against the error.

    Left, over training: the mean norm at each layer, and the late error. Right: the norm at each
    token of the last checkpoint, and the correlations of norm and error over checkpoints.

    Args:
        run: A run on a problem.

    Raises:
        ValueError: As for :func:`norms_and_error`.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.norms import plot_norms
        >>> [ax.get_ylabel() for ax in plot_norms(lab.shipped_run()).axes]
        ['mean norm', 'norm', 'squared error, late points', 'correlation with the error']
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    found = norms_and_error(run)
    grid = plt.subplots(2, 2, figsize=(10, 5.6), layout="constrained")[1]
    over_steps, by_token, error, correlation = grid.flat
    layers = range(found.norms.shape[1])
    for layer, colour in zip(layers, COLOURS, strict=False):
        name = "before block 0" if layer == 0 else f"after block {layer - 1}"
        means = found.norms[:, layer].mean(-1).tolist()
        over_steps.plot(found.steps, means, color=colour, marker="o", label=name)
        by_token.plot(found.norms[-1, layer].tolist(), color=colour, label=name)
    error.plot(found.steps, found.late_loss.tolist(), color="black", marker="o")
    first = next((step for step in found.steps if step > 0), 1)
    for ax in (over_steps, error):
        ax.set_xscale("symlog", linthresh=first)
        ax.set(xlim=(0, 1.1 * found.steps[-1]))
    error.set_yscale("log")
    over_steps.set(ylabel="mean norm", title="Residual stream over training")
    label = f"{LOSS_LABELS[found.loss_kind]}, late points"
    error.set(xlabel="training step", ylabel=label)
    by_token.set_yscale("log")
    by_token.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_token.yaxis.set_major_formatter(ScalarFormatter())
    by_token.yaxis.set_minor_formatter(NullFormatter())
    by_token.set(xlabel="token", ylabel="norm", title=f"Step {found.steps[-1]}")
    places = torch.arange(len(layers))
    shown = (
        ("rank", found.rank_correlation, GREY),
        ("given log step", found.partial_correlation, COLOURS[1]),
    )
    for shift, (name, values, colour) in zip((-0.2, 0.2), shown, strict=True):
        correlation.bar((places + shift).tolist(), values.tolist(), 0.4, color=colour, label=name)
    correlation.axhline(0, color="black", linewidth=0.7)
    correlation.set_xticks(places.tolist(), ["before", *(str(layer) for layer in layers[:-1])])
    correlation.set(xlabel="residual stream after block", ylabel="correlation with the error")
    correlation.set(ylim=(-1.05, 1.05))
    whole_numbers(by_token)
    legend_beside(by_token)
    legend_beside(correlation)
    return figure_of(over_steps)
