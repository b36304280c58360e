"""What a model can do, found by trying it on a few tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Int
from torch import Tensor

from transformer_lens_taskvec.models.forward import (
    branch_mask,
    branch_positions,
    mask_dtype,
    new_cache,
    run_branches,
    run_cached,
    run_prefix,
    run_prompts,
)
from transformer_lens_taskvec.models.protocol import device_of, hook_name, inference


@dataclass(frozen=True)
class Capabilities:
    """What a model can do.

    Attributes:
        pads: Left padding does not change a prompt's logits.
        packs: Cached prompts can be continued by branches under a 4-D mask.
        caches: Cached prompts can be continued token by token.
        shares_layers: Its blocks can run on only those branches that differ by then.
        reason: Why it does not pack, or the empty string.
        max_prompt: The longest prompt that packs, the sliding window; None for no limit.
    """

    pads: bool
    packs: bool
    caches: bool
    shares_layers: bool = False
    reason: str = ""
    max_prompt: int | None = None


def capabilities(model: Any) -> Capabilities:
    """Return what the model can do, found once per model."""
    known = _CAPABILITIES.get(model)
    if known is None:
        with inference(model):
            known = _find_capabilities(model)
        _CAPABILITIES[model] = known
    return known


# A memo: trying the model again would give the same.
_CAPABILITIES: weakref.WeakKeyDictionary[Any, Capabilities] = weakref.WeakKeyDictionary()


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
    return Capabilities(
        True, packs, caches, packs and shares, reason, _sliding_window(hf_model.config)
    )


def _tried(measure: Callable[[Any], float], model: Any) -> tuple[bool, str]:
    """Return whether the error is small, and what is wrong if it is not."""
    try:
        error = measure(model)
    except Exception as problem:  # a model may raise anything
        return False, f"{type(problem).__name__}: {problem}"
    return error < _tolerance(model), f"logits differ by {error:.1e} standard deviations"


def _sliding_window(config: Any) -> int | None:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _tolerance(model: Any) -> float:
    return 1e-3 if mask_dtype(model) == torch.float32 else 0.1


def _probe_tokens(model: Any, n: int) -> Int[Tensor, "1 pos"]:
    vocabulary = int(model.cfg.d_vocab)
    ids = (torch.arange(n) * 7 + 11).remainder(vocabulary)
    return rearrange(ids, "pos -> 1 pos").to(device_of(model))


def _relative(a: Tensor, b: Tensor) -> float:
    scale = b.float().std().clamp(min=1e-6)
    return float((a.float() - b.float()).abs().max() / scale)


def _padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    padded = torch.cat([torch.zeros_like(tokens[:, :2]), tokens], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :2] = False
    return padded, mask


def _padding_error(model: Any) -> float:
    """Return the distance of a padded prompt's last logits from those of the prompt alone."""
    tokens = _probe_tokens(model, 4)
    alone = run_prompts(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return _relative(run_prompts(model, *_padded(tokens))[:, -1], alone[:, -1])


def _caching_error(model: Any) -> float:
    """Return the distance of a padded prompt run in two cached steps from one run whole."""
    tokens, mask = _padded(_probe_tokens(model, 5))
    cache = new_cache(model, 1)
    run_cached(model, tokens[:, :-1], mask[:, :-1], cache)
    step = run_cached(model, tokens[:, -1:], mask, cache)
    return _relative(step[:, -1], run_prompts(model, tokens, mask)[:, -1])


def _packing_error(model: Any) -> float:
    """Return the distance of two branches of a padded, cached prompt from each run whole."""
    tokens = _probe_tokens(model, 6)
    padded, mask = _padded(tokens[:, :3])
    ends = [tokens[:, 3:5], tokens[:, 4:6]]
    cache = run_prefix(model, padded, mask)
    bias = branch_mask(mask, n_branches=2, branch_length=2, dtype=mask_dtype(model))
    positions = branch_positions(mask, n_branches=2, branch_length=2)
    packed = run_branches(model, torch.cat(ends, dim=1), bias, positions, cache)
    errors = []
    for index, end in enumerate(ends):
        whole = torch.cat([tokens[:, :3], end], dim=1)
        alone = run_prompts(model, whole, torch.ones_like(whole, dtype=torch.bool))
        errors.append(_relative(packed[:, 2 * index : 2 * index + 2], alone[:, 3:]))
    return max(errors)


def _sharing_error(model: Any) -> float:
    """Return the distance of edited branches that share layers from those that run all."""
    tokens = _probe_tokens(model, 5)
    padded, mask = _padded(tokens[:, :3])
    n_layers, n_branches = int(model.cfg.n_layers), 3
    first = [n_layers // 2, n_layers - 1]

    def halve(branch: int) -> Callable[..., Tensor]:
        def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
            edited = activation.clone()
            edited[:, 2 * branch] *= 0.5
            return edited

        return hook_function

    hooks = [
        (hook_name("resid_post", layer), halve(branch)) for branch, layer in enumerate(first, 1)
    ]
    bias = branch_mask(mask, n_branches=n_branches, branch_length=2, dtype=mask_dtype(model))
    positions = branch_positions(mask, n_branches=n_branches, branch_length=2)
    branches = repeat(tokens[:, 3:], "row pos -> row (branch pos)", branch=n_branches)
    active = [1 + sum(layer >= edited for edited in first) for layer in range(n_layers)]
    cache = run_prefix(model, padded, mask)
    whole = run_branches(model, branches, bias, positions, cache, hooks)
    shared = run_branches(model, branches, bias, positions, cache, hooks, active=active)
    return _relative(shared, whole)
