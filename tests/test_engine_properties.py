"""The packed engine against the plain way, over random prompts, answers, layers and modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.interventions import packed as engine
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.tokens import Batch

TOKENS = st.integers(3, 49151)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=5)
ANSWER = st.lists(TOKENS, min_size=1, max_size=4)


@st.composite
def interventions(draw: Any) -> tv.Intervention:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    hook = draw(st.sampled_from(["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]))
    layer, vector = draw(st.integers(0, 2)), torch.randn(32, generator=generator)
    kind = draw(st.sampled_from(["replace", "add", "zero", "project", "own", "head"]))
    if kind == "head":
        return tv.inject(vector[:8], layer, hook="z", head=draw(st.integers(0, 3)))
    if kind == "zero":
        return tv.ablate(layer, hook=hook)
    if kind == "project":
        return tv.ablate(layer, direction=vector, hook=hook)
    mode = (lambda rows, v: 0.5 * rows + v) if kind == "own" else kind
    return tv.inject(vector, layer, mode=mode, scale=draw(st.floats(-2, 2)), hook=hook)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def bridge(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return zoo.bridge(request.param, tokenizer)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), prompts=PROMPTS, max_tokens=st.sampled_from([None, 7, 64]))
def test_packed_logits_equal_those_of_one_prompt_and_variant_at_a_time(
    bridge: Any, data: Any, prompts: list[list[int]], max_tokens: int | None
) -> None:
    answers = [data.draw(ANSWER) for _ in prompts]
    variants = data.draw(
        st.lists(st.lists(interventions(), max_size=3), min_size=1, max_size=7), label="variants"
    )
    seen = set()
    with inference(bridge):
        for chunk in engine.answer_logits(
            bridge, prompts, answers, variants, max_tokens=max_tokens
        ):
            for i, row in enumerate(chunk.rows):
                tokens = torch.tensor([prompts[row]])
                batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), (0,))
                ids = torch.tensor([answers[row]])
                real = torch.ones_like(ids, dtype=torch.bool)
                for j, variant in enumerate(chunk.variants):
                    plain = engine._one_by_one(bridge, batch, ids, real, variants, [variant], [])
                    alone = next(plain).logits[:, 0]
                    packed = chunk.logits[i, j, : len(answers[row])]
                    scale = float(alone.abs().max())
                    torch.testing.assert_close(packed, alone[0], atol=1e-4 * scale, rtol=1e-4)
                    assert torch.equal(chunk.answers[i, : len(answers[row])], ids[0])
                    assert int(chunk.mask[i].sum()) == len(answers[row])
                    assert (row, variant) not in seen
                    seen.add((row, variant))
    assert len(seen) == len(prompts) * len(variants)
