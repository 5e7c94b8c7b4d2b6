"""Assignments woven into text, and the lines that ask them back."""

import numpy as np

from hata.learn import capture
from hata.learn.recall import planted


def encode(text):
    return list(text.encode())


def test_what_is_asked_was_said_before():
    ids = np.full((2, 4096), ord("."), np.int64)
    tokens, asked = planted(ids, encode, 16, 3)
    again, _ = planted(ids, encode, 16, 3)
    assert tokens.shape == ids.shape
    np.testing.assert_array_equal(tokens, again)
    assert not np.array_equal(tokens[0], tokens[1])
    for row, places in zip(tokens, asked, strict=True):
        text = bytes(row.tolist()).decode()
        ends = [i for i, step in zip(places, np.diff(places, append=9999), strict=True) if step > 1]
        assert len(ends) == 16
        for end in ends:
            begin = next(i for i in range(end, 0, -1) if i - 1 not in places)
            value = "".join(c for c in text[begin + 1 : end + 2] if c.isdigit())
            assert 4 <= len(value) <= 8
            assert text.index(value) < begin
            assert text.count(value) == 2


def test_text_keeps_its_half():
    ids = np.full((1, 600), ord("."), np.int64)
    tokens, _ = planted(ids, encode, 100, 0)
    assert (tokens == ord(".")).sum() >= 300
    tokens, asked = planted(ids, encode, 0, 0)
    np.testing.assert_array_equal(tokens, ids)
    assert [len(places) for places in asked] == [0]


def test_positions_that_look_back_are_kept_first():
    asked = np.arange(300, 700)
    places = capture.positions(4096, 128, 0, 0, asked)
    assert len(places) == len(set(places.tolist())) == 128
    assert (np.diff(places) > 0).all()
    assert 32 <= np.isin(places, asked).sum() <= 64
    assert places.min() >= capture.FIRST_QUERY
    few = capture.positions(4096, 2048, 0, 0, asked[:50])
    assert np.isin(asked[:50], few).all()
