"""This library against the peers' own code: same model, prompts and vectors, in turn.

pytest tests/benchmarks/peers -s --peers FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from run_peer import PEERS
from scipy.stats import spearmanr
from timing import padded, task_with_answers
from torch import Tensor
from transformer_lens import ActivationCache, patching

import transformer_lens_taskvec as tv
from transformer_lens_taskvec._smollm import packaged_folder

Compare = Callable[..., float]

TARGETS = {
    ("nnsight", 1): 15.0,
    ("nnsight", 3): 10.0,
    ("nnsight_batched", 1): 15.0,
    ("steering_vectors", 1): 15.0,
    ("repeng", 1): 15.0,
    ("hugging_face", 1): 2.5,
}
"""The least ratio, by peer and number of tokens of an answer."""


def python_of(peer: str, folder: str | None) -> Path:
    """The Python that has the peer: this one, or that of its environment; skips if none has."""
    packages, _ = PEERS[peer]
    if all(map(_is_here, packages)):
        return Path(sys.executable)
    [package] = packages
    if folder is None:
        pytest.skip(f"{package} is not installed here; see tests/benchmarks/peers/README.md")
    python = Path(folder) / package / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{package} is not installed here, and there is no {python}")
    return python


def _is_here(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@contextmanager
def started(
    peer: str, python: Path, work: dict[str, Any], folder: Path, device: str
) -> Iterator[tuple[dict[str, str], Callable[[], dict[str, np.ndarray]]]]:
    """The versions of a peer in a process of its own, and a function that makes it do the work."""
    np.savez(folder / "work.npz", **work)
    model = packaged_folder("smollm2")
    files = [str(folder / "work.npz"), str(folder / "result.npz")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(
        [str(python), str(Path(__file__).parent / "run_peer.py"), peer, str(model), *files, device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "log.txt").open("w"),
        text=True,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        replies = process.stdout

        def reply() -> str:
            line = replies.readline()
            if not line:
                pytest.fail(f"{peer} ended: {(folder / 'log.txt').read_text()[-2000:]}")
            return line

        def again() -> dict[str, np.ndarray]:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            reply()
            with np.load(files[1]) as found:
                return {name: found[name] for name in found.files}

        yield json.loads(reply()), again
        process.stdin.close()


def answer_logit(logits: Tensor, answer: Tensor) -> float:
    """The logit of an answer's first token."""
    return float(logits[0, answer[0]])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("peer", "n_tokens"), TARGETS, ids=lambda value: str(value))
def test_a_layer_sweep(
    compare: Compare,
    smollm2: Any,
    peer: str,
    n_tokens: int,
    request: pytest.FixtureRequest,
    device: str,
    tmp_path: Path,
) -> None:
    python = python_of(peer, request.config.getoption("--peers"))
    task = task_with_answers(smollm2, n_tokens)
    sets = tv.sample_splits([task], {"train": 8, "test": 24}, n_shots=5, seed=0)
    episodes = sets["test"]
    vectors = tv.task_vectors(tv.collect(smollm2, sets["train"]))
    batch = padded(smollm2, episodes, "cpu")
    work = {name: np.asarray(value) for name, value in batch._asdict().items()}
    work["vectors"] = vectors[task.name].numpy()

    def agree(ours: tv.LayerSweep, theirs: dict[str, np.ndarray]) -> str:
        asked = tv.layer_sweep(smollm2, episodes, vectors, metrics=[answer_logit])
        logits = asked.metrics["answer_logit"][0].numpy()
        worst = float(np.abs(logits - theirs["logit"]).max())
        worst_loss = float(np.abs(ours.loss[0].numpy() - theirs["loss"]).max())
        assert worst < 1e-2 and worst_loss < 1e-2
        assert (ours.correct[0].numpy() == theirs["correct"]).all()
        best = float(theirs["correct"].mean(1).max())
        return (
            f"logits within {worst:.0e}, losses {worst_loss:.0e}, equal accuracies (to {best:.2f})"
        )

    with started(peer, python, work, tmp_path, device) as (versions, sweep):
        used = ", ".join(f"{name} {number}" for name, number in versions.items())
        ratio = compare(
            f"layer sweep, 30 layers, 5-shot, answers of {n_tokens} token(s)",
            f"{peer} ({used})",
            TARGETS[peer, n_tokens],
            lambda: tv.layer_sweep(smollm2, episodes, vectors),
            sweep,
            rounds=3 if peer == "hugging_face" else 1,
            agree=agree,
        )
    assert ratio >= TARGETS[peer, n_tokens]


@pytest.fixture(scope="module")
def same_length(smollm2: Any) -> list[tv.Episode]:
    """Episodes whose prompts have equally many tokens: TransformerLens' tools take no padding."""
    task = task_with_answers(smollm2, 1)
    episodes = tv.sample_episodes([task], 60, 5, seed=0)
    by_length: dict[int, list[tv.Episode]] = {}
    for episode in episodes:
        ids = smollm2.tokenizer.encode(episode.prompt, add_special_tokens=False)
        by_length.setdefault(len(ids), []).append(episode)
    return max(by_length.values(), key=len)[:8]


def probability(logits: Tensor, answers: Tensor) -> Tensor:
    """The mean probability of answers of one token."""
    chosen = logits[:, -1].float().softmax(-1).gather(1, answers[:, :1])
    return chosen.mean()


