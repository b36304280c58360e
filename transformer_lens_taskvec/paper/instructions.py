"""Naming the task in the prompt, and how much of its decodability is the words of the name.

The paper's App. I puts an instruction before the demonstrations and finds decodability and accuracy
raised. An instruction changes the input itself, so that tasks are told apart by it even where
nothing is inferred. Two checks are measured beside: TD of the mean input embedding of the prompt,
where only words count; and prompts with another task's instruction, drawn at random, where TD of
the task and TD of the instruction come apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import pandas as pd
import torch

from transformer_lens_taskvec._utils.metrics import Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Observe
from transformer_lens_taskvec.analysis.decodability import Decodability, task_decodability
from transformer_lens_taskvec.analysis.pooling import input_embeddings
from transformer_lens_taskvec.prompts import (
    EXAMPLE_ARROW,
    PromptTemplate,
    sample_episodes,
    with_instructions,
)
from transformer_lens_taskvec.scoring import Scores, evaluate_many
from transformer_lens_taskvec.tasks.base import NULL, Task

POS_INSTRUCTIONS: Mapping[str, str] = {
    "Noun": "Find the first noun in the sentence.",
    "Adjective": "Find the first adjective in the sentence.",
    "Verb": "Find the first verb in the sentence.",
    "Adverb": "Find the first adverb in the sentence.",
    "Preposition": "Find the first preposition in the sentence.",
    "Pronoun": "Find the first pronoun in the sentence.",
    NULL: "Find any word in the sentence.",
}
"""Instructions that name the part of speech."""


BITWISE_INSTRUCTIONS: Mapping[str, str] = {
    "AND": "AND",
    "NAND": "NAND",
    "OR": "OR",
    "NOR": "NOR",
    "XOR": "XOR",
    "XNOR": "XNOR",
    NULL: "Random",
}
"""Instructions that name the operator; for :func:`prompting_study` and ``run_study``."""


@dataclass(frozen=True, repr=False)
class InstructionStudy(Shown):
    """TD and accuracy without instructions, with them, and with random ones.

    Attributes:
        decodability: TD of the task, by condition: ``plain``, ``instructed``, ``random``.
        scores: The same conditions' scores.
        at_input: TD of the task from the prompt's mean input embedding, by condition.
        of_instruction: With random instructions, TD of the instruction instead of the task.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> tasks, names = tv.bitwise_tasks(), tv.paper.BITWISE_INSTRUCTIONS
        >>> study = tv.paper.prompting_study(model, tasks, names, n_shots=2, n=12)
        >>> list(study.decodability), study.to_frame().condition.tolist()
        (['plain', 'instructed', 'random'], ['plain', 'instructed', 'random'])
    """

    decodability: dict[str, Decodability]
    scores: dict[str, Scores]
    at_input: dict[str, Decodability]
    of_instruction: Decodability

    def to_frame(self) -> pd.DataFrame:
        """One row per condition: ``condition, layer, td, td_at_input, ..., accuracy``.

        Means over tasks; Null is left out of the accuracy.
        """
        rows = []
        for condition, found in self.decodability.items():
            scores = self.scores[condition]
            real = [scores.of(task) for task in scores.tasks if task != NULL]
            of_instruction = None
            if condition == "random":
                of_instruction = float(self.of_instruction.at(found.best_layer()).mean())
            rows.append(
                {
                    "condition": condition,
                    "layer": found.best_layer(),
                    "td": float(found.mean.max()),
                    "td_at_input": float(self.at_input[condition].mean.max()),
                    "td_of_instruction": of_instruction,
                    "accuracy": mean(own.accuracy for own in real),
                    **{name: mean(own.mean(name) for own in real) for name in scores.extra},
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format="{:.2f}".format)
        return f"InstructionStudy\n{table}"


def prompting_study(
    model: Any,
    tasks: Mapping[str, Task],
    instructions: Mapping[str, str],
    *,
    n_shots: int = 4,
    n: int = 100,
    k: int = 10,
    seed: int = 0,
    template: PromptTemplate = EXAMPLE_ARROW,
    metrics: Iterable[str | Metric] = (),
    progress: bool = False,
) -> InstructionStudy:
    """Measure what naming the task does (Han et al. 2025, App. I), with the checks it needs.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        tasks: The tasks.
        instructions: The text before the demonstrations, for each task.
        n_shots: Demonstrations.
        n: Episodes a task.
        k: Neighbours that vote in TD.
        seed: Seed of the sampling.
        template: How the episodes become text.
        metrics: Further metrics, as for :func:`evaluate_many`.
        progress: Whether to show progress bars.

    Returns:
        TD and accuracy in each condition.

    Raises:
        KeyError: If a task has no instruction.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> tasks, names = tv.bitwise_tasks(), tv.paper.BITWISE_INSTRUCTIONS
        >>> study = tv.paper.prompting_study(model, tasks, names, n_shots=2, n=12)
        >>> told, plain = (study.at_input[kind].mean.max() for kind in ("instructed", "plain"))
        >>> bool(told > plain)  # the name of the task is in the words
        True
    """
    episodes = sample_episodes(tasks, n, n_shots, seed, template=template)
    names, rng, metrics = list(tasks), random.Random(seed), list(metrics)
    told = [rng.choice(names) for _ in episodes]
    conditions = {
        "plain": episodes,
        "instructed": with_instructions(episodes, instructions),
        "random": with_instructions(episodes, [instructions[name] for name in told]),
    }
    decodability, scores, at_input = {}, {}, {}
    for condition, some in conditions.items():
        activations, [scores[condition]] = evaluate_many(
            model, some, [[]], observe=Observe(), metrics=metrics, progress=progress
        )
        decodability[condition] = task_decodability(activations, k)
        words = input_embeddings(model, some)
        at_input[condition] = task_decodability(words, k)
    by_instruction = replace(
        activations, labels=torch.tensor([names.index(name) for name in told]), tasks=tuple(names)
    )
    return InstructionStudy(decodability, scores, at_input, task_decodability(by_instruction, k))
