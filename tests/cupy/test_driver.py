"""What the driver is told: contexts, attributes, launches. A fake library writes it down."""

import ctypes
import importlib
import re

import pytest

from hata.errors import HataCaptureError, KernelError

device_module = importlib.import_module("hata.backends.cupy.device")
driver = importlib.import_module("hata.backends.cupy.driver")
compiler = importlib.import_module("hata.backends.cupy.compiler")

ATTRIBUTES = {driver.MAJOR: 9, driver.MINOR: 0, driver.SMS: 132, driver.SHARED: 227 * 1024}


class Library:
    """Answers like the driver, and keeps count of contexts."""

    def __init__(self):
        self.calls, self.contexts, self.capturing, self.failures = [], [], False, []
        self.launched, self.mode = [], 0

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            return 0

        return call

    def cuDeviceGetAttribute(self, value, number, device):
        value._obj.value = ATTRIBUTES[number]
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        self.contexts.pop()
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode):
        self.mode, mode._obj.value = mode._obj.value, self.mode
        return 0

    def cuModuleLoadData(self, module, code):
        assert self.contexts, "no context"
        self.calls += [code, f"loaded in mode {self.mode}"]
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 77
        return 0

    def cuStreamIsCapturing(self, stream, status):
        status._obj.value = int(self.capturing)
        return 0

    def cuOccupancyMaxActiveClusters(self, found, function, config):
        assert self.contexts, "no context"
        self.calls.append("asked")
        found._obj.value = 9
        return 0

    def cuLaunchKernelEx(self, address, function, arguments, extra):
        if self.failures:
            return self.failures.pop()
        config = driver.LaunchConfig.from_address(address)
        attributes = {
            config.attributes[i].id: config.attributes[i].value for i in range(config.count)
        }
        data = ctypes.string_at(ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0], 4)
        self.launched.append(
            {
                "grid": tuple(config.grid),
                "block": tuple(config.block),
                "shared": config.shared,
                "stream": config.stream,
                "cluster": tuple(attributes[4].dims) if 4 in attributes else None,
                "pdl": attributes[6].flag if 6 in attributes else 0,
                "function": function.value,
                "data": data,
            }
        )
        return 0

    def cuDriverGetVersion(self, found):
        found._obj.value = 13010
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = b"because"
        return 0


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(driver, "library", lambda: found)
    monkeypatch.setattr(compiler, "cubin", lambda *key: repr(key).encode())
    return found


@pytest.fixture
def device(library):
    return device_module.Device(0)


KERNEL = device_module.Kernel("row", (("PARTS", 4),), 256, 4)


def test_what_a_device_is(device):
    assert (device.architecture, device.sms, device.shared) == (90, 132, 227 * 1024)
    assert device.clusters == 16


def start(device, stream=0, kernel=KERNEL, grid=4):
    device_module.Launch(device, kernel, grid, 0, False).of(1, b"")((1,), stream)


def test_a_launch(device, library):
    # Two addresses, then the numbers.
    launch = device_module.Launch(device, KERNEL, 64, 5000, True).of(2, b"numbers.")
    launch((0x64636261, 2), 42)
    launch((0x6C6B6A69, 2), 42)
    start(device, 0, KERNEL._replace(cluster=1), grid=3)
    first, second, third = library.launched
    assert first == {
        "grid": (64, 1, 1),
        "block": (256, 1, 1),
        "shared": 5000,
        "stream": 42,
        "cluster": (4, 1, 1),
        "pdl": 1,
        "function": 77,
        "data": b"abcd",
    }
    assert second == {**first, "data": b"ijkl"}
    assert (third["cluster"], third["pdl"], third["stream"]) == (None, 0, None)


def test_contexts_are_left_as_they_were(device, library):
    device.load(KERNEL)
    device.at_once(9, 1)
    assert library.contexts == []


def test_a_kernel_is_loaded_once(device, library):
    for _ in range(3):
        device.load(KERNEL)
    assert library.calls.count(repr(("row", (("PARTS", 4),), 90)).encode()) == 1


def test_a_thread_without_a_context(device, library):
    library.failures = [201]
    start(device)
    assert library.calls.count("cuCtxSetCurrent") == 1
    assert len(library.launched) == 1


def test_a_launch_that_fails_says_why(device, library):
    library.failures = [700]
    with pytest.raises(KernelError, match=r"launch row \(700: because\)"):
        start(device)


def test_nothing_is_loaded_while_a_graph_is_captured(device, library):
    library.capturing = True
    with pytest.raises(HataCaptureError, match=r"hata\.prepare"):
        device.load(KERNEL, 5)
    library.capturing = False
    device.load(KERNEL, 5)
    library.capturing = True
    start(device, 5)


def test_the_driver_is_asked_once_how_many_clusters_fit(device, library):
    assert [device.at_once(9, 1) for _ in range(3)] == [9] * 3
    assert library.calls.count("asked") == 1
    # The kernel that it is asked about is no part of a graph that the thread captures.
    assert "loaded in mode 2" in library.calls
    assert library.mode == 0
    # What is no cluster needs no asking.
    assert device.at_once(1, 2) == 264
    assert device.at_once(32, 1) == 4


@pytest.mark.gpu
def test_a_gpu_is_asked_in_a_capture():
    """A call that meets a cluster size for the first time must get as far as its own error."""
    torch = pytest.importorskip("torch")
    fresh = device_module.Device(torch.cuda.current_device())
    size = min(fresh.clusters, 4)
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        found = fresh.at_once(size, 1)
    graph.replay()
    torch.cuda.synchronize()
    assert x.item() == 1
    assert found == device_module.Device(torch.cuda.current_device()).at_once(size, 1) > 0


@pytest.mark.parametrize(
    ("attributes", "nvrtc", "reason"),
    [
        ({}, (13, 0), None),
        ({}, (13, 4), None),
        ({}, (14, 0), "NVRTC 14 .* CUDA 13; update the driver"),
        ({driver.MAJOR: 7, driver.MINOR: 5}, (13, 0), "capability 7.5, expected 8.0"),
    ],
)
def test_what_is_missing(library, monkeypatch, attributes, nvrtc, reason):
    pytest.importorskip("cupy", reason="the CuPy backend needs it")
    device_module.device.cache_clear()
    monkeypatch.setattr("hata.device.has_cuda", lambda: True)
    monkeypatch.setattr(compiler, "version", lambda: nvrtc)
    for number, value in attributes.items():
        monkeypatch.setitem(ATTRIBUTES, number, value)
    found = importlib.import_module("hata.backends.cupy").CuPyBackend.missing()
    device_module.device.cache_clear()
    assert (found is None) if reason is None else re.search(reason, found)
