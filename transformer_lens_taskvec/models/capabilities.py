"""What a model can do, found by trying it on a few tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Int
from torch import Tensor

from transformer_lens_taskvec.models.carried import carries_hooks
from transformer_lens_taskvec.models.forward import (
    Hooks,
    mask_dtype,
    new_cache,
    run_branches,
    run_cached,
    run_prefix,
    run_prompts,
)
from transformer_lens_taskvec.models.limits import limits
from transformer_lens_taskvec.models.protocol import counted_for, device_of, hook_name, inference
from transformer_lens_taskvec.models.readout import ENTERS, Keep, Readout, candidates
from transformer_lens_taskvec.models.tokens import PromptBatch


@dataclass(frozen=True)
class Capabilities:
    """What a model can do.

    Attributes:
        pads: Left padding does not change a prompt's logits.
        packs: Cached prompts can be continued by branches under a 4-D mask.
        caches: Cached prompts can be continued token by token.
        shares_layers: Its blocks can run on only those branches that differ by then.
        reason: Why it does not pack, or the empty string.
        apart: Longer sequences run plainly, with others of their length only; None for no limit.
        why_apart: What sets ``apart``.
        indexed: The most tokens, of prompt and branches together, in a packed pass; None for no
            limit.
        hooked: It carries hooks that were written for plain passes.
        readout: How logits are made of what enters the unembedding, None if that is not known or
            the model does not pack.
    """

    pads: bool
    packs: bool
    caches: bool
    shares_layers: bool = False
    reason: str = ""
    apart: int | None = None
    why_apart: str = ""
    indexed: int | None = None
    hooked: bool = False
    readout: Readout | None = None


def capabilities(model: Any) -> Capabilities:
    """Return what the model can do, found once per model, dtype and device.

    What is found under autocast is not remembered, and under hooks nothing is tried.
    """
    model = counted_for(model)
    if carries_hooks(model):
        reason = "it carries hooks that were written for plain passes"
        return Capabilities(False, False, False, reason=reason, hooked=True)
    state = (mask_dtype(model), device_of(model), getattr(model, "compatibility_mode", False))
    before, known = _CAPABILITIES.get(model, (None, None))
    if known is not None and before == state and not _autocasts(model):
        return known
    with inference(model):
        found = _find_capabilities(model)
    if not _autocasts(model):
        _CAPABILITIES[model] = state, found
    return found


# A memo: trying the model again would give the same.
_CAPABILITIES: weakref.WeakKeyDictionary[Any, tuple[Any, Capabilities]] = (
    weakref.WeakKeyDictionary()
)


def _autocasts(model: Any) -> bool:
    return bool(torch.is_autocast_enabled(device_of(model).type))


def _find_capabilities(model: Any) -> Capabilities:
    if not _tried(_padding_error, model)[0]:
        reason = "it does not accept left-padded prompts"
        return Capabilities(pads=False, packs=False, caches=False, reason=reason)
    caches, _ = _tried(_caching_error, model)
    hf_model = getattr(model, "original_model", None)
    if hf_model is None:
        reason = f"{type(model).__name__} takes no 4-D attention mask"
        return Capabilities(pads=True, packs=False, caches=caches, reason=reason)
    packs, problem = _tried(_packing_error, model)
    shares, _ = _tried(_sharing_error, model)
    reason = "" if packs else f"its prompts cannot be cached and continued ({problem})"
    found = limits(model)
    indexed = found.indexed
    if packs and found.apart is not None and found.apart <= _PROBED:
        # Whether the limit holds for the whole packed pass too shows only beyond it.
        beyond, _ = _tried(partial(_packing_error, n_prompt=found.apart - 2), model)
        indexed = indexed if beyond else min(found.apart, indexed or found.apart)
    return Capabilities(
        True,
        packs,
        caches,
        packs and shares,
        reason,
        found.apart,
        found.why_apart,
        indexed,
        readout=_readout(model) if packs else None,
    )


def _readout(model: Any) -> Readout | None:
    """Return what makes logits of the hidden states of a few tokens, if something does.

    It is the nearest of the candidates: where logits are small, a cap that is left out is hardly
    seen.
    """
    if ENTERS not in model.hook_dict:
        return None
    entering, found = Keep(), list(candidates(model))
    logits = run_prompts(model, _probe_tokens(model, 3), hooks=[(ENTERS, entering)])
    try:
        errors = [_relative(one.logits(model, entering.take()), logits) for one in found]
    except Exception:  # an unembedding that does not stand alone
        return None
    least = min(errors)
    return found[errors.index(least)] if least < _tolerance(model) else None


_PROBED = 256
"""Up to this length a limit is tried out."""


def _tried(measure: Callable[[Any], float], model: Any) -> tuple[bool, str]:
    """Return whether the error is small, and what is wrong if it is not."""
    try:
        error = measure(model)
    except Exception as problem:  # a model may raise anything
        return False, f"trying it raised {type(problem).__name__}: {problem}"
    return error < _tolerance(model), f"logits differ by {error:.1e} standard deviations"


def _tolerance(model: Any) -> float:
    exact = mask_dtype(model) == torch.float32 and not _autocasts(model)
    return 1e-3 if exact else 0.1


def _probe_tokens(model: Any, n: int) -> Int[Tensor, "1 pos"]:
    vocabulary = int(model.cfg.d_vocab)
    ids = (torch.arange(n) * 7 + 11).remainder(vocabulary)
    return rearrange(ids, "pos -> 1 pos").to(device_of(model))


def _probe_length(model: Any) -> int:
    """Return a prompt's length, short enough that padding and branches stay within the limits."""
    return max(1, min(24, (limits(model).apart or 32) - 8))


