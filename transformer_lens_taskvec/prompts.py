"""Episodes: a few demonstrations of a task and a query, and the template of their prompt."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from transformer_lens_taskvec._utils.text import stable_hash
from transformer_lens_taskvec.tasks.base import Example, Task


@dataclass(frozen=True)
class PromptTemplate:
    r"""How demonstrations and a query become the text of a prompt.

    The prompt consists of the instruction if there is one, the demonstrations and the query, joined
    by ``separator``. The answer is the text that turns the query into a demonstration.

    Args:
        example: A demonstration, which contains ``{x}`` and ``{y}``.
        query: The query, which contains ``{x}``; by default the part of ``example`` before ``{y}``
            without its trailing spaces. These belong to the answer, since most tokenizers attach a
            space to the following word.
        separator: The text between the parts of the prompt.
        instruction: A text before the first demonstration, with ``{task}`` for the task's name.
        bos: Whether a beginning-of-sequence token precedes the prompt. None follows the model's
            tokenizer as it was before TransformerLens changed it: those of Gemma and Llama 3 add
            one, that of SmolLM2 does not.

    Raises:
        ValueError: If ``example`` lacks ``{x}`` or ``{y}``, or has ``{y}`` before ``{x}`` or twice,
            or if ``query`` lacks ``{x}`` or is not the beginning of ``example``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> template = tv.PromptTemplate("{x} -> {y}")
        >>> template.render([tv.Example("cat", "cats")], "dog")
        'cat -> cats\ndog ->'
        >>> template.answer("dog", "dogs")
        ' dogs'
    """

    example: str = "{x} -> {y}"
    query: str | None = None
    separator: str = "\n"
    instruction: str | None = None
    bos: bool | None = None

    def __post_init__(self) -> None:
        x, y = self.example.find("{x}"), self.example.find("{y}")
        if x < 0 or y < 0 or y < x or self.example.count("{y}") > 1:
            raise ValueError(
                f"template example {self.example!r} must contain {{x}} and then {{y}} once, "
                "as in '{x} -> {y}'"
            )
        if not self.example.startswith(self._query) or "{x}" not in self._query:
            raise ValueError(
                f"template query {self.query!r} must contain {{x}} and be the beginning of the "
                f"example {self.example!r}"
            )

    @property
    def _query(self) -> str:
        if self.query is not None:
            return self.query
        return self.example[: self.example.index("{y}")].rstrip(" ")

    def render(self, demos: Iterable[Example], x: str, task: str = "") -> str:
        """Return the prompt's text, up to the last character before the answer."""
        parts = [_fill(self.example, demo.x, demo.y) for demo in demos]
        parts.append(_fill(self._query, x, ""))
        return self._begin(parts, (self.instruction or "").replace("{task}", task))

    def _begin(self, parts: list[str], instruction: str) -> str:
        return self.separator.join([instruction, *parts] if instruction else parts)

    def answer(self, x: str, y: str) -> str:
        """Return the text that completes the query's prompt."""
        return _fill(self.example[len(self._query) :], x, y)

    @classmethod
    def chat(cls, tokenizer: Any, *, chat_template: str | None = None) -> ChatTemplate:
        r"""Return the template that writes the few-shot prompt as turns of a chat.

        Each demonstration is a turn of the user and one of the assistant, and the query is a last
        turn of the user. An instruction starts the first turn. A BOS in the chat template becomes
        ``bos=True``, so that it is never doubled.

        Args:
            tokenizer: A Hugging Face tokenizer.
            chat_template: A chat template in Jinja, for a tokenizer without one.

        Returns:
            A template whose ``example`` has two turns, and whose ``separator`` ends an answer.

        Raises:
            ValueError: If there is no chat template, or it formats some exchange differently.

        Example:
            >>> from transformer_lens_taskvec import Example, PromptTemplate, lab
            >>> turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            >>> jinja = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
            >>> template = PromptTemplate.chat(lab.toy_tokenizer(), chat_template=jinja)
            >>> template.render([Example("cat", "cats")], "dog")
            '<user>cat\n<assistant>cats\n<user>dog\n<assistant>'
        """
        return _chat_template(tokenizer, chat_template)


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """A prompt template whose parts are turns of a chat; made by :meth:`PromptTemplate.chat`.

    Args:
        head: The text before the first turn, such as a default system turn.
    """

    head: str = ""

    def _begin(self, parts: list[str], instruction: str) -> str:
        if instruction:
            opening = self.example[: self.example.index("{x}")]
            parts[0] = f"{opening}{instruction}\n\n{parts[0].removeprefix(opening)}"
        return self.head + self.separator.join(parts)


