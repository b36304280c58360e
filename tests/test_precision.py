"""Models in half precision, and what is kept in full precision beside them.

No CUDA or MPS device is at hand where this suite runs. What would go wrong there shows here in
part: a vector's dtype and device against the model's (the meta device stands for another one),
averages in the model's dtype. A model split over devices by ``device_map`` is not tested.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source

TASKS = {name: task for name, task in tv.bitwise_tasks().items() if name in ("AND", "OR", "Null")}
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def few() -> list[tv.Episode]:
    return tv.sample_episodes(TASKS, 6, 2, seed=3)


@pytest.fixture(scope="module", params=HALVES, ids=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return tv.bridge_from_hf(zoo.hf_model("llama"), tokenizer, device="cpu", dtype=request.param)


@pytest.fixture(scope="module")
def full(tokenizer: Any) -> Any:
    return tv.bridge_from_hf(zoo.hf_model("llama"), tokenizer, device="cpu")


def test_activations_and_vectors_are_in_full_precision(
    half: Any, full: Any, few: list[tv.Episode]
) -> None:
    found = tv.collect(half, few)
    assert next(half.parameters()).dtype in HALVES
    assert found.values.dtype == torch.float32
    vectors = tv.task_vectors(found)
    assert vectors.values.dtype == torch.float32
    exact = torch.stack([found.values[found.labels == t].double().mean(0) for t in range(3)])
    torch.testing.assert_close(vectors.values.double(), exact, atol=1e-6, rtol=1e-6)
    expected = tv.collect(full, few).values
    cosine = torch.nn.functional.cosine_similarity(found.values, expected, dim=-1)
    assert cosine.min() > 0.99
    assert tv.task_decodability(found, 3).scores.shape == (3, 3)


def test_a_mean_of_many_does_not_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 1_000 + torch.randn(20_000, 1, 4, generator=generator)
    source = Source("made", "resid_post", -1, "{x}{y}", False)
    labels = torch.zeros(len(values), dtype=torch.long)
    found = tv.Activations(values, labels, ("a",), (0,), source)
    mean = tv.task_vectors(found)["a"]
    torch.testing.assert_close(mean.double()[0], values.double().mean(0)[0], atol=1e-4, rtol=0)


def test_half_precision_scores_are_those_of_full_precision_within_its_grain(
    half: Any, full: Any, few: list[tv.Episode]
) -> None:
    vectors = tv.task_vectors(tv.collect(full, few))
    vectors = dataclasses.replace(
        vectors,
        source=dataclasses.replace(vectors.source, model=tv.collect(half, few).source.model),
    )
    grain = 0.02 if next(half.parameters()).dtype == torch.float16 else 0.15
    for call in (
        lambda model: tv.evaluate(model, few).loss,
        lambda model: tv.layer_sweep(model, tv.zero_shot(few), vectors).loss,
        lambda model: tv.head_effects(model, few).log_probability,
    ):
        ours, expected = call(half), call(full)
        scale = float(expected.abs().mean())
        assert ours.dtype in (torch.float32, torch.float64)
        assert float((ours - expected).abs().mean()) < grain * scale


def test_packed_and_plain_agree_in_half_precision(half: Any, few: list[tv.Episode]) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edit = [tv.inject(vector, 1)]
    packed = tv.evaluate_many(half, few, [[], edit, edit])
    alone = tv.evaluate(half, few, [tv.inject(vector, 1, position=(-1,))])
    assert packed[1].correct.equal(packed[2].correct)
    torch.testing.assert_close(packed[1].loss, packed[2].loss)
    torch.testing.assert_close(packed[1].loss, alone.loss, atol=0.05, rtol=0.05)


def noting(seen: list[torch.dtype]) -> Any:
    def note(activation: torch.Tensor, hook: Any = None) -> None:
        seen.append(activation.dtype)

    return note


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_vectors_dtype_does_not_change_the_models(
    full: Any, half: Any, few: list[tv.Episode], dtype: torch.dtype
) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for model in (full, half):
        expected = next(model.parameters()).dtype
        seen: list[torch.dtype] = []
        note = noting(seen)
        edits = [tv.inject(vector, 1, mode="add"), tv.ablate(1, direction=vector)]
        tokens = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=[*edits, ("blocks.2.hook_resid_post", note)])
        assert seen == [expected]
        assert torch.isfinite(tv.evaluate(model, few, edits).loss).all()


@pytest.mark.parametrize("position", [-1, (0, -1), None])
def test_vectors_follow_the_activation_to_its_device(position: Any) -> None:
    vector = torch.randn(32)
    elsewhere = torch.empty(2, 5, 32, device="meta", dtype=torch.bfloat16)
    for edit in (
        tv.inject(vector, 1, position=position),
        tv.inject(vector, 1, mode="add", position=position),
        tv.ablate(1, position=position),
        tv.ablate(1, direction=vector, position=position),
    ):
        edited = edit(elsewhere)
        assert (edited.device.type, edited.dtype) == ("meta", torch.bfloat16)
        assert edited.shape == elsewhere.shape and vector.device.type == "cpu"
