"""The loop every contestant of the training benchmark runs in its own interpreter.

It reads commands from standard input and answers each with one line of JSON on the original standard output:
``train N`` (N more steps; seconds spent in them, largest memory so far above that before the first step) and ``score``
(on the held-out activations: unexplained variance and active latents per token).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Whatever libraries print, from their import on, goes to the log; answers alone go to the original output.
_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


@dataclass
class Setting:
    """What is the same for everyone: activations, the order of rows, sizes, and for some contests the weights."""

    train: torch.Tensor
    held: torch.Tensor
    order: np.ndarray
    start: dict[str, torch.Tensor]
    """W_enc, W_dec [F, D], b_enc, b_dec, threshold (jumprelu), or nothing: then everyone starts as it likes"""
    kind: str
    batch: int
    latents: int
    k: int
    steps: int
    device: str
    lr: float
    sparsity: float
    bandwidth: float
    """rate, penalty's coefficient and window of the contests with given weights"""

    def rows(self, step: int) -> torch.Tensor:
        """The batch of a step, the same for every contestant."""
        return self.train[torch.from_numpy(self.order[step * self.batch : (step + 1) * self.batch]).to(self.device)]


def load(folder: Path) -> Setting:
    """Reads what the benchmark wrote into its working folder."""
    options = json.loads((folder / "setting.json").read_text())
    train, held = (torch.from_numpy(np.load(folder / f"{n}.npy", mmap_mode="c")) for n in ("train", "held"))
    start = {}
    if (folder / "start.npz").exists():
        start = {name: torch.from_numpy(array) for name, array in np.load(folder / "start.npz").items()}
    device = options["device"]
    # Mapped pages count as memory once they are touched: touch all of them before the first step.
    train.sum()
    return Setting(
        train.to(device), held.to(device), np.load(folder / "order.npy"),
        {name: t.to(device) for name, t in start.items()}, **options,
    )  # fmt: skip


class Memory:
    """The largest memory of this process, or of its card, above what it had when this was made."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            # What importing and preparing took at their highest must not hide what training takes: Linux forgets the
            # highest level when told so. (``getrusage`` does not forget, and has its parent's level to begin with.)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _resident("VmRSS")

    def above(self) -> int:
        """In bytes."""
        return (torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")) - self.before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


Reconstruct = Callable[[torch.Tensor], tuple[torch.Tensor, float]]
"""rows -> their reconstruction, and how many latents are active in all of them"""


def score(reconstruct: Reconstruct, held: torch.Tensor) -> dict[str, float]:
    """Squared error over squared distance to the mean, in float64; active latents per row."""
    missed = active = 0.0
    with torch.no_grad():
        for x in held.split(1024):
            y, count = reconstruct(x)
            missed += float((y - x).double().square().sum())
            active += count
    return {
        "fvu": missed / float((held.double() - held.double().mean(0)).square().sum()),
        "l0": active / len(held),
    }


def serve(prepare: Callable[[Setting], tuple[Callable[[int], object], Reconstruct]]) -> None:
    """``prepare(setting)`` returns a function that trains on one step's batch, and one that reconstructs rows."""
    torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(0)
    setting = load(Path(sys.argv[1]))
    train, reconstruct = prepare(setting)
    memory, done = Memory(setting.device), 0

    def wait() -> None:
        if memory.cuda:
            torch.cuda.synchronize()

    _answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "train":
            wait()
            start = time.perf_counter()
            for _ in range(int(arguments[0])):
                train(done)
                done += 1
            wait()
            answer = {"seconds": time.perf_counter() - start, "memory": memory.above()}
        else:
            answer = score(reconstruct, setting.held)
        _answers.write(json.dumps(answer) + "\n")
