"""`Pieces`: what a step computes besides attention, compiled for a CUDA graph, piece by piece.

Norms, MLPs and rotary embeddings are a few functions, which all layers share: to compile them takes
a second or a few, where to compile a whole model takes half a minute and more.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hata.hf import cache as cache_layers


class Pieces:
    """What a decoder computes besides attention and linear layers, compiled for a while.

    Attributes:
        work: Whether they could be compiled, as far as is known.
    """

    def __init__(self, decoder: nn.Module, attention: Sequence[nn.Module]) -> None:
        above = [one for one in decoder.modules() if {*one.modules()} & {*attention}]
        self._modules = [
            child
            for one in above
            for child in one.children()
            if child not in above and _is_piece(child)
        ]
        self._homes = {type(one).__module__ for one in attention}
        self._compiled: dict[str, Any] = {}
        self._write: Any = None
        self.work = True

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """In this context the pieces are compiled ones."""
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            # Whether matrices may be multiplied in TF32 is the user's matter, and none are here.
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
            for module in self._modules:
                stack.enter_context(_in_place(vars(module), "forward", compiled(module.forward)))
            # Rooms differ in size.
            self._write = self._write or compiled(cache_layers.write, dynamic=True)
            stack.enter_context(_in_place(cache_layers.__dict__, "write", self._write))
            for home in self._homes:
                names = vars(sys.modules[home])
                if inspect.isfunction(names.get("apply_rotary_pos_emb")):
                    rotate = self._compiled.setdefault(
                        home, compiled(names["apply_rotary_pos_emb"])
                    )
                    stack.enter_context(_in_place(names, "apply_rotary_pos_emb", rotate))
            yield


# Tests put the identity in its place, since to compile for a CPU takes long.
compiled: Callable[..., Any] = torch.compile


def _is_piece(module: nn.Module) -> bool:
    """Whether a module computes by several kernels, and is not answered by somebody else."""
    plain = (nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict)
    has_numbers = next(module.parameters(), None) is not None
    return has_numbers and not isinstance(module, plain) and "forward" not in vars(module)


@contextlib.contextmanager
def _in_place(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names.get(name)
    names[name] = value
    try:
        yield
    finally:
        if before is None:
            names.pop(name, None)
        else:
            names[name] = before