def _relative(a: Tensor, b: Tensor) -> float:
    scale = b.float().std().clamp(min=1e-6)
    return float((a.float() - b.float()).abs().max() / scale)


def _padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    padded = torch.cat([tokens.new_zeros(1, 2), tokens], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :2] = False
    return padded, mask


def _alone(model: Any, tokens: Tensor, hooks: Hooks = ()) -> Tensor:
    return run_prompts(model, tokens, hooks=hooks)


def _padding_error(model: Any) -> float:
    """Return the distance of a padded prompt's last logits from those of the prompt alone."""
    tokens = _probe_tokens(model, _probe_length(model))
    alone = _alone(model, tokens)
    return _relative(run_prompts(model, *_padded(tokens))[:, -1], alone[:, -1])


def _caching_error(model: Any) -> float:
    """Return the distance of a padded prompt run in two cached steps from one run whole."""
    tokens, mask = _padded(_probe_tokens(model, 1 + _probe_length(model)))
    cache = new_cache(model, 1)
    run_cached(model, tokens[:, :-1], mask[:, :-1], cache)
    step = run_cached(model, tokens[:, -1:], mask, cache)
    return _relative(step[:, -1], run_prompts(model, tokens, mask)[:, -1])


def _packing_error(model: Any, n_prompt: int | None = None) -> float:
    """Return the distance of three branches of a padded, cached prompt from each run whole."""
    n = n_prompt or _probe_length(model)
    tokens = _probe_tokens(model, n + 4)
    padded, mask = _padded(tokens[:, :n])
    ends = [tokens[:, n + start : n + start + 2] for start in range(3)]
    past = run_prefix(model, PromptBatch(padded, mask, (0,), (n,)))
    packed = run_branches(model, torch.cat(ends, dim=1), past, n_branches=3)
    alone = [_alone(model, torch.cat([tokens[:, :n], end], dim=1))[:, n:] for end in ends]
    return _relative(packed, torch.cat(alone, dim=1))


def _sharing_error(model: Any) -> float:
    """Return the distance of edited branches that share layers from each run whole.

    An edit after a block stands before the next one, as in the engine.
    """
    n, n_layers = _probe_length(model), int(model.cfg.n_layers)
    tokens = _probe_tokens(model, n + 2)
    padded, mask = _padded(tokens[:, :n])
    edited = [None, n_layers // 2, n_layers - 1]

    def halve(column: int) -> Callable[..., Tensor]:
        def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
            halved = activation.clone()
            halved[:, column] *= 0.5
            return halved

        return hook_function

    hooks, alone, first = [], [], []
    for branch, layer in enumerate(edited):
        after = [] if layer is None else [(hook_name("resid_post", layer), halve(n))]
        alone.append(_alone(model, tokens, after)[:, n:])
        if layer is not None:
            last = layer + 1 == n_layers
            at = hook_name("resid_post", layer) if last else hook_name("resid_pre", layer + 1)
            hooks.append((at, halve(2 * branch)))
            first.append(layer if last else layer + 1)
    branches = repeat(tokens[:, n:], "row pos -> row (branch pos)", branch=3)
    active = [1 + sum(layer >= one for one in first) for layer in range(n_layers)]
    past = run_prefix(model, PromptBatch(padded, mask, (0,), (n,)))
    shared = run_branches(model, branches, past, hooks, n_branches=3, active=active)
    return _relative(shared, torch.cat(alone, dim=1))
