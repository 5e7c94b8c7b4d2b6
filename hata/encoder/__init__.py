"""`Encoder`: a model's projections, one per layer, in one safetensors file.

A layer's projection is a `[kv_heads, head_dim, bits]` matrix; a vector's code is the signs of its
product with the projection of its KV head (`hata.encode`). Codes nest: the first 32, 64, 128 ...
columns are a usable encoder of their own, so attaching with fewer bits slices the projection.
Queries may be hashed with projections of their own, and hidden layers may come before a projection
(`layer`).

File layout, format `hata.encoder/1`:

- tensors `layers.{i}.projection` `[Hkv, D, r]` and, where there is one, `layers.{i}.bias`
  `[Hkv, r]`; a dense layer has neither;
- header metadata, all strings: `format`, `model_type`, `num_layers`, `heads`, `kv_heads`,
  `head_dim`, `bits`, `key_norms` ("true" or "false"), `dense_layers` (a JSON list) and `made`
  (a JSON object that says how it was made).

Format `hata.encoder/2` is written where a layer has more than that. The projection and bias are
then those of keys, and may have H heads instead of Hkv (one key code per query head); added are

- `layers.{i}.query_projection` `[Cq, in, r]` and `layers.{i}.query_bias` `[Cq, r]`;
- `layers.{i}.hidden.{n}.weight` `[heads, in, out]` and `.bias` `[heads, out]`, before the
  projection of keys, and `layers.{i}.query_hidden.{n}...`, before that of queries;
- metadata `activation`, always "silu".

`encoder` is the object and `shape` the model that it fits, `layer` what stands beside a projection,
`file` the bytes of a file, `orthogonal` the untrained projections. `convert` and `pickles` read
weights that others published. Everything here is NumPy: no framework is imported.
"""

from hata.encoder.encoder import Encoder
from hata.encoder.file import FORMAT
from hata.encoder.layer import Hidden, QueryHash
from hata.encoder.shape import ModelShape

__all__ = ["FORMAT", "Encoder", "Hidden", "ModelShape", "QueryHash"]
