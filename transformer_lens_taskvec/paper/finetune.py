"""Finetuning by depth: LoRA on the answers, in chosen layers only (Han et al. 2025, Table 1).

Finetuning the layers that encode the task raises decodability and accuracy. Finetuning later
layers leaves decodability unchanged.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.training_state import TrainingState
from transformer_lens_taskvec.models.bridge import bridge_from_hf
from transformer_lens_taskvec.models.tokens import continuing_ids, habit_of
from transformer_lens_taskvec.paper.shots import ShotStudy
from transformer_lens_taskvec.prompts import EXAMPLE_ARROW, PromptTemplate, sample_episodes
from transformer_lens_taskvec.tasks.base import NULL, Task

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IGNORED = -100


@dataclass(frozen=True)
class LoraSettings:
    """How to finetune: the paper's adapter, and values for what the paper does not give.

    Attributes:
        rank: Rank of the adapters.
        alpha: The adapters are scaled by ``alpha / rank``.
        dropout: Dropout on the input of the adapters.
        n_samples: Training episodes in total, divided equally among tasks.
        n_shots: Demonstrations per episode.
        batch_size: Episodes per pass.
        accumulate: Passes whose gradients are summed before each step.
        learning_rate: The learning rate of AdamW, decaying linearly to zero.
        target_modules: The linear maps with adapters.
        template: How episodes are written as text.

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
    """Return a causal language model finetuned in some layers on the answers of few-shot prompts.

    Args:
        hf_model: A Hugging Face model; it is not changed.
        tokenizer: Its tokenizer.
        tasks: The tasks; one model learns them all.
        layers: The blocks with adapters, counted from 0; the others stay identical to the bit.
        settings: Adapter and training; the paper's by default.
        seed: Seed of adapters, episodes and dropout.
        folder: Where the adapter is saved during training, so that training can resume.
        progress: Whether to show a progress bar.

    Returns:
        A model with the adapters merged, for
        ``TransformerBridge.boot_transformers(name, hf_model=..., tokenizer=...)``.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If there are no layers or tasks, a layer does not exist, or the adapter in the
            folder is damaged or comes from another training.

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
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
        state = None
        if folder is not None:
            training = f"{settings}, seed {seed}, layers {sorted(layers)}, {list(tasks)}"
            path = Path(folder) / "adapter.safetensors"
            state = TrainingState(path, trained, [optimizer], training=training)
        _train(model, tokenizer, tasks, settings, seed, optimizer, state, progress)
    return model.merge_and_unload().eval()


@dataclass(frozen=True, repr=False)
class FinetuningStudy(Shown):
    """Studies of a pretrained model, and of the model finetuned in its first or last layers.

    Attributes:
        studies: The study of each setting: ``pretrained``, ``first n``, ``last n``.
        layers: The layers finetuned in each setting.
        unchanged: Whether every parameter outside these layers is identical, by setting.

    Example:
        >>> found = finetuning_study(hf_model, tokenizer, tasks, study)  # doctest: +SKIP
        >>> found.to_frame()[["setting", "td", "accuracy"]]  # doctest: +SKIP
    """

    studies: dict[str, ShotStudy]
    layers: dict[str, tuple[int, ...]]
    unchanged: dict[str, bool]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per setting: mean and standard deviation of TD and accuracy over tasks.

        As in Table 1, then the means of metrics that were asked for, and the numbers of episodes
        and distinct queries of the task with the fewest; Null is left out.
        """
        pretrained = self.studies["pretrained"]
        extra = pretrained.scores[pretrained.shots[0]].extra
        frame = pd.concat([s.to_frame().assign(setting=name) for name, s in self.studies.items()])
        by_setting = frame[frame.task != NULL].groupby("setting", sort=False)
        table = by_setting.agg(
            td=("td", "mean"),
            td_std=("td", "std"),
            accuracy=("accuracy", "mean"),
            accuracy_std=("accuracy", "std"),
            **{name: (name, "mean") for name in extra},
            n=("n", "min"),
            n_distinct=("n_distinct", "min"),
        )
        return table.assign(unchanged_outside=pd.Series(self.unchanged)).reset_index()

    def td_below(self, name: str) -> Float[Tensor, " shots"]:
        """Return the largest change in TD from pretraining below a setting's first layer."""
        first = min(self.layers[name])
        before, after = self.studies["pretrained"], self.studies[name]
        changes = torch.stack(
            [after.decodability[n].scores - before.decodability[n].scores for n in after.shots]
        )
        changes[:, first:] = 0
        return reduce(changes.abs(), "shots layer task -> shots", "max")

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
    """Return studies of a model, and of it finetuned in its first or its last layers (Table 1).

    Args:
        hf_model: A Hugging Face model; it is not changed.
        tokenizer: Its tokenizer.
        tasks: The tasks to learn; Null is left out.
        study: A function that studies a hooked model.
        n_layers: How many layers are the first and the last.
        settings: As for :func:`finetune_layers`.
        seed: As for :func:`finetune_layers`.
        folder: As for :func:`finetune_layers`.
        progress: Whether to show progress bars.

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
        >>> all(found.unchanged.values())  # every parameter outside these layers is identical
        True
    """
    depth = int(hf_model.config.num_hidden_layers)
    chosen = {
        "pretrained": (),
        f"first {n_layers}": tuple(range(min(n_layers, depth))),
        f"last {n_layers}": tuple(range(max(0, depth - n_layers), depth)),
    }
    learned = {name: task for name, task in tasks.items() if name != NULL}
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
    """Return whether every parameter outside some layers is identical to the bit."""
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
    optimizer: torch.optim.AdamW,
    state: TrainingState | None,
    progress: bool,
) -> None:
    batches = _batches(tokenizer, tasks, settings, seed)
    size = settings.accumulate
    groups = [batches[start : start + size] for start in range(0, len(batches), size)]
    steps = len(groups)
    done = (state and state.load()) or 0
    every = max(1, steps // 20)
    model.train()
    with tqdm(total=steps, initial=done, disable=not progress, leave=False, desc="LoRA") as bar:
        for step in range(done, steps):
            torch.manual_seed(seed * 1_000_003 + step)  # the same dropout after resuming
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / steps)
            total = 0.0
            for batch in groups[step]:
                loss = model(**_collated(batch, tokenizer)).loss / len(groups[step])
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix_str(f"loss {total:.3f}")
            if state is not None and ((step + 1) % every == 0 or step + 1 == steps):
                state.save(step + 1)
    model.eval()


