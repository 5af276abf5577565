"""What a condition costs in a training step of SmolLM2, as ratios to the step without, interleaved in one run.

    python benchmarks/finetuning.py [--rounds 5] [--rows 8] [--tokens 32] [--widths 4608 65536] [--threads 1]

step      forward and backward of a batch, all parameters trained, loss at the last position; the optimiser's update,
          which no condition changes, is left out. 50 latents over 10 sites, 5 at each; SAEs of random weights.
TopK      a subset cannot know a token's winners: every token on which a chosen latent's pre-activation is positive is
          encoded fully. Those are 3 % of a latent's tokens, as in a trained SAE, or every token (at worst).
obvious   encode the whole SAE, zero the latents, decode, add the error, at each site.

Each round times every condition between two bare steps and divides by their mean, in seconds of the processor; the
table has medians over rounds. Memory is what autograd keeps for the backward pass (exact: storages of saved tensors,
without parameters), and the process's peak above what it holds before the step. The obvious way must give the same loss
and gradient as ours: the largest difference is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from unweave import LM, SAE, Site
from unweave.latents.selection import Chosen, Selection, SiteChoice
from unweave.lm.model import Tokens
from unweave.methods.finetune.conditions import Condition, base_values, open_condition
from unweave.methods.finetune.spec import ConditionSpec
from unweave.sae.activations import JumpReLU, TopK

SITES = tuple(Site("resid_post", layer) for layer in range(2, 30, 3))
PER_SITE = 5
console = Console(width=None if sys.stdout.isatty() else 140)


def saes_of(width: int, d: int) -> dict[Site, SAE]:
    """JumpReLU SAEs of unit decoder rows, one at each site; all share their weights, so that 65,536 latents fit."""
    W = torch.nn.functional.normalize(torch.randn(width, d, generator=torch.Generator().manual_seed(0)), dim=1)
    W_enc, zero, activation = W.T.contiguous(), torch.zeros(width), JumpReLU(torch.full((width,), 0.5))
    return {site: SAE(W_enc, zero, W, torch.zeros(d), activation, read=site) for site in SITES}


def topk_of(lm: LM, saes: Mapping[Site, SAE], tokens: Tokens, positive: float) -> dict[Site, SAE]:
    """The same as TopK SAEs, biased so that the share ``positive`` of each latent's pre-activations is above 0."""
    with lm.taps(read=SITES, stop=SITES[-1]) as seen:
        lm(tokens)
    changed = {}
    for site, sae in saes.items():
        ordered = sae.pre(seen[site].flatten(0, 1)).sort(0).values
        bias = -ordered[int((1 - positive) * (len(ordered) - 1))] + 1e-3
        changed[site] = SAE(sae.W_enc, bias, sae.W_dec, sae.b_dec, TopK(64), read=site)
    return changed


def condition_of(lm: LM, saes: Mapping[Site, SAE], kind: Any, per_site: int = PER_SITE) -> Condition:
    sites = tuple(SiteChoice(site, tuple(map(Chosen, range(per_site)))) for site in saes)
    selection = Selection("chosen", "latents", sites, lm.name, per_site, "rule")
    return open_condition(ConditionSpec(kind=kind), selection, lm, saes)


def obvious(saes: Mapping[Site, SAE]) -> dict[Site, Callable[[Tensor, Any], Tensor]]:
    def edit(sae: SAE) -> Callable[[Tensor, Any], Tensor]:
        def ablated(x: Tensor, at: Any) -> Tensor:
            f = sae.encode(x)
            error = x - sae.decode(f)
            keep = torch.ones(sae.d_sae)
            keep[:PER_SITE] = 0
            return torch.where(at.mask.unsqueeze(-1), sae.decode(f * keep) + error, x)

        return ablated

    return {site: edit(sae) for site, sae in saes.items()}


