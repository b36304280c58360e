"""The folder of a training run: what lies in it, and reading that back.

A run's folder holds ``config.json`` (settings and seed), ``metrics.jsonl`` (one evaluation per
line), ``checkpoints/step_000000.safetensors`` (the model at each evaluation) and, to resume from,
``state.safetensors`` (model, optimisers and generator at the last save). Every file is written next
to its place and then moved there, so that no file is ever half written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from transformer_lens_taskvec._utils.atomic_io import read_json, reading, write_text
from transformer_lens_taskvec._utils.training_state import write_tensors


def open_folder(path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Make a folder the one of a run with these settings, or check that it is.

    Raises:
        ValueError: If the folder holds a run and it is not to be resumed, or one with another
            setting; the message names the setting.
    """
    if not (path / "config.json").exists():
        write_text(path / "config.json", json.dumps(settings, indent=1) + "\n")
        return
    if not resume:
        raise ValueError(f"{path} already holds a run; choose another folder, or resume it")
    check_settings(path, read_settings(path), settings)


def check_settings(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise unless the settings saved in a folder are the ones wanted, nested ones included.

    Raises:
        ValueError: At the first setting that differs; the message names it.
    """
    for name, value in wanted.items():
        found = saved.get(name)
        if found == value:
            continue
        if isinstance(found, dict) and isinstance(value, dict):
            absent = dict.fromkeys(found.keys() - value.keys())
            check_settings(path, _named(found, name), _named({**value, **absent}, name))
        raise ValueError(
            f"{path} holds another run: its {name} is {found!r}, not {value!r}; choose another "
            "folder"
        )


def _named(settings: Mapping[str, Any], owner: str) -> dict[str, Any]:
    return {f"{owner}.{name}": value for name, value in settings.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder, in the form of JSON.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        ValueError: If they are damaged.
    """
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json in it")
    saved = read_json(file, "damaged settings of a run")
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: damaged settings of a run: expected an object")
    return saved


def export_checkpoints(
    source: Path, target: Path, steps: Sequence[int], dtype: torch.dtype
) -> None:
    """Copy a run with only some of its checkpoints, in another dtype.

    Raises:
        ValueError: If there is no checkpoint at one of the steps, or the target holds a run.
    """
    if (target / "config.json").exists():
        raise ValueError(f"{target} already holds a run; choose another folder")
    records = {record["step"]: record for record in read_metrics(source)}
    missing = sorted(set(steps) - set(records))
    if missing:
        raise ValueError(f"no checkpoint at step {missing[0]}; there are {sorted(records)}")
    kept = sorted(set(steps))
    for step in kept:
        file = checkpoint_path(source, step)
        with reading(file, "damaged checkpoint"):
            weights = load_file(file)
        small = {name: value.to(dtype) for name, value in weights.items()}
        write_tensors(checkpoint_path(target, step), small, {"step": str(step)})
    write_text(target / "metrics.jsonl", "".join(json.dumps(records[s]) + "\n" for s in kept))
    write_text(target / "config.json", (source / "config.json").read_text())


def checkpoint_path(path: Path, step: int) -> Path:
    """Where the model at a step is kept."""
    return path / "checkpoints" / f"step_{step:06d}.safetensors"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, in order.

    Raises:
        ValueError: If a line is no evaluation; the message gives the file and the line.
    """
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    with reading(file, "damaged evaluations"):
        lines = file.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        with reading(f"{file}, line {number}", "not an evaluation"):
            record = json.loads(line)
            if type(record["step"]) is not int or record["step"] < 0:
                raise ValueError(f"its step is {record['step']!r}")
            records.append(record)
    return records
