"""What reading, editing and steering cost, as ratios to the bare model, interleaved in one run.

    python benchmarks/model.py [--rounds 7] [--tokens 8192]

harvest        chunks of ``ActivationSource`` (one site, five sites) against the model alone, stopped at the same layer
forward        a full forward pass under an edit against the bare one
evaluation     all numbers of ``evaluate`` (four variants of the model) against one bare forward pass; of SAEs that
               count every token, and that leave special tokens out
generation     greedy generation under an edit against the bare one

Each round times the bare run and the others right after one another; the table shows the median over rounds of the
ratio within a round, so that drift of the machine's speed cancels. 100 % is the bare model's speed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unweave import LM, SAE, Site
from unweave.data.corpus import Source, documents
from unweave.data.pack import PackSpec, pack
from unweave.data.policy import TokenPolicy
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.sae.activations import JumpReLU, TopK
from unweave.sae.measure.evaluate import evaluate

LAYER, LATENTS = 9, 4608
FIVE = ["resid_post.9", "mlp_add.9", "attn_add.9", "resid_post.4", "mlp_act.2"]


class _Enough(Exception):
    pass


@contextmanager
def stopped(lm: LM, layer: int) -> Iterator[None]:
    """The least that stops a model: one hook that raises."""

    def stop(*_: Any) -> None:
        raise _Enough

    handle = lm.layout.blocks[layer].register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def bare_harvest(lm: LM, store: TokenStore, source: ActivationSource) -> None:
    """The same batches of rows, pushed up to the layer and forgotten."""
    with stopped(lm, LAYER), torch.no_grad():
        for index in range(source.n_chunks):
            for rows in source.batches_of(index):
                tokens, _ = store.batch(rows, lm.pad_id)
                with suppress(_Enough):
                    lm.model(input_ids=tokens.ids, use_cache=False)


def random_sae(kind: str, d: int) -> SAE:
    """Its quality does not matter here; what an edit costs does not depend on it."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(LATENTS, d, generator=g), dim=1)
    activation = TopK(32) if kind == "topk" else JumpReLU(torch.ones(LATENTS))
    return SAE(W.T.contiguous(), torch.zeros(LATENTS), W, torch.zeros(d), activation, read=Site("resid_post", LAYER))


def ratios(
    bare: Callable[[], Any], others: dict[str, Callable[[], Any]], rounds: int
) -> tuple[float, dict[str, list[float]]]:
    """Median seconds of ``bare``, and per other the ratio bare/other of each round."""
    found: dict[str, list[float]] = {name: [] for name in others}
    base = []
    for turn in range(rounds + 1):
        seconds = {}
        order = ["", *others] if turn % 2 else [*others, ""]
        for name in order:
            started = time.perf_counter()
            (others[name] if name else bare)()
            seconds[name] = time.perf_counter() - started
        if turn:  # the first round warms up
            base.append(seconds[""])
            for name in others:
                found[name].append(seconds[""] / seconds[name])
    return statistics.median(base), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    lm = LM.load(options.model)
    console = Console()
    table = Table(
        "what",
        "bare",
        "median of bare's speed",
        "lowest",
        "highest",
        title=f"{lm!r}, {torch.get_num_threads()} threads",
    )

    def add(what: str, unit: str, bare: float, amount: float, found: dict[str, list[float]]) -> None:
        for name, values in found.items():
            table.add_row(
                f"{what}: {name}",
                f"{amount / bare:,.0f} {unit}/s",
                *(f"{v:.1%}" for v in (statistics.median(values), min(values), max(values))),
            )

    with tempfile.TemporaryDirectory() as folder:
        docs = documents((Source(path="chitchat"), Source(path="wiki")), 0)
        store = TokenStore.write(Path(folder) / "store", pack(docs, lm.tokenizer, PackSpec()), options.tokens, {})
        sources = {
            name: ActivationSource(lm, store, [lm.site(s) for s in sites], exclude_ids=lm.special_ids)
            for name, sites in (("one site", FIVE[:1]), ("five sites", FIVE))
        }
        one = sources["one site"]
        seconds, found = ratios(
            lambda: bare_harvest(lm, store, one),
            {name: lambda s=s: [s.chunk(i) for i in range(s.n_chunks)] for name, s in sources.items()},
            options.rounds,
        )
        add("harvest", "tokens", seconds, store.n_tokens, found)
        edits: dict[str, Any] = {}
        for kind in ("topk", "jumprelu"):
            sae = random_sae(kind, lm.d_model)
            edits |= {
                f"clamp 1 latent ({kind})": sae.clamp({7: 8.0}),
                f"ablate 50 latents ({kind})": sae.ablate(range(50)),
            }
        tokens, _ = store.batch([0, 1], lm.pad_id)

        def forward(edit: Any) -> None:
            with lm.taps(edit=edit):
                lm(tokens)

        seconds, found = ratios(
            lambda: lm(tokens), {n: lambda e=e: forward(e) for n, e in edits.items()}, options.rounds
        )
        add("forward", "tokens", seconds, tokens.n_tokens, found)
        saes = {"every token": random_sae("topk", lm.d_model), "no special tokens": random_sae("topk", lm.d_model)}
        saes["no special tokens"].policy = TokenPolicy(lm.special_ids)
        seconds, found = ratios(
            lambda: lm(tokens), {n: lambda s=s: evaluate(lm, s, [tokens]) for n, s in saes.items()}, options.rounds
        )
        add("evaluation", "tokens", seconds, tokens.n_tokens, found)
        prompt = lm.chat(
            [[{"role": "user", "content": "Tell me about the sea."}]], side="left", add_generation_prompt=True
        )

        def generate(edit: Any) -> None:
            lm.generate_ids(prompt, edit, max_new_tokens=40)

        eos = lm.model.generation_config.eos_token_id
        lm.model.generation_config.eos_token_id = None  # every run generates all 40
        seconds, found = ratios(
            lambda: generate(None), {n: lambda e=e: generate(e) for n, e in edits.items()}, options.rounds
        )
        lm.model.generation_config.eos_token_id = eos
        add("generation", "tokens", seconds, 40, found)
    console.print(table)


if __name__ == "__main__":
    main()
