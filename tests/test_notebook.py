"""Manners in a notebook: an interrupted cell leaves the model clean, and memory is freed."""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jupyter_client.manager import start_new_kernel

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab

SET_UP = """
import torch, transformer_lens_taskvec as tv
model = tv.load_model("smollm2", device="cpu")
sets = tv.sample_splits(tv.find_tasks(["next_letter"]), {"a": 40, "b": 40}, n_shots=8, seed=0)
vectors = tv.task_vectors(tv.collect(model, sets["a"][:4]))
tokens = model.to_tokens("example:f->", prepend_bos=False)
before = model(tokens)
print("ready")
"""
CALLS = {
    "collect": "tv.collect(model, sets['a'], progress=True)",
    "layer_sweep": "tv.layer_sweep(model, sets['b'], vectors)",
    "head_effects": "tv.head_effects(model, sets['a'], on=sets['b'])",
    "generate": "tv.generate(model, [e.prompt for e in sets['a']], max_new_tokens=200)",
}
CHECK = """
clean = not any(point.has_hooks() for point in model.hook_dict.values())
print(clean, torch.equal(model(tokens), before), torch.is_grad_enabled())
"""


@pytest.fixture(scope="module")
def kernel() -> Any:
    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client: Any, code: str, after: Callable[[], None] | None = None) -> tuple[str, str]:
    """What a cell printed, and the name of the error it ended with."""
    message = client.execute(code)
    if after is not None:
        after()
    printed, error = "", ""
    while True:
        heard = client.get_iopub_msg(timeout=300)
        if heard["parent_header"].get("msg_id") != message:
            continue
        content = heard["content"]
        if heard["msg_type"] == "stream":
            printed += content["text"]
        elif heard["msg_type"] == "error":
            error = content["ename"]
        elif heard["msg_type"] == "status" and content["execution_state"] == "idle":
            return printed, error


@pytest.mark.tutorial
@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals to send")
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_cell_leaves_the_model_as_it_was(kernel: Any, name: str) -> None:
    manager, client = kernel
    if name == next(iter(CALLS)):
        printed, error = run(client, SET_UP)
        assert not error and "ready" in printed, printed

    def interrupt() -> None:
        time.sleep(0.7)
        manager.interrupt_kernel()

    assert run(client, CALLS[name], interrupt)[1] == "KeyboardInterrupt"
    assert run(client, CHECK) == ("True True True\n", "")


def test_memory_is_freed_when_the_results_are() -> None:
    toy = tv.load_model("toy", device="cpu")
    tasks = tv.bitwise_tasks()

    def everything() -> None:
        train, test = (tv.sample_episodes(tasks, 3, 2, seed=seed) for seed in (0, 1))
        activations = tv.collect(toy, train)
        vectors = tv.task_vectors(activations)
        tv.task_decodability(activations, 3).null(20)
        tv.layer_sweep(toy, test, vectors, controls=True)
        tv.perturbation_matrix(toy, test, vectors, 1)
        tv.head_effects(toy, train, on=test)
        tv.generate(toy, [episode.prompt for episode in test], max_new_tokens=2)
        tv.paper.run_study(toy, tasks, shots=(1, 2), n=6, k=3)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    everything()
    before = tensors()
    everything()
    assert tensors() <= before


def test_progress_bars_clean_up_after_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = tv.load_model("toy", device="cpu")
    episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 4, 2, seed=0)
    config = dataclasses.replace(lab.PRESETS["small"], n_layers=1, n_checkpoints=2, n_eval=11)
    calls: list[Callable[[], Any]] = [
        lambda: tv.collect(toy, episodes, progress=True),
        lambda: tv.evaluate(toy, episodes, progress=True),
        lambda: tv.head_effects(toy, episodes, progress=True),
        lambda: tv.paper.run_study(toy, tv.bitwise_tasks(), shots=(1, 2), n=12, progress=True),
        lambda: lab.train(config, tmp_path / "run", steps=4, progress=True),
        lambda: lab.measure_emergence(
            lab.load_run(tmp_path / "run"), n=11, n_oracle=20, progress=True
        ),
    ]
    for call in calls:
        call()
        written = capsys.readouterr().err
        lines = written.split("\r")
        assert len(lines) > 2 and not lines[-1].strip() and not lines[-2].strip()
        assert "\n" not in written
