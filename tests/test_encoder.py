"""Encoder files: what they hold, how they are made, and what is refused."""

import copy
import json
import pickle
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hata
from hata.encoder import Hidden, ModelShape, QueryHash
from hata.encoder.layer import features

CONFIG = SimpleNamespace(
    model_type="llama",
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
)

# `Encoder.random(CONFIG, 64, seed=1).projection(2)[1, :2, :2]`
PINNED = [[-0.10888671875, -0.05712890625], [-0.087890625, 0.002777099609375]]


@pytest.fixture
def encoder():
    """One with a dense layer and a bias."""
    made = hata.Encoder.random(CONFIG, 64, seed=3)
    projections = (None, *made.projections[1:])
    biases = (None, None, np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64))
    return hata.Encoder(made.shape, 64, projections, biases, True, {"recipe": "test", "steps": 3})


@pytest.fixture
def path(encoder, tmp_path):
    encoder.save(tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def rewritten(path, **changes):
    """Change the metadata of an encoder file; None removes a field."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"] | changes
    metadata = {name: value for name, value in metadata.items() if value is not None}
    save_file(load_file(path), path, metadata=metadata)
    return path


def test_saved_and_loaded_is_equal(encoder, path):
    loaded = hata.Encoder.load(path)
    for name in ("shape", "bits", "key_norms", "made", "dense_layers"):
        assert getattr(loaded, name) == getattr(encoder, name)
    assert loaded.dense_layers == (0,)
    for layer in (1, 2):
        assert np.array_equal(loaded.projection(layer), encoder.projection(layer))
    assert loaded.bias(1) is None
    assert np.array_equal(loaded.bias(2, 32), encoder.bias(2)[:, :32])
    loaded.check(CONFIG)


def test_metadata_is_strings_that_anyone_can_read(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + size])["__metadata__"] == {
        "format": "hata.encoder/1",
        "model_type": "llama",
        "num_layers": "3",
        "heads": "4",
        "kv_heads": "2",
        "head_dim": "48",
        "bits": "64",
        "key_norms": "true",
        "dense_layers": "[0]",
        "made": '{"recipe": "test", "steps": 3}',
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    made = hata.Encoder.random(CONFIG, 64)
    halves = tuple(p.astype(dtype) for p in made.projections)
    hata.Encoder(made.shape, 64, halves).save(tmp_path / "half.safetensors")
    loaded = hata.Encoder.load(tmp_path / "half.safetensors")
    assert loaded.projection(0).dtype == dtype
    assert np.array_equal(loaded.projection(2), halves[2])


def with_dtype(path, dtype, width):
    """Rename the dtype of all tensors in the header of an encoder file of float16."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["dtype"] = dtype
            entry["shape"][-1] = entry["shape"][-1] * 2 // width
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return path


@pytest.fixture
def half_path(tmp_path):
    made = hata.Encoder.random(CONFIG, 64)
    halves = tuple(p.astype(np.float16) for p in made.projections)
    hata.Encoder(made.shape, 64, halves).save(tmp_path / "half.safetensors")
    return tmp_path / "half.safetensors"


def test_bfloat16_files_where_nothing_imported_ml_dtypes(half_path):
    code = "import sys, hata; print(hata.Encoder.load(sys.argv[1]).projection(0).dtype)"
    command = [sys.executable, "-c", code, str(with_dtype(half_path, "BF16", 2))]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "bfloat16"


def test_bfloat16_files_where_ml_dtypes_is_not_installed(half_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(hata.EncoderError, match="pip install ml_dtypes"):
        hata.Encoder.load(with_dtype(half_path, "BF16", 2))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_files_of_dtypes_that_numpy_has_not(half_path, dtype):
    with pytest.raises(hata.EncoderError, match="known dtypes"):
        hata.Encoder.load(with_dtype(half_path, dtype, 1))


@pytest.mark.parametrize("bits", [32, 64, 96, 256])
def test_random_blocks_are_orthogonal(bits):
    projection = hata.Encoder.random(CONFIG, bits).projection(1)
    assert projection.shape == (2, 48, bits)
    assert projection.dtype == np.float32
    for head in projection:
        for start in range(0, bits, 48):
            block = head[:, start : start + 48].astype(np.float64)
            np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=4e-3)


def test_random_is_the_same_on_every_machine():
    """The values, not only their repetition: written down once."""
    made = hata.Encoder.random(CONFIG, 64, seed=1)
    assert made.projection(2)[1, :2, :2].tolist() == PINNED
    again = hata.Encoder.random(CONFIG, 64, seed=1)
    other = hata.Encoder.random(CONFIG, 64, seed=2)
    for layer in range(3):
        assert np.array_equal(made.projection(layer), again.projection(layer))
        assert not np.array_equal(made.projection(layer), other.projection(layer))


def test_random_survives_bfloat16():
    import ml_dtypes

    projection = hata.Encoder.random(CONFIG, 64).projection(0)
    assert np.array_equal(projection, projection.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_codes_nest():
    wide, narrow = (hata.Encoder.random(CONFIG, bits) for bits in (256, 96))
    assert np.array_equal(wide.projection(1, 96), narrow.projection(1))


def test_configurations_of_every_kind():
    text = SimpleNamespace(n_layer=2, n_head=4, hidden_size=64)
    many = SimpleNamespace(get_text_config=lambda: text)
    assert ModelShape.of(many) == ModelShape("", 2, 4, 4, 16)
    assert ModelShape.of({**vars(CONFIG), "head_dim": None, "hidden_size": 64}).head_dim == 16
    latent = SimpleNamespace(**vars(CONFIG), qk_head_dim=24)
    assert ModelShape.of(latent).head_dim == 24
    with pytest.raises(hata.EncoderError, match="num_layers = None"):
        hata.Encoder.random(SimpleNamespace(num_attention_heads=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_layers = 1000000000, expected .* to 10000"),
        ({"num_attention_heads": 10**9}, "heads = 1000000000"),
        ({"head_dim": 10**9}, "head_dim = 1000000000"),
        ({"head_dim": None, "hidden_size": "64"}, "head_dim = None"),
        ({"head_dim": None, "hidden_size": 64, "num_attention_heads": "4"}, "heads = '4'"),
        ({"num_attention_heads": 5}, "heads = 5 and kv_heads = 2"),
        ({"num_key_value_heads": [2, 2]}, "kv_heads = a list"),
        ({"num_key_value_heads": -2}, "kv_heads = -2"),
        ({"model_type": {"a": 1}}, "model_type = a dict"),
    ],
)
def test_configurations_that_make_no_sense(change, message):
    with pytest.raises(hata.EncoderError, match=message):
        ModelShape.of({**vars(CONFIG), **change})


@pytest.mark.parametrize("bits", [0, 31, 40, True, 64.0])
def test_bits_are_multiples_of_32(bits):
    with pytest.raises(hata.EncoderError, match="positive multiple of 32"):
        hata.Encoder.random(CONFIG, bits)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "qwen2", "model_type 'llama' against 'qwen2'"),
        ("num_attention_heads", 8, "heads 4 against 8"),
        ("num_key_value_heads", 4, "kv_heads 2 against 4"),
        ("head_dim", 64, "head_dim 48 against 64"),
        ("num_hidden_layers", 4, "num_layers 3 against 4"),
    ],
)
def test_fault_66_encoder_of_another_model(encoder, field, value, message):
    with pytest.raises(hata.EncoderError, match=message):
        encoder.check(SimpleNamespace(**{**vars(CONFIG), field: value}))


