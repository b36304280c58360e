"""Passes through a model: of whole prompts, up to a layer, cached, and packed as branches.

Prompts are always left-padded, and positions are counted from each row's first real token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from transformer_lens_taskvec.models.past import Continued, Past
from transformer_lens_taskvec.models.protocol import device_of, hook_name
from transformer_lens_taskvec.models.readout import ENTERS, Keep
from transformer_lens_taskvec.models.tokens import PromptBatch

Hooks = Sequence[tuple[str, Callable[..., Any]]]


def run_prompts(
    model: Any,
    tokens: Int[Tensor, "row pos"],
    padding: Bool[Tensor, "row pos"] | None = None,
    hooks: Hooks = (),
) -> Float[Tensor, "row read vocab"]:
    """Return the logits of left-padded tokens.

    Args:
        model: Any model with TransformerLens' hook API.
        tokens: ``[row, pos]``.
        padding: True where a token is real, or None if all are.
        hooks: Hook functions.
    """
    kwargs = _masked(model, tokens, padding)
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type="logits", **kwargs)
    return _as_tensor(logits)


def _masked(model: Any, tokens: Tensor, padding: Tensor | None) -> dict[str, Any]:
    """Return the mask as an argument, where there is padding or the model would look for it.

    A ``HookedTransformer`` without a mask takes the padding tokens that a prompt begins with, such
    as a BOS that is the padding token too, for padding.
    """
    if padding is None and _takes_lens_cache(model):
        padding = torch.ones_like(tokens, dtype=torch.bool)
    return {} if padding is None else {"attention_mask": padding.long()}


class _Done(Exception):
    """Raised by a hook to end the pass."""


def run_until(
    model: Any,
    tokens: Tensor,
    padding: Tensor | None,
    hooks: Hooks,
    last: str,
    *,
    past: Past | None = None,
    **kwargs: Any,
) -> None:
    """Run left-padded tokens with hooks, up to the hook point ``last``.

    Args:
        model: Any model with TransformerLens' hook API; one that ``packs`` if there is a ``past``.
        tokens: ``[row, pos]``, or vectors.
        padding: As for :func:`run_prompts`.
        hooks: Hook functions.
        last: The full name of a hook point.
        past: What stands before the tokens.
        **kwargs: Passed to the model.
    """

    def stop(activation: Tensor, hook: Any = None) -> Tensor:
        raise _Done

    if past is not None:
        real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding
        behind = _after(model, past.mask, real)
        kwargs = {"past_key_values": Continued(past), **behind, **kwargs}
    elif "attention_mask" not in kwargs:
        kwargs |= _masked(model, tokens, padding)
    with suppress(_Done):
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, (last, stop)], **kwargs)


def run_prefix(model: Any, batch: PromptBatch, past: Past | None = None) -> Past:
    """Return the past of what follows a batch of tokens; nothing else is computed.

    Args:
        model: A model that ``packs``, see ``capabilities``.
        batch: The tokens; none at all for prompts of one token.
        past: What stands before them.
    """
    if not batch.tokens.shape[1]:
        return past or Past()
    cache = Continued(past or Past())
    last = hook_name("attn_out", int(model.cfg.n_layers) - 1)
    run_until(model, batch.tokens, batch.padding, (), last, past=past, past_key_values=cache)
    return (past or Past()).then(cache.added(batch.mask))


def _after(
    model: Any, before: Bool[Tensor, "row prefix"], real: Bool[Tensor, "row pos"]
) -> dict[str, Tensor]:
    """Return the mask and the positions of left-padded tokens behind others."""
    n = real.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
    own = causal & rearrange(real, "row key -> row 1 1 key")
    prompt = repeat(before, "row key -> row 1 pos key", pos=n)
    positions = before.sum(dim=1, keepdim=True) + real.cumsum(dim=1) - 1
    return {
        "attention_mask": _additive(torch.cat([prompt, own], dim=-1), mask_dtype(model)),
        "position_ids": positions.clamp(min=0),
    }


def run_branches(
    model: Any,
    tokens: Int[Tensor, "row branch_pos"],
    past: Past,
    hooks: Hooks = (),
    *,
    n_branches: int,
    active: Sequence[int] | None = None,
    reads_out: bool = True,
) -> Float[Tensor, "row branch_pos d"]:
    """Return the logits of branches that continue the same past, none of which sees another.

    Args:
        model: A model that ``packs``, see ``capabilities``.
        tokens: The branches' tokens one after another, the unedited branch first.
        past: What stands before each branch; None of its tokens may be missing.
        hooks: Hook functions; they see the branches that run.
        n_branches: The number of branches, all of one length.
        active: The number of branches that run in each layer: the unedited one, and those edited by
            then, which come first. None runs all branches in every layer, as is necessary for
            models that do not ``share_layers``.
        reads_out: If False, the pass ends before the unembedding, and what enters it is returned.
    """
    n_tokens = tokens.shape[1]
    shape: dict[str, Any] = {"n_branches": n_branches, "branch_length": n_tokens // n_branches}
    before = past.mask if past.parts else torch.zeros_like(tokens[:, :0], dtype=torch.bool)
    kwargs: dict[str, Any] = {
        "attention_mask": branch_mask(before, **shape, dtype=mask_dtype(model)),
        "position_ids": branch_positions(before, **shape),
        "past_key_values": Continued(past),
    }
    with nullcontext() if active is None else _sharing_layers(model, active, n_tokens):
        if not reads_out:
            entering = Keep()
            run_until(model, tokens, None, [*hooks, (ENTERS, entering)], ENTERS, **kwargs)
            return entering.take()
        logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type="logits", **kwargs)
    return _as_tensor(logits)


@contextmanager
def _sharing_layers(model: Any, active: Sequence[int], n_tokens: int) -> Iterator[None]:
    """Run each block on its active branches only, and what follows the blocks on all."""
    length = n_tokens // active[-1]

    def entering(layer: int) -> Callable[..., Any]:
        n = active[layer] * length

        def enter(block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            named = {name: _narrow(value, n_tokens, n) for name, value in kwargs.items()}
            if not args:
                hidden = _resize(kwargs["hidden_states"], n, length)
                return (), {**named, "hidden_states": hidden}
            rest = (_narrow(value, n_tokens, n) for value in args[1:])
            return (_resize(args[0], n, length), *rest), named

        return enter

    def leave(module: Any, args: Any) -> Any:
        return (_resize(args[0], n_tokens, length), *args[1:])

    with ExitStack() as handles:
        for layer, block in enumerate(model.blocks):
            handle = block.register_forward_pre_hook(entering(layer), with_kwargs=True)
            handles.callback(handle.remove)
        handles.callback(model.ln_final.register_forward_pre_hook(leave).remove)
        yield


def _resize(hidden: Float[Tensor, "row pos d"], n: int, length: int) -> Float[Tensor, "row n d"]:
    """Return the first ``n`` tokens, filled up with copies of the first branch."""
    missing = n - hidden.shape[1]
    if missing <= 0:
        return hidden[:, :n]
    first = hidden[:, :length]
    copies = repeat(first, "row pos d -> row (copy pos) d", copy=missing // length)
    return torch.cat([hidden, copies], dim=1)


def _narrow(value: Any, full: int, n: int) -> Any:
    """Return a mask, positions or rotations for the first ``n`` of ``full`` tokens."""
    if isinstance(value, tuple | list):
        return type(value)(_narrow(part, full, n) for part in value)
    if not isinstance(value, Tensor) or n == full:
        return value
    if value.ndim == 4 and value.shape[-2] == full:
        return value[..., :n, : value.shape[-1] - full + n]
    if value.ndim in (2, 3) and value.shape[1] == full:
        return value[:, :n]
    return value[:n] if value.ndim == 1 and len(value) == full else value


def new_cache(model: Any, n_rows: int, past: Past | None = None) -> Any:
    """Return a KV cache for :func:`run_cached`, empty but for a past."""
    if _takes_lens_cache(model):
        from transformer_lens import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), n_rows)
    cache = DynamicCache()
    if past is not None:
        for layer in past.layers:
            cache.update(*past.whole(layer), layer)
    return cache


def run_cached(
    model: Any,
    tokens: Int[Tensor, "row new"],
    mask: Bool[Tensor, "row pos"],
    cache: Any,
    hooks: Hooks = (),
) -> Float[Tensor, "row new vocab"]:
    """Return the logits of new tokens after cached ones, and add them to the cache.

    Args:
        model: A model that ``caches``, see ``capabilities``.
        tokens: ``[row, new]``.
        mask: ``[row, pos]`` over the cached positions and the new ones.
        cache: From :func:`new_cache`.
        hooks: Hook functions, which see the new positions only.
    """
    kwargs: dict[str, Any]
    new = tokens.shape[1]
    if _takes_lens_cache(model):
        kwargs = {"past_kv_cache": cache, "attention_mask": mask[:, -new:].long()}
    else:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        kwargs = {
            "past_key_values": cache,
            "attention_mask": mask.long(),
            "position_ids": positions[:, -new:],
        }
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type="logits", **kwargs)
    return _as_tensor(logits)


def _takes_lens_cache(model: Any) -> bool:
    return "past_kv_cache" in inspect.signature(model.forward).parameters


def mask_dtype(model: Any) -> torch.dtype:
    """Return the dtype of additive attention masks."""
    dtype = getattr(model.cfg, "dtype", torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def branch_mask(
    prefix_mask: Bool[Tensor, "row prefix"],
    *,
    n_branches: int,
    branch_length: int,
    dtype: torch.dtype,
) -> Float[Tensor, "row 1 branch_pos key"]:
    """Return the additive mask under which a branch sees only its prompt and its own past."""
    rows, device = prefix_mask.shape[0], prefix_mask.device
    causal = torch.ones(branch_length, branch_length, dtype=torch.bool, device=device).tril()
    own = torch.block_diag(*[causal] * n_branches).bool()
    prompt = repeat(prefix_mask, "row key -> row 1 pos key", pos=len(own))
    past = repeat(own, "pos key -> row 1 pos key", row=rows)
    return _additive(torch.cat([prompt, past], dim=-1), dtype)


def _additive(visible: Bool[Tensor, "row 1 pos key"], dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)


def branch_positions(
    prefix_mask: Bool[Tensor, "row prefix"], *, n_branches: int, branch_length: int
) -> Int[Tensor, "row branch_pos"]:
    """Return the position ids that each branch would have if it followed the prompt alone."""
    steps = torch.arange(branch_length, device=prefix_mask.device)
    steps = repeat(steps, "pos -> (branch pos)", branch=n_branches)
    return prefix_mask.sum(dim=1, keepdim=True) + steps


def _as_tensor(logits: Any) -> Tensor:
    return logits if isinstance(logits, Tensor) else logits.logits
