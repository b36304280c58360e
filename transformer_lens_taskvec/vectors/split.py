"""What a head's output at the last token is made of, by part of the prompt.

A head's output is the sum over positions of its attention pattern times the values there. So it
splits exactly by position: what comes from each demonstration, from the query, and from what stands
before the demonstrations. Under grouped-query attention several heads share the values of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import Activations
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import warn_of_hooks
from transformer_lens_taskvec.models.forward import mask_dtype, run_until
from transformer_lens_taskvec.models.layouts import check_readable, position_shapes
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.protocol import (
    check_layers,
    device_of,
    hook_name,
    inference,
    model_name,
)
from transformer_lens_taskvec.models.tokens import (
    batches,
    encode_prompts,
    pad_id,
    token_spans,
    tokens_in,
)
from transformer_lens_taskvec.prompts import AnyEpisode


@dataclass(frozen=True)
class Split:
    """The outputs of one layer's heads at the last token of some prompts, by part of the prompt.

    Attributes:
        rows: The prompts' indices.
        layer: The layer.
        z: ``[row, head, part, d_head]``, float32 on the CPU; the parts sum to the head's output.
        attention: ``[row, head, part]``, the share of the head's attention that goes to the part.
    """

    rows: tuple[int, ...]
    layer: int
    z: Float[Tensor, "row head part d_head"]
    attention: Float[Tensor, "row head part"]


def part_names(n_shots: int) -> tuple[str, ...]:
    """Return the names of a prompt's parts, in their order.

    Example:
        >>> part_names(2)
        ('before', 'demonstration 0', 'demonstration 1', 'query')
    """
    return ("before", *(f"demonstration {shot}" for shot in range(n_shots)), "query")


def parts_of_tokens(
    model: Any, episodes: Sequence[AnyEpisode]
) -> list[Float[Tensor, "token part"]]:
    """Return the part that each token of a prompt belongs to, as ones and zeros.

    A token belongs to the part that holds its last character. A BOS, the instruction and the head
    of a chat stand before the demonstrations.

    Args:
        model: The model with the tokenizer.
        episodes: Episodes with equally many demonstrations.

    Raises:
        ValueError: If numbers of demonstrations differ, or it is unknown where tokens or examples
            are in a prompt.
    """
    shots = sorted({episode.n_shots for episode in episodes})
    if len(shots) > 1 or shots[0] == 0:
        raise ValueError(
            f"the episodes have {' and '.join(map(str, shots))} demonstrations; give episodes that "
            "all have the same number, at least one"
        )
    encoded, _ = encode_prompts(model, episodes)
    found = []
    for episode, tokens, prompt in zip(
        episodes, token_spans(model, episodes), encoded, strict=True
    ):
        begins = getattr(episode, "examples_begin", None)
        if begins is None:
            raise ValueError(
                f"{type(episode).__name__} has no examples_begin, where its demonstrations begin "
                "in the prompt, so they cannot be told apart"
            )
        spans = list(zip((0, *begins), (*begins, len(episode.prompt) + 1), strict=True))
        owners = [0] * (len(prompt) - len(tokens)) + tokens_in(tokens, spans)
        found.append(torch.nn.functional.one_hot(torch.tensor(owners), len(spans)).float())
    return found


def split_heads(
    model: Any,
    episodes: Sequence[AnyEpisode],
    z: Activations,
    *,
    batch_size: int = 16,
    progress: Callable[[int], Any] = lambda n: None,
) -> Iterator[Split]:
    """Yield the outputs of heads at the last token, split by part of the prompt.

    Args:
        model: A model whose attention has the hook points ``v`` and ``pattern``.
        episodes: Episodes with equally many demonstrations.
        z: Their activations at the hook point ``z``, whose layers are split, and which the parts
            must sum to.
        batch_size: Prompts per pass.
        progress: Called with the number of prompts of each pass when it is over.

    Raises:
        ValueError: If the model has no such hook points, heads' outputs are not the sum of values
            weighted by the pattern, or as for :func:`parts_of_tokens`.
    """
    layers, parts = z.layers, parts_of_tokens(model, episodes)
    _, names = check_readable(model, layers, "v")
    shape = position_shapes(model, names)[names[0]]
    if len(shape) != 2:
        raise ValueError(
            f"values of {model_name(model)} have shape {shape} at one position, and [head, d_head] "
            "is needed to split heads"
        )
    check_layers(model, layers, "pattern")
    encoded, _ = encode_prompts(model, episodes)
    check_lengths(model, encoded)
    device, last = device_of(model), hook_name("pattern", max(layers))
    can = capabilities(model)
    if can.hooked:
        warn_of_hooks(model, stacklevel=3)
    with inference(model):
        for batch in batches(
            encoded,
            batch_size=batch_size,
            pad=pad_id(model),
            same_length=not can.pads,
            apart=can.apart,
        ):
            width = batch.tokens.shape[1]
            inside = torch.zeros(len(batch.rows), width, parts[0].shape[1])
            for place, row in enumerate(batch.rows):
                inside[place, width - len(parts[row]) :] = parts[row]
            there, splitter = batch.to(device), _Splitter(inside.to(device))
            hooks = [hook for layer in layers for hook in splitter.hooks(layer)]
            run_until(model, there.tokens, there.padding, hooks, last)
            for layer in layers:
                found = splitter.found.get(layer)
                if found is None:
                    raise ValueError(
                        f"hook point {hook_name('pattern', layer)!r} of {model_name(model)} does "
                        "not run; load the model with attn_implementation='eager'"
                    )
                split = Split(batch.rows, layer, *found)
                _check_sum(model, split, z.at(layer)[list(batch.rows)])
                yield split
            progress(len(batch.rows))


class _Splitter:
    """Hook functions that split the output of a layer's heads at the last token."""

    def __init__(self, inside: Float[Tensor, "row pos part"]) -> None:
        """Split by the part that each position is ``inside``, all zeros for padding."""
        self._inside = inside
        self._values: dict[int, Tensor] = {}
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def hooks(self, layer: int) -> list[tuple[str, Callable[..., None]]]:
        """Return pairs for ``fwd_hooks``."""

        def keep(values: Tensor, hook: Any = None) -> None:
            self._values[layer] = values

        def split(pattern: Tensor, hook: Any = None) -> None:
            self.found[layer] = self._split(pattern[:, :, -1], self._values.pop(layer))

        return [(hook_name("v", layer), keep), (hook_name("pattern", layer), split)]

    def _split(
        self, pattern: Float[Tensor, "row head pos"], values: Float[Tensor, "row pos kv d_head"]
    ) -> tuple[Float[Tensor, "row head part d_head"], Float[Tensor, "row head part"]]:
        group = pattern.shape[1] // values.shape[2]
        values = repeat(values.float(), "row pos kv d -> row pos (kv group) d", group=group)
        shares = einsum(pattern.float(), self._inside, "r head pos, r pos part -> r head part pos")
        split = einsum(shares, values, "r head part pos, r pos head d -> r head part d")
        return split.cpu(), shares.sum(dim=-1).cpu()


def _check_sum(model: Any, split: Split, z: Float[Tensor, "row head d_head"]) -> None:
    allowed = (1e-3 if mask_dtype(model) == torch.float32 else 0.05) * float(z.norm())
    off = float((split.z.sum(dim=2) - z).norm())
    if not off <= allowed:
        raise ValueError(
            f"in layer {split.layer} of {model_name(model)} heads' outputs differ by "
            f"{off / float(z.norm()):.2g} of their norm from the sum of values weighted by the "
            "pattern, as where a gate or a norm comes after, so they cannot be split by token"
        )
