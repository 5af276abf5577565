"""The speed, memory and loss of training steps beside other trainers and one dense encoder product.

    python benchmarks/training.py [--only topk-4096 relu-sparse ...] [--steps 40] [--budget] [--json FILE]

Contests: topk and batchtopk with batches of 2,048 and 4,096, everyone from its own initial weights; relu and jumprelu
with about 64 and about 553 active latents per token (0.7 % and 6 % of 9,216), everyone from the same given weights on
activations already scaled. In each, every contestant runs in an interpreter of its own (the peers in virtual
environments made for them) and sees the same batches. They take turns, a few steps at a time, so that drift of the
machine's speed falls on all of them; ratios are medians over turns of the ratio within a turn. Memory is the most that
was used above the level before the first step. The loss is the unexplained variance on held-out activations after the
same tokens; L0 there, at the end.

``--budget`` also itemises Unweave's TopK step. Without ``--activations`` (a .npy of [tokens, width] float32, or a
safetensors file or .pt dictionary with ``train`` and ``held``) those of SmolLM2's layer 9 are harvested first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from peers import budget, contests

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
PEERS = {"sparsify": "eai-sparsify", "saelens": "sae-lens"}
NAMES = {"unweave": "unweave", "sparsify": "eai-sparsify", "saelens": "sae-lens", "product": "dense product alone"}
console = Console(width=None if sys.stdout.isatty() else 120)


def install(folder: Path, package: str) -> Path:
    """The interpreter of a virtual environment with ``package``; made on first use, the pinned PyTorch first."""
    python = folder / package / "bin" / "python"
    ready = folder / package / "ready"
    if not ready.exists():
        console.print(f"installing {package} into {folder / package} (once) ...")
        venv.create(folder / package, with_pip=True)
        for wanted in ([TORCH], [TORCH, package]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        ready.touch()
    return python


class Contestant:
    """One trainer in its own process."""

    def __init__(self, name: str, python: Path, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.seconds, self.memory = name, list[float](), 0
        self.log = (folder / f"{name}.log").open("w")
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        if options.device == "cpu":
            environment["SPARSIFY_DISABLE_TRITON"] = "1"
        if name not in ("unweave", "product"):
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, HERE / "peers" / f"run_{name}.py", folder, str(options.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip

    def wait(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = Path(self.log.name).read_text()[-2000:]
            sys.exit(f"{self.name} ended early; the end of its output:\n{said}")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def race(contestants: list[Contestant], steps: int, turn: int) -> None:
    """All train the same steps in turns; the first turn warms up and is not counted."""
    for number in range(0, steps, turn):
        # Whoever goes first finds the caches as the one before left them: take turns in that, too.
        shift = number // turn % len(contestants)
        for one in contestants[shift:] + contestants[:shift]:
            now = min(turn, steps - number)
            answer = one.ask(f"train {now}")
            one.memory = answer["memory"]
            if number:
                one.seconds.append(answer["seconds"] / now)
        console.print(f"  {min(steps, number + turn)} of {steps} steps", end="\r")


def results(contestants: list[Contestant], contest: contests.Contest) -> dict[str, dict[str, Any]]:
    """By contestant: seconds per step, tokens per second, ratios to Unweave and to the product, memory, loss, L0."""
    by_name = {one.name: one for one in contestants}

    def ratio(one: Contestant, other: Contestant) -> float:
        return statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))

    found = {}
    for one in contestants:
        seconds = statistics.median(one.seconds)
        found[one.name] = {
            "seconds": seconds,
            "tokens_per_second": contest.batch / seconds,
            "share_of_product": ratio(one, by_name["product"]),
            "unweave_faster": ratio(by_name["unweave"], one),
            "memory": one.memory,
        }
        if one.name != "product":
            found[one.name] |= one.ask("score")
    return found


def run(contest: contests.Contest, data: contests.Data, options: argparse.Namespace) -> dict[str, Any]:
    """One contest, from its files to its results."""
    pythons = {"unweave": Path(sys.executable), "product": Path(sys.executable)}
    for name in contest.peers:
        if name not in options.without:
            pythons[name] = install(options.peers, PEERS[name])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"steps": options.steps, "latents": options.latents, "k": options.k, "device": options.device}
        contests.write(folder, contest, data, **sizes)
        contestants = [Contestant(name, python, folder, options) for name, python in pythons.items()]
        try:
            for one in contestants:
                one.wait()
            race(contestants, options.steps, options.turn)
            return results(contestants, contest)
        finally:
            for one in contestants:
                one.close()


def show(contest: contests.Contest, found: dict[str, Any], options: argparse.Namespace) -> None:
    active = f"about {contest.l0} of" if contest.l0 else f"k {options.k} of"
    title = f"{contest.name}: batch {contest.batch:,}, {active} {options.latents:,} latents"
    table = Table(title=f"{title}, {options.steps * contest.batch:,} tokens")
    for column in ("", "tokens/s", "unweave is faster by", "of the product", "memory, MB", "held-out FVU", "L0"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in found.items():
        table.add_row(
            NAMES[name],
            f"{row['tokens_per_second']:,.0f}",
            "" if name in ("unweave", "product") else f"{row['unweave_faster']:.2f}x",
            f"{row['share_of_product']:.0%}",
            f"{row['memory'] / 1e6:,.0f}",
            f"{row['fvu']:.4f}" if "fvu" in row else "",
            f"{row['l0']:.1f}" if "l0" in row else "",
        )
    console.print(table)


def itemise(data: contests.Data, options: argparse.Namespace) -> dict[str, Any]:
    """Where our own TopK step spends its time."""
    torch.set_num_threads(options.threads)
    x = torch.from_numpy(np.array(data[0][:65_536])).to(options.device)
    found = {}
    for batch in (2048, 4096):
        items = budget.measure("topk", x, batch=batch, latents=options.latents, k=options.k, steps=10)
        table = Table(title=f"Unweave's TopK step: batch {batch:,}, {options.threads} threads, {options.device}")
        for column in ("", "ms", "of the step", "of one product", ""):
            table.add_column(column, justify="right" if column else "left")
        for item in items:
            shares = (f"{item.seconds / other.seconds:.0%}" for other in (items[-1], items[0]))
            table.add_row(item.name, f"{1000 * item.seconds:.1f}", *shares, item.amount)
        console.print(table)
        found[str(batch)] = {item.name: {"seconds": item.seconds, "amount": item.amount} for item in items}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("UNWEAVE_CACHE", Path.home() / ".cache" / "unweave"))
    parser.add_argument("--activations", type=Path, help="activations to train on (default: harvest some)")
    parser.add_argument("--peers", type=Path, default=cache / "peers", help="where the peers' environments live")
    parser.add_argument("--without", nargs="*", default=[], choices=list(PEERS), help="peers to leave out")
    parser.add_argument("--only", nargs="*", choices=list(contests.contests(0)), help="contests (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--budget", action="store_true", help="itemise Unweave's TopK step as well")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--batch", type=int, default=2048, help="of the relu and jumprelu contests")
    for name, default in (("steps", 40), ("turn", 4), ("latents", 9216), ("k", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    options = parse()
    every = contests.contests(options.batch)
    chosen = [every[name] for name in (every if options.only is None else options.only)]
    largest = max([options.steps * contest.batch for contest in chosen], default=65_536)
    data = contests.read(options.activations) if options.activations else contests.harvest(min(largest, 200_000))
    written: dict[str, Any] = {"threads": options.threads, "device": options.device, "torch": torch.__version__}
    if options.budget:
        written["budget"] = itemise(data, options)
    for contest in chosen:
        found = run(contest, data, options)
        show(contest, found, options)
        written[contest.name] = {"contest": contests.described(contest), "results": found}
        if options.json:
            options.json.write_text(json.dumps(written, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
