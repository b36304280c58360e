"""Finetuning by depth: LoRA on the answers, in chosen layers only (Han et al. 2025, Table 1).

Finetuning the layers that encode the task raises decodability, and accuracy with it; finetuning
those after them leaves decodability as it was.
"""

from __future__ import annotations

import copy
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.atomic_io import reading, write_whole
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.models.bridge import bridge_from_hf
from transformer_lens_taskvec.paper.shots import ShotStudy
from transformer_lens_taskvec.prompts import EXAMPLE_ARROW, PromptTemplate, sample_episodes
from transformer_lens_taskvec.tasks.base import Task

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IGNORED = -100
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class LoraSettings:
    """How to finetune; the paper's adapter, and what it leaves open.

    Attributes:
        rank: Rank of the adapters.
        alpha: Their scale is ``alpha / rank``.
        dropout: On what goes into the adapters.
        n_samples: Episodes in all, evenly over tasks.
        n_shots: Demonstrations of an episode.
        batch_size: Episodes a pass.
        accumulate: Passes whose gradients are summed before a step.
        learning_rate: Of AdamW, with a linear decay to zero.
        target_modules: The linear maps that get adapters.
        template: How episodes become text.

    Example:
        >>> settings = LoraSettings(n_samples=900, learning_rate=5e-4)
        >>> settings.rank, settings.alpha
        (16, 16)
    """

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.1
    n_samples: int = 10_000
    n_shots: int = 4
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    target_modules: tuple[str, ...] = _PROJECTIONS
    template: PromptTemplate = EXAMPLE_ARROW


def finetune_layers(
    hf_model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    layers: Sequence[int],
    *,
    settings: LoraSettings | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Any:
    """Finetune some layers of a causal language model on the answers of few-shot prompts.

    Args:
        hf_model: A Hugging Face model; it is left as it is.
        tokenizer: Its tokenizer.
        tasks: What to learn, all by one model.
        layers: The blocks that get adapters, counted from 0; the others do not change by a bit.
        settings: Adapter and training; by default the paper's.
        seed: Seed of adapters, episodes and dropout.
        folder: Where the adapter is kept as training goes on, to be gone on from.
        progress: Whether to show a progress bar.

    Returns:
        A model with the adapters merged, for
        ``TransformerBridge.boot_transformers(name, hf_model=..., tokenizer=...)``.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If there are no layers or tasks, a layer does not exist, or the adapter in the
            folder is of another training.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> llama, tokenizer = lab.ToyConfig().llama(), lab.toy_tokenizer()
        >>> tasks = tv.bitwise_tasks()
        >>> settings = tv.paper.LoraSettings(n_samples=12, n_shots=1)
        >>> tuned = tv.paper.finetune_layers(llama, tokenizer, tasks, [0], settings=settings)
        >>> pairs = zip(llama.model.layers, tuned.model.layers)
        >>> [bool((a.mlp.up_proj.weight == b.mlp.up_proj.weight).all()) for a, b in pairs]
        [False, True, True, True]
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "finetuning needs peft: pip install 'transformer-lens-taskvec[finetune]'"
        ) from error
    settings = settings or LoraSettings()
    n_layers = int(hf_model.config.num_hidden_layers)
    if not layers or not all(0 <= layer < n_layers for layer in layers):
        raise ValueError(f"layers is {list(layers)}; name some of 0 to {n_layers - 1}")
    if not tasks:
        raise ValueError("tasks is empty; give at least one task")
    adapters = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        layers_to_transform=sorted(layers),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(hf_model), adapters)
        kept = None
        if folder is not None:
            path = Path(folder) / "adapter.safetensors"
            kept = _Kept(path, f"{settings}, seed {seed}, layers {sorted(layers)}, {list(tasks)}")
        _train(model, tokenizer, tasks, settings, seed, kept, progress)
    return model.merge_and_unload().eval()


@dataclass(frozen=True, repr=False)
class FinetuningStudy(Shown):
    """A study of the model as it is and finetuned in its first and in its last layers.

    Attributes:
        studies: By the name of the setting, ``pretrained``, ``first n``, ``last n``.
        layers: The layers finetuned in each.
        unchanged: Whether every parameter outside them is the same to the bit, for each.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> llama, tokenizer = lab.ToyConfig().llama(), lab.toy_tokenizer()
        >>> tasks = tv.bitwise_tasks()
        >>> few = tv.paper.LoraSettings(n_samples=12, n_shots=1)
        >>> def study(model):
        ...     return tv.paper.run_study(model, tasks, shots=(1, 2), n=12, steer_shots=())
        >>> found = tv.paper.finetuning_study(
        ...     llama, tokenizer, tasks, study, n_layers=1, settings=few
        ... )
        >>> found.layers
        {'pretrained': (), 'first 1': (0,), 'last 1': (3,)}
        >>> found.unchanged
        {'pretrained': True, 'first 1': True, 'last 1': True}
    """

    studies: dict[str, ShotStudy]
    layers: dict[str, tuple[int, ...]]
    unchanged: dict[str, bool]

    def to_frame(self) -> pd.DataFrame:
        """One row a setting: mean and standard deviation over tasks of TD and accuracy (Table 1).

        Null is left out of the accuracy.
        """
        rows = []
        for name, study in self.studies.items():
            frame = study.to_frame()
            real = frame[frame.task != "Null"]
            rows.append(
                {
                    "setting": name,
                    "td": real.td.mean(),
                    "td_std": real.td.std(),
                    "accuracy": real.accuracy.mean(),
                    "accuracy_std": real.accuracy.std(),
                    "unchanged_outside": self.unchanged[name],
                }
            )
        return pd.DataFrame(rows)

    def td_below(self, name: str) -> Float[Tensor, " shots"]:
        """The largest difference of TD from the pretrained one below a setting's first layer."""
        first = min(self.layers[name])
        before, after = self.studies["pretrained"], self.studies[name]
        differences = [
            (after.decodability[shots].scores - before.decodability[shots].scores)[:first].abs()
            for shots in after.shots
        ]
        return torch.stack([d.max() if d.numel() else torch.zeros(()) for d in differences])

    def __repr__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format="{:.2f}".format)
        return f"FinetuningStudy\n{table}"


