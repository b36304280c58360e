"""Sentences from CoNLL-U files, the format of Universal Dependencies."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformer_lens_taskvec._utils.text import line_error, read_lines
from transformer_lens_taskvec.tasks.sentences import Sentence

_N_COLUMNS = 10
_TEXT = "# text = "
_RANGE = re.compile(r"([1-9]\d{0,8})-([1-9]\d{0,8})", re.ASCII)
_EMPTY_NODE = re.compile(r"(0|[1-9]\d{0,8})\.[1-9]\d{0,8}", re.ASCII)
_UPOS = frozenset([
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN",
    "PUNCT", "SCONJ", "SYM", "VERB", "X", "_",
])  # fmt: skip


def load_conllu(path: str | os.PathLike[str]) -> list[Sentence]:
    r"""Return the sentences of a CoNLL-U file with their universal parts of speech.

    Words are the lines with a plain number: a contraction counts as its parts ("did", "n't"), and
    empty nodes are skipped. The text is the ``# text`` comment, or without one the forms, each
    followed by a space unless it has ``SpaceAfter=No``. :func:`pos_tasks` leaves out sentences
    whose answers are not separate words in that text.

    Args:
        path: A UTF-8 file.

    Returns:
        The sentences in the order of the file, with repetitions.

    Raises:
        ValueError: If the file has no sentences or a line is malformed; the message names the line.
        OSError: If the file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import transformer_lens_taskvec as tv
        >>> rows = ["1 She she PRON _ _ 2 nsubj _ _", "2 sings sing VERB _ _ 0 root _ _"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "one.conllu")
        ...     _ = path.write_text("\n".join(rows).replace(" ", "\t"))
        ...     tv.tasks.load_conllu(path)
        [Sentence(words=('She', 'sings'), tags=('PRON', 'VERB'))]
    """
    file = Path(path)
    sentences = []
    block = _Block(file)
    for number, line in read_lines(file):
        if line.strip():
            block.add(number, line)
            continue
        if block.words:
            sentences.append(block.sentence())
        block = _Block(file)
    if block.words:
        sentences.append(block.sentence())
    if not sentences:
        raise ValueError(f"{file} has no sentences; give a CoNLL-U file with word lines")
    return sentences


class _Block:
    """The lines of one sentence read so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.words: list[str] = []
        self.tags: list[str] = []
        self.text: str | None = None
        self.surface = ""
        self.range_end = 0
        self.line = 0

    def add(self, number: int, line: str) -> None:
        """Take a comment, a word, a range of words or an empty node."""
        self.line = number
        if line.startswith("#"):
            if line.startswith(_TEXT):
                self.text = line[len(_TEXT) :].strip() or None
            return
        columns = line.split("\t")
        if len(columns) != _N_COLUMNS:
            raise self._error(f"has {len(columns)} tab-separated columns; CoNLL-U has {_N_COLUMNS}")
        identifier, form, _, tag = columns[:4]
        if not form.strip():
            raise self._error("has an empty form; the second column is the word")
        spaced = "SpaceAfter=No" not in columns[-1].split("|")
        following = str(len(self.words) + 1)
        if span := _RANGE.fullmatch(identifier):
            if self.range_end > len(self.words):
                raise self._wrong_id(identifier, following)
            if span[1] != following or int(span[2]) < int(span[1]):
                raise self._wrong_id(identifier, f"{following}-N")
            self.range_end = int(span[2])
            self._print(form, spaced)
        elif node := _EMPTY_NODE.fullmatch(identifier):
            if node[1] != str(len(self.words)):
                raise self._wrong_id(identifier, f"{len(self.words)}.N")
        elif identifier != following:
            raise self._wrong_id(identifier, following)
        elif tag not in _UPOS:
            raise self._error(
                f"has the tag {tag[:40]!r}, which is none of the 17 universal ones (NOUN, ...)"
            )
        else:
            self.words.append(form)
            self.tags.append(tag)
            if len(self.words) > self.range_end:
                self._print(form, spaced)

    def sentence(self) -> Sentence:
        """Return the sentence, which must reach the end of its last range of words."""
        if self.range_end > len(self.words):
            raise self._error(f"ends the sentence within a range of words up to {self.range_end}")
        text = self.surface.strip() if self.text is None else self.text
        return Sentence(tuple(self.words), tuple(self.tags), text)

    def _print(self, form: str, spaced: bool) -> None:
        self.surface += form + (" " if spaced else "")

    def _wrong_id(self, identifier: str, expected: str) -> ValueError:
        return self._error(
            f"has the id {identifier[:40]!r} where {expected} is expected; "
            "ids count the words from 1"
        )

    def _error(self, problem: str) -> ValueError:
        return line_error(self.path, self.line, problem)
