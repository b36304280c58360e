"""Fixtures: real SmolLM2, small random models, and episodes for both."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping

PACKAGE = Path(__file__).parents[1] / "transformer_lens_taskvec"
# Shapes and types are checked at every call, except where time is measured, and in the command
# line, whose arguments typer makes.
if not any(room in argument for argument in sys.argv for room in ("benchmarks", "tests/gpu")):
    rooms = [path.stem for path in PACKAGE.iterdir() if path.stem not in ("cli", "__main__")]
    jaxtyping.install_import_hook([f"{PACKAGE.name}.{room}" for room in rooms], "checked.beartyped")

import pytest  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402

import transformer_lens_taskvec as tv  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
"""Real data that lies beside a development checkout; tests that read it skip without it."""

CLASSES = ["bridge"] if zoo.HookedTransformer is None else ["bridge", "hooked_transformer"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="device of the models in tests/benchmarks and tests/gpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, since more cost more than they bring to the lab's small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def closes_its_figures() -> Iterator[None]:
    """Close what a test has drawn, so that no other test finds it; fixtures' figures stay."""
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    yield
    for number in plt.get_fignums():
        if number not in before:
            plt.close(number)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device asked for, the CPU by default."""
    return str(request.config.getoption("--device") or "cpu")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls without the checks: of what the package itself must refuse, or must not disturb."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smollm2(device: str) -> Any:
    """The real SmolLM2-135M-Instruct."""
    return tv.load_model("smollm2", device=device)


@pytest.fixture(scope="session")
def tokenizer(smollm2: Any) -> Any:
    return smollm2.tokenizer


@pytest.fixture(scope="session", params=CLASSES)
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A small random Llama model with a real tokenizer, in each class this TransformerLens has."""
    if request.param == "bridge":
        return zoo.bridge("llama", tokenizer)
    return zoo.hooked_transformer(zoo.hf_model("llama"), tokenizer, "tiny-llama")


@pytest.fixture(scope="session")
def episodes() -> list[tv.Episode]:
    """Few-shot episodes of different lengths, of three tasks, with multi-token answers."""
    tasks = tv.find_tasks(["singular_plural", "upper_case", "en_fr"])
    two = tv.sample_episodes(tasks, n=4, n_shots=2, seed=1)
    one = tv.sample_episodes(tasks, n=3, n_shots=1, seed=2, template=tv.ARROW)
    return [*two, *one]


@pytest.fixture(scope="session")
def vectors(model: Any, episodes: list[tv.Episode]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(model, episodes))
