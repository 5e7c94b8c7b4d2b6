"""Recall: assignments put into the text that it asks back later, far away.

    kavo_id = "58213"
    ...text...
    assert kavo_id == "58213"

Text as it comes seldom asks for one key far away, so a hash that learns from it alone hardly sees
the queries that long contexts are for. Names, values and forms are drawn at random. Lines are woven
in as tokens, so it is known which queries have to look back.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import numpy as np

# What assigns, and what asks back.
FORMS = (
    ('\n{name} = "{value}"\n', '\nassert {name} == "', '{value}"\n'),
    ("\n{name} = {value}\n", "\nassert {name} == ", "{value}\n"),
    ("\n{name}: {value}\n", "\n{name}: ", "{value}\n"),
    ('\n    "{name}": "{value}",\n', '\nprint(values["{name}"])  # ', "{value}\n"),
)
# The first form is as frequent as the others together: models of code know it best.
_CHANCES = (0.5, 0.2, 0.15, 0.15)
_ENDS = ("", "_id", "_key", "_name", "_token")


def planted(
    ids: np.ndarray, encode: Callable[[str], list[int]], pairs: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Weave assignments, and lines that ask them back, into sequences.

    Args:
        ids: `[n, T]` token ids; the end of a sequence makes room for what is woven in.
        encode: Text to token ids.
        pairs: Assignments of a sequence at most; they take up to half of it.
        seed: Of names, values and places.

    Returns:
        The sequences, `[n, T]`, and for each the positions whose next token is asked back,
        ascending, int64.
    """
    made, asked = [], []
    for number, row in enumerate(ids):
        tokens, places = _woven(row, encode, pairs, np.random.default_rng((seed, number)))
        made.append(tokens)
        asked.append(places)
    return np.array(made, np.int64).reshape(ids.shape), asked


def _woven(
    row: np.ndarray, encode: Callable[[str], list[int]], pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    lines: list[tuple[float, list[int], int]] = []
    room = len(row)
    for _ in range(pairs):
        first, then = np.sort(rng.random(2))
        assigns, asks, answers = FORMS[rng.choice(len(FORMS), p=_CHANCES)]
        words = {"name": _name(rng), "value": _letters(rng, string.digits, 4, 8)}
        given, question = encode(assigns.format(**words)), encode(asks.format(**words))
        answer = encode(answers.format(**words))
        taken = len(given) + len(question) + len(answer)
        if room - taken < len(row) // 2:
            break
        room -= taken
        lines.append((first, given, 0))
        lines.append((then, question + answer, len(answer)))
    parts: list[np.ndarray | list[int]] = []
    places: list[int] = []
    at = written = 0
    for share, line, answer in sorted(lines):
        until = int(share * room)
        parts += [row[at:until], line]
        written += until - at + len(line)
        at = until
        places += range(written - answer - 1, written - 1)
    tokens = np.concatenate([*parts, row[at:room]]).astype(np.int64)
    return tokens, np.array(places, np.int64)


def _name(rng: np.random.Generator) -> str:
    word = _letters(rng, string.ascii_lowercase, 3, 9)
    return word + _ENDS[rng.integers(len(_ENDS))]


def _letters(rng: np.random.Generator, of: str, least: int, most: int) -> str:
    return "".join(of[i] for i in rng.integers(len(of), size=rng.integers(least, most + 1)))
