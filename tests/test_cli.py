"""The command line: help, completion, and the module that is the same command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.cli import app

COMMANDS = ["demo", "run", "bench", "dictionary", "tasks", "study", "train", "emergence"]


def test_every_command_is_listed_and_has_an_example_that_parses() -> None:
    listed = CliRunner().invoke(app, ["--help"]).output
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert list(commands) == COMMANDS
    for command in COMMANDS:
        assert command in listed
        text = commands[command].help or ""
        (example,) = [line for line in text.splitlines() if line.startswith("Example: taskvec ")]
        words = example.removeprefix("Example: taskvec ").split()
        assert words[0] == command
        # With --help at its end a command line is parsed and nothing is run.
        parsed = CliRunner().invoke(app, [*words, "--help"])
        assert parsed.exit_code == 0, parsed.output


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("taskvec stu", ["study"]),
        ("taskvec study b", ["bitwise"]),
        ("taskvec train --preset t", ["toy"]),
        ("taskvec train --logger t", ["tensorboard", "trackio"]),
        ("taskvec run --tasks antonyms,country_ca", ["antonyms,country_capital"]),
    ],
)
def test_the_shell_completes_commands_and_values(typed: str, offered: list[str]) -> None:
    words = typed.split()
    asked = {
        "_TASKVEC_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    found = CliRunner().invoke(app, [], prog_name="taskvec", env=asked)
    assert found.output.split() == offered


def test_the_module_is_the_command() -> None:
    module = [sys.executable, "-m", "transformer_lens_taskvec"]
    environment = {**os.environ, "NO_COLOR": "1"}
    run = subprocess.run([*module, "--version"], capture_output=True, text=True, env=environment)
    assert run.stdout == f"taskvec {tv.__version__}\n"
    shown = subprocess.run([*module, "--help"], capture_output=True, text=True, env=environment)
    assert "Usage: taskvec [OPTIONS] COMMAND" in shown.stdout


MISTAKES = {
    "unknown task": (["run", "--tasks", "uper_case"], "did you mean upper_case"),
    "unknown model": (["run", "--tasks", "upper_case,en_fr", "--model", "gpt3"], "no model named"),
    "unknown model of a study": (["study", "bitwise", "--model", "gpt3"], "no model named"),
    "unknown model to finetune": (["study", "finetune", "--model", "gpt3"], "no model named"),
    "unknown study": (["study", "poss", "--model", "toy"], "no study 'poss'"),
    "no checkpoints": (["study", "checkpoints"], "give at least one"),
    "unknown preset": (["train", "--preset", "smal"], "no preset 'smal'"),
    "unknown logger": (["train", "--logger", "wand"], "no logger 'wand'"),
    "no config": (["train", "--config", "nowhere.json"], "'nowhere.json' does not exist"),
    "no patience": (["train", "--patience", "0"], "Invalid value for '--patience'"),
    "no run": (["emergence", "nowhere"], "no run"),
    "no data": (["study", "pos", "--data", "nowhere.conllu"], "'nowhere.conllu' does not exist"),
    "unknown device": (["train", "--device", "gpu"], "'gpu' cannot be used. Use 'cpu'"),
    "a device without memory": (["train", "--device", "meta"], "'meta' cannot be used"),
    **{
        f"{command[0]}, seed {seed}": ([*command, "--seed", seed], "Invalid value for '--seed'")
        for seed in ("-1", str(2**32), str(2**63), "9" * 40)
        for command in (
            ["demo"],
            ["run", "--tasks", "upper_case,en_fr"],
            ["study", "bitwise"],
            ["train"],
            ["emergence"],
        )
    },
}
if not torch.cuda.is_available():
    MISTAKES["no CUDA"] = (["train", "--device", "cuda"], "Use 'cpu': there is no CUDA here")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_leaves_nothing_behind(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, answer = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, [*arguments, "--out", "new/results"])
    assert outcome.exit_code == 2, outcome.output
    assert answer in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith("taskvec: ")
    assert list(tmp_path.iterdir()) == []


DRY = {
    "run": ["run", "--model", "toy", "--tasks", "AND,XOR", "--shots", "2", "--n", "12"],
    "study": ["study", "bitwise", "--model", "toy", "--quick"],
    "checkpoints": ["study", "checkpoints", "--model", "toy", "--quick"],
    "train": ["train", "--preset", "small", "--steps", "100"],
}
SLOW_DRY = {
    "demo": ["demo"],
    "pos": ["study", "pos", "--quick", "--model", "toy"],
    "prompting": ["study", "prompting", "--quick", "--model", "toy"],
    "finetune": ["study", "finetune", "--quick"],
    "emergence": ["emergence", "--n", "11"],
    "toy": ["train", "--preset", "toy"],
}


@pytest.mark.parametrize(
    "arguments",
    [
        *DRY.values(),
        *(pytest.param(some, marks=pytest.mark.slow) for some in SLOW_DRY.values()),
    ],
    ids=[*DRY, *SLOW_DRY],
)
def test_a_dry_run_says_what_would_run_and_leaves_nothing_behind(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, [*arguments, "--dry-run", "--out", "new/results"])
    assert outcome.exit_code == 0, outcome.output
    said = outcome.output
    for pattern in (
        r"^[\d,]+ tokens in [\d,]+ passes$",
        r"^peak memory [\d,]+ MB above the model's$",
        r"^(less than 0.1|about [\d,.]+) minutes, at [\d,]+ tokens/s$",
    ):
        assert re.search(pattern, said, re.MULTILINE), said
    assert ("not included: finetuning" in said) == ("finetune" in arguments)
    assert "wrote" not in said and len(said.splitlines()) <= 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["run", "--tasks", "upper_case,en_fr"], ["train"], ["demo"]])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "file" / "out")])
    assert outcome.exit_code == 2 and len(outcome.output.splitlines()) == 1
    assert "cannot be written to (Not a directory). Choose another." in outcome.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
