"""Episodes: a few demonstrations of a task and a query, and other versions of the same episodes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_taskvec._utils.text import stable_hash
from transformer_lens_taskvec.prompts.templates import EXAMPLE_ARROW, PromptTemplate
from transformer_lens_taskvec.tasks.base import Example


@runtime_checkable
class AnyEpisode(Protocol):
    """What collecting and evaluating require of an episode.

    :class:`Episode` consists of text, the lab's ``LabEpisode`` of vectors and numbers.
    """

    @property
    def task(self) -> str:
        """The name of the task."""
        ...

    @property
    def prompt(self) -> Any:
        """The model's input."""
        ...

    @property
    def answer(self) -> Any:
        """The right answer."""
        ...

    @property
    def template(self) -> PromptTemplate:
        """The template of the prompt."""
        ...

    @property
    def n_shots(self) -> int:
        """The number of demonstrations."""
        ...

    @property
    def query_id(self) -> int:
        """A number of 64 bits, the same for episodes of the same task, query and answer."""
        ...

    def with_answers(self, order: Sequence[int]) -> Any:
        """Return the episode with its demonstrations' answers in another order."""
        ...


@dataclass(frozen=True)
class Episode:
    r"""One in-context prompt: demonstrations of a task, and a query with its answer.

    Attributes:
        task: The task's name.
        demos: The demonstrations, in the order of the prompt.
        query: The query's input and output.
        template: How the episode becomes text.
        seed: The seed it was sampled with, where it is known; episodes are equal whatever it is.
        demo_set: A number of 64 bits, the same for episodes that share their demonstrations by
            design (``sample_episodes(..., demo_sets=20)``); None if they are fresh. Episodes are
            equal whatever it is.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> demos = (tv.Example("cat", "cats"),)
        >>> episode = tv.Episode("plural", demos, tv.Example("dog", "dogs"))
        >>> episode.prompt
        'example:cat->cats\nexample:dog->'
        >>> episode.answer
        'dogs'
    """

    task: str
    demos: tuple[Example, ...]
    query: Example
    template: PromptTemplate = EXAMPLE_ARROW
    seed: int | None = field(default=None, compare=False, repr=False)
    demo_set: int | None = field(default=None, compare=False, repr=False)

    @property
    def prompt(self) -> str:
        """The text before the answer."""
        return self.template.render(self.demos, self.query.x, self.task)

    @property
    def answer(self) -> str:
        """The continuation that counts as right."""
        return self.template.answer(self.query.x, self.query.y)

    @property
    def outputs_begin(self) -> tuple[int, ...]:
        """Where in the prompt the output of each demonstration begins, and at last the answer."""
        return self.template.outputs_begin(self.demos, self.query.x, self.task)

    @property
    def examples_begin(self) -> tuple[int, ...]:
        """Where in the prompt each demonstration begins, and at last the query."""
        return self.template.examples_begin(self.demos, self.query.x, self.task)

    @property
    def separator(self) -> str:
        """The text that ends an answer where ``stop="separator"``."""
        return self.template.separator

    @property
    def n_shots(self) -> int:
        """The number of demonstrations."""
        return len(self.demos)

    @property
    def query_id(self) -> int:
        """A hash of task, query and answer; demonstrations and template do not count."""
        return stable_hash(self.task, self.query.x, self.query.y)

    @property
    def input_id(self) -> int:
        """A hash of the query's input alone, the same whatever the task."""
        return stable_hash(self.query.x)

    def with_answers(self, order: Sequence[int]) -> Episode:
        """Return the episode with its demonstrations' answers in another order.

        Args:
            order: For each demonstration, the index of the one whose answer it gets.

        Raises:
            ValueError: If there is not one index per demonstration.
        """
        demos = [
            Example(demo.x, self.demos[place].y)
            for demo, place in zip(self.demos, order, strict=True)
        ]
        return replace(self, demos=tuple(demos))


def demo_sets_of(episodes: Sequence[AnyEpisode]) -> Int[Tensor, " example"] | None:
    """Return which episodes share demonstrations, as equal numbers; None if none do.

    Among others that share them, an episode with fresh demonstrations has a number of its own.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> upper = tv.find_tasks(["upper_case"])
        >>> episodes = tv.sample_episodes(upper, n=9, n_shots=2, seed=0, demo_sets=8)
        >>> sets = demo_sets_of(episodes)
        >>> bool(sets[0] == sets[8]), len(sets.unique()), demo_sets_of(tv.zero_shot(episodes))
        (True, 8, None)
    """
    given = [getattr(episode, "demo_set", None) for episode in episodes]
    if all(one is None for one in given):
        return None
    alone = (stable_hash("fresh", str(index)) for index in range(len(given)))
    return torch.tensor(
        [own if one is None else one for one, own in zip(given, alone, strict=True)]
    )


def zero_shot(episodes: Iterable[Episode]) -> list[Episode]:
    """Return the episodes without their demonstrations.

    Args:
        episodes: Episodes with any number of demonstrations.

    Returns:
        New episodes, in the same order.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 1, 2, seed=0)
        >>> tv.zero_shot(episodes)[0].prompt
        'example:01111 11101->'
    """
    return [replace(episode, demos=(), demo_set=None) for episode in episodes]


