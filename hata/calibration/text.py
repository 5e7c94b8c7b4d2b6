"""Text to learn from: files to one string, a string to sequences of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from hata.errors import CaptureError
from hata.profile import user_path

SUFFIXES = frozenset(
    {".py", ".txt", ".md", ".rst", ".json", ".c", ".h", ".cpp", ".html", ".tex", ".jsonl"}
)
LEAST_TOKENS = 1024
# Text per token that is looked at, in characters; tokenizers of words need more than bytes do.
_CHARACTERS = 12


def read_text(paths: Sequence[str | Path], *, without: Sequence[str] = ()) -> str:
    """The text of files; a folder stands for the text files below it, in order of their names.

    Args:
        paths: Files and folders.
        without: Names of folders and files that are left out: text held out for judging.

    Raises:
        CaptureError: One is missing or no text, or there is nothing of a name to leave out.
    """
    texts = []
    out = _LeftOut(without)
    for name in paths:
        path = user_path(name)
        with _readable(path):
            folder = path.is_dir()
            files = _files_below(path, out) if folder else [path]
        if folder and not files:
            raise CaptureError(f"--text: got folder {path} without text files; name files")
        if not folder and out.holds(path):
            continue
        for file in files:
            try:
                with _readable(file):
                    texts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                if not folder:
                    raise CaptureError(
                        f"--text: {path} is not UTF-8 text; name text files"
                    ) from None
    if absent := out.absent():
        raise CaptureError(
            f"--without: got {', '.join(map(repr, absent))}, but nothing of --text is named so; "
            "give names of files or of folders below those of --text, without slashes"
        )
    if without and not texts:
        raise CaptureError(
            f"--text: --without {' '.join(without)} leaves nothing of it; name more text"
        )
    return "\n".join(texts)


class _LeftOut:
    """Names of files and folders that are left out, and which of them there were."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = dict.fromkeys(names)
        self._met: set[str] = set()

    def holds(self, path: Path) -> bool:
        """Whether a file, or a folder that it lies in, has one of the names."""
        found = self._names.keys() & path.parts
        self._met |= found
        return bool(found)

    def absent(self) -> list[str]:
        """The names that nothing had."""
        return [name for name in self._names if name not in self._met]


def _files_below(folder: Path, out: _LeftOut) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not out.holds(path.relative_to(folder)) and path.suffix in SUFFIXES and path.is_file()
    ]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of what cannot be read that it cannot."""
    try:
        yield
    except OSError as error:
        raise CaptureError(
            f"--text: {path} cannot be read ({error.strerror or error}); check the path"
        ) from None


def load_tokenizer(path: Path) -> Callable[[str], list[int]]:
    """Text to token ids, without special ones.

    Raises:
        CaptureError: The folder has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # Tokenizers are of many makes, and each fails in its own way.
    except Exception as error:
        settings = path / "tokenizer_config.json"
        named = settings.read_text(encoding="utf-8") if settings.is_file() else ""
        if '"ByT5Tokenizer"' in named:
            return lambda text: [byte + 3 for byte in text.encode()]
        raise CaptureError(
            f"--model: {path} has no tokenizer that can be loaded ({first_line(error)})"
        ) from None
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def sequences(
    encode: Callable[[str], list[int]], text: str, count: int, tokens: int, least: int
) -> np.ndarray:
    """Token ids of `count` stretches of a text, spread over all of it, `[count, tokens]`.

    No two of them share a token of the text. Where long stretches have few tokens, sequences are
    shorter, or fewer.

    Raises:
        CaptureError: There are fewer than `least` tokens, or too few for so many sequences.
    """
    window = tokens * _CHARACTERS
    starts = np.linspace(0, max(len(text) - window, 0), count).astype(int).tolist()
    # Where one that starts at one of these characters reaches the next one, text is short.
    if not all(
        then - start >= window or len(encode(text[start:then])) >= tokens
        for start, then in itertools.pairwise(starts)
    ):
        return _evenly(encode(text), count, tokens)
    found: list[list[int]] = []
    for start in starts:
        # Tokens of few characters need less text, and less time.
        ids = encode(text[start : start + 2 * tokens])
        if len(ids) <= tokens:
            ids = encode(text[start : start + window])
        found.append(ids[:tokens])
    length = max(map(len, found), default=0)
    if length < least:
        raise CaptureError(
            f"--text: got {length} tokens, expected at least {least}, better {tokens}; name more "
            "or longer files"
        )
    return np.array([ids for ids in found if len(ids) == length], np.int64)


def _evenly(ids: Sequence[int], count: int, tokens: int) -> np.ndarray:
    """Sequences spread over the tokens of a text that has little more than they need."""
    if len(ids) < count * tokens:
        raise CaptureError(
            f"--text: got {len(ids)} tokens, enough for {len(ids) // tokens} sequences of {tokens} "
            f"that share nothing, expected at least {count * tokens} for {count} (to learn takes "
            "one more than is learned from); name more text, or ask for fewer --sequences or "
            "tokens"
        )
    starts = [i * (len(ids) - tokens) // max(count - 1, 1) for i in range(count)]
    return np.array([ids[start : start + tokens] for start in starts], np.int64)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    # A line that ends in a colon says only what the next one is about.
    while first.rstrip().endswith(":") and more:
        first = f"{first.rstrip()} {more.pop(0).strip()}"
    return first[:300]


def load_config(model: str | Path) -> Any:
    """The configuration of a model's folder.

    Raises:
        CaptureError: It is no folder of a model.
    """
    path = user_path(model)
    try:
        there = (path / "config.json").is_file()
    except OSError:
        there = False
    if not there:
        raise CaptureError(
            f"--model: got {model}, expected a folder with config.json; give the path of a model "
            "saved by transformers"
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise CaptureError(
            f"--model: needs transformers ({error}); pip install 'hata-attention[hf]'"
        ) from None
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    # Fields of wrong types fail in as many ways as there are configurations.
    except Exception as error:
        raise CaptureError(f"--model: {model}: config.json: {first_line(error)}") from None


def python_sources(
    characters: int, *, without: Sequence[str] = (), seed: int = 0
) -> tuple[str, list[str]]:
    """Sources of the installed packages, files in an order drawn by the seed.

    Args:
        characters: How much is enough.
        without: Names of packages and folders to leave out.
        seed: Of the order.

    Returns:
        The text, and the names to leave out that nothing has.
    """
    out = _LeftOut(without)
    root = Path(np.__file__).resolve().parent.parent
    files = [path for path in sorted(root.rglob("*.py")) if not out.holds(path.relative_to(root))]
    order = np.random.default_rng(seed).permutation(len(files))
    return _enough(_readable_texts(files[number] for number in order), characters), out.absent()


def _readable_texts(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        with suppress(OSError, UnicodeDecodeError):
            yield path.read_text(encoding="utf-8")


def _enough(texts: Iterable[str], characters: int) -> str:
    """As many of them as have so many characters together."""
    found: list[str] = []
    size = 0
    for text in texts:
        found.append(text)
        size += len(text)
        if size >= characters:
            break
    return "\n".join(found)


def dataset_text(name: str, characters: int) -> str:
    """Text of a data set of the datasets library: the column `text` of its split `train`.

    Raises:
        CaptureError: The library, the data set or the column is not there.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError:
        raise CaptureError(
            f"--dataset: got {name!r}, which needs the datasets library; pip install datasets, use "
            '"python", or name files with --text'
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        return _enough((row["text"] for row in rows), characters)
    # A data set can fail in as many ways as there are places to fetch one from.
    except Exception as error:
        raise CaptureError(f"--dataset: {name} cannot be read: {first_line(error)}") from None
