"""`hata check`: a model with hash attention that leaves nothing out, and the model alone."""

from __future__ import annotations

import argparse

from hata.errors import AttachError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the model")
    parser.add_argument(
        "--encoder", default="random", metavar="FILE", help='encoder file, or "random"'
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, the model's elsewhere",
    )


def run(options: argparse.Namespace) -> int:
    """Check, and print a line for each way to generate.

    Returns:
        0 where all that could be tried agrees; 1 where nothing could be.

    Raises:
        HataError: The model cannot be loaded or attached to, or it differs.
    """
    import hata.hf
    from hata.calibration.options import device_of
    from hata.calibration.recorder import load_model

    model = load_model(options.model, device_of(options.device, spread=False), options.dtype)
    found = hata.hf.check_model(model, options.encoder)
    for one in found:
        told = one.note or f"equal; {one.hashed} steps of layers ran hash attention"
        print(f"{one.way:13} {told}")
    if not any(one.hashed for one in found):
        raise AttachError(
            f"{type(model).__name__}: nothing was hashed, so nothing is known; "
            "print(hata.hf.attach(model)) tells why its layers are dense"
        )
    return 0
