"""What a kernel is made of: the files that an op reaches, and a digest of them.

A tuned entry is valid for the sources that it was measured with: the modules that the op's module
imports from its package, the CUDA files beside them, and the headers that those include.
Docstrings, comments and blank lines do not count, so that words can be mended without tuning anew.
The digest is one of texts and not of syntax trees, so every version of Python gives the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

# Strings come first, for they may hold what looks like a comment; and in C++ so do numbers, for
# they may hold what looks like a quote (1'000).
_STRING = r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
_LONG_STRING = r""""{3}(?:\\.|[^\\])*?"{3}|'{3}(?:\\.|[^\\])*?'{3}"""
_RAW_STRING = r"""R"(?P<end>[^()\s\\]*)\(.*?\)(?P=end)\""""
_NUMBER = r"""\b\d(?:'?[\w.])*"""
_C_COMMENT = re.compile(rf"({_RAW_STRING}|{_STRING}|{_NUMBER})|//[^\n]*|/\*.*?\*/", re.DOTALL)
# Of a line what follows its code, and all lines after it that have none.
_NO_CODE = r"[^\S\n]*(?:#[^\n]*)?"
_COMMENT = re.compile(
    rf"({_LONG_STRING}|{_STRING})|{_NO_CODE}(?:\n{_NO_CODE})*(?=\n|\Z)", re.DOTALL
)
_INCLUDE = re.compile(r'^#\s*include\s*"([^"]+)"', re.MULTILINE)
_NAMED = re.compile(r"""["']([\w./-]+\.(?:cuh?|cc|cpp|h|hpp|hip|cl|ll|metal|ptx))["']""")
_IMPORTED = re.compile(r"""\bimport_module\(\s*["'](\.*)([\w.]*)["']""")
_DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
_BLOCKS = "body", "handlers", "cases", "orelse", "finalbody"


class _Source(NamedTuple):
    """A file: its text without words for people, and what it names of others.

    Attributes:
        code: The text without docstrings, comments, blank lines and trailing blanks.
        imports: Level, module and names of each import; no names for `import module`.
        files: Other sources: those that it includes, or that a string of it names.
    """

    code: str
    imports: tuple[tuple[int, str, tuple[str, ...]], ...]
    files: tuple[str, ...]


def digest(backend_class: type, op: str) -> str:
    """SHA-256 (hex) of the sources behind an op of a backend, and of their names in its package.

    It starts at the module of the package that is named like the op, else at that of the class. Of
    a class in no package, that one file counts.
    """
    name, file = backend_class.__module__, Path(inspect.getfile(backend_class))
    package = name if hasattr(sys.modules.get(name), "__path__") else name.rpartition(".")[0]
    folder = file.parent
    found = [file]
    if package:
        found = reached(_module(folder, (op,)) or file, folder, package)
    together = hashlib.sha256()
    for path in sorted(found):
        together.update(
            f"{Path(os.path.relpath(path, folder)).as_posix()}\0{code(path)}\0".encode()
        )
    return together.hexdigest()


def reached(start: Path, folder: Path, package: str) -> list[Path]:
    """The files of a package that one of its files is made of, that file first.

    Those are what it imports from the package, at its top or inside functions; the CUDA file of its
    own name (`scan.py`: `scan.cu`), and others that a string in it names (`"kernels/scan.cu"`); the
    headers of those; and so on. A package's `__init__` counts where something is imported from it.
    """
    found = [start]
    # It grows meanwhile.
    for file in found:
        source = _source(file)
        more = [m for one in source.imports for m in _imported(file, folder, package, *one)]
        named = (Path(os.path.normpath(file.parent / name)) for name in source.files)
        more += [file.with_suffix(".cu"), *named]
        found += [one for one in dict.fromkeys(more) if one not in found and one.is_file()]
    return found


def headers(path: Path) -> list[Path]:
    """The files that a CUDA source reaches by `#include "..."`."""
    return reached(path, path.parent, "")[1:]


def code(path: Path) -> str:
    """The text of a source without docstrings, comments, blank lines and trailing blanks."""
    return _source(path).code


def _source(path: Path) -> _Source:
    # Read anew each time, for it may have been edited.
    # What is no UTF-8 is told apart all the same.
    text = path.read_text("utf-8-sig", "backslashreplace")
    return (_python if path.suffix == ".py" else _cuda)(text)


@lru_cache(maxsize=256)
def _cuda(text: str) -> _Source:
    # A line that ends in a backslash goes on.
    text = _C_COMMENT.sub(lambda found: found[1] or " ", text.replace("\\\n", ""))
    lines = map(str.strip, text.split("\n"))
    text = "\n".join(filter(None, lines))
    return _Source(text, (), tuple(_INCLUDE.findall(text)))


@lru_cache(maxsize=256)
def _python(text: str) -> _Source:
    lines = text.split("\n")
    begins = [0, *accumulate(len(line) + 1 for line in lines)]
    imports, kept, end = [], [], 0

    def place(row: int | None, column: int | None) -> int:
        # Trees count lines from 1, and columns in bytes.
        line = lines[(row or 1) - 1].encode()
        return begins[(row or 1) - 1] + len(line[:column].decode())

    try:
        tree = ast.parse(text)
    except SyntaxError:
        # For another version of Python; no call gets there.
        tree = ast.Module([], [])
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            imports.append((node.level, node.module or "", names))
        elif isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            said = node.body[0]
            kept.append(text[end : place(said.lineno, said.col_offset)])
            end = place(said.end_lineno, said.end_col_offset)
    text = _COMMENT.sub(lambda found: found[1] or "", "".join((*kept, text[end:]))).strip("\n")
    imports += [(len(dots), name, ()) for dots, name in _IMPORTED.findall(text)]
    return _Source(text, tuple(imports), tuple(_NAMED.findall(text)))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A module or statement and all statements in it, in order."""
    yield node
    for block in _BLOCKS:
        for inner in getattr(node, block, ()):
            yield from _statements(inner)


def _imported(
    file: Path, folder: Path, package: str, level: int, module: str, names: tuple[str, ...]
) -> list[Path]:
    """The files that an import in a file of a package means, if they are of the package."""
    own = ".".join((package, *file.relative_to(folder).parent.parts))
    try:
        meant = importlib.util.resolve_name("." * level + module, own)
    except ImportError:
        return []
    if not f"{meant}.".startswith(f"{package}."):
        return []
    parts = tuple(meant.removeprefix(package).split(".")[1:])
    base = _module(folder, parts)
    if not names or (base is not None and base.name != "__init__.py"):
        return [base] if base else []
    # A package may name something else like a module of its own.
    bound = set()
    if base is not None:
        bound = {n for _, of, names in _source(base).imports if of for n in names}
    found = [_module(folder, (*parts, name)) or base for name in names]
    return [file for file in (*found, base if bound.intersection(names) else None) if file]


def _module(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """The file of a module below a package's folder, if there is one."""
    base = folder.joinpath(*parts)
    files = base / "__init__.py", base.with_name(f"{base.name}.py")
    return next((file for file in files if file.is_file()), None)
