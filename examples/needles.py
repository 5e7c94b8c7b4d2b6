"""Needle prompts: assignments hidden in source code, one of them asked back.

    ...code...
    kfqzm_key = "402817"
    ...code...
    assert kfqzm_key == "

A model that attends to the right place goes on with the digits. The code comes from files that are
given, else from networkx, else from Python's own library.
"""

from __future__ import annotations

import random
import string
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

DIGITS = 6


class Needle(NamedTuple):
    """A prompt and what it asks for.

    Attributes:
        tokens: The prompt, exactly as long as was asked for.
        name: The variable it asks for.
        value: The digits that are the right answer.
    """

    tokens: list[int]
    name: str
    value: str


def source_text(files: Sequence[str] = ()) -> str:
    """The text that needles are hidden in."""
    paths: Iterable[Path] = map(Path, files)
    if not files:
        spec = find_spec("networkx")
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "algorithms"
        else:
            folder = Path(sysconfig.get_path("stdlib"))
        paths = sorted(folder.rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def needles(
    encode: Callable[[str], list[int]],
    text: str,
    length: int,
    count: int,
    *,
    pairs: int = 8,
    seed: int = 1,
) -> Iterator[Needle]:
    """Make prompts.

    Args:
        encode: Text to tokens, without special tokens.
        text: What the needles are hidden in.
        length: Tokens of a prompt.
        count: How many prompts.
        pairs: Assignments in a prompt, of which one is asked back.
        seed: Another seed gives other prompts.

    Raises:
        ValueError: The length has no room for the needles, or the text is shorter than a prompt.
    """
    rng = random.Random(seed)
    for _ in range(count):
        lines = {_word(rng) + "_key": _number(rng) for _ in range(pairs)}
        name, value = rng.choice(list(lines.items()))
        hidden = [encode(f'\n{key} = "{digits}"\n') for key, digits in lines.items()]
        question = encode(f'\nassert {name} == "')
        room = length - len(question) - sum(map(len, hidden))
        if room < len(hidden):
            raise ValueError(
                f"length: got {length} tokens, expected more than {length - room}; ask for longer "
                "prompts or fewer pairs"
            )
        # A token is seldom more than a few characters; take more text until there is enough.
        width = room
        code: list[int] = []
        while len(code) < room:
            if width > len(text):
                raise ValueError(
                    f"text: got {len(text)} characters, expected more than {room} tokens' worth; "
                    "pass more files"
                )
            start = rng.randint(0, len(text) - width)
            code = encode(text[start : start + width])
            width *= 2
        code = code[:room]
        places = sorted(rng.randint(0, room) for _ in hidden)
        tokens: list[int] = []
        for begin, end, line in zip([0, *places], places, hidden, strict=False):
            tokens += code[begin:end] + line
        yield Needle(tokens + code[places[-1] :] + question, name, value)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(4, 8)))


def _number(rng: random.Random) -> str:
    return "".join(rng.choice(string.digits) for _ in range(DIGITS))
