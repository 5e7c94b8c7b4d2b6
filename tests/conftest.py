"""Shared set-up of the tests: repeatable, offline, and away from the user's own files."""

import importlib.metadata
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# What the tests read from the outside; every other HATA_* variable would change what is tested.
OURS = {"HATA_TEST_MODEL", "HATA_EXPECT_TRANSFORMERS", "HATA_MODELS_TABLE"}

# Of the table of docs/models.md.
TABLE_HEADER = "| family | attached | notes |\n| --- | --- | --- |"

# Repeatable by default; `--hypothesis-profile=search` looks for new failures.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("ci")


def pytest_configure(config):
    """Isolate the process before any test module, and so `hata`, is imported."""
    for name in [n for n in os.environ if n.startswith("HATA_") and n not in OURS]:
        del os.environ[name]
    cache = tempfile.TemporaryDirectory(prefix="hata-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["HATA_CACHE"] = cache.name
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    expected = os.environ.get("HATA_EXPECT_TRANSFORMERS")
    if expected is not None and expected != transformers_version():
        raise pytest.UsageError(
            f"HATA_EXPECT_TRANSFORMERS is {expected}, but transformers {transformers_version()} "
            "is first on the path"
        )


def transformers_version():
    """Version of the transformers that an import would find, without importing it."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "(none)"


def pytest_report_header():
    """Name what is being tested against."""
    model = os.environ.get("HATA_TEST_MODEL", "not set: tests that need a model skip")
    return [f"transformers: {transformers_version()}", f"HATA_TEST_MODEL: {model}"]


def pytest_terminal_summary(terminalreporter):
    """What was found of families of models, as a table; into a file where one is named."""
    told = {
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "family"
    }
    if not told:
        return
    rows = [
        "| `{}` | {} | {} |".format(*(part.replace("|", "/") for part in one.split("|", 2)))
        for one in sorted(told)
    ]
    table = [TABLE_HEADER, *rows]
    terminalreporter.section("families of models")
    terminalreporter.write_line("\n".join(table))
    path = os.environ.get("HATA_MODELS_TABLE")
    if path is not None:
        page = Path(path)
        intro = page.read_text(encoding="utf-8").partition(TABLE_HEADER)[0]
        intro = re.sub(r"transformers [\d.]+", f"transformers {transformers_version()}", intro)
        page.write_text(intro + "\n".join(table) + "\n", encoding="utf-8")


def pytest_collection_modifyitems(items):
    """Mark by what a test uses and where it lies, so that nobody has to remember."""
    hf = Path(__file__).parent / "hf"
    for item in items:
        if hf in item.path.parents:
            item.add_marker("hf")
        if "model_path" in getattr(item, "fixturenames", ()):
            item.add_marker("model")
        if is_suite_of_a_gpu(item):
            item.add_marker("gpu")
    # First what takes long, so that no worker is left alone with it at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def is_suite_of_a_gpu(item):
    """Whether a test is the conformance suite of a backend for GPUs."""
    suite = getattr(item, "cls", None)
    return getattr(suite, "device", None) == "cuda" and hasattr(suite, "backend")


def pytest_runtest_setup(item):
    """Skip `gpu` tests where there is no CUDA device."""
    # The suite says by itself what a backend is missing.
    if item.get_closest_marker("gpu") is not None and not is_suite_of_a_gpu(item):
        torch = pytest.importorskip("torch", reason="the gpu tests use torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def model_path():
    """Folder of a real model with a hash-attention-capable architecture."""
    value = os.environ.get("HATA_TEST_MODEL")
    if not value:
        pytest.skip("HATA_TEST_MODEL is not set; it names the folder of a model to test with")
    path = Path(value).resolve()
    if not (path / "config.json").is_file():
        pytest.fail(f"HATA_TEST_MODEL={value}: no config.json there; expected a model folder")
    return path


@pytest.fixture(scope="session")
def repo_root():
    """Top folder of the working tree."""
    return Path(__file__).resolve().parent.parent
