"""A small SAE that both files of tests explain."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.core.run import Run
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec, StreamSpec
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.spec import TrainSpec

WORDS = ["sea", "old", "the", "key", "cat", "runs", "3", "to", "was", "rain", "moon", "over", "them", "again"]


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 9)))}) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="package")
def trained(home: Path) -> Run:
    sources = (Source(path=str(home / "text.jsonl")),)
    spec = TrainSpec(
        model=str(home / "model"),
        sites=("resid_post.1",),
        data=DataSpec(sources=sources, pack=PackSpec(context=48), tokens=3000, heldout=0.2, heldout_tokens=500),
        stream=StreamSpec(chunk_tokens=1000, buffer_tokens=2000, batch_tokens=512),
        sae=TopKSpec(expansion=2, k=4, tokens=4000, batch=64, k_aux=16, dead_after=3000),
        device="cpu",
    )
    return train.run(spec, home / "runs")
