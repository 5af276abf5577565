"""What labelling costs beside the bare harvest, and how its memory grows with the number of texts.

    python benchmarks/labels.py [--judge NAME] [--tokens 500000] [--source debtags | FILE.jsonl] [--sae FOLDER]
    python benchmarks/labels.py --judge none --tokens 0 --sizes --rounds 7    # generation alone

ratio    chunk by chunk, in turns: reading all activations of one site from the model (the bare harvest), and what
         ``unweave labels`` does with them: the same pass, the SAE's codes, counts by text and latent, the piece kept.
         Beside it the rest of the work, once: matching, shuffled labels, output scores. Without ``--sae`` an SAE of
         4,608 random latents, about 40 active a token.
judging  the known cases of a judge's check put to a model that runs here: one by one, each whole prompt read and each
         reply written to its end or 40 tokens, against ``judge/local.py`` (shared beginnings, batches, replies that
         end with the rating); the ratings must be the same.
memory   the largest anonymous memory above the start's, of a random tiny model with 4,608 latents on 2,000, 8,000 and
         32,000 texts, each in a process of its own.
generate 16 prompts of SmolLM2 continued by 32 tokens in one batch with a cache, in turns unedited and edited: one
         latent for all rows, eight latents with a strength for each row, one while another fires, one that does not
         persist.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from unweave import LM, SAE, Site
from unweave.core.pieces import Pieces
from unweave.judge.base import CachedJudge, Reply
from unweave.judge.check import known_texts
from unweave.judge.form import rate
from unweave.judge.local import LocalModel
from unweave.judge.scripted import Scripted
from unweave.methods.explain.forms import DETECTION, Claim
from unweave.methods.labels import labels
from unweave.methods.labels.frequencies import Frequencies, Reading, read_chunk
from unweave.methods.labels.spec import MatchSpec
from unweave.sae.activations import JumpReLU
from unweave.sae.edits import Change, together
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import TaggedTexts, open_tagged

LAYER, LATENTS, ACTIVE = 9, 4608, 40
console = Console(width=None if sys.stdout.isatty() else 160)


def activations(lm: LM, site: Site, texts: TaggedTexts) -> torch.Tensor:
    """Activations [N, D] of the first tokens of some texts."""
    rows = [lm.tokenize(texts.text(i)).columns(slice(1, 40)) for i in range(20)]
    parts = []
    for row in rows:
        with lm.taps(read=[site], stop=site) as seen:
            lm(row)
        parts.append(seen[site][0])
    return torch.cat(parts)


def random_sae(site: Site, x: torch.Tensor) -> SAE:
    """Random directions of norm 1; thresholds such that about 40 latents are active on a token of x [N, D]."""
    W = torch.randn(LATENTS, x.shape[1], generator=torch.Generator().manual_seed(0))
    W = torch.nn.functional.normalize(W, dim=1)
    threshold = torch.quantile((x @ W.T).flatten()[: 1 << 23], 1 - ACTIVE / LATENTS).clamp(min=1e-3)
    return SAE(W.T.contiguous(), torch.zeros(LATENTS), W, torch.zeros(x.shape[1]),
               JumpReLU(threshold.expand(LATENTS).clone()), read=site)  # fmt: skip


def ratio(arguments: argparse.Namespace, folder: Path) -> None:
    lm = LM.load("smollm2-135m-instruct")
    site = Site("resid_post", LAYER)
    texts = open_tagged(TaggedSpec(source=arguments.source))
    sae = SAE.load(arguments.sae) if arguments.sae else random_sae(site, activations(lm, site, texts))
    which = np.random.default_rng(0).permutation(np.flatnonzero(~texts.heldout))
    size = np.cumsum([min(128, len(texts.text(int(i))) // 4) for i in which])  # about four characters a token
    which = which[: int((size < arguments.tokens).sum()) + 1]
    reading = Reading.of(lm, {site: sae}, texts, which, folder / "store", context=128, batch_tokens=2048)
    pieces, bare, ours = Pieces(folder / "pieces"), [], []
    for chunk in range(reading.source.n_chunks):
        for turn in (chunk % 2, 1 - chunk % 2):
            started = time.perf_counter()
            if turn:
                for _ in reading.source.passes(chunk):
                    pass
                bare.append(time.perf_counter() - started)
            else:
                read_chunk(reading, pieces, chunk)
                ours.append(time.perf_counter() - started)
    started = time.perf_counter()
    counted = Frequencies(reading, pieces)
    text_labels = labels.labels_of(texts, reading, counted.tokens(site) > 0)
    often = np.flatnonzero(text_labels.support >= min(50, np.sort(text_labels.support)[-10:][0]))
    labels.best_pairs(lm, sae, counted, site, text_labels.of(often), MatchSpec(output_score=0.0), 0)
    rest, tokens = time.perf_counter() - started, reading.store.n_tokens
    each = [a / b for a, b in zip(ours, bare, strict=True)]
    table = Table(
        title=f"Labelling {tokens:,} tokens, {len(which):,} texts, {sae.d_sae:,} latents, {len(often)} labels"
    )
    for head in ("", "seconds", "of the bare harvest"):
        table.add_column(head, justify="left" if not head else "right")
    spread = f"{min(each):.0%} to {max(each):.0%}"
    table.add_row("bare harvest", f"{sum(bare):.1f}", f"{tokens / sum(bare):,.0f} tokens/s")
    table.add_row("harvest and counts", f"{sum(ours):.1f}", f"{statistics.median(each):.1%}, by chunk {spread}")
    table.add_row("matching, shuffled, output scores", f"{rest:.1f}", f"{rest / sum(bare):.1%}")
    table.add_row("labelling in all", f"{sum(ours) + rest:.1f}", f"{(sum(ours) + rest) / sum(bare):.1%}")
    console.print(table)


def judging(name: str) -> None:
    lm, cases = LM.load(name), [Claim(one.concept, one.text) for one in known_texts()]
    started, naive = time.perf_counter(), []
    for case in cases:
        prompt = lm.chat([DETECTION.messages(case)], add_generation_prompt=True)
        naive.append(Reply(lm.decode(lm.generate_ids(prompt, max_new_tokens=40)[0])))
    slow = time.perf_counter() - started
    started = time.perf_counter()
    ratings = rate(CachedJudge(LocalModel(lm, max_new_tokens=40)), DETECTION, cases)
    quick = time.perf_counter() - started
    replies = Scripted([reply.text for reply in naive])
    same = int(((values := rate(replies, DETECTION, cases).values) == ratings.values).sum())
    usable = int((values == values).sum())
    table = Table(title=f"Judging {len(cases)} prompts of about {prompt.n_tokens} tokens by {lm.name}")
    for head in ("", "seconds a prompt"):
        table.add_column(head, justify="left" if not head else "right")
    table.add_row("one by one", f"{slow / len(cases):.2f}")
    table.add_row("shared beginnings, batches, cut at the rating", f"{quick / len(cases):.2f}")
    table.add_row("times as fast", f"{slow / quick:.1f}")
    table.add_row("the same rating", f"{same} of {usable}")
    console.print(table)


def one_size(n: int, folder: Path) -> None:
    """Labels n texts with a random tiny model and prints the growth of memory in megabytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from helpers.models import build_tiny_tokenizer

    config = LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=64, max_position_embeddings=128)  # fmt: skip
    torch.manual_seed(0)
    lm, draw = LM(LlamaForCausalLM(config), build_tiny_tokenizer()), random.Random(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as out:
        for _ in range(n):
            text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=60))
            out.write(json.dumps({"text": text, "tags": [f"tag{i}" for i in draw.sample(range(100), 4)]}) + "\n")
    texts = open_tagged(TaggedSpec(source=str(folder / "rows.jsonl")))
    site = Site("resid_post", 0)
    saes = {site: random_sae(site, activations(lm, site, texts))}
    most, done, start = 0, threading.Event(), memory()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    labels.label(lm, saes, texts, MatchSpec(support=5, output_score=None), folder=folder / "work")
    done.set()
    watcher.join()
    print(json.dumps({"megabytes": (most - start) / 1024}))


