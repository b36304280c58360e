"""Ratios where prompts share their demonstrations, and sweeps of answers of one and three tokens.

pytest tests/benchmarks/test_shared.py -s
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from timing import (
    hook_loop,
    layer_edits,
    losses,
    padded,
    plain_logits,
    record,
    right,
    task_with_answers,
)
from torch import Tensor

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source

pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.filterwarnings("ignore:demo_sets is"),  # a few are enough to measure speed
]

Compare = Callable[..., float]
ROWS_PER_BATCH = 32


def by_length(model: Any, episodes: Sequence[tv.Episode]) -> list[list[int]]:
    """The rows in batches of prompts of similar length, as whole prompts are best run."""
    lengths = [len(model.tokenizer.encode(episode.prompt)) for episode in episodes]
    order = sorted(range(len(episodes)), key=lengths.__getitem__)
    return [order[i : i + ROWS_PER_BATCH] for i in range(0, len(order), ROWS_PER_BATCH)]


def whole_prompts(model: Any, episodes: list[tv.Episode]) -> tuple[Tensor, Tensor]:
    """Losses and correctness ``[row]`` in teacher-forced batches, logits only of answers."""
    loss, correct = torch.zeros(len(episodes)), torch.zeros(len(episodes), dtype=torch.bool)
    for rows in by_length(model, episodes):
        batch = padded(model, [episodes[row] for row in rows])
        logits = plain_logits(model, batch, logits_to_keep=batch.answers.shape[1])
        loss[rows] = losses(logits, batch.answers).cpu()
        correct[rows] = right(logits, batch.answers).cpu()
    return loss, correct


def whole_activations(model: Any, episodes: list[tv.Episode]) -> Tensor:
    """``[row, layer, d_model]``, the residual stream at the end of whole prompts in batches."""
    kept: dict[tuple[int, int], Tensor] = {}
    n_layers = int(model.cfg.n_layers)
    for rows in by_length(model, episodes):
        batch = padded(model, [episodes[row] for row in rows])
        tokens, mask = batch.tokens[:, : batch.width], batch.mask[:, : batch.width]

        def keep(activation: Tensor, hook: Any, rows: list[int] = rows) -> None:
            layer = int(hook.name.split(".")[1])
            last = activation[:, -1].float().cpu()
            kept.update({(row, layer): one for row, one in zip(rows, last, strict=True)})

        names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
        with torch.no_grad():
            model.run_with_hooks(
                tokens,
                attention_mask=mask,
                fwd_hooks=[(name, keep) for name in names],
                logits_to_keep=1,
            )
    rows = range(len(episodes))
    return torch.stack(
        [torch.stack([kept[row, layer] for layer in range(n_layers)]) for row in rows]
    )


@pytest.fixture(scope="module")
def eight_shot() -> list[tv.Episode]:
    [task] = tv.find_tasks(["es_en"]).values()
    return tv.sample_episodes([task], n=200, n_shots=8, seed=0, demo_sets=5)


def test_accuracy_with_demonstration_sets(
    compare: Compare, smollm2: Any, eight_shot: list[tv.Episode]
) -> None:
    def agree(ours: tv.Scores, theirs: tuple[Tensor, Tensor]) -> str:
        worst = float((ours.loss - theirs[0]).abs().max())
        assert worst < 1e-3 and (ours.correct == theirs[1]).all()
        return f"losses within {worst:.0e}, accuracies equal ({ours.accuracy:.2f})"

    compare(
        "8-shot accuracy, 5 demonstration sets x 40 queries, one task",
        "batches of whole prompts",
        5.0,
        lambda: tv.evaluate(smollm2, eight_shot),
        lambda: whole_prompts(smollm2, eight_shot),
        rounds=1,
        agree=agree,
    )


def test_collect_with_demonstration_sets(
    compare: Compare, smollm2: Any, eight_shot: list[tv.Episode]
) -> None:
    def agree(ours: tv.Activations, theirs: Tensor) -> str:
        scale = theirs.flatten(2).norm(dim=2).mean(0)[:, None]
        worst = float(((ours.values - theirs).abs() / scale).max())
        assert worst < 1e-3
        return f"activations within {worst:.0e} of their norm"

    compare(
        "collect, all layers, 5 demonstration sets x 40 queries at 8 shots",
        "batches of whole prompts",
        5.0,
        lambda: tv.collect(smollm2, eight_shot),
        lambda: whole_activations(smollm2, eight_shot),
        rounds=1,
        agree=agree,
    )


def test_ten_shot_accuracy_with_demonstration_sets(compare: Compare, smollm2: Any) -> None:
    tasks = [*tv.bitwise_tasks(null=False).values(), *tv.pos_tasks(null=False).values()]
    fresh = tv.sample_episodes(tasks, 100, 10, seed=0)
    shared = tv.sample_episodes(tasks, 100, 10, seed=0, demo_sets=10)

    def agree(ours: tv.Scores, theirs: tv.Scores) -> str:
        a_few = [100 * task + 37 for task in range(len(tasks))]
        alone, _ = whole_prompts(smollm2, [shared[row] for row in a_few])
        worst = float((ours.loss[a_few] - alone).abs().max())
        assert worst < 1e-3 and len(ours) == len(theirs)
        accuracies = f"{ours.accuracy:.3f}, with fresh demonstrations {theirs.accuracy:.3f}"
        return f"losses of whole prompts within {worst:.0e}; accuracy {accuracies}"

    compare(
        "10-shot accuracy, bitwise and POS, 100 queries per class over 10 demonstration sets",
        "fresh demonstrations",
        3.0,
        lambda: tv.evaluate(smollm2, shared),
        lambda: tv.evaluate(smollm2, fresh),
        rounds=1,
        warm=False,
        agree=agree,
    )


@pytest.mark.parametrize(
    ("n_tokens", "demo_sets", "target"),
    [(1, None, 22.0), (3, None, 14.0), (1, 5, 35.0), (3, 5, 17.0)],
)
def test_five_shot_layer_sweep(
    compare: Compare,
    smollm2: Any,
    device: str,
    n_tokens: int,
    demo_sets: int | None,
    target: float,
) -> None:
    task = task_with_answers(smollm2, n_tokens)
    split = tv.sample_splits([task], {"train": 8, "test": 24}, n_shots=5, seed=0)
    episodes = split["test"]
    if demo_sets is not None:
        episodes = tv.sample_episodes([task], 8 * demo_sets, 5, seed=1, demo_sets=demo_sets)
    vectors = tv.task_vectors(tv.collect(smollm2, split["train"]))
    edits = layer_edits(vectors[task.name].to(device))

    def agree(ours: tv.LayerSweep, theirs: Tensor) -> str:
        worst = float((ours.loss[0] - theirs).abs().max())
        assert worst < 1e-3
        return f"losses within {worst:.0e}"

    tokens = float(padded(smollm2, episodes).mask.sum()) / len(episodes)
    demos = "" if demo_sets is None else f", {demo_sets} demonstration sets"
    compare(
        f"layer sweep, 30 layers, 5-shot, answers of {n_tokens} token(s), "
        f"{tokens:.0f} tokens a prompt{demos}",
        "one teacher-forced run_with_hooks per layer",
        target,
        lambda: tv.layer_sweep(smollm2, episodes, vectors),
        lambda: hook_loop(smollm2, episodes, edits),
        rounds=1,
        agree=agree,
    )


def points(n: int) -> tv.Activations:
    """Points of seven overlapping classes, as wide as SmolLM2's residual stream."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 7
    values = torch.randn(7, 576, generator=generator)[labels]
    values = values + 8 * torch.randn(n, 576, generator=generator)
    source = Source("made", "resid_post", -1, "{x}->{y}", False)
    return tv.Activations(values[:, None], labels, tuple(map(str, range(7))), (0,), source)


