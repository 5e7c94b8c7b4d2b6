"""`lm-evaluation-harness` with hash attention, for those who have it and its data sets.

    from hata.evaluate.harness import harness_model
    model = harness_model("PATH", "encoder.safetensors", selection=hata.Selection(bits=64, k=512))
    lm_eval.simple_evaluate(model, tasks=["niah_single_1"])

Only tasks that generate are changed: what reads a prompt in one pass runs dense attention.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import hata.hf
from hata.encoder import Encoder
from hata.errors import CaptureError
from hata.selection import Selection


def harness_model(
    model: Any,
    encoder: Encoder | str | os.PathLike[str] = "random",
    *,
    selection: Selection | Sequence[Selection | None] | Literal["auto"] | None = "auto",
    **settings: Any,
) -> Any:
    """A language model of the harness, attached.

    Args:
        model: A folder, a name, or a model of transformers: what `HFLM` takes as `pretrained`.
        encoder: See `hata.hf.attach`.
        selection: See `hata.hf.attach`.
        settings: More arguments of `HFLM`.

    Raises:
        CaptureError: The harness is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    except ImportError as error:
        raise CaptureError(
            f"harness: needs lm-evaluation-harness ({error}); pip install lm-eval"
        ) from None
    wrapped = HFLM(pretrained=model, **settings)
    wrapped.hata_handle = hata.hf.attach(wrapped.model, encoder, selection=selection)
    return wrapped