def memory() -> int:
    """This process's anonymous memory in kilobytes."""
    with open("/proc/self/status", encoding="ascii") as handle:
        return next(int(line.split()[1]) for line in handle if line.startswith("RssAnon"))


def growth(sizes: list[int]) -> None:
    table = Table(title=f"Memory of labelling with {LATENTS:,} latents and 100 labels")
    table.add_column("texts", justify="right")
    table.add_column("MB above the start's", justify="right")
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one-size", str(n), "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        table.add_row(f"{n:,}", f"{json.loads(done.stdout.splitlines()[-1])['megabytes']:.0f}")
    console.print(table)


def generation(rounds: int) -> None:
    lm = LM.load("smollm2-135m-instruct")
    lm.tokenizer.eos_token, lm.tokenizer.chat_template = None, None  # every run generates all tokens
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    texts = [f"The {word} is" for word in ("sea", "moon", "old man", "city", "war", "law", "code", "food")] * 2
    tokens, site = lm.tokenize(texts, side="left"), Site("resid_post", LAYER)
    with lm.taps(read=[site], stop=site) as seen:
        lm(tokens)
    sae = random_sae(site, seen[site][:, 1:].flatten(0, 1))
    rows = together([[Change(sae, row % 8, 4.0 + row)] for row in range(len(texts))])
    runs = {
        "unedited": (None, True), "one latent": (sae.clamp({7: 8.0}), True), "eight latents by row": (rows, True),
        "while another fires": (sae.clamp({7: 8.0}, when=sae.fires(9)), True),
        "not persistent": (sae.clamp({7: 8.0}), False),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first warms up
        for name, (edit, persist) in runs.items():
            started = time.process_time()
            lm.generate_ids(tokens, edit, max_new_tokens=32, persist=persist)
            if turn:
                seconds[name].append(time.process_time() - started)
    table = Table("generation", "seconds", "of unedited: median, least, most")
    for name, times in seconds.items():
        ratios = [one / bare for one, bare in zip(times, seconds["unedited"], strict=True)]
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(name, f"{statistics.median(times):.2f}", ", ".join(f"{one:.3f}" for one in spread))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", default="smollm2-135m-instruct", help="none: leave this section out")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--source", default="debtags")
    parser.add_argument("--sae")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2_000, 8_000, 32_000])
    parser.add_argument("--rounds", type=int, default=7, help="of generation; 0 leaves it out")
    parser.add_argument("--one-size", type=int)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.one_size:
        one_size(arguments.one_size, arguments.folder)
        return
    if arguments.judge != "none":
        judging(arguments.judge)
    if arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            ratio(arguments, Path(folder))
    if arguments.sizes:
        growth(arguments.sizes)
    if arguments.rounds:
        generation(arguments.rounds)


if __name__ == "__main__":
    main()
