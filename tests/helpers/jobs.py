"""A small model and text in a folder, and trainings of a second on them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec, StreamSpec
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.spec import TrainSpec

WORDS = [
    "the", "keys", "to", "cabinet", "are", "on", "a", "table", "near", "old", "door", "and",
    "she", "was", "reading", "about", "sea", "while", "it", "rained",
]  # fmt: skip


def write_home(folder: Path) -> None:
    """model/ and text/ with a few hundred short documents."""
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    (folder / "text").mkdir()
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 11)))}) for _ in range(400)]
    (folder / "text" / "a.jsonl").write_text("\n".join(lines))
    talk = [{"role": "user", "content": "where are the keys"}, {"role": "assistant", "content": "on the table"}]
    (folder / "text" / "b.jsonl").write_text(
        "\n".join(json.dumps({"messages": talk + talk[: i % 3]}) for i in range(60))
    )


def spec_of(home: Path, **changes: Any) -> TrainSpec:
    """Training of one SAE on what ``write_home`` wrote, about a second long."""
    base = TrainSpec(
        model=str(home / "model"),
        sites=("resid_post.1",),
        data=DataSpec(
            sources=(Source(path=str(home / "text")),),
            pack=PackSpec(context=48),
            tokens=6000,
            heldout=0.3,
            heldout_tokens=2000,
        ),
        stream=StreamSpec(chunk_tokens=1000, buffer_tokens=2000, batch_tokens=512),
        sae=TopKSpec(expansion=4, k=4, tokens=20_000, batch=64, k_aux=16, dead_after=3000),
        device="cpu",
        checkpoint_seconds=0.05,
    )
    return replace(base, **changes)


def long_spec_of(home: Path) -> TrainSpec:
    """A few seconds of training of two SAEs, with a checkpoint every few steps."""
    base = spec_of(home, sites=("resid_post.{0,1}",), epochs=40.0, checkpoint_seconds=0.02)
    return replace(base, sae=replace(base.sae, tokens=160_000))


def small(home: Path, **changes: Any) -> TrainSpec:
    """Ten steps."""
    base = spec_of(home, checkpoint_seconds=60.0)
    return replace(base, sae=replace(base.sae, tokens=640), **changes)
