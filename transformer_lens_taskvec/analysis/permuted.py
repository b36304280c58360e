"""Task decodability under permuted labels, and p-values from it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown

ROUNDING = 1e-6
"""The most by which equal means of float32 numbers, summed in another order, differ."""


@dataclass(frozen=True, repr=False)
class DecodabilityNull(Shown):
    """TD next to its distribution under permuted labels.

    Attributes:
        observed: ``[layer]``, mean TD.
        permuted: ``[permutation, layer]``, mean TD under permuted labels.
        layers: The layers, counted from 0.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> activations = tv.collect(tv.load_model("toy"), episodes)
        >>> null = tv.task_decodability(activations).null(n_permutations=99)
        >>> null.p_value, null.band().shape
        (0.01, torch.Size([2, 4]))
    """

    observed: Float[Tensor, " layer"]
    permuted: Float[Tensor, "permutation layer"]
    layers: tuple[int, ...]

    @property
    def p_values(self) -> Float[Tensor, " layer"]:
        """``[layer]``, p-values without correction for the number of layers."""
        as_high = (self.permuted >= self.observed - ROUNDING).sum(dim=0)
        return (1 + as_high) / (1 + len(self.permuted))

    @property
    def p_value(self) -> float:
        """The p-value of the highest TD over layers, against each permutation's highest."""
        highest = reduce(self.permuted, "permutation layer -> permutation", "max")
        higher = int((highest >= self.observed.max() - ROUNDING).sum())
        return (1 + higher) / (1 + len(self.permuted))

    def band(self, confidence: float = 0.95) -> Float[Tensor, "2 layer"]:
        """Return the ends of the interval of TD under permuted labels, at each layer."""
        tail = (1 - confidence) / 2
        return torch.quantile(self.permuted, torch.tensor([tail, 1 - tail]), dim=0)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer: ``layer, td, null, null_low, null_high`` (95 %), ``p``."""
        low, high = self.band()
        columns = {
            "td": self.observed,
            "null": reduce(self.permuted, "permutation layer -> layer", "mean"),
            "null_low": low,
            "null_high": high,
            "p": self.p_values,
        }
        return grid_frame({"layer": self.layers}, columns)

    def __repr__(self) -> str:
        best = int(self.observed.argmax())
        high = float(self.band()[1, best])
        return (
            f"DecodabilityNull(layer {self.layers[best]}: TD {float(self.observed[best]):.3f}, "
            f"{len(self.permuted)} permutations up to {high:.3f}; p = {self.p_value:.4f} over "
            f"{len(self.layers)} layers)"
        )