class Step:
    """A training step, bare, under edits, or with a penalty."""

    def __init__(self, lm: LM, tokens: Tokens, edits: Any = None, penalised: Condition | None = None) -> None:
        self.lm, self.tokens, self.edits, self.penalised = lm, tokens, edits, penalised
        self.targets = tokens.ids[:, -1].roll(1)
        self.base = None if penalised is None else base_values(lm, penalised, tokens)

    def loss(self, seen: Mapping[Site, Tensor]) -> Tensor:
        logits = self.lm(self.tokens, keep_logits=1)
        assert logits is not None
        loss = torch.nn.functional.cross_entropy(logits[:, -1].float(), self.targets)
        if self.penalised is None or self.base is None:
            return loss
        more = self.penalised.penalty(seen, self.tokens, self.base, 1.0)
        return loss if more is None else loss + more

    def __call__(self) -> float:
        self.lm.model.zero_grad(set_to_none=True)
        reads = self.penalised.reads if self.penalised else ()
        with self.lm.taps(edit=self.edits, read=reads, grad=True) as seen:
            loss = self.loss(seen)
            loss.backward()
        return float(loss.detach())

    def kept(self) -> int:
        """Bytes that autograd keeps for the backward pass."""
        storages: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.lm.model.parameters()}
        own |= {b.untyped_storage().data_ptr() for sae in shared for b in sae.buffers()}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return x

        reads = self.penalised.reads if self.penalised else ()
        with self.lm.taps(edit=self.edits, read=reads, grad=True) as seen:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = self.loss(seen)  # holds the graph, so that no address is used twice
            del loss
        return sum(storages.values())

    def peak(self) -> float:
        """The process's largest memory during a step, above that before it, in bytes."""
        self.lm.model.zero_grad(set_to_none=True)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        before = status("VmRSS")
        self()
        return status("VmHWM") - before


shared: list[SAE] = []


def status(name: str) -> int:
    """One of this process's memory figures, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def seconds(step: Callable[[], float]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def steps_of(lm: LM, tokens: Tokens, widths: list[int]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for width in widths:
        relu = saes_of(width, lm.d_model)
        often, worst = (topk_of(lm, relu, tokens, share) for share in (0.03, 1.0))
        shared.extend([*relu.values(), *often.values(), *worst.values()])
        for kind in ("zero", "span", "penalty"):
            one = condition_of(lm, relu, kind)
            steps[f"{kind}, {width:,}"] = Step(lm, tokens, one.edits(1.0), one if kind == "penalty" else None)
        steps[f"zero, 50 at each site, {width:,}"] = Step(lm, tokens, condition_of(lm, relu, "zero", 50).edits(1.0))
        for name, saes in (("", often), (" at worst", worst)):
            steps[f"zero, TopK {width:,}{name}"] = Step(lm, tokens, condition_of(lm, saes, "zero").edits(1.0))
        steps[f"obvious zero, {width:,}"] = Step(lm, tokens, obvious(relu))
    return steps


def difference(lm: LM, ours: Step, theirs: Step) -> tuple[float, float]:
    """(of the loss, of any parameter's gradient relative to that parameter's largest)."""
    mine = ours()
    gradients = {name: p.grad for name, p in lm.model.named_parameters()}
    lm.model.zero_grad(set_to_none=True)
    other = theirs()
    apart = [
        float((gradients[name] - p.grad).abs().max() / p.grad.abs().max().clamp(min=1e-12))
        for name, p in lm.model.named_parameters()
    ]
    return abs(mine - other), max(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of the obvious way and of TopK at worst")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="*", default=[4608, 65536])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lm = LM.load("smollm2-135m-instruct")
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(100, lm.vocab_size, (options.rows, options.tokens), generator=g)
    tokens = Tokens.of(ids)
    steps = steps_of(lm, tokens, options.widths)
    lm.model.requires_grad_(True)
    bare = Step(lm, tokens)
    bare()  # warms up
    times: dict[str, list[float]] = {name: [] for name in steps}
    alone = []
    for turn in range(options.rounds):
        before = seconds(bare)
        for name, step in steps.items():
            if turn >= options.slow_rounds and ("obvious" in name or "worst" in name):
                continue
            taken, after = seconds(step), seconds(bare)
            times[name].append(2 * taken / (before + after))
            alone.append(before := after)
    kept, peak = bare.kept(), bare.peak()
    second = statistics.median(alone)
    speed = f"bare {second:.2f} s ({ids.numel() / second:,.0f} tokens/s)"
    memory = f"{kept / 1e6:,.0f} MB kept, {peak / 1e6:,.0f} MB at the peak"
    table = Table(title=f"A step of {ids.numel():,} tokens: {speed}, {memory}")
    for head in ("50 latents over 10 sites", "time: median, least, most", "kept", "peak"):
        table.add_column(head, justify="left" if head.startswith("50") else "right")
    for name, step in steps.items():
        spread = ", ".join(f"{one(times[name]):.3f}" for one in (statistics.median, min, max))
        table.add_row(name, spread, f"{step.kept() / kept:.3f}", f"{step.peak() / peak:.3f}")
    console.print(table)
    for width in options.widths:
        loss, gradient = difference(lm, steps[f"zero, {width:,}"], steps[f"obvious zero, {width:,}"])
        console.print(f"{width:,}: ours against the obvious way: loss {loss:.1e}, gradients {gradient:.1e} (relative)")


if __name__ == "__main__":
    main()
