"""Ratios of this library to the usual ways, on SmolLM2-135M.

pytest tests/benchmarks -s
"""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from timing import hook_loop, layer_edits, padded, record, replacing, seconds

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.models.forward import run_until
from transformer_lens_taskvec.models.tokens import batches, encode
from transformer_lens_taskvec.prompts import shuffle_labels

Compare = Callable[..., float]
TASK = "element_symbol"


@pytest.fixture(scope="session")
def sets() -> dict[str, list[tv.Episode]]:
    tasks = tv.find_tasks([TASK])  # prompts of about 46 tokens
    return tv.sample_splits(tasks, {"train": 8, "test": 24}, n_shots=5, seed=0)


@pytest.fixture(scope="session")
def vectors(smollm2: Any, sets: dict[str, list[tv.Episode]]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(smollm2, sets["train"]))


@pytest.mark.parametrize(("shots", "target"), [(5, 20.0), (0, 7.0)])
def test_layer_sweep(
    compare: Compare,
    smollm2: Any,
    sets: dict[str, list[tv.Episode]],
    vectors: tv.TaskVectors,
    device: str,
    shots: int,
    target: float,
) -> None:
    episodes = sets["test"] if shots else tv.zero_shot(sets["test"])
    edits = layer_edits(vectors[TASK].to(device))
    compare(
        f"layer sweep, 30 layers, {shots}-shot",
        "one run_with_hooks per layer",
        target,
        lambda: tv.layer_sweep(smollm2, episodes, vectors),
        lambda: hook_loop(smollm2, episodes, edits),
        rounds=1 if shots else 3,
    )
    print(
        f"\nlayer sweep, {shots}-shot: {tokens_predict(smollm2, episodes):.2f} x the tokens' time"
    )


def tokens_predict(model: Any, episodes: list[tv.Episode]) -> float:
    """A layer sweep's time over that of plain passes over as many tokens in the same shapes."""
    tokens, mask, width, _ = padded(model, episodes)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    suffix = torch.randint(100, 40_000, (len(episodes), 31 * (tokens.shape[1] - width + 1)))
    suffix = suffix.to(tokens.device)

    def plain() -> None:
        with torch.no_grad():
            model(tokens[:, :width], attention_mask=mask[:, :width])
            model(suffix)

    ratios = []
    for _ in range(3):
        plain_s, _ = seconds(plain)
        ratios.append(seconds(lambda: tv.layer_sweep(model, episodes, vectors))[0] / plain_s)
    record("layer sweep's wall time", "its tokens in plain passes, at most", 1.5, min(ratios))
    return min(ratios)


def test_head_effects(
    compare: Compare, smollm2: Any, sets: dict[str, list[tv.Episode]], device: str
) -> None:
    clean, measured = sets["train"][:4], sets["test"][:4]
    z = tv.collect(smollm2, clean, hook="z").values.mean(dim=0).to(device)
    edits = [
        (f"blocks.{layer}.attn.hook_z", replacing(z[layer, head], head))
        for layer in range(30)
        for head in range(9)
    ]
    corrupted = shuffle_labels(measured, seed=0)

    def one_run_per_head() -> torch.Tensor:
        tv.collect(smollm2, clean, hook="z")
        return hook_loop(smollm2, corrupted, edits)

    def agree(ours: tv.HeadEffects, theirs: torch.Tensor) -> str:
        before = ours.baseline.loss[:, None, None]
        expected = before - theirs.T.reshape(len(measured), 30, 9)
        worst = float((ours.log_probability - expected.mean(dim=0)).abs().max())
        assert worst < 1e-3
        return f"effects differ by at most {worst:.0e} nats"

    compare(
        "head effects, 270 heads, 5-shot",
        "one run per head",
        35.0,
        lambda: tv.head_effects(smollm2, clean, on=measured),
        one_run_per_head,
        rounds=1,
        agree=agree,
    )


