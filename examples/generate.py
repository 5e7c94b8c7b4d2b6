"""Generate with dense and with hash attention, side by side.

    python examples/generate.py --model PATH --needle 4096 --n 40     # retrieval, counted
    python examples/generate.py --model PATH --prompt "def main():"   # one answer of each
    python examples/generate.py --model PATH --device cuda --backend triton --needle 4096 --n 40

With `--k` at or above the context, both answers are the same.

Every prompt is prefilled once, by the model's own attention, and both answers start from copies of
that cache, so that all of an answer's tokens are decoded the way that is being compared. The rate
leaves out the first token of an answer: the step that makes it also encodes the prompt's keys.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    Cache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

import hata
import hata.hf
from hata.commandline import Parser
from hata.evaluate.tasks import DIGITS, needles, source_text
from hata.hf.models import cache_among, cache_argument


def main() -> int:
    """Parse, load, compare; faults of what was asked for are one line."""
    args = arguments()
    try:
        compare(args)
    except (hata.HataError, OSError, ValueError) as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"generate.py: error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def compare(args: argparse.Namespace) -> None:
    """Load, and generate both ways."""
    logging.disable_progress_bar()
    if args.profile:
        hata.use_profile(args.profile)
    if args.backend != "auto":
        hata.set_backend(args.backend)
    model, tokenizer = load(args)
    attach = attachment(model, args)
    with attach() as handle:
        print(f"{handle}\n")
    if args.needle:
        count_needles(model, tokenizer, attach, args)
    else:
        one_prompt(model, tokenizer, attach, args)


def arguments() -> argparse.Namespace:
    """What can be chosen."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a model")
    parser.add_argument("--profile", help="profile of the tuner: kernels and selections")
    parser.add_argument("--encoder", default="random", help='encoder file, or "random"')
    parser.add_argument("--bits", type=int, help="bits of a code (default: 256, or the profile's)")
    parser.add_argument("--k", type=int, help="most keys to attend to (default: --ratio decides)")
    parser.add_argument("--ratio", type=float, help="share of the context to attend to (1/16)")
    parser.add_argument("--prompt", default="def fibonacci(n):\n", help="text to go on from")
    parser.add_argument("--needle", type=int, metavar="LENGTH", help="tokens of a needle prompt")
    parser.add_argument("--n", type=int, default=8, help="needle prompts")
    parser.add_argument("--pairs", type=int, default=8, help="needles in a prompt")
    parser.add_argument("--text", nargs="+", default=[], help="files to hide needles in")
    parser.add_argument("--seed", type=int, default=1, help="seed of the needle prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="with --prompt")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backend", default="auto", help="auto, numba, triton or cupy")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on cpu"
    )
    args = parser.parse_args()
    for name in ("bits", "k", "needle", "n", "pairs", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
    if args.ratio is not None and not 0 < args.ratio <= 1:
        parser.error(f"--ratio: got {args.ratio}, expected a share above 0, and at most 1")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device: got {args.device!r}, expected cpu, cuda or cuda:<index>")
    kind, _, index = args.device.partition(":")
    if kind == "cuda" and torch.cuda.device_count() <= int(index or 0):
        parser.error(
            f"--device: got {args.device!r}, but torch sees {torch.cuda.device_count()} GPUs here"
        )
    return args


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    folder = Path(args.model).expanduser()
    # Else it is the name of a model on the hub.
    is_path = folder.is_absolute() or folder.exists() or args.model.startswith(".")
    if is_path and not (folder / "config.json").is_file():
        raise ValueError(f"--model: got {args.model}, expected a folder with config.json")
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--model: {args.model} cannot be loaded: {error}") from None
    model = model.to(args.device).eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        # A tokenizer of bytes has no vocabulary file.
        config = Path(args.model) / "tokenizer_config.json"
        if json.loads(config.read_text()).get("tokenizer_class") != "ByT5Tokenizer":
            told = " ".join(str(error).split())
            raise ValueError(
                f"--model: the tokenizer of {args.model} cannot be loaded: {told}"
            ) from None
        tokenizer = ByT5Tokenizer()
    return model, tokenizer


def attachment(model: Any, args: argparse.Namespace) -> Any:
    """A function that attaches as the command line says; the encoder is made once."""
    selection: Any = "auto"
    if args.bits or args.k or args.ratio or not args.profile:
        ratio = args.ratio or (None if args.k else 1 / 16)
        # Where a ratio is given, k is a bound that is not reached.
        k = args.k or max(args.needle or 0, 4096)
        selection = hata.Selection(bits=args.bits or 256, k=k, ratio=ratio)
    with hata.hf.attach(model, args.encoder, selection=selection, strict=True) as handle:
        encoder = handle.encoder

    def attach() -> hata.hf.Handle:
        with warnings.catch_warnings():
            # Whatever there is to say was said above, and the model was checked.
            warnings.simplefilter("ignore")
            return hata.hf.attach(model, encoder, selection=selection, strict=True, check=False)

    return attach


class Clock(StoppingCriteria):
    """Notes when each token is ready; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """One token more."""
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def steps(self) -> list[float]:
        """Seconds of every step but the first."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def prefill(model: Any, ids: torch.Tensor) -> tuple[Cache, float]:
    """A cache of all tokens but the last, which the first decode step brings; and the seconds."""
    start = time.perf_counter()
    with torch.no_grad():
        cache = cache_among(model(ids[:, :-1], use_cache=True, logits_to_keep=1))
    if cache is None:
        raise ValueError(f"--model: {type(model).__name__} gives no cache to go on from")
    if ids.is_cuda:
        torch.cuda.synchronize()
    return cache, time.perf_counter() - start


def answer(
    model: Any, ids: torch.Tensor, cache: Cache, tokens: int
) -> tuple[torch.Tensor, list[float]]:
    """The next tokens, greedily, and the seconds of each step but the first."""
    clock = Clock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **{cache_argument(model): cache},
    )
    return out[0, ids.shape[1] :], clock.steps


