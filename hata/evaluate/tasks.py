"""Prompts with one right answer, made of any text: needles, several needles, tracking, frequency.

    ...code...
    kfqzm_key = "402817"
    ...code...
    assert kfqzm_key == "

A model that attends to the right place goes on with the digits. The tasks are in the manner of
RULER (arXiv 2404.06654), as source code, for which models of code need no instruction.
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
TASKS = ("needle", "multi-needle", "tracking", "frequency")

Encode = Callable[[str], list[int]]


class Prompt(NamedTuple):
    """A prompt and what it asks for.

    Attributes:
        tokens: The prompt, exactly as long as was asked for.
        name: The variable it asks for.
        value: The text that is the right answer.
    """

    tokens: list[int]
    name: str
    value: str


def source_text(files: Sequence[str] = ()) -> str:
    """The text that needles are hidden in: files, else networkx, else Python's own library."""
    paths: Iterable[Path] = map(Path, files)
    if not files:
        spec = find_spec("networkx")
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "algorithms"
        else:
            folder = Path(sysconfig.get_path("stdlib"))
        paths = sorted(folder.rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def prompts(
    task: str,
    encode: Encode,
    text: str,
    length: int,
    count: int,
    *,
    pairs: int = 8,
    seed: int = 1,
) -> Iterator[Prompt]:
    """Make prompts of a task.

    - `needle`: one of several assignments is asked back;
    - `multi-needle`: all of them are, one per prompt, each after the right answers so far;
    - `tracking`: a variable is asked that got its value from another, that one from a third;
    - `frequency`: the name that is called most often is asked for.

    Args:
        task: One of `TASKS`.
        encode: Text to tokens, without special tokens.
        text: What is hidden in.
        length: Tokens of a prompt.
        count: How many prompts.
        pairs: Assignments, chains or names in a prompt.
        seed: Another seed gives other prompts.

    Raises:
        ValueError: The task is unknown, the length has no room for what is to be hidden, or the
            text is shorter than a prompt.
    """
    rng = random.Random(seed)
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
    made = 0
    while made < count:
        if task == "frequency":
            made += 1
            yield _frequency(rng, encode, text, length, pairs)
            continue
        values = {_word(rng) + "_key": _number(rng) for _ in range(pairs)}
        lines = [f'\n{name} = "{value}"\n' for name, value in values.items()]
        if task == "tracking":
            for _ in range(2):
                heirs = {_word(rng) + "_key": (name, value) for name, value in values.items()}
                lines += [f"\n{heir} = {name}\n" for heir, (name, _) in heirs.items()]
                values = {heir: value for heir, (_, value) in heirs.items()}
        asked = list(values.items())
        if task != "multi-needle":
            asked = [rng.choice(asked)]
        before = ""
        for name, value in asked[: count - made]:
            made += 1
            question = f'{before}\nassert {name} == "'
            yield Prompt(_hide(rng, encode, text, length, lines, question), name, value)
            before = f'{question}{value}"'


def needles(
    encode: Encode, text: str, length: int, count: int, *, pairs: int = 8, seed: int = 1
) -> Iterator[Prompt]:
    """The task `needle`, see `prompts`."""
    return prompts("needle", encode, text, length, count, pairs=pairs, seed=seed)


def _frequency(rng: random.Random, encode: Encode, text: str, length: int, pairs: int) -> Prompt:
    names = [_word(rng) for _ in range(pairs)]
    often = [2] * len(names)
    often[0] = 6
    lines = [
        f"\n{name}()\n" for name, times in zip(names, often, strict=True) for _ in range(times)
    ]
    rng.shuffle(lines)
    tokens = _hide(rng, encode, text, length, lines, '\nmost_called = "')
    return Prompt(tokens, "most_called", names[0])


def _hide(
    rng: random.Random, encode: Encode, text: str, length: int, lines: list[str], question: str
) -> list[int]:
    """Lines at random places of a random stretch of text, in their order, then the question."""
    hidden, asked = [encode(line) for line in lines], encode(question)
    room = length - len(asked) - sum(map(len, hidden))
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
    return tokens + code[places[-1] :] + asked


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(4, 8)))


def _number(rng: random.Random) -> str:
    return "".join(rng.choice(string.digits) for _ in range(DIGITS))
