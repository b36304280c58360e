"""The folder of a training run: what lies in it, and reading that back.

It holds ``config.json`` (settings and seed; :func:`load_config` starts the same run from it),
``metrics.jsonl`` (one evaluation per line), ``checkpoints/step_000000.safetensors`` (the model at
each evaluation), to resume from ``state.safetensors`` (model, optimisers and generator at the last
save), and, if there are loggers, ``logged.json`` (the last step that each has had). No file is ever
half written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from transformer_lens_taskvec._utils.atomic_io import read_json, reading, write_text


def open_folder(path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Make a folder the one of a run with these settings, or raise unless it is.

    The versions that the run was started with, and the threads, are written too, under
    ``made_with``. They are not compared.
    """
    if not (path / "config.json").exists():
        described = {**settings, "made_with": _made_with()}
        write_text(path / "config.json", json.dumps(described, indent=1) + "\n")
        return
    if not resume:
        raise ValueError(f"{path} already holds a run; choose another folder, or resume it")
    check_settings(path, read_settings(path), settings)


def _made_with() -> dict[str, Any]:
    return {
        "transformer-lens-taskvec": version("transformer-lens-taskvec"),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def check_settings(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first setting, nested or not, that is not as wanted."""
    for name, value in wanted.items():
        found = saved.get(name)
        if isinstance(found, dict) and isinstance(value, dict):
            keys = {key: f"{name}.{key}" for key in found | value}
            check_settings(
                path,
                {full: found.get(key) for key, full in keys.items()},
                {full: value.get(key) for key, full in keys.items()},
            )
        elif found != value:
            raise ValueError(
                f"{path} holds another run: its {name} is {found!r}, not {value!r}; choose "
                "another folder"
            )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder, in the form of JSON."""
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json in it")
    saved = read_json(file, "damaged settings of a run")
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: damaged settings of a run: expected an object")
    return saved


def checkpoint_path(path: Path, step: int) -> Path:
    """Where the model at a step is kept."""
    return path / "checkpoints" / f"step_{step:06d}.safetensors"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, in order; a damaged line is named."""
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


def write_metrics(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the evaluations of a run, one per line."""
    lines = (json.dumps(record) + "\n" for record in records)
    write_text(path / "metrics.jsonl", "".join(lines))
