"""How long a sequence may be, by what a model's configuration says.

Attention that sees only a window or a chunk, positions from a table, and rotary frequencies that
change with the length are all invisible in a probe of a few tokens. So they are read from the
configuration; a name that is not known is taken to mean the worst.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transformer_lens_taskvec.models.protocol import model_name

_LOCAL = re.compile(r"window|chunk|local|floor_scale|index_topk|compress|block_size")
_NOT_LOCAL = re.compile(r"^num_|experts|feed_forward|ssm|mamba|pattern|_layers$|^chunk_size$")
_BY_MASK = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}


@dataclass(frozen=True)
class Limits:
    """How many tokens may run together.

    Attributes:
        context: The longest sequence that runs at all; None for no limit.
        why_context: What sets ``context``.
        apart: Longer sequences run without padding and without branches; None for no limit.
        indexed: The most tokens, of prompt and branches together, in a packed pass; None for no
            limit.
        why_apart: What sets ``apart``.
    """

    context: int | None = None
    why_context: str = ""
    apart: int | None = None
    indexed: int | None = None
    why_apart: str = ""


def limits(model: Any) -> Limits:
    """Return how many tokens may run together, by the model's configuration."""
    context, why_context = _context(model)
    apart, indexed, why_apart = context, context, "its context"
    for name, size, by_index in _localities(_text_config(model)):
        if context is not None and size >= context:
            continue
        if apart is None or size < apart:
            apart, why_apart = size, f"its {name} of {size} tokens"
        if by_index and (indexed is None or size < indexed):
            indexed = size
    return Limits(context, why_context, apart, indexed, why_apart)


def check_lengths(
    model: Any, prompts: Sequence[Any], answers: Sequence[Sequence[int]] | int = 1
) -> None:
    """Raise ``ValueError`` for a prompt that, with its answer, is longer than the model can run.

    Args:
        model: Any model with TransformerLens' hook API.
        prompts: Token ids of each prompt; vectors pass, the model checks them.
        answers: Token ids of each answer, or the number of tokens that follow every prompt.
    """
    found = limits(model)
    if found.context is None or isinstance(prompts[0], Tensor):
        return
    after = [answers] * len(prompts) if isinstance(answers, int) else list(map(len, answers))
    for prompt, more in zip(prompts, after, strict=True):
        if len(prompt) + more - 1 > found.context:  # nothing is read after an answer's last token
            answer = f" and an answer of {more}" if more > 1 else ""
            raise ValueError(
                f"a prompt of {len(prompt)} tokens{answer} does not fit into {found.context} "
                f"tokens, {found.why_context} of {model_name(model)}; give shorter prompts or "
                "fewer demonstrations"
            )


def _context(model: Any) -> tuple[int | None, str]:
    config, original = _text_config(model), getattr(model, "original_model", None)
    n_ctx = getattr(model.cfg, "n_ctx", None)
    for rope in _ropes(config):
        if "dynamic" in str(rope.get("rope_type", rope.get("type", ""))):
            # Its frequencies depend on the longest sequence that the model has seen before.
            longest = _size(config, "max_position_embeddings") or int(n_ctx or 0)
            return longest - 1, "the length from which on the dynamic rotary embedding"
    if original is None:
        return (int(n_ctx) if n_ctx else None), "the context"
    computed = any(name.endswith("inv_freq") for name, _ in original.named_buffers())
    kind = getattr(model.cfg, "positional_embedding_type", None)
    if computed or not n_ctx or kind in ("alibi", "none"):
        return None, ""
    return int(n_ctx), "the context"


def _localities(config: Any) -> Iterator[tuple[str, int, bool]]:
    """Yield each limit's name and size, and whether attention counts it by index."""
    layer_types = getattr(config, "layer_types", None)
    for name in vars(config) if config is not None else ():
        if not _LOCAL.search(name) or _NOT_LOCAL.search(name):
            continue
        size = _size(config, name)
        if size is None:
            continue
        kind = _BY_MASK.get(name)
        if kind is not None and layer_types is not None and kind not in layer_types:
            continue
        layers = getattr(config, "attention_layers", None)  # GPT-Neo's
        if name == "window_size" and layers is not None and "local" not in layers:
            continue
        if name == "floor_scale":  # Llama-4 scales queries anew from that position on
            size -= 1
        # A 4-D mask takes the place of the windows that transformers makes by masks.
        yield name, size, kind is None
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", rope.get("type", "")))
        scaled = rope.get("llama_4_scaling_beta")
        original = rope.get("original_max_position_embeddings") or _size(
            config, "original_max_position_embeddings"
        )
        if original and (kind == "longrope" or scaled):
            yield "original_max_position_embeddings", int(original), bool(scaled)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the settings of rotary embeddings; some models have several."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, Mapping):
            nested = [part for part in found.values() if isinstance(part, Mapping)]
            return nested or [found]
    return []


def _size(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if whole else None


def _text_config(model: Any) -> Any:
    config = getattr(getattr(model, "original_model", None), "config", None)
    return None if config is None else config.get_text_config()
