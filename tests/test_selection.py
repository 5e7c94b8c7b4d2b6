"""`Selection`: what it takes and what it refuses."""

import numpy as np
import pytest

import hata
from hata import Selection

COUNTS = ("bits", "k", "k_min", "sink", "recent", "dense_layers", "min_length")
SOUND = {"bits": 64, "k": 32}


def test_numbers_of_numpy_are_numbers():
    given = {name: np.int64(32) for name in COUNTS} | {"sink": np.uint8(3), "recent": np.int32(4)}
    found = Selection(**given, ratio=np.float32(0.5))
    assert found == Selection(32, 32, 0.5, 32, 3, 4, 32, 32)
    assert all(type(getattr(found, name)) is int for name in COUNTS)
    assert type(found.ratio) is float


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_count(name):
    for wrong in (True, np.True_, 32.0, np.float32(32), "32", [32]):
        with pytest.raises(hata.HataDTypeError, match=rf"Selection.{name}: got .* expected an int"):
            Selection(**{**SOUND, name: wrong})
    with pytest.raises(hata.HataShapeError, match=f"Selection.{name}: got -1"):
        Selection(**{**SOUND, name: -1})


def test_what_is_out_of_range():
    for wrong in (
        {"bits": 0},
        {"bits": 33},
        {"bits": 65568},
        {"k": 0},
        {"k": 2**31},
        {"sink": 20, "recent": 13},
    ):
        with pytest.raises(hata.HataShapeError, match="Selection"):
            Selection(**{**SOUND, **wrong})
    for ratio in (0.0, 1.5, float("nan"), -1):
        with pytest.raises(hata.HataShapeError, match=r"Selection.ratio: got"):
            Selection(**SOUND, ratio=ratio)
    for ratio in (True, "1", [0.5]):
        with pytest.raises(hata.HataDTypeError, match=r"Selection.ratio: got"):
            Selection(**SOUND, ratio=ratio)