def test_fault_66_other_bits(encoder):
    with pytest.raises(hata.EncoderError, match="got 128, expected at most 64"):
        encoder.projection(1, 128)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_fault_66_truncated_file(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(hata.EncoderError, match=r"encoder\.safetensors.*cannot be read"):
        hata.Encoder.load(path)


def test_no_kv_heads_are_not_those_that_nobody_named():
    sizes = {"num_layers": 2, "heads": 4, "head_dim": 32}
    assert hata.Encoder.random(sizes, 64).shape.kv_heads == 4
    with pytest.raises(hata.EncoderError, match="kv_heads = 0"):
        hata.Encoder.random({**sizes, "kv_heads": 0}, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hata.encoder/3"}, "format 'hata.encoder/3', expected 'hata.encoder/1'"),
        ({"format": None}, "format 'none'"),
        ({"bits": None}, "metadata that is absent or malformed"),
        ({"bits": "many"}, "metadata that is absent or malformed"),
        ({"bits": "0x40"}, "malformed .*no count"),
        ({"heads": "2_0"}, "malformed .*no count"),
        ({"heads": "+4"}, "malformed .*no count"),
        ({"kv_heads": "٢"}, "malformed .*no count"),
        ({"num_layers": " 4"}, "malformed .*no count"),
        ({"key_norms": "yes"}, "metadata that is absent or malformed"),
        ({"made": "{"}, "metadata that is absent or malformed"),
        ({"bits": "96"}, r"layers.1.projection: got shape \(2, 48, 64\), expected \(2, 48, 96\)"),
        ({"num_layers": "2"}, "tensors .*layers.2.bias"),
        ({"format": "x" * 100000}, "format 'x*[.][.][.], expected"),
        ({"bits": "x" * 100000}, "malformed"),
        ({"dense_layers": json.dumps([0] * 100000)}, "declares the dense layers .*, 0"),
        ({"dense_layers": "[]"}, r"declares the dense layers \[\]"),
        ({"num_layers": "4"}, r"declares the dense layers \[0\] but .* \[0, 3\]"),
    ],
)
def test_fault_66_file_that_contradicts_itself(path, changes, message):
    with pytest.raises(hata.EncoderError, match=message) as raised:
        hata.Encoder.load(rewritten(path, **changes))
    assert len(str(raised.value)) < len(str(path)) + 500


