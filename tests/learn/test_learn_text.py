"""Text of `hata learn`: sequences share nothing, and what is left out stays out."""

import numpy as np
import pytest

from hata.calibration.text import first_line, read_text, sequences
from hata.errors import CaptureError


def encode(text):
    """A token is a character, which tells its number in the text."""
    return [ord(letter) - 256 for letter in text]


def numbered(count):
    """Text of so many tokens: 0, 1, 2, ..."""
    return "".join(chr(256 + i) for i in range(count))


@pytest.mark.parametrize("total", [40, 41, 96, 100, 130, 160, 200])
def test_sequences_of_a_short_text_share_nothing(total):
    """Down to a text that has just as many tokens as they need."""
    found = sequences(encode, numbered(total), 5, 8, 8)
    assert found.shape == (5, 8)
    assert len(np.unique(found)) == 40
    assert (np.diff(found, axis=1) == 1).all()
    assert found.max() < total


def test_sequences_of_a_long_text_stand_where_they_did():
    text = numbered(1000)
    found = sequences(encode, text, 5, 8, 8)
    starts = np.linspace(0, len(text) - 8 * 12, 5).astype(int)
    np.testing.assert_array_equal(found, starts[:, None] + np.arange(8))


def test_text_for_fewer_sequences_says_how_much_is_missing():
    expected = "got 39 tokens, enough for 4 sequences of 8 .* expected at least 40 for 5"
    with pytest.raises(CaptureError, match=expected):
        sequences(encode, numbered(39), 5, 8, 8)
    assert sequences(encode, numbered(39), 4, 8, 8).shape == (4, 8)
    # One alone may be shorter.
    assert sequences(encode, numbered(7), 1, 8, 4).shape == (1, 7)


def test_files_can_be_left_out(tmp_path):
    (tmp_path / "held_out").mkdir()
    for name in ("a.py", "b.py", "held_out/c.py"):
        (tmp_path / name).write_text(name)
    every = [tmp_path / name for name in ("a.py", "b.py", "held_out/c.py")]
    assert read_text(every, without=["b.py", "held_out"]) == "a.py"
    # A folder whose files are left out, or are no text, is there.
    assert read_text([tmp_path, *every[:1]], without=["held_out"]).count("a.py") == 2
    for absent in ("held-out", "held_out/", "held_out/c.py", tmp_path.name):
        with pytest.raises(CaptureError, match=f"--without: got '{absent}', but nothing"):
            read_text([tmp_path], without=["b.py", absent])
    with pytest.raises(CaptureError, match="leaves nothing of it"):
        read_text(every[:1], without=["a.py"])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("one\ntwo", "one"),
        ("Error in 'sizes':\n    TypeError: got str\nmore", "Error in 'sizes': TypeError: got str"),
        ("a:\nb:\nc", "a: b: c"),
        ("alone:", "alone:"),
        ("", "ValueError"),
    ],
)
def test_an_error_in_a_line_says_what_is_wrong(said, told):
    assert first_line(ValueError(said)) == told
