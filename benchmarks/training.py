"""The speed and the loss of a TopK training step, beside other trainers and one dense encoder product.

    python benchmarks/training.py [--activations FILE] [--steps 60] [--latents 9216] [--batch 2048] [--k 32]

Each contestant runs in an interpreter of its own (the peers in virtual environments made for them) and sees the same
activations in the same batches. They take turns, a few steps at a time, so that drift of the machine's speed falls on
all of them; ratios are medians over turns of the ratio within a turn. The loss is the unexplained variance on held-out
activations after the same tokens. Without ``--activations`` (a .npy of [tokens, width] float32, or a safetensors file
or .pt dictionary with ``train`` and ``held``) the activations of SmolLM2's layer 9 are harvested first.
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

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
PEERS = {"sparsify": "eai-sparsify", "saelens": "sae-lens"}
NAMES = {"unweave": "unweave", "sparsify": "eai-sparsify", "saelens": "sae-lens", "product": "dense product alone"}
console = Console()


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


def harvest(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations of resid_post.9 of the demo's model on the demo's text: to train on, and held out by document."""
    from unweave import LM
    from unweave.data.corpus import Source, documents
    from unweave.data.pack import PackSpec, pack

    lm = LM.load("smollm2-135m-instruct")
    rows = pack(documents([Source(path="chitchat"), Source(path="wiki")], 0), lm.tokenizer, PackSpec())
    found: list[torch.Tensor] = []
    with torch.no_grad():
        while sum(map(len, found)) < count:
            part = [next(rows) for _ in range(16)]
            tokens = type(lm.tokenize(["a"])).pad([(row.ids, row.roles) for row in part], lm.pad_id)
            with lm.taps(read=["resid_post.9"], stop="resid_post.9") as seen:
                lm(tokens)
            special = torch.isin(tokens.ids, torch.tensor(lm.special_ids)) | ~tokens.mask
            found.append(seen["resid_post.9"][~special])
    x = torch.cat(found)
    x = x[x.norm(dim=1) < 10 * x.norm(dim=1).median()].numpy()
    held = len(x) // 10
    return x[held:], x[:held]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Activations to train on and held-out ones from a file."""
    if path.suffix == ".npy":
        x = np.load(path).astype(np.float32)
        return x[len(x) // 10 :], x[: len(x) // 10]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        saved = load_file(path)
    else:
        saved = torch.load(path, weights_only=True, mmap=True)
    return saved["train"].float().numpy(), saved["held"].float().numpy()


class Contestant:
    """One trainer in its own process."""

    def __init__(self, name: str, python: Path, folder: Path, threads: int) -> None:
        self.name, self.seconds = name, list[float]()
        self.log = (folder / f"{name}.log").open("w")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "SPARSIFY_DISABLE_TRITON": "1"}
        if name != "unweave":
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, HERE / "peers" / f"run_{name}.py", folder, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip

    def wait(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(
                f"{self.name} ended early; its output is in {self.log.name}:\n{Path(self.log.name).read_text()[-2000:]}"
            )
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


def write_setting(folder: Path, arguments: argparse.Namespace) -> None:
    """What all contestants read."""
    needed = arguments.steps * arguments.batch
    train, held = read(arguments.activations) if arguments.activations else harvest(min(needed, 200_000))
    train, held = train[: max(needed, arguments.batch)], held[:20_000]
    order = np.random.default_rng(0)
    epochs = -(-needed // len(train))
    np.save(folder / "order.npy", np.concatenate([order.permutation(len(train)) for _ in range(epochs)])[:needed])
    np.save(folder / "train.npy", train)
    np.save(folder / "held.npy", held)
    setting = {"batch": arguments.batch, "latents": arguments.latents, "k": arguments.k, "steps": arguments.steps}
    (folder / "setting.json").write_text(json.dumps(setting))


def race(contestants: list[Contestant], steps: int, turn: int) -> None:
    """All train the same steps in turns; the first turn warms up and is not counted."""
    for number in range(0, steps, turn):
        for one in contestants:
            now = min(turn, steps - number)
            spent = one.ask(f"train {now}")["seconds"] / now
            if number:
                one.seconds.append(spent)
        console.print(f"  {min(steps, number + turn)} of {steps} steps", end="\r")


def report(contestants: list[Contestant], arguments: argparse.Namespace) -> None:
    by_name = {one.name: one for one in contestants}

    def ratio(one: Contestant, other: Contestant) -> float:
        return statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))

    sizes = f"{arguments.latents} latents, batch {arguments.batch}, k {arguments.k}, {arguments.threads} threads"
    table = Table(title=f"TopK training: {sizes}, {arguments.steps * arguments.batch:,} tokens")
    for column in ("", "tokens/s", "unweave is faster by", "of one dense product", "held-out unexplained variance"):
        table.add_column(column, justify="left" if not column else "right")
    for one in contestants:
        loss = "" if one.name == "product" else f"{one.ask('score')['fvu']:.4f}"
        table.add_row(
            NAMES[one.name],
            f"{arguments.batch / statistics.median(one.seconds):,.0f}",
            "" if one.name in ("unweave", "product") else f"{ratio(by_name['unweave'], one):.2f}x",
            f"{ratio(one, by_name['product']):.0%}",
            loss,
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("UNWEAVE_CACHE", Path.home() / ".cache" / "unweave"))
    parser.add_argument("--activations", type=Path, help="activations to train on (default: harvest some)")
    parser.add_argument("--peers", type=Path, default=cache / "peers", help="where the peers' environments live")
    parser.add_argument("--without", nargs="*", default=[], choices=list(PEERS), help="peers to leave out")
    for name, default in (("steps", 60), ("turn", 5), ("latents", 9216), ("batch", 2048), ("k", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    pythons = {"unweave": Path(sys.executable), "product": Path(sys.executable)}
    for name, package in PEERS.items():
        if name not in arguments.without:
            pythons[name] = install(arguments.peers, package)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_setting(folder, arguments)
        contestants = [Contestant(name, python, folder, arguments.threads) for name, python in pythons.items()]
        try:
            for one in contestants:
                one.wait()
            race(contestants, arguments.steps, arguments.turn)
            report(contestants, arguments)
        finally:
            for one in contestants:
                one.close()


if __name__ == "__main__":
    main()
