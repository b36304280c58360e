"""Pasting: the upper layers of a model on linear data, through an embedding trained for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.model import RegressionTransformer, interleave
from transformer_lens_taskvec.lab.oracles import ridge
from transformer_lens_taskvec.lab.problems.base import (
    Batch,
    Problem,
    check_sizes,
    draw_labels,
    normal,
    with_noise,
)
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import (
    GREY,
    legend_beside,
    new_axes,
    task_style,
    whole_numbers,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_EVAL_SEED = 3_000_001
CURVES = ("pasted", "shuffled weights", "no lower module")
"""The upper module with a trained embedding, and the two controls; see :class:`Pasted`."""


@dataclass(frozen=True)
class LinearVectors(Problem):
    """Linear regression on Gaussian vectors, which stand for a representation.

    ``y = w.u + e`` with independent coordinates of ``u``, ``w ~ N(0, weight_variance I)`` and
    ``e ~ N(0, noise_variance)``.

    Attributes:
        dim: The dimension of ``u``.
        variances: Of the coordinates of ``u``; None if all are 1.
        noise_variance: The variance of ``e``.
        weight_variance: The variance of each weight.
        n_points: Pairs in a sequence, the query included.
        tasks: The only task.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.represented import LinearVectors
        >>> LinearVectors().sample(4, torch.Generator()).ys.shape
        torch.Size([4, 16])
    """

    dim: int = 6
    variances: tuple[float, ...] | None = None
    noise_variance: float = 0.01
    weight_variance: float = 1.0
    n_points: int = 16
    tasks: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, self.noise_variance)
        if self.weight_variance <= 0:
            raise ValueError(f"weight_variance must be positive, got {self.weight_variance}")
        given = self.variances
        if given is not None and (len(given) != self.dim or min(given) <= 0):
            raise ValueError(f"variances must be {self.dim} positive numbers, got {given}")

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        labels = draw_labels(batch_size, 1, generator, labels)
        vectors = normal(generator, batch_size, self.n_points, self.dim)
        if self.variances is not None:
            vectors = vectors * torch.tensor(self.variances, device=vectors.device).sqrt()
        weights = self.weight_variance**0.5 * normal(generator, batch_size, self.dim)
        clean = einsum(vectors, weights, "batch point dim, batch dim -> batch point")
        return Batch(vectors, with_noise(clean, self.noise_variance, generator), labels)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """Ridge with the best penalty, which is the optimum, and zero."""
        penalty = self.noise_variance / self.weight_variance or 1e-6
        best = ridge(batch.xs, batch.ys, penalty=penalty)
        return {"ridge": best, "zero": torch.zeros_like(best)}


@dataclass(frozen=True, repr=False)
class Pasted(Shown):
    """The error of a model's upper layers on linear data, with controls and yardsticks.

    ``pasted`` is the upper module with an embedding trained for it. In ``shuffled weights`` the
    entries of each of its parameters are in random order, and an embedding is trained for it in the
    same way. ``no lower module`` is the upper module on the model's own embedding, untrained.

    Attributes:
        layer: The last layer left out; the upper module begins after it.
        names: ``CURVES``, then the oracles of the linear data.
        loss: Mean squared error, ``[name, point]``.
        late_from: The first of the points that :meth:`late` averages.
        steps: The steps of each embedding's training.
        n_sequences: Sequences in the means.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.represented import Pasted
        >>> Pasted(1, ("pasted", "ridge"), torch.tensor([[2.0, 1.0], [2.0, 0.5]]), 1, 9, 9)
        Pasted(after layer 1, late squared error: pasted 1.0000, ridge 0.5000)
    """

    layer: int
    names: tuple[str, ...]
    loss: Float[Tensor, "name point"]
    late_from: int
    steps: int
    n_sequences: int

    def late(self, name: str) -> float:
        """The mean error over the late points.

        Raises:
            ValueError: If there is no such curve.
        """
        if name not in self.names:
            raise ValueError(f"no curve {name!r} here; there are: {', '.join(self.names)}")
        return float(self.loss[self.names.index(name), self.late_from :].mean())

    def to_frame(self) -> pd.DataFrame:
        """One row per curve, with columns ``name`` and ``late_loss``."""
        import pandas as pd

        late = [self.late(name) for name in self.names]
        return pd.DataFrame({"name": self.names, "late_loss": late})

    def __repr__(self) -> str:
        late = ", ".join(f"{name} {self.late(name):.4f}" for name in self.names)
        return f"Pasted(after layer {self.layer}, late squared error: {late})"


class AffineEmbedding(nn.Module):
    """Reads ``u_i`` at the tokens ``x`` and ``(u_i, y_i)`` at the tokens ``y``, each affinely.

    The lower module of a model copies the representation of ``x_i`` to the token of ``y_i``; no map
    of single tokens can, so the embedding is given both there. Positions have biases of their own.

    Args:
        dim: The dimension of ``u``.
        n_tokens: The largest number of tokens.
        d_model: Width of the residual stream.
        seed: Seed of the initial weights.

    Example:
        >>> embed = AffineEmbedding(6, 31, 64)
        >>> embed(torch.randn(2, 16, 6), torch.randn(2, 16)).shape
        torch.Size([2, 31, 64])
    """

    def __init__(self, dim: int, n_tokens: int, d_model: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.at_x = nn.Parameter(torch.randn(d_model, dim, generator=generator) / dim**0.5)
        self.at_y = nn.Parameter(torch.randn(d_model, dim + 1, generator=generator) / dim**0.5)
        self.bias = nn.Parameter(0.02 * torch.randn(n_tokens, d_model, generator=generator))

    def forward(
        self, vectors: Float[Tensor, "batch point dim"], ys: Float[Tensor, "batch point"]
    ) -> Float[Tensor, "batch token d_model"]:
        """The residual stream that the upper module is given."""
        n_tokens = 2 * vectors.shape[1] - 1
        pairs = torch.cat([vectors, ys[..., None]], dim=-1)[:, :-1]
        embedded = vectors.new_zeros(len(vectors), n_tokens, len(self.at_x))
        embedded[:, ::2] = vectors @ self.at_x.T
        embedded[:, 1::2] = pairs @ self.at_y.T
        return embedded + self.bias[:n_tokens]


def paste_upper(
    model: RegressionTransformer,
    layer: int,
    on: Problem,
    *,
    steps: int = 1_000,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    n: int = 1_000,
    seed: int = 0,
) -> Pasted:
    """Train an affine embedding for the layers above one, on linear data (Guo et al. 2024).

    If the upper layers by themselves do in-context linear regression on whatever representation the
    lower ones give, they come near ridge on linear data. Only the embedding is trained, by Adam
    with a rate that falls linearly to zero; the model is not changed.

    Args:
        model: A model of the lab, such as ``run.model()``.
        layer: The last layer to leave out: the one after which ``Phi(x)`` is best at tokens ``y``.
        on: Linear data, such as ``Represented().linear_vectors()``; of the model's dimension.
        steps: Training steps of the embedding.
        batch_size: Sequences per step.
        learning_rate: Adam's, at the beginning.
        n: Sequences that the errors are measured on.
        seed: Seed of the embedding, its data, and the order of the shuffled weights.

    Raises:
        ValueError: If no layer or no embedding is left, or the data do not fit the model.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> model = lab.RegressionTransformer(lab.RegressionConfig(6, 16, n_layers=2, d_model=64))
        >>> found = paste_upper(model, 0, LinearVectors(), steps=3, n=50)
        >>> found.names
        ('pasted', 'shuffled weights', 'no lower module', 'ridge', 'zero')
    """
    cfg = model.cfg
    if not 0 <= layer < cfg.n_layers - 1:
        raise ValueError(
            f"layer must be in [0, {cfg.n_layers - 2}], so that an upper module is left of the "
            f"model's {cfg.n_layers} layers; got {layer}"
        )
    if on.dim != cfg.d_input or on.n_points > cfg.n_points:
        raise ValueError(
            f"on has {on.n_points} points of {on.dim} dimensions; the model takes at most "
            f"{cfg.n_points} of {cfg.d_input}"
        )
    if steps < 1 or batch_size < 1 or n < 1:
        raise ValueError(f"steps, batch_size and n must be 1 or more; got {steps, batch_size, n}")
    device = model.W_pos.device
    upper = _Upper(model, layer).requires_grad_(False)
    shuffled = _shuffled(upper, seed)
    batch = on.sample(n, torch.Generator(device).manual_seed(_EVAL_SEED + seed))
    curves = {}
    for name, module in zip(CURVES, (upper, shuffled), strict=False):
        embed = AffineEmbedding(on.dim, cfg.n_ctx, cfg.d_model, seed=seed).to(model.W_pos)
        generator = torch.Generator(device).manual_seed(seed)
        optimizer = torch.optim.Adam(embed.parameters(), lr=learning_rate)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-2, total_iters=steps)
        for _ in range(steps):
            drawn = on.sample(batch_size, generator)
            loss = (module(embed(drawn.xs, drawn.ys)) - drawn.ys).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
        with torch.no_grad():
            curves[name] = module(embed(batch.xs, batch.ys))
    with torch.no_grad():
        tokens = interleave(batch.xs, batch.ys)
        curves[CURVES[2]] = upper(model.read_in(tokens) + model.W_pos[: tokens.shape[1]])
    curves |= on.oracles(batch)
    loss = torch.stack([(curve - batch.ys).square().mean(0) for curve in curves.values()])
    return Pasted(layer, tuple(curves), loss.cpu(), on.late_from, steps, n)


@styled
def plot_pasting(pasted: Pasted, ax: Axes | None = None) -> Axes:
    """Draw the error of the pasted module by position, with its controls and yardsticks.

    Args:
        pasted: From :func:`paste_upper`.
        ax: Where to draw; by default on new axes.

    Example:
        >>> loss = torch.tensor([[2.0, 1.0], [2.0, 0.5]])
        >>> ax = plot_pasting(Pasted(1, ("pasted", "ridge"), loss, 1, 9, 9))
        >>> ax.get_title()
        'Linear data in the layers above 1'
    """
    ax = new_axes(ax)
    points = range(1, pasted.loss.shape[1] + 1)
    lines = cycle(("--", ":"))
    for index, (name, curve) in enumerate(zip(pasted.names, pasted.loss.tolist(), strict=True)):
        if name in CURVES:
            ax.plot(points, curve, label=name, **task_style(index))
        else:
            colour = GREY if name == "zero" else "black"
            ax.plot(points, curve, label=name, color=colour, linestyle=next(lines))
    ax.set(yscale="log", xlabel="position in the sequence", ylabel="squared error")
    ax.set_title(f"Linear data in the layers above {pasted.layer}")
    whole_numbers(ax)
    return legend_beside(ax)


class _Upper(nn.Module):
    """The blocks of a model above a layer, with its read-out: a copy."""

    def __init__(self, model: RegressionTransformer, layer: int) -> None:
        super().__init__()
        parts = (model.blocks[layer + 1 :], model.ln_final, model.read_out)
        self.blocks, self.ln_final, self.read_out = copy.deepcopy(parts)

    def forward(
        self, residual: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch point"]:
        for block in self.blocks:
            residual = block(residual)
        predictions: Tensor = self.read_out(self.ln_final(residual)[:, ::2]).squeeze(-1)
        return predictions


def _shuffled(upper: _Upper, seed: int) -> _Upper:
    """A copy with the entries of each parameter in random order."""
    generator = torch.Generator().manual_seed(seed)
    mixed = copy.deepcopy(upper)
    with torch.no_grad():
        for parameter in mixed.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return mixed
