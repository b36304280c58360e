"""The state of a training on disk, from which a killed training resumes to the same bits."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from transformer_lens_taskvec._utils.atomic_io import reading, write_whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file or nothing."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda place: save_file(plain, place, dict(metadata)))


@dataclass(frozen=True)
class TrainingState:
    """All that a training step changes, and the file that it is saved to.

    Attributes:
        path: The file, in the format of safetensors.
        tensors: Weights, running sums and the like, by name; loading writes to them in place.
        optimizers: Their states; loading leaves their settings, such as the learning rate.
        generators: Random generators, by name.
        training: What the state belongs to; another training's is refused.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    optimizers: Sequence[Optimizer]
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    training: str = ""

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, whole or not at all."""
        found = {f"tensor.{name}": value for name, value in self.tensors.items()}
        for name, generator in self.generators.items():
            found[f"generator.{name}"] = generator.get_state()
        for number, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                for key, value in moments.items():
                    found[f"optimizer.{number}.{index}.{key}"] = value
        threads = str(torch.get_num_threads())
        metadata = {"step": str(step), "threads": threads, "training": self.training}
        write_tensors(self.path, found, metadata)

    def load(self) -> int | None:
        """Put the saved state back.

        Returns:
            The number of steps taken by then; None if no state has been saved.

        Raises:
            ValueError: If the file is damaged, or of another training.
        """
        if not self.path.exists():
            return None
        damaged = "damaged state of a training; remove it to start again"
        with reading(self.path, damaged), safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
            step, threads = int(metadata["step"]), int(metadata["threads"])
            training = metadata["training"]
            saved = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if step < 0:
                raise ValueError(f"its step is {step}")
        if training != self.training:
            raise ValueError(
                f"{self.path} is of another training, {textwrap.shorten(training, 500)}; "
                "choose another folder, or remove it"
            )
        with reading(self.path, damaged):
            self._put_back(saved)
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.tensors.values())
        if on_cpu and threads != torch.get_num_threads():
            warnings.warn(
                f"this training ran with {threads} threads and resumes with "
                f"{torch.get_num_threads()}, so sums are rounded differently. For the same bits "
                f"call torch.set_num_threads({threads}) first",
                stacklevel=4,
            )
        return step

    @torch.no_grad()
    def _put_back(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            value = saved[f"tensor.{name}"]
            if value.shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(value.shape)}, not {list(tensor.shape)}")
            tensor.copy_(value)
        for name, generator in self.generators.items():
            generator.set_state(saved[f"generator.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            moments: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimizer.{number}."
            for name, value in saved.items():
                if name.startswith(prefix):
                    index, key = name.removeprefix(prefix).split(".")
                    moments.setdefault(int(index), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
