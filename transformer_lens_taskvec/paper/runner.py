"""The paper's studies as one call with a folder of results; what ``taskvec study`` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec.loading import load_hf_model, load_model
from transformer_lens_taskvec.paper.checkpoints import Checkpoint, over_checkpoints
from transformer_lens_taskvec.paper.finetune import LoraSettings, finetuning_study
from transformer_lens_taskvec.paper.instructions import (
    BITWISE_INSTRUCTIONS,
    POS_INSTRUCTIONS,
    prompting_study,
)
from transformer_lens_taskvec.paper.published import PUBLISHED_TABLE_1
from transformer_lens_taskvec.paper.shots import Study, markdown, run_study
from transformer_lens_taskvec.plots import (
    figure_of,
    plot_checkpoints,
    plot_decodability,
    plot_prompting,
    save_figures,
)
from transformer_lens_taskvec.tasks import bitwise_tasks, load_conllu, load_treebank, pos_tasks
from transformer_lens_taskvec.tasks.pos import split_pos_tasks
from transformer_lens_taskvec.tasks.sentences import Sentence

KINDS = ("pos", "bitwise", "prompting", "finetune", "checkpoints")


def run_paper_study(
    kind: str,
    model: str,
    out: str | Path,
    *,
    data: str | Path | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    samples: int = 10_000,
    quick: bool = False,
    seed: int = 0,
    prepend_bos: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Run one of the paper's studies, and write its results, figures and a report.

    Args:
        kind: ``"pos"`` or ``"bitwise"`` (Figures 4, 19, 20, 23), ``"prompting"`` (App. I, on both
            sets of tasks), ``"finetune"`` (Table 1, on bitwise tasks), ``"checkpoints"`` (Figure 5,
            on bitwise tasks).
        model: As for :func:`load_model`; ``"toy"`` has checkpoints
            too.
        out: The folder.
        data: Sentences for ``"pos"`` and ``"prompting"``: a CoNLL-U file or a Penn Treebank folder;
            by default generated ones.
        checkpoints: Training steps or revisions.
        samples: Episodes to finetune on, the paper's number by default.
        quick: 20 episodes a task instead of 100, and 240 to finetune on.
        seed: Seed of everything.
        prepend_bos: Whether to put a beginning-of-sequence token before each prompt.
        progress: Whether to show progress bars.

    Returns:
        The files.

    Raises:
        ValueError: If there is no such study, model or data.
    """
    if kind not in KINDS:
        raise ValueError(f"no study {kind!r}; there are {', '.join(KINDS)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "n": 20 if quick else 100,
        "seed": seed,
        "prepend_bos": prepend_bos,
        "progress": progress,
    }
    if kind == "finetune":
        return _finetune(model, out, options, 240 if quick else samples)
    if kind == "checkpoints":
        return _over_checkpoints(model, out, checkpoints, options)
    sentences = None
    if data is not None:
        sentences = load_treebank(data) if Path(data).is_dir() else load_conllu(data)
    if kind == "prompting":
        return _prompting(model, out, sentences, options)
    tasks, test_tasks = bitwise_tasks(), None
    if kind == "pos":
        tasks, test_tasks = split_pos_tasks(sentences, seed=seed)
    found = run_study(load_model(model), tasks, test_tasks=test_tasks, **options)
    return found.save(out, kind)


def _prompting(
    model: str, out: Path, sentences: Sequence[Sentence] | None, options: dict[str, Any]
) -> list[Path]:
    loaded = load_model(model)
    found = {
        "bitwise": prompting_study(loaded, bitwise_tasks(), BITWISE_INSTRUCTIONS, **options),
        "pos": prompting_study(loaded, pos_tasks(sentences), POS_INSTRUCTIONS, **options),
    }
    figures = save_figures({k: figure_of(plot_prompting(v)) for k, v in found.items()}, out)
    frames = {kind: study.to_frame() for kind, study in found.items()}
    rows = {kind: json.loads(frame.to_json(orient="records")) for kind, frame in frames.items()}
    lines = [f"# Instructions in the prompt: {model}, 4 shots", ""]
    for kind, frame in frames.items():
        lines += [f"## {kind}", "", *markdown(frame), "", f"![{kind}]({kind}.png)", ""]
    return [*_written(out, rows, lines), *figures]


def _over_checkpoints(
    model: str, out: Path, checkpoints: Sequence[Checkpoint], options: dict[str, Any]
) -> list[Path]:
    load: Callable[[Checkpoint], Any] | None = None
    shots: tuple[int, ...] = (1, 4, 10)
    if model == "toy":
        from transformer_lens_taskvec.lab.toy.model import shipped_toy_run

        run, shots = shipped_toy_run(), (1, 4, 8)  # it has seen eight demonstrations at most
        checkpoints = checkpoints or run.steps
        load = run.model  # type: ignore[assignment]

    def study(loaded: Any) -> Study:
        return run_study(loaded, bitwise_tasks(), shots=shots, steer_shots=(), **options)

    # What another size, seed or prompt left is not what is asked for.
    kept = out / "n{n}-seed{seed}-bos{prepend_bos:d}".format(**options)
    found = over_checkpoints(
        model, checkpoints, study, load=load, folder=kept, progress=bool(options["progress"])
    )
    figures = save_figures({"over_checkpoints": figure_of(plot_checkpoints(found)[0])}, out)
    rows = json.loads(found.to_frame().to_json(orient="records"))
    lines = [f"# Over checkpoints: {model}", "", repr(found), "", *markdown(found.to_frame())]
    lines += ["", *(f"![{p.name}]({p.name})" for p in figures if p.suffix == ".png")]
    return [*_written(out, rows, lines), *figures]


def _finetune(model: str, out: Path, options: dict[str, Any], samples: int) -> list[Path]:
    hf_model, tokenizer = load_hf_model(model)
    tasks = bitwise_tasks()
    found = finetuning_study(
        hf_model,
        tokenizer,
        tasks,
        lambda loaded: run_study(loaded, tasks, shots=(4,), steer_shots=(), **options),
        settings=LoraSettings(n_samples=samples),
        seed=options["seed"],
        folder=out / "adapters",
        progress=options["progress"],
    )
    frame = found.to_frame()
    below = {
        name: float(found.td_below(name).max())
        for name in found.studies
        if min(found.layers[name], default=0) > 0
    }
    lines = [f"# Finetuning by depth: {model}, bitwise, 4 shots, {samples} samples", ""]
    lines += [*markdown(frame), ""]
    lines += [f"Largest change of TD below the layers of '{n}': {v:.3f}." for n, v in below.items()]
    lines += [
        "",
        "In the paper (Llama-3.1-8B): "
        + "; ".join(
            f"{name}: TD {td:.2f}, accuracy {accuracy:.2f}"
            for name, (td, accuracy) in PUBLISHED_TABLE_1.items()
        )
        + ".",
    ]
    curves = {name: study.decodability[4] for name, study in found.studies.items()}
    figures = save_figures({"td_by_layer": figure_of(plot_decodability(curves))}, out)
    lines += ["", *(f"![{p.name}]({p.name})" for p in figures if p.suffix == ".png")]
    results = {name: study.to_json() for name, study in found.studies.items()}
    return [*_written(out, results, lines), *figures]


def _written(out: Path, results: Any, lines: Sequence[str]) -> list[Path]:
    """Write the numbers and the page; returns their paths."""
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "report.md", "\n".join(lines) + "\n")
    return [out / "results.json", out / "report.md"]
