"""The paper's studies as one call with a folder of results; what ``taskvec study`` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_lens_taskvec.checkpoints import Checkpoint, over_checkpoints
from transformer_lens_taskvec.files import write_text
from transformer_lens_taskvec.finetune import LoraSettings, finetuning_study
from transformer_lens_taskvec.models import load_hf_model, load_model
from transformer_lens_taskvec.plots import (
    figure_of,
    plot_checkpoints,
    plot_decodability,
    save_figures,
)
from transformer_lens_taskvec.studies import Study, markdown, run_study, split_pos_tasks
from transformer_lens_taskvec.tasks import bitwise_tasks, load_conllu, load_treebank
from transformer_lens_taskvec.tasks.base import Task

KINDS = ("pos", "bitwise", "finetune", "checkpoints")
PUBLISHED_TABLE_1: Mapping[str, tuple[float, float]] = {
    "pretrained": (0.43, 0.262),
    "first 10": (0.85, 0.902),
    "last 10": (0.43, 0.663),
}
"""TD and accuracy on bitwise tasks of Llama-3.1-8B in the paper's Table 1."""


def run_paper_study(
    kind: str,
    model: str,
    out: str | Path,
    *,
    data: str | Path | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    quick: bool = False,
    seed: int = 0,
    prepend_bos: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Run one of the paper's studies, and write its results, figures and a report.

    Args:
        kind: ``"pos"`` or ``"bitwise"`` (Figures 4, 19, 20, 23), ``"finetune"`` (Table 1, on
            bitwise tasks), ``"checkpoints"`` (Figure 5, on bitwise tasks).
        model: As for :func:`~transformer_lens_taskvec.models.load_model`; ``"toy"`` has checkpoints
            too.
        out: The folder.
        data: Sentences for ``"pos"``: a CoNLL-U file or a Penn Treebank folder; by default
            generated ones.
        checkpoints: Training steps or revisions.
        quick: 20 episodes a task instead of 100.
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
        return _finetune(model, out, options, quick)
    if kind == "checkpoints":
        return _over_checkpoints(model, out, checkpoints, options)
    tasks, test_tasks = (bitwise_tasks(), None) if kind == "bitwise" else _pos(data, seed)
    found = run_study(load_model(model), tasks, test_tasks=test_tasks, **options)
    return found.save(out, kind)


def _pos(data: str | Path | None, seed: int) -> tuple[dict[str, Task], dict[str, Task]]:
    if data is None:
        return split_pos_tasks(seed=seed)
    read = load_treebank if Path(data).is_dir() else load_conllu
    return split_pos_tasks(read(data), seed=seed)


def _over_checkpoints(
    model: str, out: Path, checkpoints: Sequence[Checkpoint], options: dict[str, Any]
) -> list[Path]:
    load: Callable[[Checkpoint], Any] | None = None
    shots: tuple[int, ...] = (1, 4, 10)
    if model == "toy":
        from transformer_lens_taskvec.lab.toy import shipped_toy_run

        run, shots = shipped_toy_run(), (1, 4, 8)  # it has seen eight demonstrations at most
        checkpoints = checkpoints or run.steps
        load = run.model  # type: ignore[assignment]

    def study(loaded: Any) -> Study:
        return run_study(loaded, bitwise_tasks(), shots=shots, steer_shots=(), **options)

    found = over_checkpoints(
        model, checkpoints, study, load=load, folder=out, progress=bool(options["progress"])
    )
    figures = save_figures({"over_checkpoints": figure_of(plot_checkpoints(found)[0])}, out)
    write_text(out / "results.json", found.to_frame().to_json(orient="records", indent=1))
    lines = [f"# Over checkpoints: {model}", "", repr(found), "", *markdown(found.to_frame())]
    lines += ["", *(f"![{path.name}]({path.name})" for path in figures)]
    write_text(out / "report.md", "\n".join(lines) + "\n")
    return [out / "results.json", out / "report.md", *figures]


def _finetune(model: str, out: Path, options: dict[str, Any], quick: bool) -> list[Path]:
    hf_model, tokenizer = load_hf_model(model)
    tasks = bitwise_tasks()
    found = finetuning_study(
        hf_model,
        tokenizer,
        tasks,
        lambda loaded: run_study(loaded, tasks, shots=(4,), steer_shots=(), **options),
        settings=LoraSettings(n_samples=240 if quick else 10_000),
        seed=options["seed"],
        folder=out / "adapters",
        progress=options["progress"],
    )
    frame = found.to_frame()
    below = {
        name: float(found.td_below(name).max()) for name in found.studies if found.layers[name]
    }
    lines = [f"# Finetuning by depth: {model}, bitwise, 4 shots", "", *markdown(frame), ""]
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
    lines += ["", *(f"![{path.name}]({path.name})" for path in figures)]
    write_text(
        out / "results.json",
        json.dumps({name: study.to_json() for name, study in found.studies.items()}, indent=1),
    )
    write_text(out / "report.md", "\n".join(lines) + "\n")
    return [out / "results.json", out / "report.md", *figures]
