"""The effect of naming the task in the prompt, and how much of it is due to the words themselves.

In the paper's App. I an instruction before the demonstrations raises decodability and accuracy. But
an instruction changes the input, so it separates tasks even where nothing is inferred. Two checks
are measured alongside: TD of the prompt's mean input embedding, which depends only on its words;
and prompts with a random task's instruction, which separate TD of the task from TD of the
instruction.
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
"""Instructions that name the operator."""


@dataclass(frozen=True, repr=False)
class InstructionStudy(Shown):
    """TD and accuracy without instructions, with instructions, and with random instructions.

    Attributes:
        decodability: TD of the task, by condition: ``plain``, ``instructed``, ``random``.
        scores: Scores, by condition.
        at_input: TD of the task from the prompt's mean input embedding, by condition.
        of_instruction: With random instructions, TD of the instruction instead of the task.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks, names = tv.bitwise_tasks(), tv.paper.BITWISE_INSTRUCTIONS
        >>> tv.paper.prompting_study(tv.load_model("toy"), tasks, names, n=12).scores.keys()
        dict_keys(['plain', 'instructed', 'random'])
    """

    decodability: dict[str, Decodability]
    scores: dict[str, Scores]
    at_input: dict[str, Decodability]
    of_instruction: Decodability

    def to_frame(self) -> pd.DataFrame:
        """Return one row per condition: ``condition, layer, td, td_at_input, ..., accuracy``.

        The values are means over tasks; accuracy leaves out Null, as do ``n`` and ``n_distinct``,
        the numbers of all episodes and distinct queries.
        """
        rows = []
        for condition, found in self.decodability.items():
            scores, layer = self.scores[condition], found.best_layer()
            real = [scores.of(task) for task in scores.tasks if task != NULL]
            of_instruction = None
            if condition == "random":
                of_instruction = float(self.of_instruction.at(layer).mean())
            rows.append(
                {
                    "condition": condition,
                    "layer": layer,
                    "td": float(found.mean.max()),
                    "td_at_input": float(self.at_input[condition].mean.max()),
                    "td_of_instruction": of_instruction,
                    "accuracy": mean(own.accuracy for own in real),
                    **{name: mean(own.mean(name) for own in real) for name in scores.extra},
                    "n": sum(map(len, real)),
                    "n_distinct": sum(own.n_distinct for own in real),
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
    """Return the effect of naming the task (Han et al. 2025, App. I), with the checks it needs.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        tasks: The tasks.
        instructions: The text before the demonstrations, by task.
        n_shots: Demonstrations per prompt.
        n: Episodes per task.
        k: Neighbours that vote in TD.
        seed: Seed of the sampling.
        template: How the episodes become text.
        metrics: Further metrics, as for :func:`evaluate_many`.
        progress: Whether to show progress bars.

    Raises:
        KeyError: If a task has no instruction.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> tasks, names = tv.bitwise_tasks(), tv.paper.BITWISE_INSTRUCTIONS
        >>> study = tv.paper.prompting_study(model, tasks, names, n_shots=2, n=12)
        >>> told, plain = (study.at_input[kind].mean.max() for kind in ("instructed", "plain"))
        >>> bool(told > plain)  # the words contain the name of the task
        True
    """
    episodes = sample_episodes(tasks, n, n_shots, seed, template=template)
    names, rng, metrics = list(tasks), random.Random(seed), list(metrics)
    told = [names[index % len(names)] for index in range(len(episodes))]  # each as often
    rng.shuffle(told)
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
        at_input[condition] = task_decodability(input_embeddings(model, some), k)
    by_instruction = replace(
        activations, labels=torch.tensor([names.index(name) for name in told]), tasks=tuple(names)
    )
    return InstructionStudy(decodability, scores, at_input, task_decodability(by_instruction, k))
