"""How much an injected vector's accuracy depends on how answers are decoded.

After Shi et al. (2024), who compare decoding methods by their best accuracy, its spread over
settings, and self-consistency: the answer that most of several samples give (Wang et al. 2023).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import means_by_query, share_interval
from transformer_lens_taskvec.activations import label
from transformer_lens_taskvec.analysis.named import NamedVariants, check_choice, named_variants
from transformer_lens_taskvec.generation import answers
from transformer_lens_taskvec.models.tokens import encode_answers
from transformer_lens_taskvec.prompts import Episode, demo_sets_of
from transformer_lens_taskvec.vectors.base import Injectable

DECODINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "top-p 0.9": {"config": GenerationConfig(do_sample=True, top_p=0.9)},
}
"""``temperature`` or ``config`` of :func:`generate`, by the name of the decoding."""

SINGLE, VOTE = "single", "vote"
"""The mean accuracy of one sample, and that of the answer most samples give."""


@dataclass(frozen=True, repr=False)
class DecodingSensitivity(Shown):
    """Accuracy by variant and decoding, of single samples and of votes.

    Attributes:
        single: ``[variant, decoding, example]``, the share of samples that are right.
        vote: ``[variant, decoding, example]``, whether the answer that most samples give is right;
            of answers that are equally frequent, the one that came first.
        agreement: ``[variant, decoding, example]``, the share of samples that give it.
        variants: The variants' names.
        decodings: The decodings' names.
        n_samples: ``[decoding]``, the samples of each; 1 where all are the same.
        labels: ``[example]`` indices into ``tasks``.
        tasks: The tasks' names.
        queries: ``[example]``, a hash of each episode's task, query and answer.
        demo_sets: As for :class:`Scores`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> decodings = {"greedy": {}, "hot": {"temperature": 2.0}}
        >>> found = decoding_sensitivity(
        ...     model, tv.zero_shot(sets["test"]), vectors=vectors, layer=1, decodings=decodings
        ... )
        >>> best = found.spread().set_index("variant").best
        >>> best["task vector"], bool(found.single[1, 0].mean() > found.single[1, 1].mean())
        ('greedy', True)
    """

    single: Float[Tensor, "variant decoding example"]
    vote: Float[Tensor, "variant decoding example"]
    agreement: Float[Tensor, "variant decoding example"]
    variants: tuple[str, ...]
    decodings: tuple[str, ...]
    n_samples: tuple[int, ...]
    labels: Int[Tensor, " example"]
    tasks: tuple[str, ...]
    queries: Int[Tensor, " example"]
    demo_sets: Int[Tensor, " example"] | None = None

    def to_frame(self, task: str = "") -> pd.DataFrame:
        """Return one row per variant and decoding.

        Columns: ``variant, decoding, n_samples``; ``single``, the accuracy of one sample, and
        ``vote``, that of the answer that most samples give, each with Wilson's 95 % interval over
        queries ``..._low`` and ``..._high``; ``agreement``; ``n_distinct``.

        Args:
            task: The task; all by default.

        Raises:
            ValueError: If there is no such task.
        """
        rows = torch.ones(len(self.labels), dtype=torch.bool)
        if task:
            check_choice("task", task, self.tasks)
            rows = self.labels == self.tasks.index(task)
        queries = self.queries[rows]
        sets = None if self.demo_sets is None else self.demo_sets[rows]
        found = []
        for at, variant in enumerate(self.variants):
            for place, decoding in enumerate(self.decodings):
                row: dict[str, Any] = {"variant": variant, "decoding": decoding}
                row["n_samples"] = self.n_samples[place]
                for name, values in ((SINGLE, self.single), (VOTE, self.vote)):
                    own = values[at, place, rows]
                    low, high = share_interval(own, queries, sets)
                    row[name] = float(means_by_query(own, queries).mean())
                    row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
                agreed = self.agreement[at, place, rows]
                row["agreement"] = float(means_by_query(agreed, queries).mean())
                found.append({**row, "n_distinct": len(queries.unique())})
        return pd.DataFrame(found)

    def spread(self, kind: str = SINGLE, *, task: str = "") -> pd.DataFrame:
        """Return one row per variant: ``variant, best, highest, worst, lowest, spread``.

        The best and the worst decoding with their accuracies, and the difference of these. The best
        of several is biased upwards: report it on other queries than those it was chosen on.

        Args:
            kind: ``"single"`` or ``"vote"``.
            task: The task; all by default.

        Raises:
            ValueError: If the kind or the task is unknown.
        """
        check_choice("kind", kind, (SINGLE, VOTE))
        rows = []
        for variant, own in self.to_frame(task).groupby("variant", sort=False):
            accuracy = own.set_index("decoding")[kind]
            ends = {"best": accuracy.idxmax(), "highest": accuracy.max()}
            ends |= {"worst": accuracy.idxmin(), "lowest": accuracy.min()}
            rows.append({"variant": variant, **ends, "spread": accuracy.max() - accuracy.min()})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [
            f"{row.variant} {row.lowest:.2f} ({row.worst}) to {row.highest:.2f} ({row.best})"
            for row in self.spread().itertuples()
        ]
        return f"DecodingSensitivity({'; '.join(lines)}; n = {len(self.queries.unique())} queries)"


def decoding_sensitivity(
    model: Any,
    episodes: Sequence[Episode],
    variants: NamedVariants | None = None,
    *,
    vectors: Injectable | None = None,
    layer: int | None = None,
    controls: bool | Mapping[str, Injectable] = False,
    decodings: Mapping[str, Mapping[str, Any]] | None = None,
    n_samples: int = 5,
    stop: str | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> DecodingSensitivity:
    """Return the accuracy of zero-shot answers under variants and decodings.

    As for :func:`evaluate`, an answer is right if its tokens are those of the episode's, whatever
    follows; so as many are generated. With ``stop="separator"`` an answer is what stands before the
    template's separator. Spaces at its ends do not count.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        episodes: Usually zero-shot episodes.
        variants: As for :func:`icl_fidelity`.
        vectors: Task vectors, or anything else that can be injected: the variant ``task vector``.
        layer: The layer of the vectors.
        controls: As for :func:`icl_fidelity`.
        decodings: ``temperature`` or ``config`` of :func:`generate`, by name; by default greedy,
            three temperatures, and top-p.
        n_samples: How often each prompt is sampled, for accuracies and votes; once where no
            argument says how, which is greedy.
        stop: As for :func:`evaluate`: whether the separator must follow.
        max_new_tokens: With a separator, the most tokens of an answer; by default those of the
            longest right answer with it.
        seed: Seed of the sampling and of the controls.

    Raises:
        ValueError: If there are no episodes or decodings, ``n_samples`` is below 1, ``stop`` is
            unknown, ``max_new_tokens`` is given without it, or as for
            :func:`generate`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR"]), 6, 4, seed=0)
        >>> found = decoding_sensitivity(model, episodes, n_samples=3)
        >>> found.to_frame()[["decoding", "n_samples"]].values.tolist()[:2]
        [['greedy', 1], ['temperature 0.3', 3]]
    """
    episodes = list(episodes)
    decodings = DECODINGS if decodings is None else decodings
    if not episodes or not decodings or n_samples < 1:
        raise ValueError(
            f"there are {len(episodes)} episodes, {len(decodings)} decodings and {n_samples} "
            "samples; give at least one of each"
        )
    for name, settings in decodings.items():
        other = set(settings) - {"temperature", "config", "seed"}
        if other:
            raise ValueError(
                f"decoding {name!r} has {', '.join(sorted(other))}; give temperature or config, "
                "which say how a token is chosen"
            )
    layers = None if vectors is None else [layer]
    named = named_variants(model, episodes, variants or {}, vectors, layers, controls, seed)
    if max_new_tokens is not None and stop is None:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, and without a separator as many tokens count as "
            "the right answer has; leave it out, or give stop='separator'"
        )
    lengths = [len(ids) for ids in encode_answers(model, episodes, stop=stop)]
    if stop is not None:
        lengths = [max_new_tokens or max(lengths)] * len(episodes)
    repeats = tuple(n_samples if settings else 1 for settings in decodings.values())
    shape = len(named), len(decodings), len(episodes)
    single, vote, agreement = (torch.zeros(shape) for _ in range(3))
    tasks, labels = label(episodes)
    groups: dict[tuple[str, str, int], list[int]] = {}
    for row, (episode, n) in enumerate(zip(episodes, lengths, strict=True)):
        end = "" if stop is None else episode.separator
        groups.setdefault((episode.task, end, n), []).append(row)
    for (task, end, n), rows in groups.items():
        for at, of in enumerate(named.values()):
            for place, settings in enumerate(decodings.values()):
                asked = [episodes[row] for row in rows for _ in range(repeats[place])]
                options = {"max_new_tokens": n, "seed": seed, **settings}
                texts = answers(model, asked, of(task), stop=end or None, **options)
                for index, row in enumerate(rows):
                    own = texts[index * repeats[place] : (index + 1) * repeats[place]]
                    said = Counter(text.strip() for text in own)
                    [(most, count)] = said.most_common(1)
                    right = episodes[row].answer.strip()
                    single[at, place, row] = said[right] / len(own)
                    vote[at, place, row] = most == right
                    agreement[at, place, row] = count / len(own)
    queries = torch.tensor([episode.query_id for episode in episodes])
    names = tuple(name for name, _ in named)
    about = labels, tasks, queries, demo_sets_of(episodes)
    return DecodingSensitivity(single, vote, agreement, names, tuple(decodings), repeats, *about)
