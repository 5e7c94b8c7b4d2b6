"""Where selections come from: the argument, then a profile, then the default."""

import dataclasses
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.device import fingerprint  # noqa: E402
from hata.profile import (  # noqa: E402
    EncoderKey,
    Measured,
    ModelKey,
    Profile,
    Quality,
    SelectionSet,
)

PER_LAYER = (None, hata.Selection(bits=64, k=4), hata.Selection(bits=96, k=7))


def profile_with(policy, *, name="", source="measured", layers=3, heads=4):
    model = ModelKey(name, "llama", layers, heads, kv_heads=2, head_dim=16)
    encoder = EncoderKey("random", 128, seed=9)
    chosen = SelectionSet(model, encoder, source, Quality(0.9, 0.95), policy)
    measured = Measured("2026-11-21", "perf_counter", 5, False, 1.0, 1, 0)
    return Profile(fingerprint("cpu"), measured, (), (chosen,))


@pytest.fixture(autouse=True)
def quiet():
    """Every warning is one that a test expects; the profile in force is restored."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    hata.use_profile(None)


def attached(model, *args, **kwargs):
    with hata.hf.attach(model, *args, **kwargs) as handle:
        return handle


def test_profile_of_this_model(tiny, tmp_path):
    profile = profile_with(PER_LAYER)
    path = tmp_path / "p.yaml"
    profile.save(path)
    for given in (profile, path, str(path)):
        handle = attached(tiny("llama"), profile=given)
        assert handle.selections == PER_LAYER
        assert handle.source.startswith("profile")
    # The random encoder that the profile chose with: its seed, and as many bits as are needed.
    expected = hata.Encoder.random(tiny("llama").config, 96, seed=9)
    assert (handle.encoder.projection(2) == expected.projection(2)).all()


def test_profile_in_force(tiny):
    hata.use_profile(profile_with(PER_LAYER))
    assert attached(tiny("llama")).selections == PER_LAYER


def test_argument_beats_profile_beats_default(tiny):
    hata.use_profile(profile_with(PER_LAYER))
    other = profile_with(hata.Selection(bits=32, k=3, dense_layers=0))
    assert attached(tiny("llama"), profile=other).selections[0].k == 3
    mine = hata.Selection(bits=64, k=2, dense_layers=2)
    assert attached(tiny("llama"), profile=other, selection=mine).selections == (None, None, mine)


def test_profile_of_another_model_is_not_used(tiny):
    hata.use_profile(profile_with(PER_LAYER, heads=8))
    assert attached(tiny("llama")).source == "default"


def test_profile_of_a_model_of_equal_sizes_warns(tiny):
    with pytest.warns(UserWarning, match="chosen on cousin, a model of the same sizes"):
        handle = attached(tiny("llama"), profile=profile_with(PER_LAYER, name="cousin"))
    assert handle.selections == PER_LAYER


def test_synthetic_selections_warn(tiny):
    policy = hata.Selection(bits=128, k=4, dense_layers=1)
    synthetic = profile_with(policy, name="synthetic", source="synthetic", heads=32)
    with pytest.warns(UserWarning, match=r"synthetic.*python -m tune --model PATH --text FILE"):
        handle = attached(tiny("llama"), profile=synthetic)
    assert [chosen and chosen.bits for chosen in handle.selections] == [None, 128, 128]
    # Chosen for no encoder in particular: fewer bits will do.
    encoder = hata.Encoder.random(tiny("llama").config, 64)
    with pytest.warns(UserWarning, match="synthetic"):
        handle = attached(tiny("llama"), encoder, profile=synthetic)
    assert [chosen and chosen.bits for chosen in handle.selections] == [None, 64, 64]


def test_synthetic_selections_of_other_layers_are_not_used(tiny):
    synthetic = profile_with((None, None), source="synthetic", layers=2)
    assert attached(tiny("llama"), profile=synthetic).source == "default"


def test_measured_selections_need_their_bits(tiny):
    encoder = hata.Encoder.random(tiny("llama").config, 64)
    with pytest.raises(hata.EncoderError, match="got 96, expected at most 64"):
        attached(tiny("llama"), encoder, profile=profile_with(PER_LAYER))


def test_selections_chosen_with_another_encoder_warn(tiny, tmp_path):
    few = hata.Selection(bits=64, k=4, dense_layers=1)
    profile = profile_with((None, few, few))
    made = hata.Encoder.random(tiny("llama").config, 64)
    learned = dataclasses.replace(made, made={"recipe": "listwise"})
    learned.save(tmp_path / "mine.safetensors")
    for encoder, name in ((learned, "this one"), (tmp_path / "mine.safetensors", "mine.safetens")):
        with pytest.warns(UserWarning, match=f"chosen with encoder random, not with {name}"):
            handle = attached(tiny("llama"), encoder, profile=profile)
        assert handle.selections == (None, few, few)
        assert "2 of 3 layers planned to hash (dense: 0)" in repr(handle)
    attached(tiny("llama"), made, profile=profile)


def test_dense_layers_of_an_encoder_stay_dense(tiny):
    made = hata.Encoder.random(tiny("llama").config, 64)
    encoder = hata.Encoder(made.shape, 64, (*made.projections[:2], None))
    few = hata.Selection(bits=64, k=4, dense_layers=1)
    assert attached(tiny("llama"), encoder, selection=few).selections == (None, few, None)
    with pytest.raises(hata.EncoderError, match="got 2, which this encoder leaves dense"):
        attached(tiny("llama"), encoder, selection=[None, None, few])


def test_broken_profile_attaches_nothing(tiny, tmp_path):
    (tmp_path / "p.yaml").write_text("schema: other\n")
    with pytest.raises(hata.ProfileError):
        hata.hf.attach(tiny("llama"), profile=tmp_path / "p.yaml")
    assert tiny("llama").config._attn_implementation == "sdpa"


def test_a_word_that_is_no_selection(tiny):
    with pytest.raises(hata.AttachError, match="selection: got 'dense', expected \"auto\""):
        hata.hf.attach(tiny("llama"), selection="dense")
