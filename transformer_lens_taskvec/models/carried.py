"""Hooks that a model carries when the library is called.

Such hooks were written for plain passes. Under them a model runs as it would for its user: one
prompt length at a time, without padding or branches. Interventions among them are known, so they
are taken along instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.nn.modules import module as torch_module

from transformer_lens_taskvec.models.protocol import model_name

_OWN = (
    "transformer_lens.model_bridge.",
    "transformer_lens_taskvec.",
    "transformers.",
    "accelerate.",
    "torch.",
)
"""Whose functions may be there without a user's doing."""


def carries_hooks(model: Any) -> bool:
    """Return whether the model has hooks other than those of the frameworks."""
    return any(not _is_own(function) for function in _functions(model))


def hooks_of_callers(model: Any) -> set[int]:
    """Return the numbers of the handles of hooks that are not the frameworks', at hook points."""
    return {
        handle.hook.id
        for point in model.hook_dict.values()
        for handle in point.fwd_hooks
        if not _is_own(handle.user_hook)
    }


def warn_of_hooks(model: Any, stacklevel: int) -> None:
    """Say that the model has hooks, and what follows."""
    warnings.warn(
        f"{model_name(model)} carries hooks of yours, which act in every pass; prompts run "
        "plainly, one length at a time. Without them the results would be others; "
        "model.reset_hooks(including_permanent=True) removes TransformerLens' hooks.",
        stacklevel=stacklevel + 1,
    )


@contextmanager
def taking_along(model: Any, kind: type[Any]) -> Iterator[list[Any]]:
    """Take the hooks of one kind off the model for a time, and give them in their order.

    Raises:
        ValueError: If a hook of another kind at the same hook point comes after one of them, so
            that their order could not be kept.
    """
    found: dict[int, Any] = {}
    for point in {id(point): point for point in model.hook_dict.values()}.values():
        own = {
            handle.hook.id: handle.user_hook
            for handle in point.fwd_hooks
            # At another hook point than its own it is a function like any other.
            if isinstance(handle.user_hook, kind)
            and model.hook_dict.get(handle.user_hook.name) is point
        }
        others = [h.hook.id for h in point.fwd_hooks if h.hook.id not in own]
        if own and max(others, default=0) > min(own):
            raise ValueError(
                f"{model_name(model)} carries a hook that comes after an intervention at the same "
                "hook point; pass the intervention to the function instead of hooking it"
            )
        found.update(own)
    with without_hooks(model, found.keys()):
        yield [found[number] for number in sorted(found)]


@contextmanager
def without_hooks(model: Any, numbers: Set[int]) -> Iterator[None]:
    """Take hooks off a model's hook points for a time, by the numbers of their handles."""
    of_points = {id(point): point._forward_hooks for point in model.hook_dict.values()}
    kept = [(hooks, dict(hooks)) for hooks in of_points.values() if hooks.keys() & numbers]
    for hooks, before in kept:
        for number in before.keys() & numbers:
            del hooks[number]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


def _functions(model: Any) -> Iterator[Callable[..., Any]]:
    yield from torch_module._global_forward_hooks.values()
    yield from torch_module._global_forward_pre_hooks.values()
    yield from torch_module._global_backward_hooks.values()
    yield from torch_module._global_backward_pre_hooks.values()
    for module in model.modules() if hasattr(model, "modules") else ():
        active = {
            **module._forward_hooks,
            **module._forward_pre_hooks,
            **module._backward_hooks,
            **module._backward_pre_hooks,
        }
        if not active:
            continue
        # TransformerLens wraps the hooks of a hook point and keeps the originals.
        handles = [*getattr(module, "fwd_hooks", ()), *getattr(module, "bwd_hooks", ())]
        by_number = {handle.hook.id: handle.user_hook for handle in handles}
        yield from (by_number.get(number) or function for number, function in active.items())


def _is_own(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    if name is None or "caching_hooks" in name:
        return False  # an object, such as an intervention, or a cache that the user reads
    return (getattr(function, "__module__", None) or "").startswith(_OWN)
