"""The file that a run starts from again: the ``config.json`` that every run writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transformer_lens_taskvec._utils.atomic_io import read_json, reading
from transformer_lens_taskvec._utils.subclasses import subclass_named
from transformer_lens_taskvec._utils.typed import check_names, check_types, check_value
from transformer_lens_taskvec.lab.problems.base import Problem
from transformer_lens_taskvec.lab.training.recipe import Recipe, recipe_named
from transformer_lens_taskvec.lab.training.stopping import EarlyStopping

_HOW: Mapping[str, Any] = {
    "seed": int,
    "device": str,
    "autocast": bool,
    "compile": bool,
    "stop": Mapping[str, Any] | None,
}
"""What shapes a run besides the settings of its class, with the types of the values."""

_NOT_READ = ("kind", "made_with")


def settings_of(
    config: Recipe,
    *,
    seed: int,
    device: torch.device,
    autocast: bool,
    compile: bool,
    stop: EarlyStopping | None,
) -> dict[str, Any]:
    """Everything that shapes a run, in the form of JSON."""
    return {
        "seed": seed,
        **config.to_json(),
        "device": device.type,
        "autocast": autocast,
        "compile": compile,
        "stop": None if stop is None else dataclasses.asdict(stop),
    }


def load_config(path: str | Path, *, problem: Problem | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`train` that a ``config.json`` describes.

    Every run writes that file. On the same machine with the same number of threads, which stands in
    it under ``made_with``, training from it gives the same bits. What the file leaves out has its
    default; ``kind`` and ``problem`` have none.

    Args:
        path: The file.
        problem: The problem, in place of the file's. It is needed if the problem holds functions of
            your own, which no file can hold.

    Returns:
        ``config``, a :class:`Recipe`, and those of ``seed``, ``device``, ``autocast``, ``compile``
        and ``stop`` that are in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key is unknown, a value is of the wrong type or not allowed, or the problem
            is not defined; the message names the file and the key.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> arguments = lab.load_config(lab.shipped_run().path / "config.json")
        >>> arguments["config"] == lab.PRESETS["small"], arguments["seed"]
        (True, 0)
        >>> plan = lab.plan_training(**arguments, steps=100)  # or lab.train(out_dir=..., ...)
        >>> plan.by_kind["training"][0]
        100
    """
    path = Path(path)
    saved = read_json(path, "not the config of a run")
    with reading(path, "not a config to train from"):
        check_value(Mapping[str, Any], saved, "the content")
        if "kind" not in saved:
            raise ValueError("no key 'kind'; it names the class of settings, such as 'TrainConfig'")
        check_value(str, saved["kind"], "kind")
        recipe = recipe_named(saved["kind"])
        check_names(recipe, saved, also=(*_HOW, *_NOT_READ))
        own = {name: value for name, value in saved.items() if name not in (*_HOW, *_NOT_READ)}
        given: dict[str, Any] = {} if problem is None else {"problem": problem}
        described = own.pop("problem", None)
        if described is not None and problem is None:
            given["problem"] = _problem(described)
        check_types(recipe, own)
        how = {name: saved[name] for name in _HOW if name in saved}
        for name, value in how.items():
            check_value(_HOW[name], value, name)
        if "device" in how:
            with reading("device", f"{how['device']!r} is no device"):
                torch.device(how["device"])
        if how.get("stop") is not None:
            how["stop"] = _stop(how["stop"])
        return {"config": recipe.from_json(saved, **given), **how}


def _problem(described: Any) -> Problem:
    check_value(Mapping[str, Any], described, "problem")
    fields = dict(described)
    name = fields.pop("kind", None)
    check_value(str, name, "problem.kind")
    kind: type[Any] | None = subclass_named(Problem, name)
    if kind is None:
        raise ValueError(
            f"problem.kind is {name!r}, which is not defined; import the module that defines it "
            "first, or give problem="
        )
    plain = getattr(kind.from_json, "__func__", None) is vars(Problem)["from_json"].__func__
    if hasattr(kind, "__dataclass_fields__"):
        check_names(kind, fields, prefix="problem.")
        # What from_json makes itself, and what it refuses, is not of the annotated type here.
        known = {key: one for key, one in fields.items() if not isinstance(one, dict)}
        check_types(kind, known, prefix="problem.", scalars_only=not plain)
    problem: Problem = kind.from_json(fields)
    return problem


def _stop(described: Mapping[str, Any]) -> EarlyStopping:
    check_names(EarlyStopping, described, prefix="stop.")
    check_types(EarlyStopping, described, prefix="stop.")
    return EarlyStopping(**described)
