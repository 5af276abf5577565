"""A training of a second, of an SAE with 64 latents to explain."""

from __future__ import annotations

import json
import random
from pathlib import Path

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.core.run import Run
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec, StreamSpec
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.spec import TrainSpec

WORDS = ["sea", "old", "the", "key", "cat", "runs", "3", "to", "was", "rain", "moon", "over", "them", "again"]


def train_small(folder: Path) -> Run:
    """Writes model/ and text.jsonl into a folder, and trains on them."""
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 9)))}) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    sources = (Source(path=str(folder / "text.jsonl")),)
    spec = TrainSpec(
        model=str(folder / "model"),
        sites=("resid_post.1",),
        data=DataSpec(sources=sources, pack=PackSpec(context=48), tokens=3000, heldout=0.2, heldout_tokens=500),
        stream=StreamSpec(chunk_tokens=1000, buffer_tokens=2000, batch_tokens=512),
        sae=TopKSpec(expansion=2, k=4, tokens=4000, batch=64, k_aux=16, dead_after=3000),
        device="cpu",
    )
    return train.run(spec, folder / "runs")
