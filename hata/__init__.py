"""HATA: hash-aware top-k attention for long-context decoding.

Four ops with interchangeable backends, tuned profiles, and an adapter for transformers:

- `encode`, `hamming_topk`, `sparse_attend`, `hash_attend`, `prepare`: the ops (`hata.ops`)
- `set_backend`, `use_backend`, `get_backend`, `list_backends`, `use_profile`: what runs them
- `Encoder`, `Selection`: the learned projections of a model, and which keys a layer attends to
- `hata.hf.attach`: hash attention in a transformers model

Importing `hata` imports no array framework.
"""

from hata.encoder import Encoder
from hata.errors import (
    AttachError,
    BackendUnavailable,
    EncoderError,
    HataAutogradError,
    HataCaptureError,
    HataDeviceError,
    HataDTypeError,
    HataError,
    HataShapeError,
    KernelError,
    ProfileError,
    UnknownBackend,
    UnsupportedProblem,
)
from hata.ops import encode, hamming_topk, hash_attend, prepare, sparse_attend
from hata.registry import (
    get_backend,
    list_backends,
    set_backend,
    use_backend,
    use_profile,
)
from hata.selection import Selection

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "BackendUnavailable",
    "Encoder",
    "EncoderError",
    "HataAutogradError",
    "HataCaptureError",
    "HataDTypeError",
    "HataDeviceError",
    "HataError",
    "HataShapeError",
    "KernelError",
    "ProfileError",
    "Selection",
    "UnknownBackend",
    "UnsupportedProblem",
    "encode",
    "get_backend",
    "hamming_topk",
    "hash_attend",
    "list_backends",
    "prepare",
    "set_backend",
    "sparse_attend",
    "use_backend",
    "use_profile",
]
