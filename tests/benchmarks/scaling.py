"""How time and peak memory grow with layers, variants, prompts, prompt length and vocabulary.

    python tests/benchmarks/scaling.py --out FOLDER [--device cuda] [--quick]

Small random Llama models; each quantity doubles alone, the others stay. Every point is measured in
a process of its own. An exponent is the slope of a line through all points on logarithmic axes,
its range the slopes between neighbours: 1 is linear growth, 0 none. Written are ``scaling.json``,
``scaling.png`` and ``scaling.svg``; peak memory is that above the model's own, and needs Linux or
an accelerator.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.plots.style import FIGURE_SIZE, save_figures, styled, task_style

sys.path.append(str(Path(__file__).parents[1]))
from timing import seconds

D_MODEL = 128
WORDS = 1_000
"""Words that prompts are made of; the model's vocabulary may be larger."""
PRELOADED = [
    "transformer_lens_taskvec",
    "transformer_lens.model_bridge",
    "transformers.models.llama.modeling_llama",
]
"""What takes long to import, and starts no threads."""


@dataclass(frozen=True)
class Case:
    """One point: what is called, on what sizes.

    ``length`` is the prompts' tokens; ``variants`` counts vectors, injected at layers in turn.
    """

    call: str = "evaluate_many"
    layers: int = 8
    variants: int = 16
    prompts: int = 32
    length: int = 64
    vocabulary: int = 4_096
    device: str = "cpu"


@dataclass(frozen=True)
class Fit:
    """The growth with one quantity: the exponent over all points, and between neighbours."""

    exponent: float
    low: float
    high: float


AXES: Mapping[str, Sequence[int]] = {
    "layers": (2, 4, 8, 16, 32),
    "variants": (4, 8, 16, 32, 64),
    "prompts": (8, 16, 32, 64, 128),
    "length": (32, 64, 128, 256, 512),
    "vocabulary": (4_096, 8_192, 16_384, 32_768, 65_536),
}
SHOWN = {"length": "prompt length (tokens)"}
QUICK: Mapping[str, Sequence[int]] = {"variants": (2, 4, 8, 16), "prompts": (4, 8, 16, 32)}
QUICK_CASE = Case(layers=2, variants=4, prompts=4, length=16, vocabulary=1_024)


def tokenizer() -> Any:
    """A tokenizer with one token per word, ``w0`` to the last."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<pad>",
        unk_token="<pad>",
        bos_token="<pad>",
        # Without this TransformerLens would load another tokenizer of the same name.
        add_bos_token=True,
        name_or_path="words",
        padding_side="left",
    )


def model_of(case: Case) -> Any:
    """A random Llama model of the case's layers and vocabulary."""
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=D_MODEL,
        intermediate_size=4 * D_MODEL,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        max_position_embeddings=2_048,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    hf_model = LlamaForCausalLM(config)
    hf_model.config.architectures = ["LlamaForCausalLM"]
    return tv.bridge_from_hf(hf_model, tokenizer(), device=case.device)


def episodes_of(case: Case) -> list[tv.Episode]:
    """Prompts of random words that have nothing in common."""
    rng = random.Random(0)
    template = tv.PromptTemplate("{x} {y}", bos=False)

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(n))

    return [
        tv.Episode("words", (), tv.Example(words(case.length), words(1)), template)
        for _ in range(case.prompts)
    ]


def call_of(case: Case, model: Any) -> Callable[[], Any]:
    """What is timed."""
    episodes = episodes_of(case)
    if case.call == "collect":
        return lambda: tv.collect(model, episodes)
    vectors = torch.randn(case.variants, D_MODEL, generator=torch.Generator().manual_seed(0))
    variants = [[tv.inject(one, i % case.layers)] for i, one in enumerate(vectors)]
    return lambda: tv.evaluate_many(model, episodes, [[], *variants])


def measure(case: Case, rounds: int = 3) -> dict[str, float]:
    """The case's time in seconds and its peak memory in MiB, in this process."""
    model = model_of(case)
    call_of(replace(case, prompts=2, length=4, variants=2), model)()  # imports, buffers
    call = call_of(case, model)
    gc.collect()
    before = _reset_peak(case.device)
    call()
    peak = (_peak(case.device) - before) / 2**20
    return {"seconds": statistics.median(seconds(call)[0] for _ in range(rounds)), "MiB": peak}