def _chat_template(tokenizer: Any, jinja: str | None) -> ChatTemplate:
    """Return a chat template's pieces, found by rendering a conversation of marker words."""
    if jinja is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the tokenizer has no chat template; give one, as in "
            "PromptTemplate.chat(tokenizer, chat_template='{% for message in messages %}...')"
        )
    marks = ["XFIRSTX", "YFIRSTY", "XSECONDX", "YSECONDY", "XQUERYX"]
    turns = [
        {"role": role, "content": mark}
        for role, mark in zip(("user", "assistant") * 3, marks, strict=False)
    ]

    def pieces(n_turns: int, *, asks: bool) -> list[str]:
        text = tokenizer.apply_chat_template(
            turns[:n_turns], chat_template=jinja, tokenize=False, add_generation_prompt=asks
        )
        found = re.split("|".join(marks[:n_turns]), text)
        if len(found) != n_turns + 1:
            raise ValueError(f"the chat template repeats or omits a turn: {text!r}")
        return found

    before, reply, between, reply_again, between_again, asked = pieces(5, asks=True)
    end = pieces(2, asks=False)[-1]
    opening = between.removeprefix(end)
    alike = (reply, between) == (reply_again, between_again)
    if not (alike and between == end + opening and before.endswith(opening)):
        raise ValueError(
            "the chat template does not format every exchange the same way: between turns it has "
            f"{between!r} and {between_again!r}, before the first {before!r}"
        )
    if not reply.startswith(asked):
        raise ValueError(
            f"the chat template asks for an answer with {asked!r} and shows one after {reply!r}; "
            "the second must begin with the first"
        )
    head = before.removesuffix(opening)
    bos = getattr(tokenizer, "bos_token", None)
    has_bos = bool(bos) and head.startswith(str(bos))
    return ChatTemplate(
        example=f"{opening}{{x}}{reply}{{y}}",
        query=f"{opening}{{x}}{asked}",
        separator=end,
        bos=has_bos,
        head=head.removeprefix(str(bos)) if has_bos else head,
    )


def _fill(pattern: str, x: str, y: str) -> str:
    # Not str.format: inputs may contain braces.
    before, brace, after = pattern.partition("{y}")
    return before.replace("{x}", x) + (y if brace else "") + after.replace("{x}", x)


ARROW = PromptTemplate("{x} -> {y}")
EXAMPLE_ARROW = PromptTemplate("example:{x}->{y}")
QA = PromptTemplate("Q: {x}\nA: {y}", separator="\n\n")


@runtime_checkable
class AnyEpisode(Protocol):
    """What collecting and evaluating require of an episode.

    :class:`Episode` consists of text, the lab's ``RegressionEpisode`` of vectors and numbers.
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

    @property
    def prompt(self) -> str:
        """The text before the answer."""
        return self.template.render(self.demos, self.query.x, self.task)

    @property
    def answer(self) -> str:
        """The continuation that counts as right."""
        return self.template.answer(self.query.x, self.query.y)

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


def sample_episodes(
    tasks: Mapping[str, Task] | Iterable[Task],
    n: int,
    n_shots: int,
    seed: int,
    *,
    template: PromptTemplate = EXAMPLE_ARROW,
) -> list[Episode]:
    """Return ``n`` random episodes per task; a query is never among its own demonstrations.

    Queries of one task are distinct as long as the task has enough inputs, and then repeat with
    other demonstrations, which a warning says. Each task has its own random stream, so adding a
    task does not change the episodes of the others.

    Args:
        tasks: Tasks, or a mapping from names to tasks as the task functions return it.
        n: Episodes per task.
        n_shots: Demonstrations per episode.
        seed: Seed of the sampling.
        template: The template of the prompts.

    Returns:
        The episodes, task by task.

    Raises:
        ValueError: If there is no task, two have the same name, a number is out of range, or a task
            has too few inputs for ``n_shots`` demonstrations and a query, or repeats inputs.
        TypeError: If one of the tasks is not a task.

    Warns:
        UserWarning: If more episodes are asked for than a task has inputs.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> plural = tv.mapping_task("plural", {"cat": "cats", "dog": "dogs", "cow": "cows"})
        >>> episodes = tv.sample_episodes([plural], n=3, n_shots=2, seed=0)
        >>> sorted(episode.query.x for episode in episodes)
        ['cat', 'cow', 'dog']
    """
    return sample_splits(tasks, {"all": n}, n_shots, seed, template=template)["all"]


def sample_splits(
    tasks: Mapping[str, Task] | Iterable[Task],
    sizes: Mapping[str, int],
    n_shots: int,
    seed: int,
    *,
    template: PromptTemplate = EXAMPLE_ARROW,
) -> dict[str, list[Episode]]:
    """Return sets of random episodes such that no two sets share a query.

    Vectors from the evaluated episodes themselves would leak the answers; take them from another
    set. If a task has fewer inputs than the sets together ask for, they are divided in proportion
    to the sizes, and queries repeat within a set with other demonstrations.

    Args:
        tasks: As for :func:`sample_episodes`.
        sizes: Episodes per task in each set, such as ``{"train": 40, "test": 40}``.
        n_shots: As for :func:`sample_episodes`.
        seed: As for :func:`sample_episodes`.
        template: As for :func:`sample_episodes`.

    Returns:
        The episodes of each set, task by task.

    Raises:
        ValueError: As for :func:`sample_episodes`, or if a task has fewer inputs than sets.
        TypeError: As for :func:`sample_episodes`.

    Warns:
        UserWarning: If the sets together ask for more episodes than a task has inputs.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> double = tv.mapping_task("double", {str(i): str(2 * i) for i in range(20)})
        >>> sets = tv.sample_splits([double], {"train": 5, "test": 5}, n_shots=2, seed=0)
        >>> len(sets["train"]), len(sets["test"])
        (5, 5)
        >>> {e.query for e in sets["train"]} & {e.query for e in sets["test"]}
        set()
    """
    chosen = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    _check_request(chosen, sizes, n_shots)
    for task in chosen:
        _check_task(task, n_sets=sum(size > 0 for size in sizes.values()), n_shots=n_shots)
    _warn_of_repeats(chosen, sum(sizes.values()))
    episodes: dict[str, list[Episode]] = {name: [] for name in sizes}
    for task in chosen:
        rng = random.Random(f"{seed}/{task.name}")
        queries = _share_out(task, sizes, rng)
        for name, size in sizes.items():
            for index in range(size):
                query = queries[name][index % len(queries[name])]
                drawn = _distinct(task, n_shots + 1, rng)
                demos = [e for e in drawn if e.x != query.x][:n_shots]
                episodes[name].append(Episode(task.name, tuple(demos), query, template, seed))
    return episodes


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
    return [replace(episode, demos=()) for episode in episodes]


def n_inputs(task: Task) -> int | None:
    """Return the number of the task's distinct inputs, or None if it is not known."""
    return len(task) if isinstance(task, Sized) else None