def test_resid_patching_by_layer(
    compare: Compare, smollm2: Any, same_length: list[tv.Episode], device: str
) -> None:
    n_layers = smollm2.cfg.n_layers
    vectors = tv.task_vectors(tv.collect(smollm2, same_length[:4], hook="resid_pre"))
    measured = same_length[4:]
    tokens, _, width, answers = padded(smollm2, measured)
    [task] = vectors.tasks
    values = vectors[task].to(device)
    # The patch setter reads the cache's last position only.
    cache = ActivationCache(
        {f"blocks.{i}.hook_resid_pre": values[i].expand(1, width, -1) for i in range(n_layers)},
        smollm2,
    )
    cells = pd.DataFrame({"layer": range(n_layers), "pos": width - 1})

    def theirs() -> Tensor:
        with torch.no_grad():
            return patching.get_act_patch_resid_pre(
                smollm2,
                tokens,
                cache,
                lambda logits: probability(logits, answers),
                index_df=cells,
                index_axis_names=None,
            ).cpu()

    def agree(ours: tv.LayerSweep, found: Tensor) -> str:
        worst = float((ours.mean("probability")[:, 0] - found).abs().max())
        assert worst < 1e-4
        return f"probabilities within {worst:.0e}"

    ratio = compare(
        "residual stream patched by layer, 30 layers, 5-shot",
        f"TransformerLens {version('transformer-lens')} patching",
        15.0,
        lambda: tv.layer_sweep(smollm2, measured, vectors, metrics=["probability"]),
        theirs,
        rounds=1,
        agree=agree,
    )
    assert ratio >= 15


@pytest.mark.timeout(3600)
def test_head_patching(
    compare: Compare, smollm2: Any, same_length: list[tv.Episode], device: str
) -> None:
    clean, measured = same_length[:4], same_length[4:]
    z = tv.collect(smollm2, clean, hook="z").values.mean(dim=0).to(device)
    n_layers, n_heads = z.shape[:2]
    tokens, _, width, answers = padded(smollm2, tv.shuffle_labels(measured, seed=0))
    cache = ActivationCache(
        {f"blocks.{i}.attn.hook_z": z[i].expand(1, width, -1, -1) for i in range(n_layers)},
        smollm2,
    )
    cells = [(layer, width - 1, head) for layer in range(n_layers) for head in range(n_heads)]

    def theirs() -> Tensor:
        with torch.no_grad():
            return patching.get_act_patch_attn_head_out_by_pos(
                smollm2,
                tokens,
                cache,
                lambda logits: probability(logits, answers),
                index_df=pd.DataFrame(cells, columns=["layer", "pos", "head"]),
                index_axis_names=None,
            ).cpu()

    def agree(ours: tv.HeadEffects, found: Tensor) -> str:
        with torch.no_grad():
            before = float(probability(smollm2(tokens), answers))
        worst = float((ours.probability - (found - before).reshape(n_layers, n_heads)).abs().max())
        assert worst < 1e-4
        return f"effects on probability within {worst:.0e}"

    ratio = compare(
        "head effects, 270 heads, 5-shot",
        f"TransformerLens {version('transformer-lens')} patching",
        30.0,
        lambda: tv.head_effects(smollm2, clean, on=measured),
        theirs,
        rounds=1,
        agree=agree,
    )
    assert ratio >= 30


def test_attribution_patching(
    compare: Compare, smollm2: Any, same_length: list[tv.Episode]
) -> None:
    """An estimate by gradients, of all positions, against exact effects at the last one."""
    if find_spec("transformer_lens.tools.analysis.attribution_patching") is None:
        pytest.skip("this TransformerLens has no attribution patching; 4.3 has")
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    clean, measured = same_length[:4], same_length[4:]
    intact = padded(smollm2, measured)
    shuffled = padded(smollm2, tv.shuffle_labels(measured, seed=0))
    assert intact.tokens.shape == shuffled.tokens.shape
    shape = (smollm2.cfg.n_layers, smollm2.cfg.n_heads)

    def theirs() -> Tensor:
        effects = torch.zeros(shape)
        for row, answer in enumerate(intact.answers[:, 0].tolist()):
            found = attribution_patch(
                smollm2,
                intact.tokens[row : row + 1],
                shuffled.tokens[row : row + 1],
                lambda logits, answer=answer: logits[0, -1].log_softmax(-1)[answer],
            )
            for node, score in found.node_scores.items():
                if node.kind == "attn_head_out" and node.position == intact.width - 1:
                    effects[node.layer, node.head] += score / len(measured)
        return effects

    def agree(ours: tv.HeadEffects, found: Tensor) -> str:
        exact, estimated = ours.log_probability.flatten(), found.flatten()
        rank = float(spearmanr(exact, estimated).statistic)
        best, screened = exact.abs().topk(20).indices, estimated.abs().topk(60).indices
        recall = float(torch.isin(best, screened).float().mean())
        assert rank > 0
        return f"an estimate: rank correlation {rank:.2f}, recall of the top 20 in 60 {recall:.2f}"

    compare(
        "exact effects of 270 heads, 5-shot",
        f"TransformerLens {version('transformer-lens')} attribution_patch",
        0.0,
        lambda: tv.head_effects(smollm2, clean, on=measured),
        theirs,
        rounds=1,
        agree=agree,
    )
