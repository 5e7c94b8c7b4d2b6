"""Launchers without a GPU: what they would launch, on a device that writes it down."""

import importlib
import itertools
import re
import struct
from contextlib import contextmanager

import numpy as np
import pytest

import hata
from hata import registry
from hata.backend import use_config
from hata.problem import Problem

cupy_backend = importlib.import_module("hata.backends.cupy")
compiler = importlib.import_module("hata.backends.cupy.compiler")
devices = importlib.import_module("hata.backends.cupy.device")
encode = importlib.import_module("hata.backends.cupy.encode")
row = importlib.import_module("hata.backends.cupy.row")


class Recorder(devices.Device):
    """A device that writes down what it is told to do."""

    def __init__(self, architecture=90):
        devices.Described.__init__(self, architecture)
        self.launched, self.loaded = [], []

    def at_once(self, size, resident):
        return devices.Described.at_once(self, size, resident)

    def load(self, kernel, stream=0):
        self.loaded.append(kernel)

    def starter(self, launch, stream):
        return lambda data: self.launched.append((launch, data))


class Recorded(cupy_backend.CuPyBackend):
    name = "cupy-recorded"
    devices = frozenset({"cpu"})
    frameworks = frozenset({"numpy"})

    @classmethod
    def missing(cls):
        return None


@pytest.fixture
def device(monkeypatch):
    """The device that the ops run on in a test; `device.architecture` may be changed first."""
    found = Recorder()
    monkeypatch.setattr(devices, "device_of", lambda name: found)
    registry._forget()
    monkeypatch.setitem(registry._state.backends, "cupy-recorded", Recorded())
    with hata.use_backend("cupy-recorded"):
        yield found