def _check_request(tasks: Sequence[Task], sizes: Mapping[str, int], n_shots: int) -> None:
    if not tasks:
        raise ValueError("tasks is empty; give at least one task")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(f"{task!r} is not a task: it needs .name and .sample(n, rng)")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have distinct names, got {names}")
    if n_shots < 0:
        raise ValueError(f"n_shots is {n_shots}; it must be 0 or more")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"n is {size} for the set {name!r}; it must be 1 or more")


def _warn_of_repeats(tasks: Sequence[Task], n: int) -> None:
    few = {task.name: n_inputs(task) for task in tasks if n > (n_inputs(task) or n)}
    if few:
        warnings.warn(
            f"{n} episodes of each task are asked for in all, but "
            + ", ".join(f"{name!r} has {available}" for name, available in few.items())
            + " distinct inputs. Queries repeat with other demonstrations; accuracies, intervals "
            "and tests count distinct queries.",
            stacklevel=3,
        )


def _check_task(task: Task, n_sets: int, n_shots: int) -> None:
    available = n_inputs(task)
    if available is None:
        return
    if available < max(n_shots + 1, n_sets):
        raise ValueError(
            f"task {task.name!r} has {available} distinct inputs, too few for n_shots={n_shots} "
            f"demonstrations and a query in each of {n_sets} set(s); at most n_shots="
            f"{max(available - 1, 0)}"
        )


def _distinct(task: Task, n: int, rng: random.Random) -> list[Example]:
    """Return ``n`` examples of a task, or raise ``ValueError`` unless their inputs are distinct."""
    examples = task.sample(n, rng)
    found = len({example.x for example in examples})
    if not len(examples) == found == n:
        raise ValueError(
            f"task {task.name!r} was asked for {n} examples with distinct inputs and gave "
            f"{len(examples)} with {found} distinct inputs, so episodes would lack demonstrations "
            "and sets would share queries. Let sample(n, rng) draw without replacement, and give "
            "the number of inputs as __len__ if it is limited"
        )
    return examples


def _share_out(
    task: Task, sizes: Mapping[str, int], rng: random.Random
) -> dict[str, list[Example]]:
    """Return each set's queries: as many as asked for, or its share of all the task's inputs."""
    available = n_inputs(task)
    wanted = sum(sizes.values())
    pool = _distinct(task, wanted if available is None else min(wanted, available), rng)
    ends, asked = [0], 0
    for size in sizes.values():
        asked += size
        least = ends[-1] + 1
        most = len(pool) - (len(sizes) - len(ends))
        ends.append(min(max(round(len(pool) * asked / wanted), least), most))
    return {name: pool[start:end] for name, start, end in zip(sizes, ends, ends[1:], strict=False)}


def shuffle_labels(episodes: Sequence[AnyEpisode], seed: int) -> list[AnyEpisode]:
    """Return the episodes with their demonstrations' answers shuffled, none in its own place.

    Where answers are equal, none stays where an equal one was, unless more than half of a prompt's
    answers are the same.

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
    shuffled = []
    for episode in episodes:
        n = episode.n_shots
        if n < 2:
            raise ValueError(
                f"an episode of {episode.task!r} has {n} demonstration(s); shuffling labels needs "
                "two or more"
            )
        order = list(range(n))
        for last in range(n - 1, 0, -1):  # Sattolo's shuffle: one cycle, nothing keeps its place
            other = rng.randrange(last)
            order[last], order[other] = order[other], order[last]
        answers = [demo.y for demo in getattr(episode, "demos", ())]
        shuffled.append(episode.with_answers(_without_equals(order, answers)))
    return shuffled


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
