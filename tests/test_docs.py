"""What the pages promise: Python blocks run, commands parse, links lead somewhere.

Blocks of one page share their names and run in order, in a folder that holds what the pages speak
of: `model` (a tiny random Llama) and `profile.yaml`. They may use `model` and `input_ids` unmade.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hata
from hata import registry
from hata.device import fingerprint
from hata.profile import Measured, Profile

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/**/*.md"))
)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# A command at the start of a line of a block, or alone between backticks.
_COMMAND = re.compile(r"^(?:\$ )?((?:python -m|python|hata|make) .+?)\s*(?:#.*)?$", re.MULTILINE)
_INLINE = re.compile(r"`((?:python -m|python|hata|make) [^`]+)`")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return [body for name, body in _FENCE.findall(text_of(page)) if name == language]


def commands(page):
    text = text_of(page)
    prose = _FENCE.sub("", text)
    shell = "\n".join(body for name, body in _FENCE.findall(text) if name in ("", "sh", "bash"))
    found = [*_COMMAND.findall(shell), *(" ".join(c.split()) for c in _INLINE.findall(prose))]
    return list(dict.fromkeys(found))


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]
ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a profile."""
    transformers = pytest.importorskip("transformers", reason="the pages use transformers")
    import torch

    folder = tmp_path_factory.mktemp("docs")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder / "model")
    measured = Measured("2026-01-01", "perf_counter", 1, False, 1.0, 0, 0)
    Profile(fingerprint("cpu"), measured).save(folder / "profile.yaml")
    return folder


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=str)
def test_python_blocks_run(page, place, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    here = tmp_path / "here"
    shutil.copytree(place, here)
    monkeypatch.chdir(here)
    registry.reset()
    names = {
        "model": AutoModelForCausalLM.from_pretrained("model"),
        "input_ids": torch.arange(1, 49)[None],
    }
    try:
        for body in blocks(page, "python"):
            exec(compile(body, str(page), "exec"), names)
    finally:
        registry.reset()


def options_of(program):
    """All option names in a program's help."""
    done = subprocess.run(
        [sys.executable, "-m", *program, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", done.stdout))


@pytest.fixture(scope="module")
def options():
    known = {}

    def ask(*program):
        if program not in known:
            known[program] = options_of(program)
        return known[program]

    return ask


@pytest.mark.parametrize(
    ("page", "command"), ALL_COMMANDS, ids=[f"{page}: {c}" for page, c in ALL_COMMANDS]
)
def test_command_exists(page, command, options):
    words = shlex.split(re.sub(r"\.\.\.|…|[\[\]|]", " ", command))
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    match words:
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            for target in targets:
                if "=" not in target:
                    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
        case ["python", "-m", "tune", *_] | ["hata", "tune", *_]:
            assert given <= options("tune")
        case ["python", "-m", "pytest", *_]:
            pass
        case ["python", "-m", "hata"]:
            assert (ROOT / "hata" / "__main__.py").is_file()
        case ["python", "-m", module, *_]:
            assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), module
            assert given <= options(module)
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), script
            source = (ROOT / script).read_text()
            for option in given:
                assert f'"{option}"' in source, option
        case ["hata", "learn" | "eval" | "check" | "bench" as verb, *_]:
            assert given <= options("hata.cli", verb)
        case ["hata", "info", *_]:
            assert given <= {"--json"}
        case ["hata", "convert", *_]:
            assert given <= {"--config", "--out"}
        case ["hata", "profile", verb, *_]:
            assert verb in ("show", "validate", "diff")
        case ["hata", flag] if flag.startswith("--"):
            assert flag in ("--version", "--help")
        case _:
            pytest.fail(f"{page}: nobody knows what {command!r} is")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in _LINK.findall(_FENCE.sub("", text_of(page))):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            name, _, anchor = target.partition("#")
            assert (folder / name).exists(), target
            if anchor:
                assert anchor in anchors(folder / name), target


def anchors(page):
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def test_environment_page_lists_every_variable():
    page = text_of("docs/environment.md")
    for folder in ("hata", "backends", "tune", "tests/conftest.py", "benchmarks"):
        files = [ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py")
        for file in files:
            for name in set(re.findall(r"[\"'](HATA_[A-Z_]+)[\"']", file.read_text())):
                assert f"`{name}`" in page, f"{name} in {file.relative_to(ROOT)}"


def test_readme_lists_every_folder():
    layout = text_of("README.md").partition("## What is where")[2].partition("\n## ")[0]
    for folder in ("hata", "backends", "tune", "benchmarks", "examples", "docs"):
        assert f"`{folder}/`" in layout
        assert (ROOT / folder).is_dir()
    for name in re.findall(r"^\| `([^`]+)/`", layout, re.MULTILINE):
        assert (ROOT / name).is_dir(), name


# Where a page names files, they are files of today; records of the past name those of their time.
_FILE = re.compile(r"`((?:hata|backends|tune|benchmarks|tests|examples)/[\w/.*]+\.(?:py|cuh?|sh))`")
TODAY = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "adr"]


@pytest.mark.parametrize("page", TODAY, ids=str)
def test_files_that_a_page_names_exist(page):
    for name in _FILE.findall(text_of(page)):
        assert any(ROOT.glob(name)), name


def test_structure_page_names_every_module():
    """Its list has a heading for each folder, and below that a row for each file of it."""
    told = {}
    for section in text_of("docs/structure.md").split("\n### ")[1:]:
        for folder in re.findall(r"`([\w/]+)/`", section.partition("\n")[0]):
            told[folder] = set(re.findall(r"`([\w.]+\.(?:py|cuh?))`(?=[^|\n]*\|)", section))
    modules = {}
    for room in ("hata", "backends", "tune", "benchmarks"):
        for file in (ROOT / room).rglob("*"):
            if file.suffix in (".py", ".cu", ".cuh"):
                names = modules.setdefault(str(file.parent.relative_to(ROOT)), set())
                names |= {file.name} - {"__init__.py"}
    for folder, names in modules.items():
        assert told.get(folder, set()) - {"__init__.py"} == names, folder
    tests = text_of("docs/structure.md").partition("### Tests")[2]
    folders = {str(test.parent.relative_to(ROOT)) for test in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"^\| `([\w/]+)/`", tests, re.MULTILINE)) == folders
    assert set(told) == set(modules)


def test_backends_page_tells_the_automatic_order():
    page = text_of("docs/backends.md")
    order = ", ".join(f"`{name}`" for name in registry.AUTO_ORDER)
    assert order in page
    for name in registry.BUILT_IN:
        assert f"| `{name}` |" in page


def test_adapter_page_tells_every_field_of_a_selection():
    table = text_of("docs/adapter.md").partition("| field | meaning |")[2].partition("\n\n")[0]
    told = set(re.findall(r"`(\w+)`(?=[^|]*\| )", table))
    assert set(hata.Selection.__slots__) <= told