def test_fault_66_wrong_arrays(encoder):
    shape, projections = encoder.shape, encoder.projections
    for arguments, message in (
        ((shape, 64, projections[:2]), "got 2 layers, expected 3"),
        ((shape, 64, projections, encoder.biases[:1]), "got 1 layers, expected 3"),
        ((shape, 32, projections), r"got shape \(2, 48, 64\), expected \(2, 48, 32\)"),
        ((shape, 64, projections, (encoder.biases[2], None, None)), "a bias but no projection"),
        ((shape, 64, [None, *(p.astype(int) for p in projections[1:])]), "int64"),
    ):
        with pytest.raises(hata.EncoderError, match=message):
            hata.Encoder(*arguments)


PROJECTION = np.ones((2, 48, 64), np.float32)
NONSENSE = {
    "shape": (None, {}, CONFIG),
    "projections": (None, 3, "abc", ([[1.0]], None, None), (None, None, "a")),
    "biases": (3, ("a", None, None), (None, [0.0] * 64, None)),
    "queries": (3, ("a", None, None), (PROJECTION, None, None)),
    "hidden": (3, (1, 2, 3), ((), ((PROJECTION,),), ()), ((("a", "b"),), (), ())),
    "made": (None, 3, "abc", {"a": object()}, {"a": 1, 2: "b"}),
    "key_norms": ("no", None, 1),
    "bits": ("64", None, 64.0, 2**40),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_arguments_of_another_kind(encoder, name):
    given = {field: getattr(encoder, field) for field in NONSENSE}
    hata.Encoder(**given)
    for wrong in NONSENSE[name]:
        # An entry's error names the entry: `layers.0.bias` for `biases`.
        with pytest.raises(hata.EncoderError, match=name[:4]):
            hata.Encoder(**{**given, name: wrong})


def test_query_hashes_of_another_kind():
    for wrong in (None, "a", [[1.0]]):
        with pytest.raises(hata.EncoderError, match=r"query_projection: got .* NumPy array"):
            QueryHash(wrong)
    with pytest.raises(hata.EncoderError, match=r"query_bias: got builtins\.str"):
        QueryHash(PROJECTION, "a")
    for wrong in (3, (1,), ((1, 2),), ((PROJECTION,) * 3,)):
        with pytest.raises(hata.EncoderError, match="query_hidden"):
            QueryHash(PROJECTION, None, wrong)


def test_numbers_of_numpy_are_numbers(path):
    made = hata.Encoder.random(CONFIG, np.int64(64), np.int32(1))
    assert made.projection(np.int64(2), np.int64(32))[1, :2, :2].tolist() == PINNED
    made.save(path)
    for wrong in (-1, 1.5, "1", None):
        with pytest.raises(hata.EncoderError, match="seed: got"):
            hata.Encoder.random(CONFIG, seed=wrong)
    for wrong in ("0", None, 0.0):
        with pytest.raises(hata.EncoderError, match=r"layer: got .* whole number"):
            made.projection(wrong)


def test_paths_as_users_write_them(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    encoder.save("~/encoder.safetensors")
    assert (tmp_path / "encoder.safetensors").is_file()
    assert hata.Encoder.load("~/encoder.safetensors").bits == 64
    for wrong in ("", None, 3, b"encoder.safetensors"):
        for use in (encoder.save, hata.Encoder.load):
            with pytest.raises(hata.EncoderError, match=r"path: got .* expected the path"):
                use(wrong)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".PICKLE", ".ckpt"])