def step(batch=1, heads=32, kv_heads=8, slots=4096, dim=128, bits=128, tokens=1):
    """Arguments of a decode step."""
    kv = np.zeros((batch, kv_heads, slots, dim), np.float16)
    return {
        "q": np.zeros((batch, heads, tokens, dim), np.float16),
        "keys": kv,
        "values": kv.copy(),
        "key_codes": np.zeros((batch, kv_heads, slots, bits // 8), np.uint8),
        "projection": np.zeros((kv_heads, dim, bits), np.float16),
        "k": 512,
    }


def fields(data, layout):
    """Fields of a packed argument by name."""
    names, codes = zip(*layout.items(), strict=True)
    return dict(
        zip(names, struct.unpack_from("<" + "".join(codes).replace("P", "Q"), data), strict=True)
    )


def declared(text):
    """Names and codes of the fields of a struct in a source, in order."""
    found = []
    for line in re.sub(r"//.*", "", text).split(";"):
        words = line.replace("const ", "").strip()
        if not words:
            continue
        kind, _, names = words.partition(" ")
        for name in names.split(","):
            name = name.strip()
            pointer = "*" in name or kind.endswith("*")
            code = "P" if pointer else {"i64": "q", "int": "i", "float": "f"}[kind]
            found.append((name.strip("* "), code))
    return found


def body(source, name):
    return re.search(rf"struct {name} \{{(.*?)\}};", compiler.read(source), re.DOTALL)[1]


AXES = {
    "b": "0", "h": "1", "t": "2", "s": "2",
}  # fmt: skip


def axis_name(name):
    """`keys_s` of a source is `keys_2` of a layout; weights have no batch."""
    stem, _, axis = name.rpartition("_")
    if stem.endswith(("projection", "bias")) and axis in ("h", "d"):
        return f"{stem}_{'hd'.index(axis)}"
    return f"{stem}_{AXES[axis]}" if axis in AXES and stem else name


def test_arguments_of_rows_are_those_of_the_source():
    expected = [(axis_name(name), code) for name, code in declared(body("row.cuh", "Params"))]
    assert list(row.LAYOUT.items()) == expected


def test_arguments_of_encode_are_those_of_the_source():
    arrays = declared(body("encode.cu", "Arrays"))
    job = [(axis_name(name), code) for name, code in declared(body("encode.cu", "Job"))]
    expected = [(f"{name}{i}", code) for i in (0, 1) for name, code in arrays]
    expected += [("lengths", "P"), ("starts", "P")]
    expected += [(f"{name}{i}", code) for i in (0, 1) for name, code in job]
    expected += [(name, "i") for name in ("kv_heads", "length_step", "start_step", "slots")]
    assert list(encode.LAYOUT.items()) == expected


@contextmanager
def using(op, **changes):
    """A configuration that differs from the default of a usual problem."""
    problem = Problem(op, "cpu", "float16", "float16", heads=32, kv_heads=8, head_dim=128,
                      value_dim=128, bits=128, k=512, slots=4096)  # fmt: skip
    with use_config("cupy-recorded", op, {**Recorded().default(problem), **changes}):
        yield


def test_a_decode_step_is_one_launch(device):
    arguments = step()
    hata.hash_attend(**arguments, fresh=1)
    [(launch, data)] = device.launched
    constants = dict(launch.kernel.constants)
    assert (constants["FUSED"], constants["FRESH"], constants["SAME_PROJECTION"]) == (1, 1, 1)
    assert launch.kernel.cluster == constants["NUM_SPLITS"] > 1
    assert launch.grid == 8 * constants["NUM_SPLITS"]
    assert not launch.pdl
    given = fields(data, row.LAYOUT)
    assert given["keys"] == arguments["keys"].__array_interface__["data"][0]
    assert (given["keys_0"], given["keys_1"], given["keys_2"]) == (0, 4096 * 128, 128)
    assert (given["k"], given["heads"], given["slots"]) == (512, 8, 4096)
    assert given["lse"] == given["lengths"] == given["scores"] == 0


def test_key_norms_are_counted_in_three_rounds(device):
    arguments = step()
    norms = np.zeros(arguments["key_codes"].shape[:3], np.float16)
    hata.hash_attend(**arguments, key_norms=norms, fresh=1)
    [(launch, _)] = device.launched
    assert dict(launch.kernel.constants)["DIGITS"] == 3


def test_given_codes_need_no_encode(device):
    arguments = step()
    q_codes = np.zeros((1, 16, 1, 16), np.uint8)
    hata.hash_attend(**arguments, q_codes=q_codes)
    [(launch, data)] = device.launched
    constants = dict(launch.kernel.constants)
    assert (constants["FUSED"], constants["CODE_GROUP"], constants["GROUP"]) == (0, 2, 4)
    assert fields(data, row.LAYOUT)["q_codes"] == q_codes.__array_interface__["data"][0]


def test_long_projections_are_a_launch_of_their_own(device):
    with using("hash_attend", cluster="cluster"):
        hata.hash_attend(**step(bits=512), fresh=1)
    launches = [launch for launch, _ in device.launched]
    assert [launch.kernel.name for launch in launches] == ["encode", "hash_attend"]
    assert [launch.pdl for launch in launches] == [False, True]


def test_old_gpus_meet_through_global_memory(device):
    device.architecture, device.clusters = 80, 1
    hata.hash_attend(**step(), fresh=1)
    [(launch, data)] = device.launched
    constants = dict(launch.kernel.constants)
    assert (constants["SYNC"], launch.kernel.cluster, launch.kernel.cooperative) == (2, 1, True)
    given = fields(data, row.LAYOUT)
    # An area of every block, of whole lines, and a counter of every row behind them.
    assert constants["WORKSPACE_BYTES"] % row.LINE == 0
    assert given["arrivals"] - given["exchange"] >= launch.grid * constants["WORKSPACE_BYTES"]


# The latter: weights leave less room for positions than histograms do.
@pytest.mark.parametrize(
    ("sizes", "k"),
    [({"slots": 2**13, "kv_heads": 4}, 512),
     ({"slots": 2**15, "kv_heads": 8, "dim": 64, "bits": 256}, 8192)],
)  # fmt: skip
def test_blocks_that_wait_for_one_another_all_find_room(device, sizes, k):
    """Whatever is asked for, and where histograms leave room for fewer blocks than planned."""
    for architecture, norms in itertools.product((80, 86, 90), (False, True)):
        described = devices.Described(architecture)
        device.architecture, device.clusters = architecture, described.clusters
        device.sms, device.shared = described.sms, described.shared
        registry._forget()
        device.launched.clear()
        arguments = {**step(batch=4, heads=64, **sizes), "k": k}
        if norms:
            arguments["key_norms"] = np.zeros(arguments["key_codes"].shape[:3], np.float16)
        for parts, threads in itertools.product((0, 4, 8, 16, 32), (128, 256, 512)):
            with using("hash_attend", num_splits=parts, threads=threads, cluster="cooperative"):
                for fresh in (0, 1):
                    hata.hash_attend(**arguments, fresh=fresh)
        rows = [launch for launch, _ in device.launched if launch.kernel.name == "hash_attend"]
        for launch in rows:
            room = (device.shared + 1024) // (launch.shared + 2048 + 1024)
            at_once = min(room, dict(launch.kernel.constants)["BLOCKS_PER_SM"])
            if launch.kernel.cooperative:
                assert launch.grid <= device.sms * at_once
        assert any(launch.kernel.cooperative for launch in rows)


def test_positions_lie_in_shared_memory_where_there_is_room(device):
    for k, joined, listed in ((512, "cluster", True), (4096, "cluster", True),
                              (512, "cooperative", True), (2**15, "cluster", False)):  # fmt: skip
        with using("hash_attend", cluster=joined, num_splits=4):
            hata.hash_attend(**{**step(slots=2**16), "k": k}, fresh=1)
        launch = device.launched[-1][0]
        constants = dict(launch.kernel.constants)
        assert bool(constants["POSITIONS_AT"]) == listed
        if listed:
            # A share of the budget in whole tiles, and half more, behind what others may see.
            assert (
                constants["EXCHANGE_BYTES"]
                >= constants["POSITIONS_AT"] + (k // 4 * 3 // 2 + 32) * 4
            )
        for place in (
            "EXCHANGE_BYTES",
            "QUERY_BYTES",
            "HISTOGRAM_BYTES",
            "RING_BYTES",
            "STAGES_AT",
        ):
            assert constants[place] % row.LINE == 0, place
            assert constants["POSITIONS_AT"] % 16 == 0


def test_a_launch_of_blocks_that_wait_for_one_another_starts_early_for_none(device):
    with using("hash_attend", num_splits=4, cluster="cooperative", fused=False):
        hata.hash_attend(**step(), fresh=1)
    launches = [launch for launch, _ in device.launched]
    assert [launch.kernel.name for launch in launches] == ["encode", "hash_attend"]
    assert [launch.kernel.cooperative for launch in launches] == [False, True]
    assert [dict(launch.kernel.constants)["PDL"] for launch in launches][1] == 0
    assert not launches[1].pdl


def test_keys_to_select_by_spill_where_shared_memory_is_small(device):
    q_codes = np.zeros((1, 4, 1, 16), np.uint8)
    small = np.zeros((1, 1, 4096, 16), np.uint8)
    large = np.broadcast_to(small[:, :, :1], (1, 1, 2**22, 16))
    for codes in (small, large):
        hata.hamming_topk(q_codes, codes, 9)
    spilled = [dict(launch.kernel.constants)["SPILL"] for launch, _ in device.launched]
    assert spilled == [0, 1]
    assert all(launch.shared <= device.shared for launch, _ in device.launched)


def test_a_plan_serves_other_arrays(device):
    for turn in range(3):
        arguments = step()
        hata.hash_attend(**arguments)
        assert len(registry.in_force()[1].routes) == 1
        given = fields(device.launched[turn][1], row.LAYOUT)
        assert given["q"] == arguments["q"].__array_interface__["data"][0]
    # One array in two roles of a call, then two.
    arguments = step()
    hata.hash_attend(**{**arguments, "values": arguments["keys"]})
    hata.hash_attend(**arguments)
    given = fields(device.launched[-1][1], row.LAYOUT)
    assert given["values"] == arguments["values"].__array_interface__["data"][0]


def test_a_growing_cache_compiles_nothing_new(device):
    for slots in (3000, 3001, 3500, 4096):
        hata.hash_attend(**step(slots=slots), fresh=1)
    assert len({launch.kernel for launch, _ in device.launched}) == 1


def test_prepare_loads_and_launches_nothing(device):
    hata.prepare("hash_attend", **step(), fresh=1)
    assert not device.launched
    assert device.loaded
    hata.hash_attend(**step(), fresh=1)
    assert [launch.kernel for launch, _ in device.launched] == device.loaded


SIZES = {
    "many heads": {"heads": 128, "kv_heads": 8},
    "long codes": {"heads": 16, "kv_heads": 1, "bits": 512},
    "norms": {"heads": 8, "kv_heads": 8, "bits": 512, "norms": True},
    "latent": {"heads": 16, "kv_heads": 1, "dim": 576, "bits": 256},
}


@pytest.mark.parametrize("threads", [128, 256, 512, 1024])
@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("sizes", SIZES)
def test_shared_memory_fits(device, sizes, threads, architecture):
    described = devices.Described(architecture)
    device.architecture, device.clusters = architecture, described.clusters
    device.sms, device.shared = described.sms, described.shared
    sizes = dict(SIZES[sizes])
    norms = sizes.pop("norms", False)
    arguments = step(batch=1, slots=2**13, **sizes)
    if norms:
        arguments["key_norms"] = np.zeros(arguments["key_codes"].shape[:3], np.float16)
    for parts, joined in itertools.product((0, 1, 2, 4, 8, 16, 32), ("auto", "cooperative")):
        with using("hash_attend", num_splits=parts, threads=threads, cluster=joined, prefetch=16):
            hata.hash_attend(**arguments)
    for launch, _ in device.launched:
        assert launch.grid % launch.kernel.cluster == 0
        assert launch.kernel.cluster <= described.clusters
        # What kernels declare statically comes on top.
        assert launch.shared + 2048 <= described.shared


def test_parts_are_as_many_as_find_room(device):
    """A cluster lies within a group of multiprocessors, so not all of them make whole ones."""
    codes = np.broadcast_to(np.zeros((1, 8, 1, 16), np.uint8), (1, 8, 2**17, 16))
    for fit, expected in (({16: 8}, 16), ({9: 9, 10: 7, 16: 7}, 9), ({}, 1)):
        device.at_once = lambda size, resident, fit=fit: fit.get(size, 7)
        registry._forget()
        with using("hamming_topk", cluster="cluster"):
            hata.hamming_topk(np.zeros((1, 32, 1, 16), np.uint8), codes, 2048)
        launch = device.launched[-1][0]
        assert dict(launch.kernel.constants)["NUM_SPLITS"] == launch.kernel.cluster == expected


def test_few_long_rows_meet_through_global_memory(device):
    """As an H200 has it: 9 clusters of 9 blocks, 132 multiprocessors."""
    device.sms = 132
    device.at_once = lambda size, resident: {1: 132, 2: 66}.get(size, 9 * (size <= 9))
    for batch, slots, joined, parts in (
        (1, 2**14, 1, 9), (1, 2**15, 2, 16), (1, 2**19, 2, 16), (4, 2**17, 2, 4), (5, 2**17, 1, 2),
    ):  # fmt: skip
        registry._forget()
        codes = np.broadcast_to(np.zeros((1, 8, 1, 16), np.uint8), (batch, 8, slots, 16))
        hata.hamming_topk(np.zeros((batch, 32, 1, 16), np.uint8), codes, 512)
        constants = dict(device.launched[-1][0].kernel.constants)
        assert (constants["SYNC"], constants["NUM_SPLITS"]) == (joined, parts)
