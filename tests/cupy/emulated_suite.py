"""The conformance suite over the kernels on a CPU; `test_emulated` runs it in its own process."""

import importlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import hata
from hata import arrays, registry
from hata.testing import BackendSuite

sys.path.insert(0, str(Path(__file__).parent))
emulator = importlib.import_module("emulator")
cupy_backend = importlib.import_module("hata.backends.cupy")
defaults = importlib.import_module("hata.backends.cupy.defaults")
devices = importlib.import_module("hata.backends.cupy.device")
row = importlib.import_module("hata.backends.cupy.row")

# NUM_SPLITS, SYNC and the like follow from what the device may do.
DEVICES = {
    "cluster": {},
    "cooperative": {"architecture": 80, "clusters": 1},
    "spill": {"shared": 56 * 1024, "clusters": 2},
    "other": {},
}
MODE = os.environ.get("EMULATED", "cluster")
DEVICE = emulator.Device(**DEVICES[MODE])
if MODE in ("other", "spill"):
    # Positions that are attended to lie in global memory.
    row.MOST_LISTED = 0
devices.device_of = lambda name: DEVICE
# CPU tensors have no streams.
arrays.framework("x", torch.zeros(1)).stream = lambda index: 0


class EmulatedBackend(cupy_backend.CuPyBackend):
    name = "cupy-emulated"
    devices = frozenset({"cpu"})
    frameworks = frozenset({"numpy", "torch"})

    @classmethod
    def missing(cls):
        return None if emulator.compiler() else "there is no C++ compiler"

    def default(self, problem):
        config = dict(defaults.of(problem))
        if "threads" in config:
            config |= {"threads": 128, "num_splits": 4 if MODE == "cooperative" else 2}
        if MODE == "other":
            # What is not the default: single blocks, plain arithmetic, stages of keys and values.
            other = {"num_splits": 1, "binary_mma": False, "stages": 2}
            config |= {name: value for name, value in other.items() if name in config}
        return config


module = types.ModuleType("hata_emulated")
module.EmulatedBackend = EmulatedBackend
sys.modules["hata_emulated"] = module
registry.BUILT_IN["cupy-emulated"] = "hata_emulated:EmulatedBackend"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestEmulated(BackendSuite):
    backend = "cupy-emulated"
    device = "cpu"
    frameworks = ("numpy",)
    max_slots = 200
    max_head_dim = int(os.environ.get("EMULATED_DIM", "192"))
    max_examples = int(os.environ.get("EMULATED_EXAMPLES", "4"))

    @pytest.mark.parametrize("bits", [32, 64, 128, 256])
    @pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
    def test_splits_of_several_rounds(self, bits, group):
        """Rounds of scored keys alone, and those at the ends of splits, take different ways."""
        rng = np.random.default_rng(bits + group)
        q_codes = rng.integers(0, 256, (2, 2 * group, 1, bits // 8), dtype=np.uint8)
        for slots, lengths in ((700, (700, 333)), (1540, (1540, 1001))):
            codes = rng.integers(0, 256, (2, 2, slots, bits // 8), dtype=np.uint8)
            found = []
            for backend in (self.backend, "reference"):
                with hata.use_backend(backend):
                    found.append(
                        hata.hamming_topk(
                            q_codes,
                            codes,
                            40,
                            lengths=np.array(lengths, np.int32),
                            sink=3,
                            recent=5,
                        )
                    )
            np.testing.assert_array_equal(*found)

    def test_fault_30_negative_strides(self):
        pytest.skip("it asks a process of its own, which does not know this backend")