def test_fault_67_pickle_is_refused_unread(tmp_path, suffix):
    path = tmp_path / f"encoder{suffix}"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(hata.EncoderError, match=r"pickle.*hata convert .*encoder"):
        hata.Encoder.load(path)


def test_absent_file(tmp_path):
    with pytest.raises(hata.EncoderError, match=r'not a file.*"random"'):
        hata.Encoder.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_save_leaves_the_old_file(encoder, path, monkeypatch, name):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(name, fail)
    with pytest.raises(hata.EncoderError, match=r"encoder\.safetensors.*no space left"):
        encoder.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name", ["", "file.txt/e", "/proc/none/e", "nul\0e", "e" * 300, "folder"], ids=repr
)
def test_names_that_cannot_be_written(encoder, tmp_path, name):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.iterdir())
    out = tmp_path / f"{name}.safetensors" if name else tmp_path
    with pytest.raises(hata.EncoderError, match=r"path: got .*"):
        encoder.save(out)
    assert sorted(tmp_path.iterdir()) == before


def test_equal_encoders_are_equal_files(encoder, path, tmp_path):
    """The library's own order of the metadata differs between saves."""
    other = tmp_path / "other.safetensors"
    for _ in range(5):
        made = dict(reversed(encoder.made.items()))
        copied = hata.Encoder(encoder.shape, 64, encoder.projections, encoder.biases, True, made)
        copied.save(other)
        assert other.read_bytes() == path.read_bytes()
        hata.Encoder.load(other).save(other)
        assert other.read_bytes() == path.read_bytes()
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert size % 8 == 0
    header = json.loads(raw[8 : 8 + size])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_only_safetensors_are_written(encoder, tmp_path):
    with pytest.raises(hata.EncoderError, match=r"ends in \.safetensors"):
        encoder.save(tmp_path / "encoder.pt")


def test_dense_layer_has_no_projection(encoder):
    with pytest.raises(hata.EncoderError, match="got 0, which this encoder leaves dense"):
        encoder.projection(0)
    with pytest.raises(hata.EncoderError, match="got 3, expected 0 to 2"):
        encoder.projection(3)