def test_perturbation_matrix(compare: Compare, smollm2: Any, device: str) -> None:
    tasks = tv.bitwise_tasks()
    split = tv.sample_splits(tasks, {"train": 4, "test": 4}, n_shots=4, seed=0)
    vectors = tv.task_vectors(tv.collect(smollm2, split["train"], layers=[15]))
    edits = [
        ("blocks.15.hook_resid_post", replacing(vectors[task, 15].to(device)))
        for task in vectors.tasks
    ]

    def one_run_per_cell() -> None:
        for task in tasks:
            own = [episode for episode in split["test"] if episode.task == task]
            hook_loop(smollm2, own, edits)

    compare(
        "perturbation matrix, 7 x 7 bitwise tasks, 4-shot",
        "one teacher-forced run per cell",
        4.0,
        lambda: tv.perturbation_matrix(smollm2, split["test"], vectors, 15),
        one_run_per_cell,
    )


def test_task_decodability(compare: Compare) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(700) % 7
    centres = torch.randn(7, 30, 576, generator=generator)
    values = centres[labels] + 8 * torch.randn(700, 30, 576, generator=generator)
    names = tuple(map(str, range(7)))
    source = Source("made", "resid_post", -1, "{x}->{y}", False)
    found = tv.Activations(values, labels, names, tuple(range(30)), source)
    points, truth = values.numpy(), labels.numpy()

    def by_scikit_learn() -> np.ndarray:
        return np.stack(
            [
                cross_val_predict(
                    KNeighborsClassifier(n_neighbors=10), points[:, i], truth, cv=LeaveOneOut()
                )
                for i in range(30)
            ]
        )

    compare(
        "TD, 700 points, 30 layers",
        "scikit-learn leave-one-out per layer",
        10.0,
        lambda: tv.task_decodability(found),
        by_scikit_learn,
        rounds=1,
    )


def test_collect_is_as_fast_as_a_plain_pass(
    compare: Compare, smollm2: Any, sets: dict[str, list[tv.Episode]]
) -> None:
    episodes = sets["test"]
    tokens, mask, width, _ = padded(smollm2, episodes)
    tokens, mask = tokens[:, :width], mask[:, :width].bool()

    def plain_pass() -> None:
        with torch.no_grad():
            run_until(smollm2, tokens, mask, [], "blocks.20.hook_resid_post")

    compare(
        "collect, layers 0 to 20",
        "a plain pass to the same layer",
        1 / 1.05,
        lambda: tv.collect(smollm2, episodes, layers=range(21)),
        plain_pass,
        rounds=7,
    )