N_POINTS = 20_000


def test_decodability_of_many_points_takes_the_time_of_brute_force(compare: Compare) -> None:
    found = points(N_POINTS)

    def neighbours() -> np.ndarray:
        nearest = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(found.at(0).numpy())
        return nearest.kneighbors(return_distance=False)

    def agree(ours: tv.Decodability, theirs: np.ndarray) -> str:
        votes = found.labels[torch.as_tensor(theirs)]
        counts = torch.nn.functional.one_hot(votes, 7).sum(1)
        own = counts.gather(1, found.labels[:, None])[:, 0]
        others = counts.scatter(1, found.labels[:, None], -1).amax(1)
        clear = own != others  # a tie goes by distance
        worst = float((ours.hits[0] - (own > others).float())[clear].abs().mean())
        assert worst < 1e-3  # neighbours at equal distance up to rounding
        return f"votes without a tie differ in {worst:.1%} of points"

    compare(
        "TD, 20,000 points, one layer",
        "scikit-learn's neighbours, brute force",
        0.5,
        lambda: tv.task_decodability(found),
        neighbours,
        rounds=1,
        agree=agree,
    )


_PEAK = """
    from pathlib import Path
    from test_shared import N_POINTS, points, tv

    def used(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    found = points(N_POINTS)
    tv.task_decodability(points(100))
    Path("/proc/self/clear_refs").write_text("5")
    before = used("VmRSS")
    tv.task_decodability(found)
    print(used("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_decodability_of_many_points_needs_little_memory(benchmark: Any) -> None:
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path}\n{textwrap.dedent(_PEAK)}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    peak = float(out)
    print(f"\nTD of {N_POINTS} points: peak +{peak:.0f} MiB")
    record("TD, 20,000 points, peak memory", "500 MB", 1.0, 500e6 / 2**20 / peak)
    benchmark.pedantic(lambda: None, rounds=1)
    assert peak * 2**20 < 500e6
