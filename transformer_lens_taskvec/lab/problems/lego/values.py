"""Where a model holds the values of a chain's variables: by layer and position in the chain.

A model that works its way along the chain has the value of a later variable in a later layer: a
diagonal in the map of layers and positions. One with a shortcut has all values in one layer: a
column of positions that become readable together (Zhang et al., 2206.04301).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.analysis.classifiers import Readout, readout, readout_name
from transformer_lens_taskvec.lab.problems.lego.chains import (
    clause_ceiling,
    query_places,
    read_chains,
)
from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import heat_map

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PLACES = ("query", "clause")
"""The tokens at which values are read."""

SEED = 31
"""Of the sequences that values are read from."""


@dataclass(frozen=True, repr=False)
class ValueDecodability(Shown):
    """How well the value of each variable is read from the residual stream.

    Attributes:
        scores: The share of held-out sequences in which the value is decoded, ``[place, layer,
            position]``; the places are those of :data:`PLACES`.
        shuffled: The same with the values shuffled among the sequences, the control.
        ceiling: The best that a causal model can do, ``[place, position]``; see
            :func:`clause_ceiling`.
        n_supervised: The positions that training counts.
        n: Sequences.
        method: How the values were decoded.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.lego import Lego
        >>> from transformer_lens_taskvec.lab.problems.lego import value_decodability
        >>> problem = Lego(n_vars=3, n_supervised=2)
        >>> model = problem.make_model(lab.TrainConfig(n_layers=1), seed=0, device="cpu")
        >>> found = value_decodability(model, problem, n=40)
        >>> found.scores.shape, len(found.to_frame())
        (torch.Size([2, 1, 3]), 6)
    """

    scores: Float[Tensor, "place layer position"]
    shuffled: Float[Tensor, "place layer position"]
    ceiling: Float[Tensor, "place position"]
    n_supervised: int
    n: int
    method: str = "linear"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, from 0; a value is read after the layer's block."""
        return tuple(range(self.scores.shape[1]))

    def readable_from(self, place: str = "query") -> Float[Tensor, " position"]:
        """Return the first layer at which each variable's value is readable; NaN if none.

        A value is readable where its score is halfway from one half to the ceiling, and above all
        scores of the control.

        Args:
            place: The token at which it is read, ``"query"`` or ``"clause"``.

        Raises:
            ValueError: If there is no such place.
        """
        at = _place(place)
        halfway = (0.5 + self.ceiling[at]) / 2
        readable = self.scores[at] >= halfway.clamp(min=float(self.shuffled.max()))
        first = readable.int().argmax(0).float()
        return first.where(readable.any(0), torch.nan)

    def rank_correlation(self, place: str = "query") -> float:
        """Return Spearman's correlation of the layer at which values become readable and position.

        It is 1 for a diagonal, 0 if all become readable at one layer, and NaN if fewer than two do.

        Args:
            place: The token at which they are read.
        """
        positions, layers = self._readable(place)
        if len(layers) < 2:
            return float("nan")
        if len(set(layers)) == 1:
            return 0.0
        from scipy.stats import spearmanr  # takes half a second to import

        return float(spearmanr(positions, layers).statistic)

    def layers_per_position(self, place: str = "query") -> float:
        """Return how many layers later the value of each further variable becomes readable.

        That is the slope of the regression of layer on position: 1 for one step of the chain per
        layer, 0 for a shortcut, NaN if fewer than two are readable.

        Args:
            place: The token at which they are read.
        """
        positions, layers = self._readable(place)
        if len(layers) < 2:
            return float("nan")
        from scipy.stats import linregress  # takes half a second to import

        return float(linregress(positions, layers).slope)

    def to_frame(self) -> pd.DataFrame:
        """One row per place, layer and position in the chain, from 1.

        Columns ``place, layer, position, score, shuffled, ceiling``.
        """
        import pandas as pd

        rows = [
            {
                "place": place,
                "layer": layer,
                "position": position + 1,
                "score": float(self.scores[at, layer, position]),
                "shuffled": float(self.shuffled[at, layer, position]),
                "ceiling": float(self.ceiling[at, position]),
            }
            for at, place in enumerate(PLACES)
            for layer in self.layers
            for position in range(self.scores.shape[2])
        ]
        return pd.DataFrame(rows)

    def _readable(self, place: str) -> tuple[list[int], list[float]]:
        """The positions whose values are readable, and the layers from which they are."""
        first = self.readable_from(place)
        positions = (~first.isnan()).nonzero()[:, 0]
        return positions.tolist(), first[positions].tolist()

    def __repr__(self) -> str:
        layers = [spelled_layer(layer) for layer in self.readable_from().tolist()]
        return (
            f"ValueDecodability({self.method}, n = {self.n}: readable at the query from layers "
            f"{', '.join(layers)}, {self.layers_per_position():.2f} layers per position, rank "
            f"correlation {self.rank_correlation():.2f}; shuffled at most "
            f"{float(self.shuffled.max()):.2f})"
        )


