"""A small model, SAEs at four of its sites and pairs in a folder, and a search for a circuit on them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.lm.model import LM
from unweave.methods.circuits.spec import CircuitFindSpec
from unweave.sae.module import SAE, ReLU
from unweave.tasks import agreement
from unweave.tasks.agreement import Pair

SITES = ("embed", "attn_add.1", "mlp_add.1", "resid_post.1")


def made_pairs(n: int, seed: int, length: int = 6) -> list[Pair]:
    """Random words of letters, each with one that has another third letter."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        letters = rng.choices("abcdefghij", k=length)
        changed = [*letters[:2], rng.choice("xyz"), *letters[3:]]
        found.append(Pair("".join(letters), "".join(changed), rng.choice("klm"), rng.choice("nop"), ""))
    return found


def write_home(folder: Path) -> None:
    """model/, saes/ with one SAE a site, train.jsonl and test.jsonl of pairs, inputs.jsonl of single inputs."""
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    lm = LM.load(str(folder / "model"), device="cpu")
    g = torch.Generator().manual_seed(0)
    for site in SITES:
        enc, dec = torch.randn(32, 16, generator=g) * 0.3, torch.randn(16, 32, generator=g) * 0.3
        biases = torch.randn(16, generator=g) * 0.1, torch.randn(32, generator=g) * 0.1
        SAE(enc, biases[0], dec, biases[1], ReLU(), read=lm.site(site)).save(folder / "saes" / site)
    agreement.save(folder / "train.jsonl", made_pairs(9, 0) + made_pairs(2, 1, 7))
    agreement.save(folder / "test.jsonl", made_pairs(6, 2) + made_pairs(3, 3, 7) + made_pairs(2, 0))
    lines = [{"context": pair.clean_prefix, "answer": pair.clean_answer} for pair in made_pairs(8, 4)]
    lines += [{"context": "abc", "answer": "d"}, {"context": "abc", "answer": "de"}]
    (folder / "inputs.jsonl").write_text("\n".join(map(json.dumps, lines)))


def spec_of(home: Path, **changes: Any) -> CircuitFindSpec:
    """The search for a circuit on what ``write_home`` wrote."""
    base = CircuitFindSpec(
        saes=(str(home / "saes"),),
        model=str(home / "model"),
        device="cpu",
        pairs=home / "train.jsonl",
        steps=2,
        node_threshold=0.1,
    )
    return replace(base, **changes)
