"""The registry: every family knows its tasks, and only what is asked for is made."""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.tasks import registry
from transformer_lens_taskvec.tasks.registry import FAMILIES, NULL, Family, all_tasks, find_tasks


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_knows_the_tasks_that_its_maker_makes(family: Family) -> None:
    made = [name for name in family.maker() if name != NULL]
    assert made == list(family.tasks)
    assert [task.name for task in family.make().values()] == made


def test_no_two_families_or_tasks_share_a_name() -> None:
    names = [family.name for family in FAMILIES]
    tasks = [task for family in FAMILIES for task in family.tasks]
    assert len(set(names)) == len(names)
    assert len(set(tasks)) == len(tasks)
    assert list(all_tasks()) == tasks


def test_asking_for_a_task_reads_no_file_of_another_family(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = Path.read_text

    def noted(path: Path, *args: Any, **kwargs: Any) -> str:
        read.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", noted)
    assert list(find_tasks(["upper_case"])) == ["upper_case"]
    assert read == ["words.txt"]
    read.clear()
    all_tasks()
    data = resources.files("transformer_lens_taskvec.tasks") / "data"
    of_import = {"sentences.json", "penn_upos.tsv"}
    assert sorted(read) == sorted({path.name for path in data.iterdir()} - of_import)


def test_asking_for_tasks_makes_their_families_once_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    def noted(family: Family) -> Family:
        def maker() -> dict[str, tv.Task]:
            made.append(family.name)
            return family.maker()

        return Family(family.name, maker, family.tasks, family.description)

    monkeypatch.setattr(registry, "FAMILIES", tuple(noted(family) for family in FAMILIES))
    asked = ["XOR", "upper_case", "AND"]
    assert list(find_tasks(asked)) == asked
    assert made == ["bitwise", "algorithmic"]


def test_a_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def colour_tasks() -> dict[str, tv.Task]:
        return {"colours": tv.mapping_task("colours", {"sky": "blue"})}

    mine = Family("colours", colour_tasks, ("colours",), "the colours of things")
    monkeypatch.setattr(registry, "FAMILIES", (*FAMILIES, mine))
    assert len(find_tasks(["colours"])["colours"].sample(1, random.Random(0))) == 1
    assert "colours" in all_tasks()


def test_the_null_task_has_no_name_to_ask_for() -> None:
    with pytest.raises(ValueError, match="no task named 'Null'"):
        find_tasks([NULL])
    with pytest.raises(ValueError, match="give at least one"):
        find_tasks([])


def test_tasks_are_listed_by_family_with_an_example() -> None:
    outcome = CliRunner().invoke(app, ["tasks"])
    assert outcome.exit_code == 0
    lines = outcome.output.splitlines()
    headings = [line for line in lines if not line.startswith("  ")]
    assert headings == [f"{family.name}: {family.description}" for family in FAMILIES]
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(all_tasks())
    assert "  next_number            " in outcome.output
