"""Training on an accelerator: no step waits for it, and an interrupted run resumes.

pytest tests/gpu/test_lab.py -m gpu --device cuda -s
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.training import loop

pytestmark = pytest.mark.gpu
TUTORIALS = Path(__file__).parents[2] / "tutorials"


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device asked for, or the first CUDA device."""
    asked = request.config.getoption("--device")
    if asked is None and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; --device cpu runs this on the CPU")
    return torch.device(asked or "cuda")


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """On CUDA everything that makes the host wait for the device is an error."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def small(preset: str) -> lab.TrainConfig:
    changed = {"batch_size": 8, "n_layers": 2, "n_checkpoints": 2, "n_eval": 4, "steps": 12}
    config = dataclasses.replace(lab.PRESETS[preset], **changed)
    assert isinstance(config, lab.TrainConfig)
    return config


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("preset", ["paper", "small"])
def test_no_step_waits_for_the_device(
    preset: str, autocast: bool, compiled: bool, device: torch.device
) -> None:
    if compiled and device.type != "cuda":
        pytest.skip("compiling for the CPU takes long")
    step = loop.training_step(
        small(preset), seed=0, device=device, autocast=autocast, compile=compiled
    )
    for _ in range(2):
        step()
    with refusing_to_wait(device):
        for _ in range(3):
            step()


def test_a_run_that_was_interrupted_resumes(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, steps = small("paper"), []
    take = loop._take_step

    def killing(*args: object) -> None:
        steps.append(args[2])
        if len(steps) == 6:
            raise KeyboardInterrupt
        take(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_take_step", killing)
    with pytest.raises(KeyboardInterrupt):
        lab.train(config, tmp_path / "killed", device=device, autocast=True, progress=False)
    killed = lab.train(config, tmp_path / "killed", device=device, autocast=True, progress=False)
    straight = lab.train(config, tmp_path / "run", device=device, autocast=True, progress=False)
    assert steps[:13] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12]
    torch.testing.assert_close(killed.loss, straight.loss, rtol=1e-2, atol=1e-2)


def test_the_papers_script_times_and_trains(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(TUTORIALS), *sys.path])
    import lab_paper

    on_cpu = device.type == "cpu"
    config = small("paper") if on_cpu else dataclasses.replace(lab.PRESETS["paper"], steps=500)
    modes = lab_paper.MODES[:2] if on_cpu else lab_paper.MODES
    often = 1 if on_cpu else 20
    found = lab_paper.report(config, tmp_path, seed=0, device=device, modes=modes, often=often)
    print(f"\n\n{(tmp_path / 'paper.md').read_text()}")
    assert all(row["over_bound"] > (0 if on_cpu else 1) for row in found["step"])
    assert lab.load_run(tmp_path).finished
