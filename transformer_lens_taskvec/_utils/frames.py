"""Tables of tensors: one row per combination of the values on the axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd
from einops import rearrange
from torch import Tensor


def grid_frame(axes: Mapping[str, Sequence[Any]], columns: Mapping[str, Tensor]) -> pd.DataFrame:
    """Return one row per combination of the axes' values; the last axis varies fastest.

    Args:
        axes: The values along each axis, by column name.
        columns: A tensor for each further column, whose shape broadcasts to that of the axes.

    Example:
        >>> import torch
        >>> table = grid_frame({"task": ["AND", "OR"], "layer": [0, 1]}, {"td": torch.eye(2)})
        >>> table.values.tolist()
        [['AND', 0, 1.0], ['AND', 1, 0.0], ['OR', 0, 0.0], ['OR', 1, 1.0]]
    """
    shape = [len(values) for values in axes.values()]
    flat = {
        name: rearrange(values.expand(shape), "... -> (...)").tolist()
        for name, values in columns.items()
    }
    return pd.DataFrame(product(*axes.values()), columns=[*axes]).assign(**flat)
