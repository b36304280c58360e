"""Small randomly initialised models of several architectures, with a real tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_taskvec as tv

try:  # TransformerLens 3.x has it, 4.x no longer
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def hf_model(kind: str, **changes: Any) -> Any:
    """A random model of the kind, larger in scale than the usual initialisation."""
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {**SIZES, "num_key_value_heads": 2}),
        "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2}),
        "gpt2": (
            "GPT2",
            {"vocab_size": 49152, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
        ),
        "gpt_neox": ("GPTNeoX", SIZES),
        "gemma2": (
            "Gemma2",
            {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 128},
        ),
        "opt": (
            "OPT",
            {
                "vocab_size": 49152,
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 32,
                "pad_token_id": 2,
                "max_position_embeddings": 256,
            },
        ),
        "mamba": (
            "Mamba",
            {"vocab_size": 49152, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
        ),
    }
    family, settings = configs[kind]
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    config.architectures = [family + suffix]
    # Mamba has no attention to ask the eager implementation for.
    attention = {} if kind == "mamba" else {"attn_implementation": "eager"}
    model_class = getattr(transformers, family + suffix)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if attention:
            config._attn_implementation = "eager"
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and kind != "mamba":
                    parameter.mul_(4.0)
    return model.eval().to(torch.float32)


def sentencepiece_tokenizer() -> Any:
    """A tokenizer as Llama 2's, which puts a space before every text, and spells by bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [chr(0x2581), *map(chr, range(33, 127))]
    merges = [(chr(0x2581), "c"), (chr(0x2581) + "c", "at"), ("a", "t"), ("c", "at")]
    merges += [("d", "o"), ("do", "g"), (chr(0x2581), "dog"), ("-", ">")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(chr(0x2581)), normalizers.Replace(" ", chr(0x2581))]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(chr(0x2581), " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        add_bos_token=True,  # or TransformerLens would load another of the name
        padding_side="left",
        name_or_path="sentencepiece",
    )


def with_bos(episodes: Sequence[tv.Episode], bos: bool | None) -> list[tv.Episode]:
    """The same episodes with another use of a beginning-of-sequence token."""
    return [replace(e, template=replace(e.template, bos=bos)) for e in episodes]


def bridge(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """A ``TransformerBridge`` around a random model."""
    return TransformerBridge.boot_transformers(
        f"tiny-{kind}", hf_model=hf_model(kind, **changes), tokenizer=tokenizer, device="cpu"
    )


def hooked_transformer(hf_llama: Any, tokenizer: Any, name: str) -> Any:
    """A ``HookedTransformer`` with a Llama model's weights as they are, under 3.x."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    assert HookedTransformer is not None
    c = hf_llama.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=256,
        d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        model_name=name,
        default_prepend_bos=False,
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer, default_padding_side="left")
    model.load_and_process_state_dict(
        convert_llama_weights(hf_llama, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
