"""What pruning costs beside the calibration's forward passes, and what each compression does to the loss.

    python benchmarks/compress.py [--model NAME] [--tokens 32768] [--heldout 8192] [--rounds 1] [--only WORDS]

cost     processor time in one process: forward passes of the calibration tokens (with logits, and without), and WANDA
         block by block on the same tokens; what of it is choosing masks.
loss     perplexity on held-out tokens before and after each method, with the interval of the difference in nats.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from unweave import LM
from unweave.data.batches import store_batches
from unweave.inputs.inputs import token_store
from unweave.lm.projections import projections
from unweave.methods.compress.masks import Pattern
from unweave.methods.compress.measure import compare, row_losses
from unweave.methods.compress.models import Method, compress_model, pruning, ranking, rounding
from unweave.methods.compress.spec import PruneSpec

METHODS: list[Method] = [
    *(pruning(name, share) for share in (0.5, Pattern(2, 4)) for name in ("magnitude", "wanda", "sparsegpt")),
    *(rounding(bits, 64) for bits in (8, 4, 3)),
    *(ranking(0.5, aware=aware) for aware in (False, True)),
]


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", default="", help="methods whose words begin so; 'none' for the cost alone")
    for name, default in (("tokens", 32768), ("heldout", 8192), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    lm = LM.load(asked.model)
    chosen = projections(lm)
    dense = [projection.weight.clone() for projection in chosen]
    data = PruneSpec().data
    with tempfile.TemporaryDirectory() as folder:
        calibration, _ = token_store(lm, asked.model, data, "train", asked.tokens, Path(folder))
        heldout, _ = token_store(lm, asked.model, data, "heldout", asked.heldout, Path(folder))
        batches = store_batches(lm, calibration, range(calibration.n_rows), 2048, spread=1)
        measured = store_batches(lm, heldout, range(heldout.n_rows), 2048)

    def restore() -> None:
        for projection, weights in zip(chosen, dense, strict=True):
            projection.weight.copy_(weights)

    def forward(stop: str | None) -> None:
        for batch in batches:
            with lm.taps(stop=stop):
                lm(batch)

    wanda, choosing = pruning("wanda", 0.5), [0.0]

    def timed(weights: torch.Tensor, inputs: object) -> object:
        result: list[object] = []
        choosing[0] += seconds(lambda: result.append(wanda.change(weights, inputs)))  # type: ignore[arg-type]
        return result[0]

    watched = replace(wanda, change=timed)  # type: ignore[arg-type]
    for _ in range(asked.rounds):
        choosing[0] = 0.0
        whole, below = seconds(lambda: forward(None)), seconds(lambda: forward(f"resid_post.{lm.n_layers - 1}"))
        pruning_seconds = seconds(lambda: compress_model(lm, chosen, watched, batches))
        restore()
        print(
            f"{asked.tokens:,} tokens: forward {whole:.1f} s, without logits {below:.1f} s; WANDA block by block "
            f"{pruning_seconds:.1f} s = {pruning_seconds / whole:.2f} and {pruning_seconds / below:.2f} times; masks "
            f"{choosing[0]:.1f} s",
            flush=True,
        )
    methods = [method for method in METHODS if method.words.startswith(asked.only)]
    before = row_losses(lm, measured) if methods else None
    for method in methods:
        cost = seconds(lambda method=method: compress_model(lm, chosen, method, batches))
        loss = compare(before, row_losses(lm, measured))  # type: ignore[arg-type]
        restore()
        print(
            f"{method.words}: perplexity {math.exp(loss.before):.2f} -> {math.exp(loss.after):.2f}, "
            f"{loss.after - loss.before:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}] nats, {cost:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
