"""Hooked models from Hugging Face models."""

from __future__ import annotations

from typing import Any

import torch

from transformer_lens_taskvec.models.tokens import habit_of, note_bos_habit


def bridge_from_hf(hf_model: Any, tokenizer: Any, **kwargs: Any) -> Any:
    """Return a ``TransformerBridge`` around a Hugging Face model, with that model's name.

    Args:
        hf_model: The model, which then belongs to the bridge: its attention becomes eager. Its
            parameters stay as they are, quantised ones and several dtypes too, unless ``dtype`` is
            given.
        tokenizer: Its tokenizer.
        **kwargs: Passed to ``TransformerBridge.boot_transformers``, such as ``device`` (by default
            TransformerLens' choice, for a quantised model where it is) and ``dtype``, to which all
            floating-point parameters are cast.

    Returns:
        The bridge, in evaluation mode.

    Raises:
        ValueError: If ``dtype`` is given and the model is quantised.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> model = tv.bridge_from_hf(lab.ToyConfig().llama(), lab.toy_tokenizer())
        >>> model.cfg.n_layers, model.training
        (4, False)
    """
    from transformer_lens.model_bridge import TransformerBridge

    stays = _is_quantised(hf_model) and "device" not in kwargs
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = hf_model.dtype
    elif _is_quantised(hf_model):
        raise ValueError(
            f"dtype is {kwargs['dtype']}, but the model is quantised, and a cast would destroy its "
            "packed weights; leave dtype out, or load the model without quantisation"
        )
    else:
        # Not buffers: rotary frequencies stay in float32.
        for parameter in hf_model.parameters():
            parameter.data = parameter.data.to(kwargs["dtype"])
    if stays:
        kwargs["device"] = hf_model.device
    hf_model.config._attn_implementation = "eager"  # what the bridge's attention hooks need
    name = str(getattr(hf_model.config, "name_or_path", "") or type(hf_model).__name__)
    habit = habit_of(tokenizer)
    # boot_transformers only records the device and dtype of a model that it is given.
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=hf_model.eval(), tokenizer=tokenizer, **kwargs
    )
    note_bos_habit(bridge.tokenizer, habit)
    return bridge if stays else bridge.to(bridge.cfg.device, print_details=False)


def _is_quantised(hf_model: Any) -> bool:
    """Return whether some weights are stored as anything but plain floating-point tensors."""
    from transformer_lens.utilities.quantization import quantization_method

    return (
        bool(getattr(hf_model, "is_quantized", False))
        or quantization_method(hf_model.config) is not None
        or any(hasattr(module, "_packed_params") for module in hf_model.modules())
        or any(
            type(parameter.data) is not torch.Tensor
            or not parameter.is_floating_point()
            or parameter.itemsize < 2
            for parameter in hf_model.parameters()
        )
    )
