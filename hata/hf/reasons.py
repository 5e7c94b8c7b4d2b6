"""Why a step of a planned layer ran dense, as users read it."""

# As planned:
PREFILL = "several tokens (prefill)"
DENSE = "as its selection says"
SHORT = "context within the budget"
TRAINING = "training"
# Not planned, and warned about:
NO_CACHE = "no cache; generate with use_cache=True"
GRADIENTS = "gradients are recorded; decode under torch.no_grad()"
HOLES = "a mask that hides more than left padding"
UNSEEN = (
    "a mask whose values were never looked at; run the prefill, or one step, outside of the "
    "compiled function, or leave the mask out"
)
MASK = "a mask of a kind that is not known (boolean, additive or [B, S] are)"
BIAS = "a mask that adds numbers to the logits"
WEIGHTS = "attention weights are asked for; leave output_attentions out"
NOT_CACHED = "keys and values that are not those of the layer's cache"
DTYPES = (
    "queries, keys and values of several dtypes, as autocast leaves them; load the model in one"
)
NEVER_CALLED = (
    "its attention never came through the attention interface; this release of transformers, or "
    "this model, works in a way that is not known"
)
OTHER_PLAN = "a cache layer of another attachment, or one that layers share"

# Why a step ran without a CUDA graph:
FIRST = "the first step of a cache"
NO_ROOM = "a cache whose keys were just moved, or have no room behind them"
HOOKS = "hooks on modules, which a graph would not call"
CHANGES = "a cache that is changed at every step, as by beam search"
MORE_OUTPUTS = "hidden states or attention weights are asked for"
NO_OUTPUT = "a model that returns no ModelOutput, or return_dict=False"
OTHERS = "somebody else answers the attention of a layer"
OFFLOADED = "an offloaded cache"
LENGTHS = "layers that hold different numbers of keys"
POSITIONS = "a mask that hides keys, and no position_ids"
MANY_CODES = "min_length above k with an encoder that hashes keys once per query head"

AS_PLANNED = (DENSE, PREFILL, SHORT, TRAINING)
