"""Task vectors: for each task the mean of its activations, at each layer (Han et al. 2025, App. C).

They are saved as safetensors, with the names that make them usable inside the file; loading never
unpickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from transformer_lens_taskvec._utils.atomic_io import reading, replacing
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Source, layer_index
from transformer_lens_taskvec.interventions.modes import InSubspace
from transformer_lens_taskvec.models.protocol import model_name

if TYPE_CHECKING:
    pass


_FORMAT = "taskvec-1"


@dataclass(frozen=True, repr=False)
class TaskVectors(Shown):
    """One vector a task and layer.

    Attributes:
        values: ``[task, layer, d_model]``, float32 on the CPU (``[task, layer, head, d]`` for a
            hook point with a head axis).
        tasks: The tasks' names, in the order of the first axis.
        layers: The layers of the second axis, counted from 0.
        source: Where the vectors come from.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> vectors["XOR"].shape, vectors.at("XOR", 1).shape  # by layer, at layer 1
        (torch.Size([4, 64]), torch.Size([64]))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vectors.save(f"{folder}/bitwise.safetensors")
        ...     tv.TaskVectors.load(f"{folder}/bitwise.safetensors", model).tasks
        ('AND', 'NAND', 'OR', 'NOR', 'XOR', 'XNOR')
    """

    values: Float[Tensor, "task layer d_model"]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    source: Source

    def __getitem__(self, task: str) -> Float[Tensor, "layer d_model"]:
        """The vectors of one task, one a layer in the order of ``layers``.

        Raises:
            KeyError: If there is no such task; the message names those there are.
        """
        if task not in self.tasks:
            raise KeyError(f"no vector for task {task!r}; there are: {', '.join(self.tasks)}")
        return self.values[self.tasks.index(task)]

    def at(self, task: str, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of one task at one layer, by the layer's number in the model.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer.
        """
        return self[task][layer_index(self.layers, layer)]

    def subspace(self, layer: int) -> InSubspace:
        """The directions in which the tasks' vectors differ at a layer, as a mode for ``inject``.

        Its rank is the number of tasks less one, at most.

        Raises:
            ValueError: If there is no such layer, or one task only.
        """
        if len(self.tasks) < 2:
            raise ValueError("one task spans no subspace; it takes two or more to differ")
        values = self.values[:, layer_index(self.layers, layer)].double()
        centred = values - values.mean(dim=0)
        _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
        kept = strengths > 1e-9 * strengths.max()
        return InSubspace(directions[kept].float())

    def to_frame(self) -> pd.DataFrame:
        """One row a task and layer: ``task, layer, norm, cosine`` (to the mean over tasks)."""
        mean = self.values.mean(dim=0, keepdim=True)
        cosine = torch.nn.functional.cosine_similarity(self.values, mean, dim=-1)
        return pd.DataFrame(
            [
                {
                    "task": task,
                    "layer": layer,
                    "norm": float(self.values[row, column].norm()),
                    "cosine": float(cosine[row, column]),
                }
                for row, task in enumerate(self.tasks)
                for column, layer in enumerate(self.layers)
            ]
        )

    def check_model(self, model: Any) -> None:
        """Raise ``ValueError`` unless the vectors were taken from this model."""
        if model_name(model) != self.source.model:
            raise ValueError(
                f"these vectors come from {self.source.model!r}, the model is {model_name(model)!r}"
            )
        width = int(model.cfg.d_model)
        if self.source.hook.startswith("resid") and self.values.shape[-1] != width:
            raise ValueError(
                f"these vectors have width {self.values.shape[-1]}, "
                f"{model_name(model)!r} has d_model {width}"
            )

    def check_tasks(self, tasks: Iterable[str]) -> None:
        """Raise ``ValueError`` unless each of the tasks has a vector."""
        missing = [task for task in dict.fromkeys(tasks) if task not in self.tasks]
        if missing:
            raise ValueError(
                f"no vector for {', '.join(missing)}; the vectors are of: {', '.join(self.tasks)}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vectors to a safetensors file, whole or not at all."""
        metadata = {
            "format": _FORMAT,
            "tasks": json.dumps(self.tasks),
            "layers": json.dumps(self.layers),
            "source": json.dumps(asdict(self.source)),
        }
        with replacing(Path(path)) as beside:
            save_file({"values": self.values.contiguous()}, beside, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None) -> TaskVectors:
        """Read vectors that :meth:`save` wrote.

        Args:
            path: The file.
            model: When given, the model the vectors must come from.

        Raises:
            ValueError: If the file is damaged or not of this kind, or the vectors come from
                another model.
            OSError: If the file cannot be read.
        """
        with reading(path, "damaged task-vector file, or none"):
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                values = file.get_tensor("values")
            vectors = cls._from_file(values, metadata)
        if model is not None:
            vectors.check_model(model)
        return vectors

    @classmethod
    def _from_file(cls, values: Tensor, metadata: dict[str, str]) -> TaskVectors:
        if metadata.get("format") != _FORMAT:
            raise TypeError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        tasks = tuple(str(task) for task in json.loads(metadata["tasks"]))
        layers = tuple(int(layer) for layer in json.loads(metadata["layers"]))
        source = Source(**json.loads(metadata["source"]))
        for field in fields(Source):
            value = getattr(source, field.name)
            if type(value).__name__ != field.type:
                raise TypeError(f"its source's {field.name} is {value!r}, not of type {field.type}")
        if not values.is_floating_point():
            raise TypeError(f"values of type {values.dtype}")
        if values.ndim < 3 or values.shape[:2] != (len(tasks), len(layers)):
            raise TypeError(
                f"values of shape {tuple(values.shape)} for {len(tasks)} tasks and "
                f"{len(layers)} layers"
            )
        return cls(values, tasks, layers, source)

    def __repr__(self) -> str:
        width = self.values.shape[-1]
        return (
            f"TaskVectors({len(self.tasks)} tasks x {len(self.layers)} layers x {width}, "
            f"{self.source.hook} of {self.source.model}: {', '.join(self.tasks)})"
        )
