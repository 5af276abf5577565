"""Where the time of a training step goes, measured inside running steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unweave.methods.train import init, objectives
from unweave.methods.train.kinds import SAESpec
from unweave.methods.train.trainer import SAETrainer
from unweave.sae.sparse import kernels, products


@dataclass(frozen=True)
class Item:
    """One part of a step."""

    name: str
    seconds: float
    amount: str
    """what it achieved: arithmetic of the products, and of the other parts the least that they must move"""


# Whatever runs inside a part counts for that part alone.
_PARTS: dict[str, list[tuple[Any, str]]] = {
    "encode": [(torch, "addmm"), (torch, "mm")],
    "choose": [(kernels, "topk_rows"), (kernels, "_places"), (kernels, "_largest"), (kernels, "_first_guess")],
    "decode": [(products, "weighted_rows"), (products, "_bag"), (products, "_bags")],
    "gradient of the values": [(products, "dot_rows"), (torch.autograd, "grad")],
    "gradients of the weights": [(products, "transposed_rows"), (products, "latent_sums")],
    "optimiser": [(torch.optim.Adam, "step")],
    "norm constraint": [(init, "unit_rows"), (torch.linalg, "vecdot"), (torch.Tensor, "addcmul_")],
    "loss": [(objectives, "reconstruction")],
}


@contextmanager
def timed(spent: dict[str, float], wait: Callable[[], object]) -> Iterator[None]:
    """Adds to ``spent`` the seconds of every part that runs inside."""
    busy = False

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return function(*args, **kwargs)
            busy = True
            wait()
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                spent[name] += time.perf_counter() - began
                busy = False

        return run

    saved = [(where, attribute, getattr(where, attribute)) for part in _PARTS.values() for where, attribute in part]
    for name, part in _PARTS.items():
        for where, attribute in part:
            setattr(where, attribute, watch(name, getattr(where, attribute)))
    try:
        yield
    finally:
        for where, attribute, function in saved:
            setattr(where, attribute, function)


def _copied_per_second(like: Tensor, wait: Callable[[], object]) -> float:
    """Bytes read and written per second by a copy too large for the caches."""
    source = torch.ones(64 << 20, dtype=torch.float32, device=like.device)
    goal = torch.empty_like(source)
    best = float("inf")
    for _ in range(4):
        wait()
        began = time.perf_counter()
        goal.copy_(source)
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def measure(kind: str, x: Tensor, *, batch: int, latents: int, k: int, steps: int) -> list[Item]:
    """The parts of a step of ``kind`` (topk, batchtopk) on rows x [N, D], beside one dense encoder product."""

    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize()

    width = x.shape[1]
    size = {"kind": kind, "k": k, "expansion": latents // width}
    spec = SAESpec.from_dict(size | {"batch": batch, "tokens": 10**9, "aux_weight": 0.0})
    trainer = SAETrainer(spec, width, init_x=x[:batch])
    W, b, out = torch.randn(latents, width).to(x), torch.zeros(latents).to(x), x.new_empty(batch, latents)
    spent: dict[str, float] = defaultdict(float)
    total = product = 0.0
    for step in range(steps + 2):
        rows = x[torch.randint(len(x), (batch,)).to(x.device)]
        parts: dict[str, float] = defaultdict(float)
        wait()
        began = time.perf_counter()
        torch.addmm(b, rows, W.T, out=out)
        wait()
        between = time.perf_counter()
        with timed(parts, wait):
            trainer.step(rows)
        wait()
        if step >= 2:  # the first steps warm up
            product += between - began
            total += time.perf_counter() - between
            for name, seconds in parts.items():
                spent[name] += seconds
    each = {name: spent[name] / steps for name in _PARTS}
    amounts = _amounts(each, product / steps, _copied_per_second(x, wait), batch, width, latents, k)
    rest = total / steps - sum(each.values())
    return [
        Item("one dense encoder product", product / steps, amounts["product"]),
        *(Item(name, seconds, amounts.get(name, "")) for name, seconds in each.items()),
        Item("everything else", rest, "scaling, bookkeeping"),
        Item("the step", total / steps, f"{product / total:.0%} of the product's speed"),
    ]


def _amounts(
    each: dict[str, float], product: float, copied: float, batch: int, width: int, latents: int, k: int
) -> dict[str, str]:
    """See ``Item.amount``."""
    flops, entries, table = 2 * batch * width * latents, batch * k, 4 * latents * width
    gathered = 4 * entries * width
    moved = {
        "choose": 4 * batch * latents,
        "decode": gathered,
        "gradient of the values": gathered,
        "gradients of the weights": 2 * (gathered + table),
        "optimiser": 7 * 2 * table,
        "norm constraint": 6 * table,
    }

    def rate(seconds: float, amount: float, unit: float) -> float:
        return amount / max(seconds, 1e-12) / unit

    found = {name: f"{rate(each[name], amount, 1e9):.1f} GB/s" for name, amount in moved.items()}
    return found | {
        "product": f"{rate(product, flops, 1e9):,.0f} GFLOP/s; a copy moves {copied / 1e9:.1f} GB/s",
        "encode": f"{rate(each['encode'], flops, 1e9):,.0f} GFLOP/s",
    }
