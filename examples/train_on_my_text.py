"""Train a sparse autoencoder on your own text, measure it, and look at a few latents.

    python examples/train_on_my_text.py path/to/texts --tokens 300_000

The folder may hold .txt files (one document each) and .jsonl, .json or .parquet files (one document or conversation a
row). Every step is a run directory: a second call returns at once, an interrupted one goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unweave import UnweaveError
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.evaluate import stage as evaluation
from unweave.methods.evaluate.spec import EvalSpec
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.spec import TrainSpec


def spec_of(options: argparse.Namespace) -> TrainSpec:
    """What to train; every field that is not named keeps its default."""
    return TrainSpec(
        model=options.model,
        sites=(options.site,),
        data=DataSpec(
            sources=(Source(path=str(options.folder)),),
            pack=PackSpec(context=options.context),
            tokens=options.tokens,
            heldout_tokens=max(500, options.tokens // 20),
        ),
        sae=TopKSpec(tokens=3 * options.tokens),  # about three epochs; `epochs` refuses more than four
    )


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="catalogue name, hub id, folder or .gguf file")
    parser.add_argument("--site", default="resid_post.9")
    parser.add_argument("--tokens", type=int, default=300_000, help="distinct tokens to train on")
    parser.add_argument("--context", type=int, default=512, help="the longest row, in tokens")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args(args)
    spec = spec_of(options)
    try:
        trained = train.run(spec, options.runs)
        folder = train.sae_folder(trained)
        measured = evaluation.run(EvalSpec(sae=folder), options.runs).result.metrics
        recorded = latents.run(LatentsSpec(sae=folder, tokens=options.tokens), options.runs)
    except UnweaveError as error:
        print(f"error: {error}", file=sys.stderr)  # what happened, where, and what to do about it
        return 2

    print(f"SAE: {folder}")
    print(f"unexplained variance {measured.unexplained_variance:.3f} at L0 {measured.l0:.1f}")
    if measured.recovered_vs_mean is not None:
        print(f"cross-entropy recovered against mean ablation {measured.recovered_vs_mean:.3f}")
    records = latents.load(recorded)
    print(records)
    for latent in records.rate.argsort()[-3:]:
        print(records.latent(int(latent)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
