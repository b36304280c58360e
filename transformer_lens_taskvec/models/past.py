"""Keys and values of tokens that stand before others, stored once and read by many rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Segment:
    """Keys and values of some tokens, of every layer.

    Attributes:
        layers: By layer, its keys and its values, ``[row, head, pos, d]``.
        mask: ``[row, pos]``, True where a token is real.
    """

    layers: Mapping[int, KeysAndValues]
    mask: Bool[Tensor, "row pos"]


@dataclass(frozen=True)
class Past:
    """What stands before the tokens of some rows: segments, of each of which a row reads one row.

    Attributes:
        parts: Each segment, in the order of the tokens, and the row of it that every row reads;
            None if each row reads its own.
    """

    parts: tuple[tuple[Segment, Int[Tensor, " row"] | None], ...] = ()

    @property
    def width(self) -> int:
        """The number of tokens of a row, padding included."""
        return sum(segment.mask.shape[1] for segment, _ in self.parts)

    @property
    def mask(self) -> Bool[Tensor, "row pos"]:
        """``[row, pos]``, True where a token is real."""
        return torch.cat([_rows(segment.mask, index) for segment, index in self.parts], dim=1)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have keys and values."""
        return tuple(sorted(self.parts[0][0].layers)) if self.parts else ()

    def rows(self, rows: Int[Tensor, " row"]) -> Past:
        """Return the past of some rows; nothing is copied."""
        return Past(
            tuple(
                (segment, rows if index is None else index[rows]) for segment, index in self.parts
            )
        )

    def then(self, segment: Segment) -> Past:
        """Return the past with a segment after it, row for row."""
        return Past((*self.parts, (segment, None)))

    def whole(self, layer: int, *after: KeysAndValues) -> KeysAndValues:
        """Return a layer's keys and values, with others after them."""
        mine = [
            [_rows(one, index) for one in segment.layers[layer]] for segment, index in self.parts
        ]
        keys, values = (torch.cat(some, dim=-2) for some in zip(*mine, *after, strict=True))
        return keys, values


def _rows(values: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return values
    if len(values) == 1:
        return values.expand(len(index), *values.shape[1:])
    return values[index]


class Continued(DynamicCache):  # type: ignore[misc]
    """The cache of a pass whose tokens come after a past, which is read and stays as it is."""

    def __init__(self, past: Past) -> None:
        """Read ``past``, and keep what the pass adds."""
        super().__init__()
        self._past = past
        self._added: dict[int, KeysAndValues] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        """Keep a layer's new keys and values, and return them with those of the past."""
        self._added[layer_idx] = key_states, value_states
        if not self._past.parts:
            return key_states, value_states
        return self._past.whole(layer_idx, (key_states, value_states))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens of the past and of the pass so far."""
        added = self._added.get(layer_idx)
        return self._past.width + (0 if added is None else added[0].shape[-2])

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys of a pass, and the offset of the first."""
        return self._past.width + query_length, 0

    @property
    def stored(self) -> int:
        """The number of tokens of the past that are stored, padding included."""
        return sum(segment.mask.numel() for segment, _ in self._past.parts)

    def added(self, mask: Bool[Tensor, "row pos"]) -> Segment:
        """Return what the pass added."""
        return Segment(self._added, mask)
