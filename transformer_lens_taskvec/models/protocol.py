"""What the library requires of a model: hook points, layers, a device, a name."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformer_lens.utilities.components_utils import get_act_name


@runtime_checkable
class HookedModel(Protocol):
    """The part of TransformerLens' hook API that the library uses.

    ``TransformerBridge``, ``HookedTransformer`` and any other ``HookedRootModule`` with these
    members will do. Text prompts also need a ``tokenizer``, and function vectors
    ``blocks[l].attn.W_O``.

    Attributes:
        cfg: The configuration, with ``n_layers`` and ``d_model``, and optionally ``model_name`` and
            ``device``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> isinstance(tv.load_model("toy"), tv.models.HookedModel)
        True
    """

    cfg: Any

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The hook points by name."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with temporary hooks."""
        ...


def model_name(model: Any) -> str:
    """Return the name under which the model was loaded."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def counted_for(model: Any) -> Any:
    """Return the model that a stand-in counts for, or the model itself."""
    return getattr(model, "counts_for", model)


def fingerprint(model: Any) -> str | None:
    """Return a hash of a few hundred entries of each parameter, or None without parameters.

    It takes milliseconds, and is the same in every process, on every device, and at every precision
    that holds the weights exactly. Another checkpoint, finetuning, processed weights and rounding
    to a lower precision change it; an edit of single neurons may not.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> fingerprint(model) == fingerprint(tv.load_model("toy"))
        True
        >>> _ = model.original_model.lm_head.weight.data.mul_(1.001)
        >>> fingerprint(model) == fingerprint(tv.load_model("toy"))
        False
    """
    entries: dict[torch.device, list[Tensor]] = {}
    for parameter in getattr(model, "parameters", tuple)():
        per_axis = round(256 ** (1 / max(1, parameter.ndim)))
        grid = tuple(slice(None, None, max(1, size // per_axis)) for size in parameter.shape)
        some = parameter.detach()[grid].to(torch.float32).flatten()
        entries.setdefault(parameter.device, []).append(some)
    hashes = []
    for several in entries.values():
        copied = torch.cat(several).cpu().split(list(map(len, several)))  # one copy, not one each
        hashes += [hashlib.sha256(one.numpy().tobytes()).digest() for one in copied]
    # Sorted, since versions of TransformerLens may list the same parameters in another order.
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()[:16] if hashes else None


def revision(model: Any) -> str | None:
    """Return the commit on the model hub that the weights come from, where it is known."""
    config = getattr(getattr(model, "original_model", model), "config", model.cfg)
    commit = getattr(config, "_commit_hash", None)
    return None if commit is None else str(commit)


def device_of(model: Any) -> torch.device:
    """Return the device of the model's inputs."""
    return torch.device(getattr(model.cfg, "device", None) or "cpu")


def check_layers(
    model: Any, layers: Sequence[int] | None, hook: str = "resid_post"
) -> tuple[int, ...]:
    """Return the layers asked for, all of them for None.

    Raises:
        ValueError: If a layer is out of range, named twice, or has no such hook point.
    """
    n_layers = int(model.cfg.n_layers)
    chosen = tuple(range(n_layers)) if layers is None else tuple(int(layer) for layer in layers)
    if not chosen:
        raise ValueError("layers is empty; name at least one layer, or None for all")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers names a layer twice: {list(chosen)}; name each once")
    points = model.hook_dict  # a bridge builds it at every look
    for layer in chosen:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"layer {layer} is out of range: {model_name(model)} has layers 0 to {n_layers - 1}"
            )
        if hook_name(hook, layer) not in points:
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
            f"there are: {', '.join(near[:12]) or 'none that start like it'}"
        )


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Run without gradients and in evaluation mode, and restore the modes afterwards.

    One thread at a time: hooks and modes are the model's, so a second thread waits. Two bridges
    around one Hugging Face model count as one.
    """
    with _LOCK:
        lock = _LOCKS.setdefault(getattr(model, "original_model", model), threading.RLock())
    with lock, _evaluating(model):
        yield


# Locks are the model's, and no state may be left on it.
_LOCK = threading.Lock()
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
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


def hook_name(hook: str, layer: int) -> str:
    """Return the full name of a hook point in a block; short names are TransformerLens'.

    Example:
        >>> hook_name("resid_post", 3), hook_name("z", 0), hook_name("attn.hook_z", 0)
        ('blocks.3.hook_resid_post', 'blocks.0.attn.hook_z', 'blocks.0.attn.hook_z')
    """
    if "." in hook or hook.startswith("hook_"):
        return f"blocks.{layer}.{hook}"
    return str(get_act_name(hook, layer))
