"""How processes meet: which GPU each takes, how long they wait, and who speaks for all. No process is started here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from unweave.cli.bridge import execute
from unweave.core.command import Command
from unweave.core.dist import SOLO, Group, refuse_shared_device, world
from unweave.core.errors import UnweaveError
from unweave.core.result import Result
from unweave.core.spec import Spec


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The second of two processes on a machine with one GPU, as far as ``world`` can see; and what it asked for."""
    asked: dict[str, Any] = {}
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: asked.update(device=number))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.update(how, backend=backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    world.cache_clear()
    yield asked
    world.cache_clear()


def test_processes_wait_for_one_that_tokenises_for_hours(meeting: dict[str, Any]) -> None:
    assert world() == Group(1, 2)
    assert meeting["timeout"] >= timedelta(hours=24)


def test_more_processes_than_gpus_may_meet_to_work_on_cpus(
    meeting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    world()
    assert "device" not in meeting
    refuse_shared_device("cpu", Group(1, 2))
    with pytest.raises(UnweaveError, match=r"process 1 of this machine finds only 1 GPUs[\s\S]*device cpu"):
        refuse_shared_device(None, Group(1, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world.cache_clear()
    world()
    assert meeting["device"] == 1
    refuse_shared_device(None, Group(1, 2))


def test_one_gpu_by_its_number_is_no_place_for_several_processes() -> None:
    with pytest.raises(UnweaveError, match=r"2 processes would all work on cuda:1[\s\S]*device cuda"):
        refuse_shared_device("cuda:1", Group(0, 2))
    refuse_shared_device("cuda:1", SOLO)


@dataclass(frozen=True, kw_only=True)
class NothingSpec(Spec):
    """Nothing."""


@dataclass(frozen=True)
class Said:
    path: Path
    result: dict[str, Any]
    reused: bool = False


def say(_spec: Spec, runs: Path) -> Said:
    return Said(runs, {"found": 1})


def test_a_stray_rank_in_the_environment_silences_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage = Command(
        words="train",
        spec=NothingSpec,
        result=Result,
        stage="test_dist:say",
        summary="Nothing.",
        about="Nothing.",
        examples=(),
        in_several=True,
    )
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert execute(stage, None, {}, tmp_path, True) is not None
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert execute(stage, None, {}, tmp_path, True) is None