def both(
    model: Any, tokenizer: Any, attach: Any, ids: torch.Tensor, tokens: int
) -> tuple[dict[str, str], dict[str, list[float]], float]:
    """The dense and the hash answer to one prompt, their step times, the prefill's seconds."""
    cache, seconds = prefill(model, ids)
    texts, steps = {}, {}
    found, steps["dense"] = answer(model, ids, copy.deepcopy(cache), tokens)
    texts["dense"] = tokenizer.decode(found, skip_special_tokens=True)
    with attach():
        found, steps["hash"] = answer(model, ids, cache, tokens)
    texts["hash"] = tokenizer.decode(found, skip_special_tokens=True)
    return texts, steps, seconds


def count_needles(model: Any, tokenizer: Any, attach: Any, args: argparse.Namespace) -> None:
    """Ask for needles and count how many come back."""
    prompts = needles(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        source_text(args.text),
        args.needle,
        args.n,
        pairs=args.pairs,
        seed=args.seed,
    )
    right, same = {"dense": 0, "hash": 0}, 0
    steps: dict[str, list[float]] = {"dense": [], "hash": []}
    prefills = []
    for number, prompt in enumerate(prompts, 1):
        ids = torch.tensor([prompt.tokens], device=model.device)
        texts, times, seconds = both(model, tokenizer, attach, ids, DIGITS)
        prefills.append(seconds)
        for way in right:
            right[way] += texts[way].startswith(prompt.value)
            steps[way] += times[way]
        same += texts["dense"] == texts["hash"]
        print(
            f"{number:3d}/{args.n}  {prompt.name} = {prompt.value}   "
            f"dense {texts['dense'][:DIGITS]!r}   hash {texts['hash'][:DIGITS]!r}",
            flush=True,
        )
    print()
    report(steps, prefills, args.needle)
    print(
        f"needles: dense {right['dense']}/{args.n}, hash {right['hash']}/{args.n}; "
        f"equal answers: {same}/{args.n}"
    )


def one_prompt(model: Any, tokenizer: Any, attach: Any, args: argparse.Namespace) -> None:
    """Go on from one prompt."""
    tokens = tokenizer.encode(args.prompt, add_special_tokens=False)
    ids = torch.tensor([tokens], device=model.device)
    texts, steps, seconds = both(model, tokenizer, attach, ids, args.max_new_tokens)
    for way, text in texts.items():
        print(f"--- {way}\n{args.prompt}{text}\n")
    print(f"the answers {'are equal' if texts['dense'] == texts['hash'] else 'differ'}")
    report(steps, [seconds], len(tokens))


def report(steps: dict[str, list[float]], prefills: list[float], length: int) -> None:
    """Tokens per second of each way; the median step, so that one hiccup does not count."""
    print(
        f"prefill of {length} tokens, dense for both: {statistics.median(prefills):.2f} s (median)"
    )
    for way, seconds in steps.items():
        if seconds:
            median = statistics.median(seconds)
            print(f"decode, {way}: {1 / median:.1f} tokens/s ({median * 1e3:.1f} ms a step)")


if __name__ == "__main__":
    sys.exit(main())
