"""Two processes train one SAE as one process does: losses, clocks, weights, for every kind."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from helpers.models import build_tiny
from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.lm.model import LM, Tokens
from unweave.methods.train.end_to_end import end_to_end_step
from unweave.methods.train.kinds import SAESpec, TopKSpec
from unweave.methods.train.trainer import SAETrainer

D, K, BATCH, STEPS = 8, 3, 21, 100

CASES: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "clip": 1.0, "multi_topk": 0.125, "resample_every": 200},
    "batchtopk": {"kind": "batchtopk"},
    "matryoshka": {"kind": "matryoshka", "groups": [0.25, 0.75]},
    "relu": {"kind": "relu", "sparsity": 0.6, "sparsity_warmup": 0.3},
    "p-anneal": {"kind": "p-anneal"},
    "gated": {"kind": "gated"},
    "jumprelu": {"kind": "jumprelu", "bandwidth": 0.3},
    "jumprelu-step": {"kind": "jumprelu", "penalty": "step", "bandwidth": 0.3, "preact_weight": 1e-2},
    "jumprelu-tanh": {"kind": "jumprelu", "penalty": "tanh", "threshold_parameter": "log", "bandwidth": 0.1},
    "transcoder": {"kind": "topk", "skip": "fit"},
}


def _data(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    strength = torch.rand(n, 20, generator=g) * (torch.rand(n, 20, generator=g) < 0.15)
    return (strength @ torch.randn(20, D, generator=torch.Generator().manual_seed(7)) + 1).double()


def _train(case: str, group: Group) -> dict[str, Any]:
    options = {"k": K, "expansion": 4, "batch": BATCH, "tokens": BATCH * STEPS, "lr": 3e-3, "dead_after": 60}
    options |= {"k_aux": 2, **CASES[case]}
    if "sparsity" in CASES[case]:
        del options["k"]
    spec, x = SAESpec.from_dict(options), _data(BATCH * STEPS, seed=1)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double())[0]
    own_sample = _data(150 - 40 * group.rank, seed=group.rank)  # what the first process measures counts
    goal = x @ turn + x.square() if case == "transcoder" else None
    t = SAETrainer(
        spec, D, init_x=own_sample, init_target=None if goal is None else own_sample @ turn + own_sample.square(),
        dtype=torch.float64, group=group,
    )  # fmt: skip
    rows = []
    for start in range(0, len(x), BATCH):
        mine = slice(start, start + BATCH)
        share = group.share(BATCH)
        mine = slice(start + share.start, start + share.stop)
        rows.append(t.step(x[mine], None if goal is None else goal[mine]))
    trace = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    named = {name: p.detach() for name, p in t.weights.named().items()}
    state = str(asdict(t.state))
    return {
        "trace": trace, "clocks": t.dead_for, "weights": named, "tokens": t.tokens_seen, "steps": t.steps,
        "state": state, "threshold": t.batch_threshold(),
    }  # fmt: skip


def _predict(group: Group) -> dict[str, Tensor]:
    """Three steps end to end over rows that are divided unequally."""
    lm = LM(build_tiny("gpt_neox").double(), None)
    ids = torch.randint(8, 90, (5, 9), generator=torch.Generator().manual_seed(2))
    tokens = Tokens.of(ids)
    with lm.taps(read=["resid_post.0"]) as seen:
        lm(tokens)
    x = seen["resid_post.0"].reshape(-1, lm.d_model)
    spec = TopKSpec(k=4, expansion=2, batch=45, aux_weight=0.0, warmup=0.0)
    t = SAETrainer(spec, lm.d_model, init_x=x, dtype=torch.float64, group=group)
    mine = tokens.rows(group.share(len(tokens)))
    rows = [end_to_end_step(lm, t, mine, "resid_post.0", part_tokens=10 * (1 + group.rank)) for _ in range(3)]
    return {"trace": torch.tensor([list(row.values()) for row in rows], dtype=torch.float64), "W": t.weights.W_enc.data}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {case: _train(case, Group(rank, 2)) for case in CASES}
    found["end-to-end"] = _predict(Group(rank, 2))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    spawn(_work, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_trap_29_two_processes_train_as_one_does(case: str, both: list[dict[str, Any]]) -> None:
    alone = _train(case, SOLO)
    for found in both:
        torch.testing.assert_close(found[case]["trace"], alone["trace"], rtol=1e-5, atol=1e-9)
        assert torch.equal(found[case]["clocks"], alone["clocks"])
        assert found[case]["tokens"] == BATCH * STEPS and found[case]["steps"] == STEPS
        for name, p in alone["weights"].items():
            torch.testing.assert_close(found[case]["weights"][name], p, rtol=1e-5, atol=1e-7)
    assert torch.equal(both[0][case]["trace"], both[1][case]["trace"])
    assert both[0][case]["state"] == both[1][case]["state"]
    assert both[0][case]["threshold"] == both[1][case]["threshold"] == pytest.approx(alone["threshold"], rel=1e-6)
    for name in alone["weights"]:  # to the last bit between processes
        assert torch.equal(both[0][case]["weights"][name], both[1][case]["weights"][name])
    assert bool((alone["trace"][:, 3] > 0).any()) or case in ("relu", "p-anneal", "gated")  # some had dead latents


def test_two_processes_train_end_to_end_as_one_does(both: list[dict[str, Any]]) -> None:
    alone = _predict(SOLO)
    for found in both:
        torch.testing.assert_close(found["end-to-end"]["trace"], alone["trace"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["end-to-end"]["W"], alone["W"], rtol=1e-6, atol=1e-9)


def test_a_process_without_rows_is_refused() -> None:
    t = SAETrainer(TopKSpec(k=K, expansion=4), D, init_x=_data(50, 0))
    with pytest.raises(UnweaveError, match="empty"):
        t.step(torch.empty(0, D))
