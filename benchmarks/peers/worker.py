"""The loop every contestant of the training benchmark runs in its own interpreter.

It reads commands from standard input and answers each with one line of JSON on the original standard output:
``train N`` (N more steps; seconds spent in them) and ``score`` (unexplained variance on the held-out activations).
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
    """What is the same for everyone: activations, the order of rows, sizes."""

    train: torch.Tensor
    held: torch.Tensor
    order: np.ndarray
    batch: int
    latents: int
    k: int
    steps: int

    def rows(self, step: int) -> torch.Tensor:
        """The batch of a step, the same for every contestant."""
        return self.train[torch.from_numpy(self.order[step * self.batch : (step + 1) * self.batch])]


def load(folder: Path) -> Setting:
    """Reads what the benchmark wrote into its working folder."""
    options = json.loads((folder / "setting.json").read_text())
    arrays = [torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in ("train", "held")]
    return Setting(*arrays, np.load(folder / "order.npy"), **options)


def unexplained(reconstruct: Callable[[torch.Tensor], torch.Tensor], held: torch.Tensor) -> float:
    """Squared error over squared distance to the mean, in float64."""
    with torch.no_grad():
        missed = sum(float((reconstruct(x) - x).double().square().sum()) for x in held.split(1024))
    return missed / float((held.double() - held.double().mean(0)).square().sum())


def serve(
    prepare: Callable[[Setting], tuple[Callable[[int], None], Callable[[torch.Tensor], torch.Tensor]]],
) -> None:
    """``prepare(setting)`` returns a function that trains on one step's batch, and one that reconstructs rows."""
    torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(0)
    setting = load(Path(sys.argv[1]))
    train, reconstruct = prepare(setting)
    done = 0
    _answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "train":
            start = time.perf_counter()
            for _ in range(int(arguments[0])):
                train(done)
                done += 1
            _answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
        else:
            _answers.write(json.dumps({"fvu": unexplained(reconstruct, setting.held)}) + "\n")
