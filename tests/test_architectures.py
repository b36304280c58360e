"""Every architecture agrees with `transformers`, falls back with a warning, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import committed, compare, rows

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
    assert row.word in ("agrees", "falls back", "refused", "not built"), row.why
    assert row.outcome == committed().get(name, row.outcome), row
