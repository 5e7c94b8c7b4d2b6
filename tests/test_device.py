"""Kinds of device beside CPU and CUDA: plug-ins, from the command to a timed call."""

import importlib.metadata
import json
import re
import textwrap
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

import hata
from hata import cli, device, registry
from hata.arrays import Layout, framework
from hata.errors import HataDeviceError, ProfileError
from hata.measure.clock import times
from hata.problem import Problem
from hata.profile import Entry, Measured, Profile, ProfileWarning, Timing, default_output

TOY = """
    from hata.backend import Backend
    from hata.device import Fingerprint, Kind

    class Toy(Kind):
        def fingerprint(self, index):
            return Fingerprint("toy", f"Toy {index or 0}", 3, sm=12, driver="1.5")

        def clock(self):
            return Clock()

    class Clock(list):
        blocks = True
        def add(self, calls, within=None):
            self.append(calls)
        def sample(self, index):
            return [7.0]

    class ToyBackend(Backend):
        name = "toys"
        devices = frozenset({"toy"})
        frameworks = frozenset({"layout"})
        def tunables(self, op, problem): return {"block": (32, 64)}
        def default(self, problem): return {"block": 32}
        def encode(self, call): raise NotImplementedError
        hamming_topk = sparse_attend = encode
"""
PROBLEM = Problem("encode", "toy", "float32", "float32", head_dim=16, bits=32)


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a kind of device: `plug_in(name, source, class name)`."""
    points = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HATA_PROFILE", raising=False)
    monkeypatch.setattr("hata.device.has_cuda", lambda: False)
    others = importlib.metadata.entry_points

    def entry_points(**asked):
        if asked.get("group", "").startswith("hata."):
            return [point for point in points if point.group == asked["group"]]
        return others(**asked)

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)

    def install(name, source, attribute, group=device.ENTRY_POINTS):
        module = f"{name}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        points.append(EntryPoint(name, f"{module}:{attribute}", group))
        forget()

    def forget():
        device._plugins.cache_clear()
        device.plugin.cache_clear()
        registry.reset()

    forget()
    yield install
    monkeypatch.undo()
    forget()


@pytest.fixture
def toy(plug_in):
    plug_in("toy", TOY, "Toy")
    plug_in("toys", TOY, "ToyBackend", registry.ENTRY_POINTS)


def facts(capsys):
    assert cli.main(["info", "--json"]) == 0
    return {one["device"]: one for one in json.loads(capsys.readouterr().out)["devices"]}


def test_a_kind_of_a_plug_in_serves_from_profile_to_clock(toy, capsys):
    assert device.default_device() == "toy"
    assert device.fingerprint("toy:1").name == "Toy 1"
    hashes = {"toys": {"encode": registry.load("toys").kernel_hash("encode")}}
    here = replace(device.fingerprint("toy"), kernels=hashes)
    (samples,) = times([lambda: None], "toy", 3)
    assert samples == [7.0] * 3
    entry = Entry("toys", PROBLEM, {"block": 64}, Timing(5.0, 5.0, 5.0), 9.0)
    measured = Measured("2026-12-01", "toy", 3, False, 1.0, 2, 0)
    written = Profile(here, measured, (entry,)).save(default_output(here))

    registry.reset()
    adapter = framework("x", Layout((1, 1, 1, 16), "float32", "toy"))
    found = registry.resolve(PROBLEM, adapter, "toy:0")
    assert (found.name, found.config(PROBLEM)) == ("toys", {"block": 64})
    assert registry.profile_in_force() == written

    told = facts(capsys)
    assert told["toy"]["description"] == "Toy 0 (3 cores)"
    assert told["toy"]["profile"].startswith(f"{written.path} (user cache, 1 entry")
    assert told["cpu"]["slug"].startswith("cpu-")


def test_a_profile_of_another_architecture_is_refused(toy):
    other = replace(device.fingerprint("toy"), sm=13)
    written = Profile(other, Measured("2026-12-01", "toy", 3, False, 1.0, 2, 0))
    with pytest.warns(ProfileWarning, match="not used: it is for Toy 0"):
        assert written.lookup("toys", "", PROBLEM, {}).config is None


def test_a_kind_that_is_not_installed_is_named(plug_in, tmp_path):
    with pytest.raises(HataDeviceError, match="got 'toy', expected 'cpu', 'cuda', or"):
        device.fingerprint("toy")
    here = replace(device.fingerprint("cpu"), device="toy")
    with pytest.raises(ProfileError, match="device: got toy, expected one of 'cpu', 'cuda'"):
        Profile(here, Measured("2026-12-01", "toy", 3, False, 1.0, 2, 0)).save(tmp_path / "p.yaml")
    assert device.default_device() == "cpu"


BROKEN = {
    "import fails": ("raise OSError('libtoy.so is absent')", "OSError: libtoy.so is absent"),
    "class is absent": ("", "AttributeError"),
    "class is no kind": ("class Toy: pass", "expected a subclass of hata.device.Kind"),
    "class is abstract": ("from hata.device import Kind\nclass Toy(Kind): pass", "abstract"),
    "fingerprint fails": (TOY.replace("index or 0", "1 / 0"), "failed: ZeroDivisionError"),
    "fingerprint of another kind": (TOY.replace('"toy"', '"toi"'), "expected a Fingerprint"),
    "device without a name": (TOY.replace('f"Toy {index or 0}"', "None"), "Fingerprint.name: got"),
    "device is absent": (
        TOY.replace(
            "return Fingerprint", "from hata import HataDeviceError as E; raise E('gone')#"
        ),
        r"none \(gone\)$",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kind_is_reported_and_harms_no_other(plug_in, capsys, fault):
    source, expected = BROKEN[fault]
    plug_in("toy", source, "Toy")
    told = facts(capsys)
    assert told["cpu"]["slug"].startswith("cpu-")
    assert re.search(expected, told["toy"]["description"])
    assert device.default_device() == "cpu"
    assert hata.get_backend() == "auto"
