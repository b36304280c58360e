"""Correctness and speed on an accelerator: every number against one prompt and one edit at a time.

pytest tests/gpu -m gpu --device cuda -s
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from timing import (
    hook_loop,
    layer_edits,
    losses,
    padded,
    paired,
    plain_logits,
    record,
    replacing,
    table,
    task_with_answers,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models import prefixes

pytestmark = pytest.mark.gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRAIN = {"float32": 1e-3, "bfloat16": 0.15}
"""How far two ways of computing the same loss in nats may be apart."""


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> str:
    """The device asked for, or the first CUDA device."""
    asked = request.config.getoption("--device")
    if asked is None and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; --device cpu runs this on the CPU")
    return str(asked or "cuda")


@pytest.fixture(scope="module", params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(device: str, dtype: str) -> Any:
    return tv.load_model("smollm2", device=device, dtype=DTYPES[dtype])


@pytest.fixture(params=["shared", "whole"])
def beginnings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether what prompts have in common runs once, or, as is faster here, every time."""
    for cost in ("_PASS", "_LAUNCH"):
        monkeypatch.setattr(prefixes, cost, 0 if request.param == "shared" else 1 << 40)
    return str(request.param)


@pytest.fixture(scope="module")
def full(device: str) -> Any:
    return tv.load_model("smollm2", device=device)


@pytest.fixture(scope="module")
def sets(full: Any) -> dict[str, list[tv.Episode]]:
    tasks = [task_with_answers(full, n_tokens) for n_tokens in (1, 3)]
    return tv.sample_splits(tasks, {"train": 6, "test": 4}, n_shots=3, seed=0)


@pytest.fixture(scope="module")
def vectors(model: Any, sets: dict[str, list[tv.Episode]]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(model, sets["train"]))


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    yield
    print(f"\n\n{table()}")


def one_by_one(model: Any, episodes: list[tv.Episode], edit: tuple[str, Any] | None) -> Tensor:
    """``[row]`` losses with an edit, each prompt in a pass of its own, without padding."""
    found = []
    for episode in episodes:
        batch = padded(model, [episode])

        def hook(activation: Tensor, hook: Any, at: int = batch.width - 1) -> Tensor:
            assert edit is not None
            edit[1](activation, at)
            return activation

        hooks = [] if edit is None else [(edit[0], hook)]
        found.append(losses(plain_logits(model, batch, hooks), batch.answers))
    return torch.cat(found).cpu()


def adding(vector: Tensor) -> Callable[[Tensor, int], None]:
    def edit(activation: Tensor, at: int) -> None:
        activation[:, at] += vector.to(activation.dtype)

    return edit


def test_the_model_is_where_it_was_asked_for(model: Any, device: str, dtype: str) -> None:
    parameter = next(model.parameters())
    assert parameter.device.type == torch.device(device).type
    assert parameter.dtype == DTYPES[dtype]


def test_packed_variants_score_as_one_by_one(
    model: Any,
    sets: dict[str, list[tv.Episode]],
    vectors: tv.TaskVectors,
    device: str,
    dtype: str,
    beginnings: str,
) -> None:
    episodes = sets["test"]
    chosen = vectors.values[0].to(device)
    layers = (0, 7, 15, 29)
    variants: list[list[Any]] = [[]]
    edits: list[tuple[str, Any] | None] = [None]
    for layer in layers:
        name = f"blocks.{layer}.hook_resid_post"
        variants += [[tv.inject(chosen[layer].cpu(), layer)]]
        edits += [(name, replacing(chosen[layer]))]
    variants += [[tv.inject(chosen[15].cpu(), 15, mode="add")], [tv.ablate(15, hook="mlp_out")]]
    edits += [("blocks.15.hook_resid_post", adding(chosen[15]))]
    edits += [("blocks.15.hook_mlp_out", replacing(torch.zeros_like(chosen[15])))]
    scores = tv.evaluate_many(model, episodes, variants)
    alone = torch.stack([one_by_one(model, episodes, edit) for edit in edits])
    found = torch.stack([one.loss for one in scores])
    worst = float(((found - alone).abs() / (1 + alone.abs())).max())
    print(f"\n{dtype}, beginnings {beginnings}: losses within {worst:.1e}")
    assert worst < GRAIN[dtype]