def finetuning_study(
    hf_model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    study: Callable[[Any], ShotStudy],
    *,
    n_layers: int = 10,
    settings: LoraSettings | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> FinetuningStudy:
    """Compare a model with itself finetuned in its first and in its last layers (Table 1).

    Args:
        hf_model: A Hugging Face model; it is left as it is.
        tokenizer: Its tokenizer.
        tasks: What to learn; Null is left out.
        study: Measures a hooked model.
        n_layers: How many layers are the first and the last.
        settings: As for :func:`finetune_layers`.
        seed: As for :func:`finetune_layers`.
        folder: As for :func:`finetune_layers`.
        progress: Whether to show progress bars.

    Returns:
        A study of each setting.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> llama, tokenizer = lab.ToyConfig().llama(), lab.toy_tokenizer()
        >>> tasks = tv.bitwise_tasks()
        >>> few = tv.paper.LoraSettings(n_samples=12, n_shots=1)
        >>> def study(model):
        ...     return tv.paper.run_study(model, tasks, shots=(1, 2), n=12, steer_shots=())
        >>> found = tv.paper.finetuning_study(
        ...     llama, tokenizer, tasks, study, n_layers=1, settings=few
        ... )
        >>> list(found.studies)
        ['pretrained', 'first 1', 'last 1']
    """
    depth = int(hf_model.config.num_hidden_layers)
    chosen = {
        "pretrained": (),
        f"first {n_layers}": tuple(range(min(n_layers, depth))),
        f"last {n_layers}": tuple(range(max(0, depth - n_layers), depth)),
    }
    learned = {name: task for name, task in tasks.items() if name != "Null"}
    studies: dict[str, ShotStudy] = {}
    unchanged: dict[str, bool] = {}
    for name, layers in chosen.items():
        model = copy.deepcopy(hf_model)
        if layers:
            part = None if folder is None else Path(folder) / name.replace(" ", "_")
            model = finetune_layers(
                hf_model,
                tokenizer,
                learned,
                layers,
                settings=settings,
                seed=seed,
                folder=part,
                progress=progress,
            )
        unchanged[name] = same_outside(hf_model, model, layers)
        studies[name] = study(bridge_from_hf(model, tokenizer))
    return FinetuningStudy(studies, chosen, unchanged)


def same_outside(before: Any, after: Any, layers: Sequence[int]) -> bool:
    """Whether every parameter outside some layers is the same to the bit."""
    others = dict(after.named_parameters())
    inside = tuple(f".layers.{layer}." for layer in layers)
    return all(
        torch.equal(value, others[name])
        for name, value in before.named_parameters()
        if not any(part in f".{name}" for part in inside)
    )


def _train(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    settings: LoraSettings,
    seed: int,
    kept: _Kept | None,
    progress: bool,
) -> None:
    batches = _batches(tokenizer, tasks, settings, seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
    steps = len(batches) // settings.accumulate
    done = 0 if kept is None else kept.load(trained, optimizer)
    every = max(1, steps // 20)
    model.train()
    with tqdm(total=steps, initial=done, disable=not progress, leave=False, desc="LoRA") as bar:
        for step in range(done, steps):
            torch.manual_seed(seed * 1_000_003 + step)  # dropout, the same after a resumption
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / steps)
            total = 0.0
            for batch in batches[step * settings.accumulate : (step + 1) * settings.accumulate]:
                loss = model(**_collated(batch, tokenizer)).loss / settings.accumulate
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix_str(f"loss {total:.3f}")
            if kept is not None and ((step + 1) % every == 0 or step + 1 == steps):
                kept.save(trained, optimizer, step + 1)
    model.eval()


def _batches(
    tokenizer: Any, tasks: Mapping[str, Task], settings: LoraSettings, seed: int
) -> list[list[tuple[list[int], int]]]:
    """Token ids of prompt and answer with the length of the prompt, in shuffled batches."""
    each = max(1, settings.n_samples // len(tasks))
    episodes = sample_episodes(tasks, each, settings.n_shots, seed, template=settings.template)
    random.Random(seed).shuffle(episodes)
    rows = []
    for episode in episodes:
        prompt, answer, end = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (episode.prompt, episode.answer, episode.separator)
        )
        rows.append(([*prompt, *answer, *end], len(prompt)))
    size = settings.batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _collated(rows: Sequence[tuple[list[int], int]], tokenizer: Any) -> dict[str, Tensor]:
    """Right-padded tokens, and the answers as labels."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    labels = torch.full((len(rows), width), _IGNORED)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (ids, n_prompt) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, n_prompt : len(ids)] = torch.tensor(ids[n_prompt:])
        mask[row, : len(ids)] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class _Kept:
    """An adapter and its optimiser's state on disk, and what training they are of."""

    path: Path
    training: str

    def save(self, trained: Mapping[str, Tensor], optimizer: Any, step: int) -> None:
        tensors = {f"adapter.{name}": value.detach() for name, value in trained.items()}
        for name, value in trained.items():
            for key in _MOMENTS:
                tensors[f"{key}.{name}"] = optimizer.state[value][key]
        metadata = {"step": str(step), "training": self.training}
        write_whole(self.path, lambda beside: save_file(tensors, beside, metadata))

    def load(self, trained: Mapping[str, Tensor], optimizer: Any) -> int:
        """Put it back, where there is one; returns the steps that it has taken."""
        if not self.path.exists():
            return 0
        damaged = "damaged adapter; remove it to begin anew"
        with reading(self.path, damaged), safe_open(self.path, framework="pt") as saved:
            metadata = saved.metadata()
            training, step = metadata["training"], int(metadata["step"])
        if training != self.training:
            raise ValueError(
                f"{self.path} is of another training, {textwrap.shorten(training, 500)}; "
                "name another folder or remove it"
            )
        with (
            reading(self.path, damaged),
            safe_open(self.path, framework="pt") as saved,
            torch.no_grad(),
        ):
            for name, value in trained.items():
                value.copy_(saved.get_tensor(f"adapter.{name}"))
                optimizer.state[value] = {
                    key: saved.get_tensor(f"{key}.{name}") for key in _MOMENTS
                }
        return step