def value_decodability(
    model: Any,
    problem: Any,
    *,
    n: int = 800,
    method: str | Readout = "linear",
    k: int = 10,
    seed: int = SEED,
) -> ValueDecodability:
    """Return how well each variable's value is decoded at its clause and its query, by layer.

    The bits of the sequences are uniform, whatever the problem's ``negation``.

    Args:
        model: A model of the lab, or a :class:`Run`, whose last model is taken.
        problem: A :class:`Lego`.
        n: Sequences.
        method: ``"linear"`` for a linear probe tested on held-out fifths of the sequences,
            ``"knn"`` for task decodability with the value as the task, or another readout of
            :func:`task_decodability`.
        k: Neighbours, for methods that have them.
        seed: Seed of the sequences and of the shuffling.

    Raises:
        ValueError: If there are fewer than 20 sequences, or no such method.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.lego import Lego
        >>> problem = Lego(n_vars=2, n_supervised=2)
        >>> model = problem.make_model(lab.TrainConfig(n_layers=1), seed=0, device="cpu")
        >>> value_decodability(model, problem, n=40, method="knn").ceiling[1].tolist()
        [1.0, 0.75]
    """
    if n < 20:
        raise ValueError(f"n is {n}; a probe needs 20 sequences or more")
    decode = readout(method, k)
    generator = torch.Generator().manual_seed(seed)
    batch = uniform(problem).sample(n, generator)
    orders = torch.rand(batch.ys.shape, generator=generator).argsort(0)
    model, n_vars = model if isinstance(model, nn.Module) else model.model(), problem.n_vars
    read = _residuals(model, batch.xs, n_vars)
    n_layers = read.shape[1]
    scores, shuffled = torch.zeros(2, len(PLACES), n_layers, n_vars)
    for position in range(n_vars):
        values, order = batch.ys[:, position], orders[:, position]
        for place in range(len(PLACES)):
            for layer in range(n_layers):
                points = read[place, layer, :, position]
                scores[place, layer, position] = decode(points, values).float().mean()
                shuffled[place, layer, position] = decode(points, values[order]).float().mean()
    ceiling = torch.stack([torch.ones(n_vars), clause_ceiling(n_vars)])
    name = readout_name(method)
    return ValueDecodability(scores, shuffled, ceiling, problem.n_supervised, n, name)


@styled
def plot_values(found: ValueDecodability) -> Figure:
    """Draw the decodability of values by layer and position, at queries and at clauses.

    A white line follows the supervised positions; the lowest row is the ceiling of a causal model,
    the one above it the control.

    Args:
        found: From :func:`value_decodability`.

    Example:
        >>> from matplotlib import pyplot as plt
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.problems.lego import Lego
        >>> from transformer_lens_taskvec.lab.problems.lego import plot_values
        >>> problem = Lego(n_vars=2, n_supervised=2)
        >>> model = problem.make_model(lab.TrainConfig(n_layers=1), seed=0, device="cpu")
        >>> figure = plot_values(value_decodability(model, problem, n=40))
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ["at the variable's query", 'at its clause']
        >>> plt.close(figure)
    """
    import matplotlib.pyplot as plt

    n_layers, n_vars = found.scores.shape[1:]
    size = (2 * (1.6 + 0.36 * n_vars), 1.4 + 0.34 * (n_layers + 2))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    columns = [str(position + 1) for position in range(n_vars)]
    rows = [*(f"layer {layer}" for layer in reversed(found.layers)), "shuffled", "ceiling"]
    for at, (ax, title) in enumerate(
        zip(axes, ("at the variable's query", "at its clause"), strict=True)
    ):
        extra = torch.stack([found.shuffled[at].mean(0), found.ceiling[at]])
        shown = torch.cat([found.scores[at].flip(0), extra])
        heat_map(
            shown,
            rows,
            columns,
            ax,
            label="held-out accuracy",
            colours="viridis",
            ends=(0.5, 1.0),
            written=".2f",
        )
        ax.axhline(n_layers - 0.5, color="white", linewidth=2)
        if found.n_supervised < n_vars:
            ax.axvline(found.n_supervised - 0.5, color="white", linewidth=1.2, linestyle="--")
        ax.set_title(title)
        ax.set_xlabel("position in the chain")
        ax.tick_params(axis="x", rotation=0)
        for name in ax.get_xticklabels():
            name.set_horizontalalignment("center")
    axes[1].set_yticks(range(len(rows)), [""] * len(rows))
    return figure


def spelled_layer(layer: float) -> str:
    """A layer's number, or ``none``."""
    return "none" if layer != layer else str(int(layer))


def uniform(problem: Any) -> Any:
    """The problem with every bit uniform."""
    return replace(problem, negation=0.5)


def _place(place: str) -> int:
    if place not in PLACES:
        raise ValueError(f"place is {place!r}; values are read at one of {PLACES}")
    return PLACES.index(place)


def _residuals(
    model: Any, tokens: Int[Tensor, "batch token"], n_vars: int
) -> Float[Tensor, "place layer batch position d_model"]:
    """The residual stream after every block, at each variable's query and clause."""
    names = [hook_name("resid_post", layer) for layer in range(model.cfg.n_layers)]
    kept: list[Tensor] = []

    def keep(residual: Tensor, hook: Any) -> None:
        kept.append(residual.float().cpu())

    with torch.no_grad():
        device = next(model.parameters()).device
        model.run_with_hooks(tokens.to(device), fwd_hooks=[(name, keep) for name in names])
    places = query_places(tokens, n_vars), read_chains(tokens, n_vars).clause_at
    residuals, rows = torch.stack(kept), torch.arange(len(tokens))[:, None]
    return torch.stack([residuals[:, rows, at] for at in places])