def test_td_and_accuracy_cost_little_more_than_the_prompts_tokens(
    compare: Compare, smollm2: Any, device: str
) -> None:
    tasks = [*tv.pos_tasks().values(), *tv.bitwise_tasks(null=False).values()]
    episodes = [e for n in (1, 4, 10) for e in tv.sample_episodes(tasks, 2, n, seed=0)]
    encoded = encode(smollm2, [episode.prompt for episode in episodes], bos=False)

    def tokens_alone() -> None:
        with torch.no_grad():
            for batch in batches(encoded, batch_size=4096 // max(map(len, encoded)), pad=2):
                tokens, mask = batch.tokens.to(device), batch.mask.to(device)
                run_until(smollm2, tokens, mask, [], "blocks.29.hook_resid_post")

    compare(
        "TD and accuracy, POS and bitwise, 1, 4 and 10 shots",
        "the prompts' tokens alone",
        1 / 1.3,
        lambda: tv.task_decodability(
            tv.evaluate_many(smollm2, episodes, [[]], observe=tv.Observe())[0]
        ),
        tokens_alone,
        rounds=1,
    )


_MEMORY = """
    import sys, threading, time, psutil, torch
    import transformer_lens_taskvec as tv
    model = tv.load_model("smollm2", device="cpu")
    words = [f"w{i}" for i in range(60)]
    task = tv.mapping_task("t", {word: word for word in words})
    episodes = tv.sample_episodes([task], n=64, n_shots=20, seed=0)
    encode = model.tokenizer.encode
    ids = [encode(e.prompt, add_special_tokens=False)[:200] for e in episodes]
    tokens = torch.tensor([row[:min(map(len, ids))] for row in ids])
    texts = [model.tokenizer.decode(row) for row in tokens]
    episodes = [tv.Episode("t", (), tv.Example(t, "x"), tv.PromptTemplate("{x}{y}")) for t in texts]
    tv.collect(model, episodes[:1], layers=[0])
    process, peak, done = psutil.Process(), 0, False
    start = process.memory_info().rss
    def watch():
        global peak
        while not done:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)
    thread = threading.Thread(target=watch); thread.start()
    if sys.argv[1] == "collect":
        kept = tv.collect(model, episodes, batch_size=4).values
    else:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens, names_filter=lambda name: name.endswith("hook_resid_post"))
        kept = torch.stack([cache[f"blocks.{i}.hook_resid_post"][:, -1] for i in range(30)], dim=1)
    done = True; thread.join()
    assert kept.shape == (64, 30, 576), kept.shape
    print(tokens.shape[1], peak - start)
"""


def test_collect_needs_a_tenth_of_the_memory(benchmark: Any) -> None:
    used = {}
    for way in ("collect", "run_with_cache"):
        script = textwrap.dedent(_MEMORY)
        out = subprocess.run(
            [sys.executable, "-c", script, way], capture_output=True, text=True, check=True
        ).stdout.split()
        used[way] = int(out[1])
        print(f"\n{way}: {out[0]} tokens a prompt, peak +{used[way] / 2**20:.0f} MiB")
    ratio = used["run_with_cache"] / used["collect"]
    record("collect's peak memory, 64 prompts of 200 tokens", "run_with_cache", 10.0, ratio)
    benchmark.pedantic(resource.getrusage, args=(resource.RUSAGE_SELF,), rounds=1)
    assert ratio >= 10


_VOCABULARY = """
    import sys, threading, time, psutil, torch, transformers
    from unittest import mock
    import transformer_lens_taskvec as tv
    from transformer_lens_taskvec.models import capabilities
    tokenizer = tv.load_model("smollm2", device="cpu").tokenizer
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=262_144, hidden_size=256, intermediate_size=1024, num_hidden_layers=30,
        num_attention_heads=4, num_key_value_heads=1, head_dim=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, architectures=["Gemma2ForCausalLM"])
    model = tv.bridge_from_hf(transformers.Gemma2ForCausalLM(config), tokenizer, device="cpu")
    episodes = tv.sample_episodes(tv.find_tasks(["element_symbol"]), 24, 5, seed=0)
    variants = [[tv.inject(torch.ones(256), layer)] for layer in range(30)]
    if sys.argv[1] == "whole":
        mock.patch.object(capabilities, "_readout", lambda model: None).start()
    tv.evaluate_many(model, episodes[:1], variants[:1])
    process, peak, done = psutil.Process(), 0, False
    start = process.memory_info().rss
    def watch():
        global peak
        while not done:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)
    thread = threading.Thread(target=watch); thread.start()
    began = time.perf_counter()
    scores = tv.evaluate_many(model, episodes, variants)
    seconds = time.perf_counter() - began
    done = True; thread.join()
    print(peak - start, seconds, sum(one.mean_loss for one in scores))
"""


def test_a_large_vocabulary_takes_little_memory(benchmark: Any) -> None:
    """A sweep of 30 variants over 24 prompts with Gemma's vocabulary."""
    found = {}
    for way in ("tiles", "whole"):
        script = textwrap.dedent(_VOCABULARY)
        out = subprocess.run(
            [sys.executable, "-c", script, way], capture_output=True, text=True, check=True
        ).stdout.split()
        found[way] = memory, seconds, _ = tuple(map(float, out[-3:]))
        print(f"\nlogits in {way}: peak +{memory / 2**20:.0f} MiB, {seconds:.1f} s")
    ratio = found["whole"][0] / found["tiles"][0]
    record("peak memory of a sweep, vocabulary 262,144", "logits of whole passes", 2.0, ratio)
    benchmark.pedantic(lambda: None, rounds=1)
    assert found["tiles"][0] < 1.5e9 and ratio >= 2
    assert found["tiles"][2] == pytest.approx(found["whole"][2], rel=1e-5)


def test_importing_costs_little_more_than_transformer_lens(benchmark: Any) -> None:
    script = (
        "import time, transformer_lens; t = time.perf_counter(); "
        "import transformer_lens_taskvec; print(time.perf_counter() - t)"
    )

    def seconds() -> float:
        command = [sys.executable, "-c", script]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    added = sorted(seconds() for _ in range(3))[1]
    print(f"\nimport transformer_lens_taskvec adds {added:.2f} s")
    benchmark.pedantic(lambda: None, rounds=1)
    assert added <= 0.5
