"""Every causal language model that transformers has, tiny and random: right, and told truly.

Prints a table, which docs/models.md holds; `make test-models` runs all and writes it anew.
"""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf import models, reasons  # noqa: E402

_spec = importlib.util.spec_from_file_location("families", Path(__file__).parent / "families.py")
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "padded": {},
}
LATER = [name for name in families.names() if name not in families.REPRESENTATIVE]
ALL = [
    *families.REPRESENTATIVE,
    *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.models]) for name in LATER),
]


def answer(model, way):
    """Tokens and logits of a short generation; two rows where there is padding."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (2 if way == "padded" else 1, 40), generator=generator)
    mask = torch.ones_like(ids)
    if way == "padded":
        ids[1, :11] = mask[1, :11] = 0
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **WAYS[way],
        )
    return out.sequences, torch.stack(out.logits)


def attached(model, way, k, calls):
    """The answer with hash attention of k keys, the layers' reports, and the number of calls."""
    before = len(calls)
    selection = hata.Selection(bits=64, k=k, dense_layers=0, min_length=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hata.hf.attach(model, selection=selection, check=False) as handle:
            got = answer(model, way)
    return got, handle.report().layers, len(calls) - before


@pytest.fixture
def told(record_property, request):
    """Tell what a family was found to be, for the table."""

    def tell(verdict):
        record_property("family", f"{request.node.callspec.params['name']}|{verdict}")

    return tell


@pytest.mark.parametrize("name", ALL)
def test_family(name, told, calls, monkeypatch):
    try:
        model = families.build(name)
    except families.CannotBuild as error:
        told(f"not built|{' '.join(str(error).split())[:60]}")
        pytest.skip(f"cannot be built: {error}")
    own = {}
    for way in WAYS:
        # What a model cannot do by itself is not asked of it when it is attached.
        try:
            own[way] = answer(model, way)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
    if not own:
        told(f"not run|{why}")
        pytest.skip(f"does not generate by itself: {why}")
    try:
        attached(model, "dynamic" if "dynamic" in own else next(iter(own)), 6, calls)
    except hata.AttachError as error:
        reason = re.sub(r"^model: got \w+, |; this architecture.*|, expected a.*", "", str(error))
        told(f"refused|{reason}")
        assert name not in models.TESTED
        return
    for way, (tokens, logits) in own.items():
        with monkeypatch.context() as patch:
            patch.setattr("hata.hf.layer_plan.covered", lambda selection: 0)
            got, layers, count = attached(model, way, 4096, calls)
        assert torch.equal(tokens, got[0])
        bound = 2e-3 * float(logits.abs().max())
        assert float((logits - got[1]).abs().max()) <= bound
        assert count == sum(layer.hashed for layer in layers)
    found = {}
    for way in own:
        _, layers, count = attached(model, way, 6, calls)
        assert count == sum(layer.hashed for layer in layers)
        for layer in layers:
            assert (layer.selection is None) == bool(layer.why)
            unplanned = set(layer.dense) - {reasons.PREFILL, reasons.SHORT}
            # A planned layer hashed in every step that could, or says why it did not.
            assert layer.selection is None or bool(layer.hashed) != bool(unplanned)
            assert layer.selection is not None or not layer.hashed
            found.setdefault(layer.layer, []).append(
                ("hashed" if layer.hashed else next(iter(unplanned)))
                if not layer.why
                else layer.why
            )
    kinds = {what for whats in found.values() for what in whats}
    hashed = sorted(layer for layer, whats in found.items() if "hashed" in whats)
    missing = [way for way in WAYS if way not in own]
    notes = [f"no {way} by itself" for way in missing] + sorted(kinds - {"hashed"})
    told(f"{'hashed' if hashed else 'dense'}|{'; '.join(notes)}")
    if name in models.TESTED:
        assert hashed
    elif name in models.DENSE:
        assert kinds == {models.DENSE[name]}


def test_the_table_holds_what_the_adapter_knows(repo_root):
    """Families that attach takes for tested are listed as hashed; others, as what they are."""
    table = (repo_root / "docs" / "models.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (\w+)", table, re.MULTILINE))
    assert len(rows) >= 130
    hashed = {name for name, verdict in rows.items() if verdict == "hashed"}
    assert hashed >= models.TESTED
    assert len(models.TESTED) >= 120
    assert all(rows[name] == "dense" for name in models.DENSE)
