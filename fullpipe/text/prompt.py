"""ComfyUI's prompt syntax: `(word)`, `((word))`, `(word:1.2)`, `\\(`, `embedding:name`.

The rules were read from ComfyUI 0.3.75 and are kept to the letter, oddities of unbalanced brackets
included; the parser here is a different one, because theirs recurses once per bracket and copies
the text at every level. This one takes time and memory in proportion to the prompt.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass

from fullpipe.errors import InvalidRequest

EMBEDDING_PREFIX = "embedding:"
EMPHASIS = 1.1

# Stand-ins for escaped brackets while brackets are counted.
_ESCAPED_CLOSE, _ESCAPED_OPEN = "\0\1", "\0\2"
_BEFORE_EMBEDDING = re.compile(f"[ \n](?={EMBEDDING_PREFIX})")


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt under one weight: plain text, or what follows `embedding:`."""

    text: str
    weight: float
    is_embedding: bool = False


def split_prompt(prompt: str) -> list[Piece]:
    """Split a prompt into weighted text and textual-inversion references, in order.

    An `embedding:` is recognised at the start of a weighted stretch, after a space and after a
    newline; an embedding piece holds all text up to the next one, its name first.
    """
    pieces = []
    for text, weight in weighted_segments(_escape(prompt)):
        for word in _BEFORE_EMBEDDING.split(_unescape(text)):
            if word.startswith(EMBEDDING_PREFIX):
                pieces.append(Piece(word[len(EMBEDDING_PREFIX) :], weight, is_embedding=True))
            elif word:
                pieces.append(Piece(word, weight))
    return pieces


def weighted_segments(text: str) -> list[tuple[str, float]]:
    """Give every stretch of text the weight that its brackets say.

    A pair of brackets multiplies by 1.1, or sets the weight when its content ends in `:number`
    (whatever Python's `float` accepts; the weights around it then do not matter). A closing
    bracket that closes nothing is text, and so is the next opening one. A bracket that is never
    closed counts as closed by the last character of the text around it if that is a `)`, and is
    text otherwise. The prompt's escaped brackets must have been replaced before.

    Returns:
        (text, weight) pairs in order, no text empty.
    """
    openings, closing_of, brackets = _match_brackets(text)
    segments: list[tuple[str, float]] = []
    next_opening = 0
    # What is left to read: [position, end) at a weight; the innermost comes last.
    pending = [(0, len(text), 1.0)]
    while pending:
        position, end, weight = pending.pop()
        if next_opening == len(openings) or openings[next_opening] >= end:
            if position < end:
                segments.append((text[position:end], weight))
            continue
        opening = openings[next_opening]
        next_opening += 1
        if position < opening:
            segments.append((text[position:opening], weight))
        closing = closing_of.get(opening, end)
        if closing < end:
            pending.append((closing + 1, end, weight))
        elif end - opening >= 2 and text[end - 1] == ")":
            closing = end - 1
        else:
            # Never closed: all of the rest is text, further openings in it too.
            segments.append((text[opening:end], weight))
            while next_opening < len(openings) and openings[next_opening] < end:
                next_opening += 1
            continue
        inner_end, inner_weight = _explicit_weight(text, opening + 1, closing, brackets)
        if inner_weight is None:
            inner_weight = weight * EMPHASIS
        pending.append((opening + 1, inner_end, inner_weight))
    return segments


def _match_brackets(text: str) -> tuple[list[int], dict[int, int], list[int]]:
    """Find the brackets that count: openings in order, who closes whom, and all bracket positions.

    A closing bracket at level 0 takes the level below it, where openings only lead back up.
    """
    openings: list[int] = []
    closing_of: dict[int, int] = {}
    brackets: list[int] = []
    unclosed: list[int] = []
    debt = 0
    for match in re.finditer(r"[()]", text):
        position = match.start()
        brackets.append(position)
        if match.group() == "(":
            if debt:
                debt -= 1
            else:
                openings.append(position)
                unclosed.append(position)
        elif unclosed:
            closing_of[unclosed.pop()] = position
        else:
            debt += 1
    return openings, closing_of, brackets


def _explicit_weight(
    text: str, start: int, end: int, brackets: list[int]
) -> tuple[int, float | None]:
    """Read `:number` at the end of text[start:end]; returns the end of what it weighs, and it.

    Only the text after the last bracket can hold the number, and each such stretch belongs to one
    pair of brackets, so all calls together read the prompt once.
    """
    before = bisect_left(brackets, end)
    after_bracket = max(start, brackets[before - 1] + 1) if before else start
    colon = text.rfind(":", after_bracket, end)
    if colon <= start:  # a colon that comes first weighs nothing, and is text
        return end, None
    try:
        return colon, float(text[colon + 1 : end])
    except ValueError:
        return end, None


def _escape(prompt: str) -> str:
    return prompt.replace("\\)", _ESCAPED_CLOSE).replace("\\(", _ESCAPED_OPEN)


def _unescape(text: str) -> str:
    return text.replace(_ESCAPED_CLOSE, ")").replace(_ESCAPED_OPEN, "(")


def check_text(name: str, text: str) -> None:
    """Refuse text that is not valid Unicode, as JSON can carry it in `\\ud800`.

    Raises:
        InvalidRequest: the text holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} is not valid Unicode: lone surrogate "
            f"U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None
