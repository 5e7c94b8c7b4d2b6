"""Hash attention in transformers models.

    import hata.hf
    handle = hata.hf.attach(model)          # model.generate() now decodes with hash attention
    handle.detach()                         # everything is as it was

Needs transformers 5.17 to 5.24 (`pip install hata-attention[hf]`). Prefill, and any other step of
more than one token, runs the model's own attention. See `attach` for what can be chosen.
"""

try:
    from hata.hf.attachment import Handle, attach, check_model, detach
    from hata.hf.layer_report import LayerReport, Report
    from hata.hf.model_selections import DEFAULT_SELECTION
except ModuleNotFoundError as error:
    if error.name not in ("torch", "transformers"):
        raise
    raise ModuleNotFoundError(
        f"hata.hf needs {error.name}, which is not installed; pip install 'hata-attention[hf]'",
        name=error.name,
    ) from error

__all__ = [
    "DEFAULT_SELECTION",
    "Handle",
    "LayerReport",
    "Report",
    "attach",
    "check_model",
    "detach",
]