def _batches(
    tokenizer: Any, tasks: Mapping[str, Task], settings: LoraSettings, seed: int
) -> list[list[tuple[list[int], int]]]:
    """Return token ids of prompt and answer with the prompt's length, in shuffled batches.

    They are those that the answers are evaluated on, with a BOS if the template says so.
    """
    each = max(1, settings.n_samples // len(tasks))
    episodes = sample_episodes(tasks, each, settings.n_shots, seed, template=settings.template)
    random.Random(seed).shuffle(episodes)
    bos = habit_of(tokenizer) if settings.template.bos is None else settings.template.bos
    first = [tokenizer.bos_token_id] if bos else []
    rows = []
    for episode in episodes:
        prompt = [*first, *tokenizer(episode.prompt, add_special_tokens=False)["input_ids"]]
        answer, end = continuing_ids(tokenizer, [episode.answer, episode.separator])
        rows.append(([*prompt, *answer, *end], len(prompt)))
    size = settings.batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def training_tokens(
    tokenizer: Any, tasks: Mapping[str, Task], settings: LoraSettings, seed: int
) -> int:
    """Return how many tokens :func:`finetuning_study` trains on, padding included."""
    learned = {name: task for name, task in tasks.items() if name != NULL}
    batches = _batches(tokenizer, learned, settings, seed)
    return 2 * sum(len(rows) * max(len(ids) for ids, _ in rows) for rows in batches)


def _collated(rows: Sequence[tuple[list[int], int]], tokenizer: Any) -> dict[str, Tensor]:
    """Return right-padded tokens, and the answers as labels."""
    tokens = [torch.tensor(ids) for ids, _ in rows]
    labels = [torch.tensor([_IGNORED] * n_prompt + ids[n_prompt:]) for ids, n_prompt in rows]
    mask = [torch.ones_like(row) for row in tokens]
    return {
        "input_ids": pad_sequence(tokens, True, padding_value=tokenizer.pad_token_id or 0),
        "attention_mask": pad_sequence(mask, True),
        "labels": pad_sequence(labels, True, padding_value=_IGNORED),
    }
