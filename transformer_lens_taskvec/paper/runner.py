"""Run a study of the paper and write its results, figures and a report to a folder.

Each function returns the paths of the files in the folder ``out``. Further options are those of
the study's own function. Without ``sentences``, part-of-speech tasks use generated sentences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformer_lens_taskvec._utils.text import stable_hash
from transformer_lens_taskvec.models.protocol import model_name
from transformer_lens_taskvec.paper.checkpoints import Checkpoint, over_checkpoints
from transformer_lens_taskvec.paper.finetune import LoraSettings, finetuning_study
from transformer_lens_taskvec.paper.instructions import (
    BITWISE_INSTRUCTIONS,
    POS_INSTRUCTIONS,
    prompting_study,
)
from transformer_lens_taskvec.paper.plots import plot_checkpoints, plot_prompting
from transformer_lens_taskvec.paper.published import PUBLISHED_TABLE_1
from transformer_lens_taskvec.paper.shots import ShotStudy, markdown, run_study, write_study
from transformer_lens_taskvec.plots import figure_of, plot_decodability
from transformer_lens_taskvec.tasks import bitwise_tasks, load_conllu, load_treebank, pos_tasks
from transformer_lens_taskvec.tasks.pos import split_pos_tasks
from transformer_lens_taskvec.tasks.sentences import Sentence


def read_sentences(path: str | Path) -> list[Sentence]:
    """Return the tagged sentences of a CoNLL-U file or of a Penn Treebank folder."""
    return load_treebank(path) if Path(path).is_dir() else load_conllu(path)


def write_shot_study(
    model: Any,
    kind: str,
    out: str | Path,
    *,
    sentences: Sequence[Sentence] | None = None,
    **options: Any,
) -> list[Path]:
    """Run :func:`run_study` on one set of tasks (Figures 4, 19, 20, 23) and write it.

    Raises:
        ValueError: If ``kind`` is neither ``"pos"`` nor ``"bitwise"``.
    """
    if kind not in ("pos", "bitwise"):
        raise ValueError(f"kind is {kind!r}; it must be 'pos' or 'bitwise'")
    tasks, test_tasks = bitwise_tasks(), None
    if kind == "pos":
        tasks, test_tasks = split_pos_tasks(sentences, seed=options.get("seed", 0))
    return run_study(model, tasks, test_tasks=test_tasks, **options).save(out, kind)


def write_instruction_study(
    model: Any, out: str | Path, *, sentences: Sequence[Sentence] | None = None, **options: Any
) -> list[Path]:
    """Run :func:`prompting_study` on both sets of tasks (App. I) and write it."""
    found = {
        "bitwise": prompting_study(model, bitwise_tasks(), BITWISE_INSTRUCTIONS, **options),
        "pos": prompting_study(model, pos_tasks(sentences), POS_INSTRUCTIONS, **options),
    }
    figures = {kind: figure_of(plot_prompting(study)) for kind, study in found.items()}
    frames = {kind: study.to_frame() for kind, study in found.items()}
    rows = {kind: json.loads(frame.to_json(orient="records")) for kind, frame in frames.items()}
    lines = [f"# Instructions in the prompt: {model_name(model)}, 4 shots", ""]
    for kind, frame in frames.items():
        lines += [f"## {kind}", "", *markdown(frame), "", f"![{kind}]({kind}.png)", ""]
    return write_study(out, rows, "\n".join([*lines, ""]), figures)


def write_checkpoint_study(
    name: str,
    checkpoints: Sequence[Checkpoint],
    out: str | Path,
    *,
    load: Callable[[Checkpoint], Any],
    shots: Sequence[int] = (1, 4, 10),
    **options: Any,
) -> list[Path]:
    """Run :func:`run_study` on bitwise tasks at each training checkpoint (Figure 5) and write it.

    A checkpoint whose results are already in the folder is not measured again.
    """

    def study(loaded: Any) -> ShotStudy:
        return run_study(loaded, bitwise_tasks(), shots=shots, steer_shots=(), **options)

    # Results with other options must not be reused.
    chosen = {**options, "shots": tuple(shots), "progress": None}
    key = stable_hash(repr(sorted(chosen.items()))).to_bytes(8, "big", signed=True).hex()
    kept = Path(out) / "n{n}-seed{seed}-{key}".format(key=key, **options)
    found = over_checkpoints(
        name, checkpoints, study, load=load, folder=kept, progress=bool(options["progress"])
    )
    figures = {"over_checkpoints": figure_of(plot_checkpoints(found)[0])}
    rows = json.loads(found.to_frame().to_json(orient="records"))
    lines = [f"# Over checkpoints: {name}", "", repr(found), "", *markdown(found.to_frame())]
    lines += ["", "![over_checkpoints.png](over_checkpoints.png)", ""]
    return write_study(out, rows, "\n".join(lines), figures)


def study_finetuned(model: Any, **options: Any) -> ShotStudy:
    """Return :func:`run_study` of one model of Table 1."""
    return run_study(model, bitwise_tasks(), shots=(4,), steer_shots=(), **options)


def write_finetuning_study(
    hf_model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    settings: LoraSettings | None = None,
    **options: Any,
) -> list[Path]:
    """Run :func:`finetuning_study` on bitwise tasks (Table 1) and write it.

    The adapters are saved in the same folder during training.
    """
    settings = settings or LoraSettings()
    tasks = bitwise_tasks()
    found = finetuning_study(
        hf_model,
        tokenizer,
        tasks,
        partial(study_finetuned, **options),
        settings=settings,
        seed=options["seed"],
        folder=Path(out) / "adapters",
        progress=options["progress"],
    )
    name = hf_model.config.name_or_path
    frame = found.to_frame()
    below = {
        name: float(found.td_below(name).max())
        for name, layers in found.layers.items()
        if layers and min(layers) > 0
    }
    published = "; ".join(
        f"{name}: TD {td:.2f}, accuracy {accuracy:.2f}"
        for name, (td, accuracy) in PUBLISHED_TABLE_1.items()
    )
    lines = [
        f"# Finetuning by depth: {name}, bitwise, 4 shots, {settings.n_samples} samples",
        "",
        *markdown(frame),
        "",
        *(f"Largest change of TD below the layers of '{n}': {v:.3f}." for n, v in below.items()),
        "",
        f"In the paper (Llama-3.1-8B): {published}.",
        "",
        "![td_by_layer.png](td_by_layer.png)",
        "",
    ]
    curves = {name: study.decodability[4] for name, study in found.studies.items()}
    results = {name: study.to_json() for name, study in found.studies.items()}
    figures = {"td_by_layer": figure_of(plot_decodability(curves))}
    return write_study(out, results, "\n".join(lines), figures)
