"""The packed engine against the plain way, over random prompts, answers, layers and modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import read_prompts
from transformer_lens_taskvec.interventions import packed as engine
from transformer_lens_taskvec.models import prefixes
from transformer_lens_taskvec.models.capabilities import Capabilities, capabilities
from transformer_lens_taskvec.models.protocol import inference

TOKENS = st.integers(3, 49151)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=5)
SHORT = st.lists(TOKENS, min_size=1, max_size=5)
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


@st.composite
def prompts_of_a_tree(draw: Any) -> list[list[int]]:
    """Prompts whose beginnings form a tree: every part may follow every other that was drawn."""
    parts = draw(st.lists(st.lists(TOKENS, max_size=9), min_size=1, max_size=4))
    beginnings: list[list[int]] = [[]]
    for part in parts:
        beginnings.append([*draw(st.sampled_from(beginnings)), *part])
    ends = draw(st.lists(st.tuples(st.sampled_from(beginnings), SHORT), min_size=1, max_size=6))
    return [[*beginning, *end] for beginning, end in ends]


def logits_alone(
    model: Any, prompt: list[int], answer: list[int], variant: list[tv.Intervention]
) -> torch.Tensor:
    """The logits that predict an answer, of one prompt under bare hooks, without the engine."""
    tokens = torch.tensor([[*prompt, *answer[:-1]]])

    def at_prompt(edit: tv.Intervention) -> Any:
        def hook_function(activation: torch.Tensor, hook: Any = None) -> torch.Tensor:
            edited = edit(activation[:, : len(prompt)])
            return torch.cat([edited, activation[:, len(prompt) :]], dim=1)

        return edit.name, hook_function

    hooks = [at_prompt(edit) for edit in variant]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return logits[0, len(prompt) - 1 :]


@pytest.fixture
def shares_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models share beginnings too, which would save no time."""
    monkeypatch.setattr(prefixes, "_PASS", 0)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.data(),
    prompts=st.one_of(PROMPTS, prompts_of_a_tree()),
    max_tokens=st.sampled_from([None, 7, 64]),
)
def test_packed_logits_equal_those_of_one_prompt_and_variant_at_a_time(
    bridge: Any, shares_all: None, data: Any, prompts: list[list[int]], max_tokens: int | None
) -> None:
    answers = [data.draw(ANSWER) for _ in prompts]
    variants = data.draw(
        st.lists(st.lists(interventions(), max_size=3), min_size=1, max_size=7), label="variants"
    )
    observe = data.draw(st.sampled_from([[], ["blocks.1.hook_resid_post"]]), label="observe")
    assert capabilities(bridge).packs
    seen = set()
    with inference(bridge):
        for chunk in engine.answer_logits(
            bridge, prompts, answers, variants, observe=observe, max_tokens=max_tokens
        ):
            for i, row in enumerate(chunk.rows):
                n = len(answers[row])
                for j, variant in enumerate(chunk.variants):
                    alone = logits_alone(bridge, prompts[row], answers[row], variants[variant])
                    close(chunk.logits[i, j, :n], alone)
                    assert (row, variant) not in seen
                    seen.add((row, variant))
                assert chunk.answers[i, :n].tolist() == answers[row]
                assert int(chunk.mask[i].sum()) == n
                if chunk.observed is not None:
                    _, cache = bridge.run_with_cache(torch.tensor([prompts[row]]))
                    close(chunk.observed[i, 0], cache["blocks.1.hook_resid_post"][0, -1])
                    assert (row, "observed") not in seen
                    seen.add((row, "observed"))
    assert len(seen) == len(prompts) * (len(variants) + len(observe))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=1e-4)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    prompts=prompts_of_a_tree(),
    budget=st.sampled_from([5, 40, 400]),
    position=st.sampled_from([-1, -2, 0, 1]),
)
def test_activations_behind_shared_beginnings_are_those_of_each_prompt_alone(
    bridge: Any, prompts: list[list[int]], budget: int, position: int
) -> None:
    prompts = [prompt for prompt in prompts if len(prompt) > 1] or [[5, 6]]
    own = [-position if position < 0 else len(prompt) - position for prompt in prompts]
    seen = []
    with inference(bridge):
        can = capabilities(bridge)
        plan = prefixes.steps(prompts, budget=budget, can=can, own=own, fewest=4)
        for batch, past in prefixes.in_steps(bridge, plan):
            ends = [-own[row] for row in batch.rows]
            found = read_prompts(bridge, batch, ["blocks.2.hook_resid_post"], ends, past=past)
            for row, values in zip(batch.rows, found, strict=True):
                _, cache = bridge.run_with_cache(torch.tensor([prompts[row]]))
                close(values[0], cache["blocks.2.hook_resid_post"][0, position])
            seen.extend(batch.rows)
    assert sorted(seen) == list(range(len(prompts)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompts=prompts_of_a_tree(), budget=st.integers(1, 60), fewest=st.integers(1, 12))
def test_steps_contain_every_prompt_once_and_beginnings_that_save_enough(
    prompts: list[list[int]], budget: int, fewest: int
) -> None:
    can = Capabilities(pads=True, packs=True, caches=True)
    levels: list[list[list[int]]] = []
    ended: dict[int, list[int]] = {}
    uses: dict[tuple[int, ...], int] = {}
    for step in prefixes.steps(prompts, budget=budget, can=can, fewest=fewest):
        above = levels[step.level - 1] if step.level else [[]]
        parents = step.parents or (0,) * len(step.tokens)
        whole = [[*above[p], *own] for p, own in zip(parents, step.tokens, strict=True)]
        assert step.before >= max(len(above[p]) for p in parents)
        assert len(step.tokens) == 1 or len(step.tokens) * step.width <= budget
        del levels[step.level :]
        if step.rows:
            ended |= dict(zip(step.rows, whole, strict=True))
            assert all(step.tokens)
        else:
            levels.append(whole)
            uses |= {tuple(tokens): 0 for tokens in whole}
    assert ended == dict(enumerate(prompts))
    for beginning in uses:
        below = [p for p in prompts if tuple(p[: len(beginning)]) == beginning]
        assert len(below) >= 2
        assert len(beginning) >= prefixes.FEWEST


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), first=st.sampled_from([0, 2, None]))
def test_continuations_of_prompts_that_share_are_those_of_each_prompt_alone(
    bridge: Any, shares_all: None, data: Any, first: int | None
) -> None:
    words = st.lists(st.sampled_from(["one", "two", "three", " ", "->", "7"]), max_size=12)
    begin = "".join(data.draw(words))
    prompts = [f"{begin}{''.join(data.draw(words))}:" for _ in range(4)]
    edits = [data.draw(interventions())]
    options: dict[str, Any] = {"max_new_tokens": 4, "first": first}
    together = tv.generate(bridge, prompts, edits, **options)
    assert together == [tv.generate(bridge, [one], edits, **options)[0] for one in prompts]
