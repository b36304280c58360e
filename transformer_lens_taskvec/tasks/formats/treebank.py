"""Sentences from bracketed Penn Treebank files (``.mrg``), as in NLTK's corpora."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformer_lens_taskvec._utils.text import line_error, read_lines
from transformer_lens_taskvec.tasks._data import read_pairs
from transformer_lens_taskvec.tasks.sentences import Sentence, detokenise

_TOKEN = re.compile(r"[()]|[^\s()]+")
_TRACE = "-NONE-"
_UPOS = dict(read_pairs("penn_upos"))
_ESCAPES = {
    "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
}  # fmt: skip


def load_treebank(path: str | os.PathLike[str]) -> list[Sentence]:
    """Return the sentences of Penn Treebank files with universal parts of speech.

    Tags are mapped to UPOS one by one: every VB is VERB and every IN is ADP, even auxiliaries and
    subordinating conjunctions. Traces are dropped, brackets unescaped, and the words joined into
    the text.

    Args:
        path: A file, or a directory with ``.mrg`` files at any depth, such as NLTK's
            ``corpora/treebank``.

    Returns:
        The sentences, in the order of the file names and files, with repetitions.

    Raises:
        ValueError: If there are no files or no sentences, or a line is malformed; the message names
            the line.
        OSError: If a file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import transformer_lens_taskvec as tv
        >>> tree = "( (S (NP (PRP She) ) (VP (VBZ sings) (NP (-NONE- *) )) (. .) ))"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "wsj_0001.mrg").write_text(tree)
        ...     tv.tasks.load_treebank(folder)
        [Sentence(words=('She', 'sings', '.'), tags=('PRON', 'VERB', 'PUNCT'))]
    """
    root = Path(path)
    files = sorted(root.rglob("*.mrg")) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"{root} has no .mrg files; give the directory of the bracketed files")
    sentences = [sentence for file in files for sentence in _sentences(file)]
    if not sentences:
        raise ValueError(f"{root} has no sentences; give files of bracketed trees")
    return sentences


@dataclass
class _Node:
    """An open bracket: the line it opened in, and its content so far."""

    line: int
    label: str | None = None
    word: str | None = None
    has_children: bool = False


def _sentences(path: Path) -> Iterator[Sentence]:
    """Yield a sentence per outermost bracket; a stack has no limit of depth, unlike recursion."""
    stack: list[_Node] = []
    leaves: list[tuple[str, str]] = []
    for number, line in read_lines(path):
        for token in _TOKEN.findall(line):
            if token == "(":
                _open(path, number, stack)
            elif token == ")":
                if not stack:
                    raise line_error(path, number, "closes a bracket that was never opened")
                leaf = _close(path, number, stack.pop())
                if leaf is not None:
                    leaves.append(leaf)
                if not stack and leaves:
                    words = tuple(word for word, _ in leaves)
                    yield Sentence(words, tuple(tag for _, tag in leaves), detokenise(words))
                    leaves = []
            else:
                _read_atom(path, number, stack, token)
    if stack:
        raise line_error(path, stack[-1].line, "opens a bracket that is never closed")


def _open(path: Path, number: int, stack: list[_Node]) -> None:
    if stack:
        if stack[-1].word is not None:
            raise line_error(
                path, number, f"opens a bracket after the word {stack[-1].word[:40]!r}; close it"
            )
        stack[-1].has_children = True
    stack.append(_Node(number))


def _read_atom(path: Path, number: int, stack: list[_Node], token: str) -> None:
    if not stack:
        raise line_error(path, number, f"has {token[:40]!r} outside all brackets")
    node = stack[-1]
    if node.has_children or node.word is not None:
        raise line_error(
            path, number, f"has {token[:40]!r} where a bracket is expected; a word is '(TAG word)'"
        )
    if node.label is None:
        node.label = token
    else:
        node.word = token


def _close(path: Path, number: int, node: _Node) -> tuple[str, str] | None:
    """Return the word and tag of a closed bracket, or None for a phrase or a trace."""
    if node.has_children or node.label == _TRACE:
        return None
    if node.label is None or node.word is None:
        label = None if node.label is None else node.label[:40]
        raise line_error(path, number, f"closes a bracket without a word after {label!r}")
    # Where annotators were in doubt, as in "JJ|NN", the likelier tag comes first.
    tag = _UPOS.get(node.label.split("|")[0])
    if tag is None:
        raise line_error(
            path, number, f"has the tag {node.label[:40]!r}, which is not a Penn Treebank tag"
        )
    word = _ESCAPES.get(node.word, node.word)
    return word.replace("\\/", "/").replace("\\*", "*"), tag