def test_copies_and_pickles(encoder):
    assert copy.deepcopy(encoder) is encoder
    assert pickle.loads(pickle.dumps(encoder)).shape == encoder.shape
    assert "bits=64" in repr(encoder)


def test_no_framework_is_imported(path):
    code = (
        "import sys, hata; hata.Encoder.load(sys.argv[1]);"
        "print([m for m in ('torch', 'jax', 'transformers', 'ml_dtypes') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": "999999999999"},
        {"num_layers": "0"},
        {"made": "null"},
        {"made": "[[1, 2]]"},
        {"made": "[" * 100000},
        {"dense_layers": "7"},
        {"dense_layers": '["0"]'},
        {"made": '{"recipe": "listwise", "settings": "x"}'},
        {"made": '{"settings": [1]}'},
        {"made": '{"settings": null}'},
        {"made": '{"recipe": ["a"]}'},
        {"made": '{"recipe": 5}'},
        {"made": '{"recipe": ""}'},
        {"made": json.dumps({"recipe": "\x1b[31mred"})},
        {"made": json.dumps({"recipe": "two\nlines"})},
        {"made": json.dumps({"recipe": "a" * 101})},
        {"heads": "0"},
        {"heads": "-4"},
        {"heads": "6"},
        {"kv_heads": "0"},
        {"head_dim": "9" * 30},
        {"model_type": "\x1b[31mred"},
    ],
)
def test_hostile_metadata(tmp_path, change):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "encoder.safetensors"
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    hata.Encoder.random(config, bits=32).save(path)
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {**file.metadata(), **change}
    save_file(tensors, path, metadata=header)
    with pytest.raises(hata.EncoderError, match="malformed") as raised:
        hata.Encoder.load(path)
    assert str(raised.value).isprintable()
    assert str(path) in str(raised.value)


def test_numbers_that_are_none():
    shape = hata.encoder.ModelShape("", 1, 1, 1, 16)
    bad = np.full((1, 16, 32), np.nan, np.float32)
    with pytest.raises(hata.EncoderError, match="NaN"):
        hata.Encoder(shape, 32, (bad,))
    with pytest.raises(hata.EncoderError, match="is not a file"):
        hata.Encoder.load("a" * 5000)


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.fixture
def rich():
    """Query projections and hidden layers; the first layer dense, the last one plain."""
    made = hata.Encoder.random(CONFIG, 64, seed=3)
    query = QueryHash(normal(8, 32, 64), normal(8, 64), (Hidden(normal(8, 48, 32), normal(8, 32)),))
    return hata.Encoder(
        made.shape,
        64,
        (None, normal(2, 16, 64), made.projections[2]),
        (None, normal(2, 64), None),
        queries=(None, query, QueryHash(normal(4, 48, 64))),
        hidden=((), (Hidden(normal(2, 48, 16), normal(2, 16)),), ()),
    )


def test_query_projections_and_hidden_layers_are_saved(rich, tmp_path):
    path = tmp_path / "rich.safetensors"
    rich.save(path)
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    assert header["__metadata__"]["format"] == "hata.encoder/2"
    assert "layers.1.query_hidden.0.weight" in header
    loaded = hata.Encoder.load(path)
    assert loaded.query(0) is None
    for name in ("projection", "bias"):
        np.testing.assert_array_equal(getattr(loaded.query(1), name), getattr(rich.query(1), name))
    np.testing.assert_array_equal(
        loaded.query(1, 32).projection, rich.queries[1].projection[..., :32]
    )
    np.testing.assert_array_equal(loaded.hidden[1][0].weight, rich.hidden[1][0].weight)
    assert loaded.query(2).bias is None


