"""The logit lens: residual streams read as the model reads its last one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.models.forward import mask_dtype, run_prompts
from transformer_lens_taskvec.models.protocol import device_of, hook_name, inference, model_name
from transformer_lens_taskvec.models.readout import Keep

STATES = ("resid_pre", "resid_mid", "resid_post")
"""Hook points of the residual stream itself."""

ADDED = ("attn_out", "mlp_out")
"""Hook points of what a block adds to it."""

Read = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row vocab"]]
"""Makes logits of residual streams, float32 on the CPU."""


def stream_reader(model: Any, *, added: bool = False) -> Read:
    """Return what makes logits of residual streams, tried on a few tokens of the model.

    It is TransformerLens' ``logit_readout`` where that is there (4.x, of a bridge), and the
    model's own ``ln_final`` and ``unembed`` elsewhere.

    Args:
        model: A language model.
        added: Whether what attention and MLPs add will be read too.

    Raises:
        ValueError: If the model's logits are not made of its last stream so, or a block does more
            than adding ``attn_out`` and ``mlp_out``, where these are read.

    Example:
        >>> import torch
        >>> import transformer_lens_taskvec as tv
        >>> stream_reader(tv.load_model("toy"))(torch.ones(1, 64)).shape
        torch.Size([1, 101])
    """
    through = partial(_through_modules, model)
    if hasattr(model, "original_model"):
        try:
            from transformer_lens.tools.analysis import logit_readout
        except ImportError:  # TransformerLens 3.9
            pass
        else:
            through = partial(_through_readout, logit_readout, model)

    def read(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        with inference(model):
            return through(rows).float().cpu()

    with inference(model):
        problem = _problem(model, read, added)
    if problem:
        raise ValueError(f"vectors of {model_name(model)} cannot be read as tokens: {problem}")
    return read


def _through_readout(logit_readout: Callable[..., Any], model: Any, rows: Tensor) -> Tensor:
    values: Tensor = logit_readout(model, rows).values
    return values


def _through_modules(model: Any, rows: Tensor) -> Tensor:
    stream = rearrange(rows.to(device_of(model), mask_dtype(model)), "row d -> 1 row d")
    logits: Tensor = model.unembed(model.ln_final(stream))
    return logits[0]


def _problem(model: Any, read: Read, added: bool) -> str:
    """Return what keeps the reader from giving the model's own logits, or the empty string."""
    last = int(model.cfg.n_layers) - 1
    points = ("resid_pre", "resid_post", *ADDED) if added else ("resid_post",)
    names = {point: hook_name(point, last) for point in points}
    missing = [name for name in names.values() if name not in model.hook_dict]
    if missing:
        return f"it has no hook points {', '.join(missing)}"
    tokens = (torch.arange(3) * 7 + 11).remainder(int(model.cfg.d_vocab))
    tokens = rearrange(tokens, "pos -> 1 pos").to(device_of(model))
    kept = {point: Keep() for point in points}
    logits = run_prompts(model, tokens, hooks=[(names[point], kept[point]) for point in points])
    streams = {point: keep.take()[0].float().cpu() for point, keep in kept.items()}
    tolerance = 1e-3 if mask_dtype(model) == torch.float32 else 0.1
    try:
        apart = _distance(read(streams["resid_post"]), logits[0].float().cpu())
    except Exception as error:  # a model may raise anything
        return f"reading its last residual stream raised {type(error).__name__}: {error}"
    if not apart <= tolerance:
        return (
            "its logits are not those of its last residual stream through ln_final and unembed; "
            f"they differ by {apart:.1e} standard deviations"
        )
    if added:
        change = streams["resid_post"] - streams["resid_pre"]
        left = change - streams["attn_out"] - streams["mlp_out"]
        if not left.norm() <= tolerance * streams["resid_post"].norm():
            return f"its blocks do not add {' and '.join(ADDED)} as they are"
    return ""


def _distance(a: Float[Tensor, "pos vocab"], b: Float[Tensor, "pos vocab"]) -> float:
    """Return the largest difference up to a constant per position, in standard deviations."""
    a, b = (of - reduce(of, "pos vocab -> pos 1", "mean") for of in (a, b))
    return float((a - b).abs().max() / b.std().clamp(min=1e-6))
