"""Every architecture agrees with `transformers`, falls back with a warning, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import compare, rows

OUTCOMES: dict[str, tuple[str, ...]] = {
    "agrees": (
        "apertus",
        "arcee",
        "bitnet",
        "codegen",
        "cohere",
        "cohere2, wide window",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5",
        "ernie4_5_moe",
        "falcon, one KV head",
        "flex_olmo",
        "gemma",
        "gemma2, wide window",
        "gemma3_text, wide window",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo, global",
        "gpt_neo, wide window",
        "gpt_neox",
        "gpt_neox, sequential",
        "gpt_oss, wide window",
        "gptj",
        "granite",
        "granite, multipliers",
        "granitemoe",
        "hunyuan_v1_dense",
        "jais2",
        "jetmoe",
        "llama",
        "llama, rope linear",
        "llama, rope llama3",
        "llama, rope yarn",
        "llama4_text, wide chunks",
        "minimax_m2",
        "ministral3",
        "mistral, no window",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3, wide window",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "stablelm, parallel",
        "starcoder2",
        "xglm",
        "youtu",
    ),
    "falls back": (
        "afmoe",
        "bamba",
        "bloom",
        "cohere2",
        "exaone4",
        "falcon, ALiBi",
        "falcon_h1",
        "falcon_mamba",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "gpt_oss",
        "granitemoehybrid",
        "jamba",
        "laguna",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "mistral",
        "mixtral, window",
        "modernbert-decoder",
        "mpt",
        "nemotron_h",
        "olmo3",
        "olmo_hybrid",
        "phi3, window",
        "qwen2, window",
        "qwen2_moe, window",
        "qwen3, window",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe, window",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "smollm3, window",
        "starcoder2, window",
        "vaultgemma",
        "zamba2",
    ),
    "not built": (
        "falcon",
        "gpt_bigcode, heads",
        "hrm_text",
        "opt, norm after",
    ),
    "refused": ("deepseek_v4",),
}
"""The table, under the versions of TransformerLens and transformers that the table names.

Of rows that are not in it any outcome will do that is not wrong without a word.
"""

USUAL = (
    "gemma2",
    "glm_moe_dsa",
    "gpt2",
    "gpt_neo",
    "gpt_oss, wide window",
    "llama, rope dynamic",
    "llama4_text",
    "mamba",
    "mistral",
    "mpt",
    "openai-gpt",
    "opt, projected",
    "phi3, rope longrope",
    "qwen2, window",
)
"""The rows that run by default; the others are slow."""


def _row(name: str) -> Any:
    return pytest.param(name, marks=() if name in USUAL else pytest.mark.slow)


@pytest.mark.parametrize("name", [_row(name) for name in rows()])
def test_an_architecture_agrees_falls_back_or_is_refused(name: str) -> None:
    row = compare(name)
    expected = [outcome for outcome, names in OUTCOMES.items() if name in names]
    assert row.word in ("agrees", "falls back", "refused", "not built"), row.why
    assert not expected or row.outcome in expected, row
