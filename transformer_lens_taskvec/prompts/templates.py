"""Templates: how demonstrations and a query become the text of a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformer_lens_taskvec.tasks.base import Example


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

    def outputs_begin(self, demos: Iterable[Example], x: str, task: str = "") -> tuple[int, ...]:
        """Return where in the text of :meth:`render` the examples' outputs begin.

        The spaces before an output belong to it, as those before the answer do.

        Example:
            >>> import transformer_lens_taskvec as tv
            >>> tv.PromptTemplate("{x} -> {y}").outputs_begin([tv.Example("cat", "cats")], "dog")
            (6, 18)
        """
        found: list[int] = []
        known: list[Example] = []
        for demo in demos:
            found.append(len(self.render(known, demo.x, task)))
            known.append(demo)
        return (*found, len(self.render(known, x, task)))

    def examples_begin(self, demos: Iterable[Example], x: str, task: str = "") -> tuple[int, ...]:
        """Return where in the text of :meth:`render` the demonstrations begin, and the query.

        Before the first of them stands the instruction, if there is one. The separator after an
        example belongs to it.

        Example:
            >>> import transformer_lens_taskvec as tv
            >>> tv.PromptTemplate("{x} -> {y}").examples_begin([tv.Example("cat", "cats")], "dog")
            (0, 12)
        """
        parts = [_fill(self.example, demo.x, demo.y) for demo in demos]
        instruction = (self.instruction or "").replace("{task}", task)
        ahead = (parts[:place] for place in range(len(parts) + 1))
        return tuple(len(self._begin([*some, ""], instruction)) for some in ahead)

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
