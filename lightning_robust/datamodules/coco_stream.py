"""COCO's annotation files, gigabytes of JSON, read record by record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from lightning_robust.errors import UserError

_CHUNK: Final = 2**20  # bytes read at a time
_BLANK: Final = " \t\r\n"


class Record(NamedTuple):
    """An entry of one of the file's lists.

    Attributes:
        section: Name of the list: ``images``, ``annotations`` or ``categories``.
        value: The entry.
        start: Its first byte in the file.
        length: Its bytes.
    """

    section: str
    value: Any
    start: int
    length: int


def records(path: Path, sections: tuple[str, ...] = ("images", "annotations", "categories")) -> Iterator[Record]:
    """Yield the entries of some lists of a JSON object in the order of the file, holding one at a time.

    Raises:
        UserError: If the file is missing, no JSON object, or cut short.
    """
    try:
        with path.open("rb") as file:
            yield from _object(_Window(file), sections)
    except FileNotFoundError as error:
        raise UserError(f"the annotation file {path} does not exist.") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is no whole COCO annotation file ({error}): it is damaged or cut short.") from error


class _Window:
    """A moving piece of a file as text in which each byte is one character, so that places are bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.text, self.at, self.start = file, "", 0, 0
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Drop what was read and read on; False at the end of the file."""
        read = self.file.read(max(_CHUNK, len(self.text) - self.at))  # doubling, for a long value
        self.text = self.text[self.at :] + read.decode("latin-1")
        self.start, self.at = self.start + self.at, 0
        return bool(read)

    def peek(self) -> str:
        """The next character that is no blank, which is not taken."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                raise ValueError("it ends too early")

    def take(self, expected: str) -> str:
        """Take the next character, which must be one of those expected."""
        found = self.peek()
        if found not in expected:
            raise ValueError(f"{found!r} at byte {self.start + self.at} where one of {expected!r} should be")
        self.at += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """Take a value; with its first byte and its length."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except ValueError:
                if not self.more():
                    raise
                continue
            # a number that reaches the window's edge may go on behind it
            if end == len(self.text) and self.more():
                continue
            start, length = self.start + self.at, end - self.at
            self.at = end
            return value, start, length


def _object(window: _Window, sections: tuple[str, ...]) -> Iterator[Record]:
    window.take("{")
    while window.peek() != "}":
        name = window.value()[0]
        window.take(":")
        if name in sections and window.peek() == "[":
            window.take("[")
            while window.peek() != "]":
                yield Record(name, *window.value())
                if window.take(",]") == "]":
                    break
            else:
                window.take("]")
        else:
            window.value()
        if window.take(",}") == "}":
            return
