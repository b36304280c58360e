"""What can be injected, and task vectors: one vector per task and layer.

Task vectors are saved as safetensors, with the names of their tasks and layers in the metadata;
loading never unpickles.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from transformer_lens_taskvec._utils.atomic_io import reading, replacing
from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Activations, Source, layer_index
from transformer_lens_taskvec.interventions.intervention import Intervention, inject
from transformer_lens_taskvec.interventions.modes import MODES, InSubspace, Mode
from transformer_lens_taskvec.models.protocol import fingerprint, model_name, revision
from transformer_lens_taskvec.models.tokens import Separator, bos_of
from transformer_lens_taskvec.prompts import AnyEpisode, demo_sets_of

_FORMAT = "taskvec-3"
_SOURCE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "hook", "template", "mode"), (str,)),
    **{"position": (int,), "bos": (bool,), "seed": (int, type(None))},
    **{name: (str, type(None)) for name in ("weights", "revision")},
}


@runtime_checkable
class Injectable(Protocol):
    """What can be injected: every method of making task vectors returns one.

    Sweeps, controls, perturbations and experiments take any object with these members. A sweep
    covers ``layers``; an object that acts at all layers at once has None as its only layer.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> isinstance(vectors, tv.Injectable)
        True
        >>> vectors.inject("XOR", 1)
        [Intervention(blocks.1.hook_resid_post, replace, |v|=3.41, position=-1)]
    """

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        ...

    @property
    def layers(self) -> Sequence[int | None]:
        """The layers it can be injected at, counted from 0."""
        ...

    @property
    def source(self) -> Source:
        """The model, hook point and prompt format it comes from."""
        ...

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Mode | None = None,
        scale: float = 1.0,
        relative: bool = False,
        position: int | Sequence[int] | Separator | None = -1,
    ) -> list[Intervention]:
        """Return the interventions that make the model do the task.

        Args:
            task: One of ``tasks``.
            layer: One of ``layers``.
            mode: As for :func:`inject`; its own mode if None.
            scale: As for :func:`inject`.
            relative: As for :func:`inject`.
            position: As for :func:`inject`; by default where the method says, which need not
                be -1.
        """
        ...


OWN = "own"
"""The position at which what is injected acts by itself."""

Place = int | Sequence[int] | Separator | str | None
"""Positions, or :data:`OWN`."""


def at_place(position: Place) -> dict[str, Any]:
    """Return the position as an argument of ``inject``, none for :data:`OWN`.

    Raises:
        ValueError: If it is another text.
    """
    if isinstance(position, str) and position != OWN:
        raise ValueError(f"position is {position!r}; it must be {OWN!r}, or as for inject")
    return {} if isinstance(position, str) else {"position": position}


def check_vectors(vectors: Injectable, model: Any, episodes: Sequence[AnyEpisode] = ()) -> None:
    """Raise ``ValueError`` unless vectors come from this model and from prompts like these.

    Other weights under the same name, such as another checkpoint's, a finetuned copy's or the same
    ones at a lower precision, are warned about: whether vectors transfer to them may be the very
    question.

    Args:
        vectors: What will be injected.
        model: The model it will be injected in.
        episodes: The episodes it will be injected in; whether a BOS stands before their prompts
            must be as it was where the vectors come from.
    """
    source = vectors.source
    if model_name(model) != source.model:
        raise ValueError(
            f"these vectors come from {source.model!r}, the model is {model_name(model)!r}; "
            "extract vectors from this model. If their transfer is what you measure, rename their "
            "source: replace(vectors, source=replace(vectors.source, model=...))"
        )
    weights = fingerprint(model)
    if None not in (source.weights, weights) and weights != source.weights:
        here = _weights(weights, revision(model))
        there = _weights(source.weights, source.revision)
        warnings.warn(
            f"these vectors come from other weights of {source.model!r} ({there}) than the model's "
            f"({here}): another checkpoint, a finetuned copy or another precision. Extract vectors "
            "from this model, unless their transfer is what you measure.",
            stacklevel=3,
        )
    if episodes and bos_of(model, episodes) is not source.bos:
        there, here = ("with", "without") if source.bos else ("without", "with")
        raise ValueError(
            f"these vectors come from prompts {there} a BOS, and the episodes' prompts are {here} "
            "one. Use one template for both"
        )


def _weights(weights: str | None, commit: str | None) -> str:
    return f"fingerprint {weights}" + (f", revision {commit}" if commit else "")


def warn_of_shared(found: Activations | Sequence[AnyEpisode]) -> None:
    """Warn if means over episodes, or their activations, are over demonstrations they share."""
    sets = found.demo_sets if isinstance(found, Activations) else demo_sets_of(found)
    if sets is not None and len(sets.unique()) < len(sets):
        warnings.warn(
            f"means are taken over {len(sets)} prompts that share {len(sets.unique())} sets of "
            "demonstrations, so they carry what few demonstrations say besides the task. Use "
            "episodes with fresh demonstrations (demo_sets=None).",
            stacklevel=3,
        )


def check_tasks(vectors: Injectable, episodes: Sequence[AnyEpisode]) -> None:
    """Raise ``ValueError`` unless there is a vector for the task of each episode."""
    tasks = dict.fromkeys(episode.task for episode in episodes)
    missing = [task for task in tasks if task not in vectors.tasks]
    if missing:
        raise ValueError(
            f"no vector for {', '.join(missing)}; there are vectors for: {', '.join(vectors.tasks)}"
        )


@dataclass(frozen=True, repr=False)
class TaskVectors(Shown):
    """One vector per task and layer.

    Attributes:
        values: ``[task, layer, d_model]``, float32 on the CPU; ``[task, layer, head, d]`` for a
            hook point with a head axis.
        tasks: The tasks' names, in the order of the first axis.
        layers: The layers of the second axis, counted from 0.
        source: The model, hook point and prompt format they come from.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> vectors["XOR"].shape, vectors["XOR", 1].shape  # by layer, at layer 1
        (torch.Size([4, 64]), torch.Size([64]))
        >>> vectors.at(1).shape  # [task, d_model]
        torch.Size([6, 64])
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vectors.save(f"{folder}/bitwise.safetensors")
        ...     tv.TaskVectors.load(f"{folder}/bitwise.safetensors", model).tasks
        ('AND', 'NAND', 'OR', 'NOR', 'XOR', 'XNOR')
    """

    values: Float[Tensor, "task layer ... d"]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    source: Source

    def __getitem__(self, key: str | tuple[str, int]) -> Float[Tensor, "*layer d"]:
        """Return one task's vectors in the order of ``layers``, or its vector at one layer.

        Args:
            key: A task, or a task and a layer.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer.
        """
        task, *layer = (key,) if isinstance(key, str) else key
        if task not in self.tasks:
            raise KeyError(f"no vector for task {task!r}; there are: {', '.join(self.tasks)}")
        values = self.values[self.tasks.index(task)]
        return values[layer_index(self.layers, layer[0])] if layer else values

    def at(self, layer: int) -> Float[Tensor, "task *head d"]:
        """Return the vectors of all tasks at one layer.

        Raises:
            ValueError: If there is no such layer.
        """
        return self.values[:, layer_index(self.layers, layer)]

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Mode | None = None,
        scale: float = 1.0,
        relative: bool = False,
        position: int | Sequence[int] | Separator | None = -1,
    ) -> list[Intervention]:
        """Return the intervention that injects a task's vector at the hook point it comes from.

        The arguments are those of :meth:`Injectable.inject`.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer, or as for :func:`inject`.
        """
        if layer is None:
            raise ValueError(f"layer is None; give one of {list(self.layers)}")
        mode = self.source.mode if mode is None else mode
        return [
            inject(
                self[task, layer],
                layer,
                mode=mode,
                scale=scale,
                relative=relative,
                position=position,
                hook=self.source.hook,
            )
        ]

    def subspace(self, layer: int) -> InSubspace:
        """Return the span of the differences between tasks' vectors, as a mode for ``inject``.

        Its rank is at most the number of tasks minus one.

        Raises:
            ValueError: If there is no such layer, or only one task.
        """
        if len(self.tasks) < 2:
            raise ValueError("one task spans no subspace; it takes vectors of two tasks or more")
        values = self.at(layer).double()
        centred = values - reduce(values, "task d -> d", "mean")
        _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
        kept = strengths > 1e-9 * strengths.max()
        return InSubspace(directions[kept].float())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task and layer: ``task, layer, norm, cosine`` to the tasks' mean."""
        vectors = rearrange(self.values, "task layer ... -> task layer (...)")
        mean = reduce(vectors, "task layer d -> 1 layer d", "mean")
        cosine = torch.nn.functional.cosine_similarity(vectors, mean, dim=-1)
        axes = {"task": self.tasks, "layer": self.layers}
        return grid_frame(axes, {"norm": vectors.norm(dim=-1), "cosine": cosine})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vectors to a safetensors file; an interrupted write leaves no partial file.

        The metadata holds the source and the version of this library.
        """
        metadata = {
            "format": _FORMAT,
            "tasks": json.dumps(self.tasks),
            "layers": json.dumps(self.layers),
            "source": json.dumps(asdict(self.source)),
            "version": version("transformer-lens-taskvec"),
        }
        with replacing(Path(path)) as temporary:
            # A function vector is the same at every layer, so it is stored once.
            stored = self.values[:, :1] if self.values.stride(1) == 0 else self.values
            save_file({"values": stored.contiguous()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None) -> TaskVectors:
        """Return the vectors that :meth:`save` wrote.

        Args:
            path: The file.
            model: If given, the model that the vectors must come from.

        Raises:
            ValueError: If the file is damaged or holds no task vectors, or the vectors come from
                another model.
            OSError: If the file cannot be read.
        """
        with reading(path, "damaged, or not a task-vector file"):
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                values = file.get_tensor("values")
            vectors = cls._from_file(values, metadata)
        if model is not None:
            check_vectors(vectors, model)
        return vectors

    @classmethod
    def _from_file(cls, values: Tensor, metadata: dict[str, str]) -> TaskVectors:
        if metadata.get("format") != _FORMAT:
            raise TypeError(
                f"its format is {metadata.get('format')!r}, not {_FORMAT!r}, which has the "
                "fingerprint of the model's weights"
            )
        tasks = tuple(str(task) for task in json.loads(metadata["tasks"]))
        layers = tuple(int(layer) for layer in json.loads(metadata["layers"]))
        fields = json.loads(metadata["source"])
        fields["heads"] = tuple((int(layer), int(head)) for layer, head in fields["heads"])
        for name in ("n", "n_shots"):
            fields[name] = tuple(int(number) for number in fields[name])
        source = Source(**fields)
        for name, kinds in _SOURCE.items():
            value = getattr(source, name)
            if type(value) not in kinds:
                raise TypeError(f"{name} in its source is {value!r}, not of {kinds[0]}")
        if source.mode not in MODES:
            raise TypeError(f"its mode is {source.mode!r}, not one of {', '.join(MODES)}")
        if not values.is_floating_point():
            raise TypeError(f"values of type {values.dtype}")
        if source.heads and values.ndim == 3 and values.shape[1] == 1:
            values = repeat(values, "task 1 d -> task layer d", layer=len(layers))
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


@dataclass(frozen=True, repr=False)
class LayerwiseVectors(Shown):
    """Vectors of which those of several layers are injected together.

    Attributes:
        vectors: A vector per task and layer.
        layers: The choices: None injects all of them, a layer those up to and including it.
        position: Where they act by themselves, as for :func:`inject`.
        mode: How they act by themselves; None for the vectors' own mode.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes, hook="attn_out"))
        >>> [len(LayerwiseVectors(vectors, (0, 2, None)).inject("XOR", at)) for at in (0, 2, None)]
        [1, 3, 4]
    """

    vectors: TaskVectors
    layers: tuple[int | None, ...] = (None,)
    position: int | tuple[int, ...] | Separator | None = -1
    mode: Mode | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.vectors.tasks

    @property
    def source(self) -> Source:
        """Where the vectors come from."""
        return self.vectors.source

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Mode | None = None,
        scale: float = 1.0,
        relative: bool = False,
        position: Place = OWN,
    ) -> list[Intervention]:
        """Return the interventions of all layers up to one; as for :meth:`Injectable.inject`.

        Raises:
            KeyError: If there is no such task.
            ValueError: If the layer is not one of ``layers``, or as for :func:`inject`.
        """
        layer_index(self.layers, layer)
        options: dict[str, Any] = {"position": self.position, **at_place(position)}
        options |= {"mode": self.mode if mode is None else mode, "relative": relative}
        return [
            edit
            for one in self.vectors.layers
            if layer is None or one <= layer
            for edit in self.vectors.inject(task, one, scale=scale, **options)
        ]

    def __repr__(self) -> str:
        return f"LayerwiseVectors({self.vectors!r})"
