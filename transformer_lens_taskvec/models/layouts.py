"""Where a hook point's activation has its positions, heads and width, found by trying it.

Most are ``[batch, pos, d]`` or ``[batch, pos, head, d]``. Some have the head where others have the
position (``pattern``), some merge batch and position (the routers of mixtures of experts), some
share one row among all prompts (``hook_cos``), and some never run. Names do not tell: ``q`` is one
kind in Llama and another in DeepSeek.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from transformer_lens_taskvec.models.carried import without_hooks
from transformer_lens_taskvec.models.protocol import (
    check_layers,
    counted_for,
    device_of,
    hook_name,
    inference,
    model_name,
)

# Rows and positions of the two passes: an axis that has both sizes in turn is that one.
_TRIALS = ((2, 5), (3, 6))

_SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")

# A memo of the shapes in each pass, by model, state of its switches, and hook point that runs.
_SEEN: weakref.WeakKeyDictionary[Any, dict[Any, list[set[tuple[int, ...]]]]] = (
    weakref.WeakKeyDictionary()
)


def check_readable(
    model: Any, layers: Sequence[int] | None, hook: str
) -> tuple[tuple[int, ...], list[str]]:
    """Return the layers asked for, all of them for None, and the names of their hook points.

    Raises:
        ValueError: As for :func:`check_layers` and :func:`position_shapes`, or if the layers'
            activations have different shapes.
    """
    chosen = check_layers(model, layers, hook)
    names = [hook_name(hook, layer) for layer in chosen]
    shapes = position_shapes(model, names)
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"layers have activations of different shapes at {hook!r}: {shapes}; name layers of "
            "one shape"
        )
    return chosen, names


def position_shapes(model: Any, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of the activation at one position: ``(d,)``, or ``(head, d)``.

    Hook points that are not known yet are tried in two short passes.

    Args:
        model: Any model with TransformerLens' hook API.
        names: Full names of hook points in its blocks.

    Raises:
        ValueError: If an activation is not ``[batch, pos, ...]``, or the hook point never runs.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> names = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"]
        >>> list(position_shapes(tv.load_model("toy"), names).values())
        [(64,), (4, 16)]
    """
    model = counted_for(model)
    known = _SEEN.setdefault(model, {})
    state = (
        *(bool(getattr(model.cfg, switch, False)) for switch in _SWITCHES),
        bool(getattr(model, "compatibility_mode", False)),
    )
    if any((state, name) not in known for name in names):
        hooks = {name.split(".", 2)[-1] for name in names}  # in all layers: a sweep asks for each
        blocks = [name for name in model.hook_dict if name.startswith("blocks.")]
        new = [name for name in blocks if name.split(".", 2)[-1] in hooks]
        # Temporary hooks may not suit prompts this short; TransformerLens connects some points by
        # permanent ones.
        handles = [handle for point in model.hook_dict.values() for handle in point.fwd_hooks]
        temporary = {handle.hook.id for handle in handles if not handle.is_permanent}
        with inference(model), without_hooks(model, temporary):
            trials = [_shapes_seen(model, new, *trial) for trial in _TRIALS]
        for name in new:
            if all(seen[name] for seen in trials):
                known[state, name] = [seen[name] for seen in trials]
    return {name: _at_position(model, name, known.get((state, name), [])) for name in names}


def _shapes_seen(
    model: Any, names: Sequence[str], n_rows: int, length: int
) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes that each hook point sees in a pass; the empty one for no tensor."""
    seen: dict[str, set[tuple[int, ...]]] = {name: set() for name in names}

    def note(name: str) -> Any:
        def hook_function(activation: Any, hook: Any = None) -> None:
            seen[name].add(tuple(activation.shape) if isinstance(activation, Tensor) else ())

        return hook_function

    model.run_with_hooks(
        _trial_tokens(model, n_rows, length), fwd_hooks=[(name, note(name)) for name in names]
    )
    return seen


def _trial_tokens(model: Any, n_rows: int, length: int) -> Tensor:
    width = getattr(model.cfg, "d_input", None)  # of a model that reads vectors
    if width is not None:
        return torch.zeros(n_rows, length, int(width), device=device_of(model))
    ids = (torch.arange(n_rows * length) * 7 + 11).remainder(int(model.cfg.d_vocab))
    return rearrange(ids, "(row pos) -> row pos", row=n_rows).to(device_of(model))


def _at_position(model: Any, name: str, trials: Sequence[set[tuple[int, ...]]]) -> tuple[int, ...]:
    if not trials:
        raise ValueError(
            f"hook point {name!r} of {model_name(model)} does not run; switch it on "
            "(model.set_use_attn_result(True) for 'result', and so on), or choose another"
        )
    rest = {shape[2:] for shapes in trials for shape in shapes}
    first = {shape[:2] for shapes in trials for shape in shapes}
    if first != set(_TRIALS) or len(rest) > 1:
        (n_rows, length), shapes = _TRIALS[0], " and ".join(map(str, sorted(trials[0])))
        raise ValueError(
            f"hook {name!r} of {model_name(model)} has no position as its second axis: for "
            f"{n_rows} prompts of {length} tokens the activation's shape is {shapes}, and [batch, "
            "pos, d] or [batch, pos, head, d] is needed. Read it with model.run_with_cache, and "
            "edit it with a hook function of your own"
        )
    return rest.pop()