def measure_apart(cases: Sequence[Case]) -> list[dict[str, float]]:
    """Every case in a new process, one after the other."""
    # A process that has touched an accelerator cannot be forked, and neither should one with
    # threads; the server that forks has neither.
    accelerated = any(case.device != "cpu" for case in cases)
    context = multiprocessing.get_context("spawn" if accelerated else "forkserver")
    if not accelerated:
        context.set_forkserver_preload(PRELOADED)
    pool = context.Pool(1, maxtasksperchild=1)
    try:
        return pool.map(measure, cases, chunksize=1)
    finally:
        pool.close()
        pool.join()


def _reset_peak(device: str) -> float:
    """Forget the peak so far; returns the bytes in use."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _from_status("VmRSS")


def _peak(device: str) -> float:
    return float(torch.cuda.max_memory_allocated()) if device != "cpu" else _from_status("VmHWM")


def _from_status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024.0 * int(kib)


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """The exponent of a power law through the points."""
    x, y = np.log2(sizes), np.log2(values)
    slopes = np.diff(y) / np.diff(x)
    return Fit(float(np.polyfit(x, y, 1)[0]), float(slopes.min()), float(slopes.max()))


def scale(base: Case, axes: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """One row per call, quantity and size: the case, ``varied``, ``seconds`` and ``MiB``."""
    cases = [
        (name, replace(base, call=call, **{name: size}))
        for call in ("evaluate_many", "collect")
        for name, sizes in axes.items()
        for size in sizes
        if (call, name) != ("collect", "variants")
    ]
    found = measure_apart([case for _, case in cases])
    return [
        {**asdict(case), "varied": name, **one}
        for (name, case), one in zip(cases, found, strict=True)
    ]


def value(row: Mapping[str, Any], what: str) -> float:
    """A row's seconds or MiB; less than 1 MiB, which the allocator may have had, counts as 1."""
    return max(row[what], 1.0) if what == "MiB" else float(row[what])


def curves(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows by call and varied quantity, ascending."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["call"], row["varied"]), []).append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The exponents in Markdown."""
    lines = [
        "| call | against | from | to | time, exponent | (range) | memory, exponent | (range) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (call, name), some in curves(rows).items():
        sizes = [row[name] for row in some]
        ends = (f"{row['seconds']:.2f} s, {row['MiB']:.0f} MiB" for row in (some[0], some[-1]))
        cells = [call, f"{name} {sizes[0]} to {sizes[-1]}", *ends]
        for what in ("seconds", "MiB"):
            one = fit(sizes, [value(row, what) for row in some])
            cells += [f"{one.exponent:.2f}", f"{one.low:.2f} to {one.high:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@styled
def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Time and memory against each quantity, on logarithmic axes, with the exponents."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["varied"] for row in rows))
    size = (0.5 * FIGURE_SIZE[0] * len(names) + 0.6, 1.4 * FIGURE_SIZE[1])
    drawn, axes = plt.subplots(
        2, len(names), figsize=size, layout="constrained", sharey="row", squeeze=False
    )
    calls = list(dict.fromkeys(row["call"] for row in rows))
    for (call, name), some in curves(rows).items():
        sizes = [row[name] for row in some]
        for line, what in enumerate(("seconds", "MiB")):
            ax = axes[line, names.index(name)]
            values = [value(row, what) for row in some]
            label = f"{call}, exponent {fit(sizes, values).exponent:.2f}"
            ax.plot(sizes, values, **task_style(calls.index(call)), label=label)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(sizes, [f"{size // 1024}k" if size >= 4096 else size for size in sizes])
            ax.minorticks_off()
            ax.set_xlabel(SHOWN.get(name, name) if line else "")
    for ax in axes.flat:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.04, 1), handlelength=1.2)
    axes[0, 0].set_ylabel("time (s)")
    axes[1, 0].set_ylabel("peak memory above\nthe model's (MiB)")
    return drawn


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, and write the rows and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and figure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few points of a tiny model")
    given = parser.parse_args(arguments)
    base, axes = (QUICK_CASE, QUICK) if given.quick else (Case(), AXES)
    rows = scale(replace(base, device=given.device), axes)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scaling.json").write_text(json.dumps(rows, indent=1))
    save_figures({"scaling": figure(rows)}, given.out)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