def shuffle_labels(episodes: Sequence[AnyEpisode], seed: int) -> list[AnyEpisode]:
    """Return the episodes with their demonstrations' answers shuffled, none in its own place.

    Where answers are equal, none stays where an equal one was, unless more than half of a prompt's
    answers are the same. Episodes that share their demonstrations get the same order, so that they
    still share them.

    Args:
        episodes: Episodes with at least two demonstrations.
        seed: Seed of the shuffling.

    Returns:
        New episodes, in the same order.

    Raises:
        ValueError: If an episode has fewer than two demonstrations.

    Example:
        >>> from transformer_lens_taskvec import Episode, Example
        >>> episode = Episode("t", (Example("a", "1"), Example("b", "2")), Example("c", "3"))
        >>> shuffle_labels([episode], seed=0)[0].demos
        (Example(x='a', y='2'), Example(x='b', y='1'))
    """
    rng = random.Random(seed)
    shared: dict[int | None, list[int]] = {}
    shuffled = []
    for episode in episodes:
        n = episode.n_shots
        if n < 2:
            raise ValueError(
                f"an episode of {episode.task!r} has {n} demonstration(s); shuffling labels needs "
                "two or more"
            )
        demo_set = getattr(episode, "demo_set", None)
        order = list(shared.get(demo_set, ())) or _in_one_cycle(n, rng)
        if demo_set is not None:
            shared[demo_set] = list(order)
        answers = [demo.y for demo in getattr(episode, "demos", ())]
        shuffled.append(episode.with_answers(_without_equals(order, answers)))
    return shuffled


def permute_mapping(episodes: Sequence[Episode], seed: int) -> list[Episode]:
    """Return the episodes under another mapping: each input gets the output of another input.

    All episodes of a task get the same one, demonstrations and queries alike. It has the task's
    inputs and outputs, and is as consistent as the task, but is not the task. Where outputs are
    equal, no input keeps an equal one, unless more than half of them are the same.

    Args:
        episodes: Episodes, each task's with two distinct inputs or more.
        seed: Seed of the permutation.

    Raises:
        ValueError: If a task has fewer than two distinct inputs.

    Example:
        >>> from transformer_lens_taskvec import Episode, Example
        >>> episode = Episode("t", (Example("a", "1"), Example("b", "2")), Example("c", "3"))
        >>> other = permute_mapping([episode], seed=1)[0]
        >>> sorted(demo.y for demo in (*other.demos, other.query))
        ['1', '2', '3']
        >>> any(own == its for own, its in zip(other.demos, episode.demos))
        False
    """
    rng = random.Random(seed)
    known: dict[str, dict[str, str]] = {}
    for episode in episodes:
        for one in (*episode.demos, episode.query):
            known.setdefault(episode.task, {}).setdefault(one.x, one.y)
    other: dict[str, dict[str, str]] = {}
    for task, mapping in known.items():
        if len(mapping) < 2:
            raise ValueError(f"task {task!r} has one input; a permutation needs two or more")
        outputs = list(mapping.values())
        order = _without_equals(_in_one_cycle(len(outputs), rng), outputs)
        other[task] = {x: outputs[at] for x, at in zip(mapping, order, strict=True)}

    def changed(task: str, one: Example) -> Example:
        return Example(one.x, other[task][one.x])

    return [
        replace(
            episode,
            demos=tuple(changed(episode.task, demo) for demo in episode.demos),
            query=changed(episode.task, episode.query),
        )
        for episode in episodes
    ]


def _in_one_cycle(n: int, rng: random.Random) -> list[int]:
    """Return a random order in which nothing keeps its place, by Sattolo's shuffle."""
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = rng.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


def _without_equals(order: list[int], answers: Sequence[str]) -> list[int]:
    """Return the order with swaps such that no place gets its own answer back, if possible."""
    for place, own in enumerate(answers):
        if answers[order[place]] == own:
            others = (at for at, of in enumerate(order) if own not in (answers[of], answers[at]))
            other = next(others, place)
            order[place], order[other] = order[other], order[place]
    return order


def with_instructions(
    episodes: Sequence[Episode], instructions: Mapping[str, str] | Sequence[str]
) -> list[Episode]:
    """Return the episodes with an instruction at the start of each prompt (App. I).

    Args:
        episodes: The episodes.
        instructions: One text per task, by name, or a list of one per episode.

    Returns:
        New episodes, in the same order.

    Raises:
        KeyError: If a task has no instruction.
        ValueError: If a list does not have one text per episode.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 1, 1, seed=0)
        >>> told = tv.with_instructions(episodes, tv.paper.BITWISE_INSTRUCTIONS)
        >>> told[0].prompt.splitlines()[0], told[0].prompt.endswith(episodes[0].prompt)
        ('AND', True)
    """
    texts = instructions
    if isinstance(texts, Mapping):
        texts = [texts[episode.task] for episode in episodes]
    if len(texts) != len(episodes):
        raise ValueError(
            f"there are {len(episodes)} episodes and {len(texts)} instructions; give one each"
        )
    return [
        replace(episode, template=replace(episode.template, instruction=text))
        for episode, text in zip(episodes, texts, strict=True)
    ]