def test_collected_activations_are_those_of_one_prompt_at_a_time(
    model: Any, sets: dict[str, list[tv.Episode]], dtype: str, beginnings: str
) -> None:
    found = tv.collect(model, sets["test"])
    alone = []
    for episode in sets["test"]:
        batch = padded(model, [episode])
        with torch.no_grad():
            _, cache = model.run_with_cache(
                batch.tokens[:, : batch.width],
                names_filter=lambda name: name.endswith("hook_resid_post"),
            )
        layers = [cache[f"blocks.{i}.hook_resid_post"][0, -1] for i in range(30)]
        alone.append(torch.stack(layers).float().cpu())
    expected = torch.stack(alone)
    worst = float(((found.values - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    print(f"\n{dtype}, beginnings {beginnings}: activations within {worst:.1e} of their norm")
    assert worst < {"float32": 1e-4, "bfloat16": 0.05}[dtype]


def test_generated_text_is_that_of_whole_passes(
    full: Any, sets: dict[str, list[tv.Episode]], beginnings: str
) -> None:
    prompts = [episode.prompt for episode in sets["test"][::2]]
    texts = tv.generate(full, prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = full.tokenizer.encode(prompt, add_special_tokens=False)
        new: list[int] = []
        while len(new) < 6:
            tokens = torch.tensor([ids + new], device=next(full.parameters()).device)
            with torch.no_grad():
                chosen = int(full(tokens)[0, -1].argmax())
            if chosen == full.tokenizer.eos_token_id:
                break
            new.append(chosen)
        assert text == full.tokenizer.decode(new, skip_special_tokens=True)


def test_head_effects_are_those_of_one_run_per_head(
    full: Any, sets: dict[str, list[tv.Episode]], device: str
) -> None:
    [task, _] = dict.fromkeys(episode.task for episode in sets["test"])
    clean, measured = (
        [episode for episode in sets[name] if episode.task == task] for name in ("train", "test")
    )
    effects = tv.head_effects(full, clean, on=measured)
    z = tv.collect(full, clean, hook="z").values.mean(dim=0).to(device)
    heads = [(0, 0), (7, 3), (15, 8), (29, 4)]
    edits = [
        (f"blocks.{layer}.attn.hook_z", replacing(z[layer, head], head)) for layer, head in heads
    ]
    alone = hook_loop(full, tv.shuffle_labels(measured, seed=0), edits)
    expected = (effects.baseline.loss - alone).mean(dim=1)
    found = torch.stack([effects.log_probability[head] for head in heads])
    torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=0)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read, and copies between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        found = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (aten._local_scalar_dense, aten.nonzero, aten.equal):
            self.count += 1
        elif packet is aten._to_copy:
            self.count += int(found.device != args[0].device)
        elif packet is aten.copy_:
            self.count += int(args[0].device != args[1].device)
        return found


@pytest.mark.parametrize("call", ["evaluate_many", "collect"])
def test_the_host_does_not_wait_for_every_layer(
    full: Any, sets: dict[str, list[tv.Episode]], device: str, call: str
) -> None:
    """Twice the layers must not mean more waiting."""
    counts = []
    for n_layers in (3, 6):
        hf_model = zoo.hf_model("llama", num_hidden_layers=n_layers)
        model = tv.bridge_from_hf(hf_model, full.tokenizer, device=device)
        vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        [task, _] = vectors.tasks
        variants = [[], *(vectors.inject(task, i % n_layers) for i in range(6))]

        def run(model: Any = model, variants: Any = variants) -> Any:
            if call == "collect":
                return tv.collect(model, sets["test"])
            return tv.evaluate_many(model, sets["test"], variants)

        run()  # what is asked of a model once
        with Waits() as waits:
            run()
        counts.append(waits.count)
    print(f"\n{call}: the host waits {counts[0]} times with 3 layers, {counts[1]} with 6")
    assert counts[1] <= counts[0]


@pytest.fixture(scope="module")
def few_or_many(full: Any, device: str) -> list[tv.Episode]:
    """Five-shot episodes of about 44 tokens: enough to fill an accelerator, few on the CPU."""
    n = 6 if device == "cpu" else 48
    return tv.sample_episodes([task_with_answers(full, 1)], n, 5, seed=0)


def test_a_layer_sweep_is_faster_than_one_run_per_layer(
    full: Any, few_or_many: list[tv.Episode], device: str
) -> None:
    vectors = tv.task_vectors(tv.collect(full, few_or_many))
    [task] = vectors.tasks
    edits = layer_edits(vectors[task].to(device))
    tv.layer_sweep(full, few_or_many, vectors)
    mine, theirs, sweep, alone = paired(
        lambda: tv.layer_sweep(full, few_or_many, vectors),
        lambda: hook_loop(full, few_or_many, edits),
        rounds=1 if device == "cpu" else 5,
    )
    worst = float((sweep.loss[0] - alone).abs().max())
    work = f"layer sweep, 30 layers, 5-shot, {len(few_or_many)} prompts, float32"
    note = f"losses within {worst:.0e}"
    record(work, "one run_with_hooks per layer", 3.0, theirs / mine, note, ours_s=mine)
    assert worst < 1e-2
    assert theirs / mine >= 3


def test_collect_is_about_as_fast_as_a_plain_pass(
    full: Any, few_or_many: list[tv.Episode], device: str
) -> None:
    batch = padded(full, few_or_many)

    def plain_pass() -> None:
        with torch.no_grad():
            full(
                batch.tokens[:, : batch.width],
                attention_mask=batch.mask[:, : batch.width],
                logits_to_keep=1,
            )

    plain_pass()
    tv.collect(full, few_or_many)
    mine, theirs, *_ = paired(
        lambda: tv.collect(full, few_or_many), plain_pass, rounds=3 if device == "cpu" else 9
    )
    tokens = int(batch.mask[:, : batch.width].sum())
    print(f"\nplain pass: {tokens / theirs:.0f} tokens per second")
    record("collect, all layers", "a plain pass", 0.5, theirs / mine, ours_s=mine)
    assert theirs / mine >= 0.5
