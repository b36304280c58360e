"""Making a hooked model of a Hugging Face model."""

from __future__ import annotations

from typing import Any

from transformer_lens_taskvec.models.tokens import (
    known_bos_habit,
    note_bos_habit,
    puts_bos,
)


def bridge_from_hf(hf_model: Any, tokenizer: Any, **kwargs: Any) -> Any:
    """A ``TransformerBridge`` around a Hugging Face model, named as that is.

    Args:
        hf_model: The model; the bridge takes it over.
        tokenizer: Its tokenizer.
        **kwargs: Passed to ``TransformerBridge.boot_transformers``; ``device`` (by default the one
            that TransformerLens chooses) and ``dtype`` (by default the model's own) take effect.

    Returns:
        The bridge, in evaluation mode.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> model = tv.bridge_from_hf(lab.ToyConfig().llama(), lab.toy_tokenizer())
        >>> model.cfg.n_layers, model.training
        (4, False)
    """
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.config._attn_implementation = "eager"  # what the bridge's attention hooks need
    name = str(getattr(hf_model.config, "name_or_path", "") or type(hf_model).__name__)
    # Of a model it is given, boot_transformers only records device and dtype.
    kwargs.setdefault("dtype", hf_model.dtype)
    for parameter in hf_model.parameters():  # not buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(kwargs["dtype"])
    known = known_bos_habit(tokenizer)
    habit = puts_bos(tokenizer) if known is None else known
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=hf_model.eval(), tokenizer=tokenizer, **kwargs
    )
    note_bos_habit(bridge.tokenizer, habit)
    return bridge.to(bridge.cfg.device, print_details=False)