def without(path, *names, **renamed):
    """Rewrite a file with some tensors left out or renamed."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
    tensors = {name: x for name, x in load_file(path).items() if name not in names}
    for old, new in renamed.items():
        tensors[new] = tensors.pop(old.replace("__", "."))
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("left_out", "renamed", "message"),
    [
        (["layers.1.query_projection"], {}, "parts of layers.1.query_projection"),
        (["layers.1.hidden.0.bias"], {}, "half of layers.1.hidden.0"),
        ([], {"layers__1__bias": "layers.1.offset"}, "expected layers.N.projection"),
        ([], {"layers__1__bias": "layers.3.bias"}, "N below 3"),
        (["layers.1.hidden.0.weight", "layers.1.hidden.0.bias"], {}, "layers.1.projection: got"),
        (["layers.1.projection"], {}, "declares the dense layers|got none, but a query"),
    ],
)
def test_files_of_the_second_format_that_are_not_whole(rich, tmp_path, left_out, renamed, message):
    path = tmp_path / "rich.safetensors"
    rich.save(path)
    without(path, *left_out, **renamed)
    with pytest.raises(hata.EncoderError, match=message):
        hata.Encoder.load(path)


def test_the_first_format_knows_projections_and_biases_only(rich, tmp_path):
    path = tmp_path / "rich.safetensors"
    rich.save(path)
    rewritten(path, format="hata.encoder/1")
    with pytest.raises(hata.EncoderError, match=r"layers\.1\.hidden\.0\.bias"):
        hata.Encoder.load(path)
    rich.save(path)
    rewritten(path, activation="relu")
    with pytest.raises(hata.EncoderError, match="activation 'relu'"):
        hata.Encoder.load(path)


@pytest.mark.parametrize(
    ("query", "hidden", "message"),
    [
        (QueryHash(normal(3, 48, 64)), (), "a multiple of 2 heads"),
        (QueryHash(normal(6, 48, 64)), (), "a divisor or a multiple"),
        (QueryHash(normal(2, 16, 64)), (), r"expected \(2, 48, 64\)"),
        (QueryHash(normal(2, 48, 32)), (), r"expected \(2, 48, 64\)"),
        (QueryHash(np.full((2, 48, 64), np.nan, np.float32)), (), "NaN"),
        (None, ((normal(2, 48, 48), normal(2, 48)),), "hidden layers for keys alone"),
        (QueryHash(normal(2, 48, 64)), ((normal(2, 48, 40), normal(2, 40)),), "width 40"),
        (QueryHash(normal(2, 48, 64)), ((normal(2, 40, 48), normal(2, 48)),), r"\(2, 48, 48\)"),
        (QueryHash(normal(2, 48, 64)), ((normal(48, 48), normal(48)),), "weight: got shape"),
    ],
)
def test_parts_that_do_not_fit(query, hidden, message):
    made = hata.Encoder.random(CONFIG, 64)
    with pytest.raises(hata.EncoderError, match=message):
        hata.Encoder(made.shape, 64, made.projections, queries=(query,) * 3, hidden=(hidden,) * 3)


def test_key_norms_stand_before_hidden_layers():
    made = hata.Encoder.random(CONFIG, 64)
    hidden = ((Hidden(normal(2, 48, 48), normal(2, 48)),),) * 3
    query = (QueryHash(normal(2, 48, 64)),) * 3
    with pytest.raises(hata.EncoderError, match="hidden layers and key norms"):
        hata.Encoder(made.shape, 64, made.projections, (), True, queries=query, hidden=hidden)


def test_features_are_those_of_the_hidden_layers():
    x = normal(1, 2, 3, 48)
    layer = Hidden(normal(4, 48, 16), normal(4, 16))
    found = features(x, [layer], 4)
    assert found.shape == (1, 4, 3, 16)
    for head in range(4):
        z = x[0, head // 2] @ layer.weight[head] + layer.bias[head]
        np.testing.assert_allclose(found[0, head], z / (1 + np.exp(-z)), rtol=1e-4, atol=1e-5)
    assert features(x, [], 2) is x
