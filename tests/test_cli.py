"""The command line: help, completion, and the module that is the same command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.cli import app

COMMANDS = ["demo", "run", "tasks", "study", "train", "emergence"]


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
