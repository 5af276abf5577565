"""How long node effects and edges take beside the obvious loop, for circuits of 19 sites of a random model.

    python benchmarks/circuits.py [--rounds 3] [--sizes 2x6 8x8 32x16] [--latents 512 4096] [--nodes 100 2000]
                                  [--device cuda] [--json FILE]

The model: 6 blocks of width 512 and a vocabulary of 50,304 (Pythia-70M's sizes; GPT-NeoX, attention before the MLP).
SAEs at the embedding and, in every block, at what attention and MLP add and at the residual stream. Integrated
gradients with 10 points, pairs of random tokens that differ in a third of their places, about as many retained
downstream nodes as ``--nodes`` says, weights summed over positions.

The loop (``tests/helpers/circuit_loop.py``) has no handicap. Nodes: a forward and backward pass of the whole batch per
site and point, from the last logits to the site. Edges: one forward pass in which every node is a leaf, then a backward
pass per retained node that asks for the leaves it reaches and nothing else, over the graph of the whole batch or of the
node's own example, whichever is faster. Where the loop would take long, nodes are timed with fewer points and edges
with a sample of the retained nodes, and the rest is extrapolated: the table says how much was timed.

Both sides take turns; seconds are medians over rounds, ratios medians of the ratio within a round. ``by operations``
counts both sides' floating-point operations (of matrix products, as PyTorch counts them): the ratio that arithmetic
alone allows at one rate. What is measured beyond it comes from fewer and larger pieces of work. Memory is the most
above the level before, of the process on a CPU and of PyTorch's allocations on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import circuit_loop
from unweave.attribute.attribution import SiteEffects, node_effects
from unweave.attribute.options import AttributionOptions
from unweave.attribute.states import change_of, moved_positions, states
from unweave.circuits.about import Options
from unweave.circuits.edges import edge_effects
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import JumpReLU
from unweave.sae.module import SAE
from unweave.tasks.agreement import AnswerDifference

LAYERS, WIDTH, VOCABULARY, STEPS = 6, 512, 50_304, 10
SITES = ["embed", *(f"{point}.{i}" for i in range(LAYERS) for point in ("attn_add", "mlp_add", "resid_post"))]
console = Console(width=None if sys.stdout.isatty() else 200)


def make_lm(device: str) -> LM:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
        intermediate_size=4 * WIDTH, max_position_embeddings=512, use_parallel_residual=False,
    )  # fmt: skip
    return LM(GPTNeoXForCausalLM(config).to(device), None)


def make_saes(lm: LM, latents: int) -> dict[Site, SAE]:
    """Random directions of norm 1, the encoder their transpose; 32 or 64 latents are active at a token on average."""
    g = torch.Generator().manual_seed(1)
    tokens = Tokens.of(torch.randint(0, VOCABULARY, (16, 16), generator=g))
    sites = [Site.parse(site) for site in SITES]
    with lm.taps(read=sites) as seen:
        lm(tokens)
    saes = {}
    for site in sites:
        x = seen[site].flatten(0, 1)
        W_dec = torch.nn.functional.normalize(torch.randn(latents, WIDTH, generator=g), dim=1).to(lm.device)
        b_dec = x.mean(0)
        pre = (x - b_dec) @ W_dec.T
        share = (32 if latents <= 512 else 64) / latents
        bound = pre.flatten().sort().values[int(pre.numel() * (1 - share))].clamp(min=0)
        activation = JumpReLU(bound.expand(latents).clone())
        saes[site] = SAE(W_dec.T.contiguous(), -b_dec @ W_dec.T, W_dec, b_dec, activation, read=site).to(lm.device)
    return saes


def make_pair(size: tuple[int, int]) -> tuple[Tokens, Tokens]:
    g = torch.Generator().manual_seed(2)
    clean = torch.randint(0, VOCABULARY, size, generator=g)
    patch = clean.clone()
    middle = slice(size[1] // 3, 2 * size[1] // 3)
    patch[:, middle] = torch.randint(0, VOCABULARY, patch[:, middle].shape, generator=g)
    return Tokens.of(clean), Tokens.of(patch)


# -- the two sides ----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One size: inputs, SAEs, node effects and which downstream nodes are retained."""

    lm: LM
    saes: dict[Site, SAE]
    clean: Tokens
    patch: Tokens
    max_tokens: int
    effects: dict[Site, SiteEffects]
    threshold: float = 0.0
    retained: tuple[tuple[Site, tuple[int, int, int]], ...] = ()

    def retain(self, wanted: int) -> None:
        """Sets the threshold so that about so many nodes that can have edges pass it."""
        sizes = {s: torch.cat([e.latents, e.error[..., None]], -1).abs() for s, e in self.effects.items()}
        del sizes[Site("embed")]
        everything = torch.cat([e.flatten() for e in sizes.values()])
        self.threshold = float(everything.topk(wanted + 1).values[-1])
        self.retained = tuple((s, tuple(n)) for s, e in sizes.items() for n in (e > self.threshold).nonzero().tolist())  # type: ignore[misc]

    @property
    def metric(self) -> AnswerDifference:
        answers = torch.ones(len(self.clean), dtype=torch.int64)
        return AnswerDifference(7 * answers, 5 * answers)

    def our_nodes(self) -> Any:
        return node_effects(
            self.lm,
            self.saes,
            self.clean,
            self.patch,
            self.metric,
            AttributionOptions(method="ig", steps=STEPS, max_tokens=self.max_tokens),
        )

    def our_edges(self) -> Any:
        return edge_effects(
            self.lm,
            self.saes,
            self.clean,
            self.patch,
            self.effects,
            Options(node_threshold=self.threshold, summed="positions", max_tokens=self.max_tokens),
        )

    def loop_nodes(self, points: int) -> Any:
        """All sites, the first of the points."""
        clean = circuit_loop.site_values(self.lm, self.saes, self.clean)
        patch = circuit_loop.site_values(self.lm, self.saes, self.patch)
        starts, ends = ({s: v[0] for s, v in values.items()} for values in (clean, patch))
        alphas = [k / STEPS for k in range(points)]
        found = circuit_loop.node_gradients(self.lm, list(self.saes), starts, ends, self.clean, self.metric, alphas)
        effects = {}
        for site, g in found.items():
            (_, f, e), (_, f2, e2) = clean[site], patch[site]
            effects[site] = ((g @ self.saes[site].W_dec.T) * (f2 - f), (g * (e2 - e)).sum(-1))
        return effects

    def changes(self) -> dict[Site, tuple[Tensor, Tensor]]:
        start, end = (states(self.lm, self.saes, t, max_tokens=self.max_tokens) for t in (self.clean, self.patch))
        moved = moved_positions(self.clean.to(self.lm.device), None)
        found = {s: change_of(self.saes[s], start[s], end[s], moved) for s in start}
        return {s: (c.latents, c.error) for s, c in found.items()}

    def loop_edges(self, sample: int, alone: bool, changes: dict[Site, tuple[Tensor, Tensor]]) -> tuple[float, Any]:
        """Seconds for all retained nodes, from ``sample`` of them, and their edges; ``alone``: a graph per example."""
        every = max(1, len(self.retained) // sample)
        nodes = self.retained[::every]
        gradients = {s: e.gradient for s, e in self.effects.items()}
        summed: dict[Any, Tensor] = {}
        forward = backward = 0.0
        groups = [slice(i, i + 1) for i in range(len(self.clean))] if alone else [slice(0, len(self.clean))]
        for rows in groups:
            here = [(s, (b - rows.start, p, j)) for s, (b, p, j) in nodes if rows.start <= b < rows.stop]
            if not here:
                continue
            began = seconds(self.lm)
            graph = circuit_loop.leaves(self.lm, self.saes, self.clean.rows(rows))
            forward += seconds(self.lm) - began
            part = {s: (f[rows], e[rows]) for s, (f, e) in changes.items()}
            left = {s: g[rows] for s, g in gradients.items()}
            wanted: dict[Site, list[tuple[int, int, int]]] = {}
            for site, node in here:
                wanted.setdefault(site, []).append(node)
            began = seconds(self.lm)
            for up, down, (_, _, slot), weights in circuit_loop.edge_rows(graph, self.saes, left, part, wanted):
                total = summed.setdefault((up, down, slot), weights.new_zeros(weights.shape[-1]))
                total += weights.sum(0)
            backward += seconds(self.lm) - began
        return forward + backward * len(self.retained) / len(nodes), summed


def seconds(lm: LM) -> float:
    """A clock that waits for the device."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(lm: LM, work: Callable[[], Any]) -> float:
    began = seconds(lm)
    work()
    return seconds(lm) - began


class Counter(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products and attention."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def observe(lm: LM, work: Callable[[], Any]) -> tuple[float, float]:
    """Floating-point operations, and the most memory above the level before in MB."""
    gc.collect()
    on_gpu = lm.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide what is used anew
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = resident("VmRSS")
    with Counter() as counter:
        work()
    after = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return counter.total, max(0, after - before) / 1e6


def resident(name: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


# -- rounds -----------------------------------------------------------------------------------------------------------


def check(case: Case, summed: dict[Any, Tensor]) -> float:
    """The largest relative difference of our edges from the loop's, over the downstream nodes."""
    ours = case.our_edges()
    worst = 0.0
    dense: dict[tuple[Site, Site], Tensor] = {}
    for up, down, slot in summed:
        if (up, down) not in dense:
            edges = ours.get((up, down))
            table = torch.zeros(case.saes[up].d_sae + 1, case.saes[down].d_sae + 1, device=case.lm.device)
            if edges is not None:
                table[edges.up[:, 1], edges.down[:, 1]] = edges.weight
            dense[up, down] = table
        expected = summed[up, down, slot]
        scale = max(float(expected.norm()), 1e-3 * float(dense[up, down].norm()))
        if scale > 0:
            worst = max(worst, float((dense[up, down][:, slot] - expected).norm()) / scale)
    return worst


def measure(case: Case, rounds: int, budget: float) -> dict[str, Any]:
    """One row of the table. ``budget`` seconds are what one timing of the loop may take."""
    changes = case.changes()
    one = timed(case.lm, lambda: case.loop_nodes(1))
    points = max(1, min(STEPS, int(budget / one)))
    few = min(20, len(case.retained))
    both = {alone: case.loop_edges(few, alone, changes)[0] for alone in (False, True)}
    alone = both[True] < both[False]
    sample = max(few, min(len(case.retained), int(budget / both[alone] * len(case.retained))))
    case.our_edges()
    times: dict[str, list[float]] = {name: [] for name in ("loop nodes", "our nodes", "loop edges", "our edges")}
    for _ in range(rounds):
        start, some = timed(case.lm, lambda: case.loop_nodes(0)), timed(case.lm, lambda: case.loop_nodes(points))
        times["loop nodes"].append(start + (some - start) * STEPS / points)
        times["our nodes"].append(timed(case.lm, case.our_nodes))
        times["loop edges"].append(case.loop_edges(sample, alone, changes)[0])
        times["our edges"].append(timed(case.lm, case.our_edges))
    ratios = list(zip(*times.values(), strict=True))
    one_point = observe(case.lm, lambda: case.loop_nodes(1))
    a_few = observe(case.lm, lambda: case.loop_edges(few, alone, changes))
    seen = {
        "loop nodes": (one_point[0] * STEPS, one_point[1]),
        "our nodes": observe(case.lm, case.our_nodes),
        "loop edges": (a_few[0] * len(case.retained) / few, a_few[1]),
        "our edges": observe(case.lm, case.our_edges),
    }
    return {
        "retained": len(case.retained),
        "points": points,
        "sample": min(sample, len(case.retained)),
        "graph": "example" if alone else "batch",
        "seconds": {name: statistics.median(several) for name, several in times.items()},
        "nodes": statistics.median(a / b for a, b, _, _ in ratios),
        "edges": statistics.median(c / d for _, _, c, d in ratios),
        "both": statistics.median((a + c) / (b + d) for a, b, c, d in ratios),
        "flops": {name: flops for name, (flops, _) in seen.items()},
        "memory": {name: memory for name, (_, memory) in seen.items()},
        "difference": check(case, case.loop_edges(len(case.retained), alone, changes)[1])
        if sample >= len(case.retained)
        else None,
    }


def row(label: str, latents: int, found: dict[str, Any]) -> list[str]:
    s, f, m = found["seconds"], found["flops"], found["memory"]
    nodes, both = (
        f["loop nodes"] / f["our nodes"],
        (f["loop nodes"] + f["loop edges"]) / (f["our nodes"] + f["our edges"]),
    )
    timed_part = f"{found['points']} of {STEPS}, {found['sample']:,} of {found['retained']:,} ({found['graph']})"
    return [
        label,
        f"{latents:,}",
        f"{found['retained']:,}",
        f"{s['loop nodes']:.2f} / {s['our nodes']:.2f}",
        f"{s['loop edges']:.2f} / {s['our edges']:.2f}",
        f"{found['nodes']:.1f}x",
        f"{found['edges']:.1f}x",
        f"{found['both']:.1f}x",
        f"{nodes:.1f} / {f['loop edges'] / f['our edges']:.1f} / {both:.1f}",
        timed_part,
        f"{max(m['loop nodes'], m['loop edges']):,.0f} / {max(m['our nodes'], m['our edges']):,.0f}",
        "" if found["difference"] is None else f"{found['difference']:.0e}",
    ]


COLUMNS = (
    "examples x tokens", "latents", "retained", "nodes: loop / ours, s", "edges: loop / ours, s", "nodes", "edges",
    "both", "by operations: nodes / edges / both", "of the loop, timed", "memory: loop / ours, MB", "edges differ by",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["2x6", "8x8", "32x16"], help="examples x tokens")
    parser.add_argument("--latents", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--nodes", nargs="+", type=int, default=[100, 2000], help="retained downstream nodes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for one timing of the loop's nodes or edges")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of one pass, on our side")
    parser.add_argument("--threads", type=int, default=0, help="default: PyTorch's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    lm = make_lm(options.device)
    table = Table(title=f"nodes and edges, {len(SITES)} sites, {torch.get_num_threads()} threads, {options.device}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    written: dict[str, Any] = {"threads": torch.get_num_threads(), "device": options.device, "torch": torch.__version__}
    for latents in options.latents:
        saes = make_saes(lm, latents)
        for label in options.sizes:
            examples, tokens = map(int, label.split("x"))
            clean, patch = (t.to(lm.device) for t in make_pair((examples, tokens)))
            case = Case(lm, saes, clean, patch, options.max_tokens, {})
            case.effects = case.our_nodes()
            for wanted in options.nodes:
                case.retain(wanted)
                console.print(f"{label}, {latents:,} latents, {len(case.retained):,} retained nodes ...")
                found = measure(case, options.rounds, options.budget)
                written[f"{label} {latents} {wanted}"] = found
                table.add_row(*row(label, latents, found))
                if options.json:
                    options.json.write_text(json.dumps(written, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
