"""Sites, specs, run directories and sparse codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.plain_result import Plain
from unweave.core import run as run_module
from unweave.core.codes import Codes
from unweave.core.dist import SOLO, Group, world
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.run import Run
from unweave.core.site import LAYER_POINTS, Site, matching
from unweave.core.spec import Spec, operational
from unweave.core.writing import atomic_write, write_json


@pytest.mark.parametrize("name", ["resid_post.12", "embed", "logits", "attn_heads.0", "path.model.norm@in"])
def test_site_names_round_trip(name: str) -> None:
    assert str(Site.parse(name)) == name
    assert Site.parse(Site.parse(name)) == Site.parse(name)


@pytest.mark.parametrize(
    "name", ["resid_post", "resid_post.-1", "resid.3", "embed.0", "", "path.", "path.a/b", "logits.x"]
)
def test_bad_site_names_are_refused(name: str) -> None:
    with pytest.raises(UnweaveError, match="not a site"):
        Site.parse(name)


def test_sites_sort_in_execution_order() -> None:
    ordered = [
        Site("embed"),
        *(Site(p, i) for i in (0, 2, 10) for p in LAYER_POINTS),
        Site("final_norm"),
        Site("logits"),
    ]
    shuffled = ordered[::2] + ordered[1::2]
    assert shuffled != ordered and sorted(shuffled) == ordered


def test_transformer_lens_names_both_ways() -> None:
    assert Site("mlp_add", 12).to_transformer_lens() == "blocks.12.hook_mlp_out"
    assert Site.from_transformer_lens("blocks.3.attn.hook_z") == Site("attn_heads", 3)
    for point in LAYER_POINTS:
        site = Site(point, 4)
        if point in ("attn_in", "attn_out", "mlp_out"):  # TransformerLens has no hook of the same value
            with pytest.raises(UnweaveError):
                site.to_transformer_lens()
        else:
            assert Site.from_transformer_lens(site.to_transformer_lens()) == site
    with pytest.raises(UnweaveError, match="ln2"):
        Site.from_transformer_lens("blocks.0.ln2.hook_normalized")


@dataclass(frozen=True, kw_only=True)
class Inner(Spec):
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer(Spec):
    name: str
    count: int = 3
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    maybe: float | None = None
    speed: int = operational(1)


def test_spec_round_trip_and_coercion() -> None:
    spec = Outer.from_dict(
        {"name": "x", "count": "1_000", "inner": {"rate": "2"}, "several": [{"kind": "b"}], "maybe": "none"}
    )
    assert spec.count == 1000 and spec.inner.rate == 2.0 and spec.several == (Inner(kind="b"),) and spec.maybe is None
    assert Outer.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@dataclass(frozen=True, kw_only=True)
class Outmost(Spec):
    outer: Outer = Outer(name="given", count=8, inner=Inner(rate=9.0))


def test_a_part_of_a_group_leaves_the_rest_as_the_default_has_it() -> None:
    spec = Outmost.from_dict({"outer": {"inner": {"kind": "b"}}})
    assert spec.outer == Outer(name="given", count=8, inner=Inner(rate=9.0, kind="b"))


def test_spec_digest_sees_results_only() -> None:
    assert Outer(name="x").digest() == Outer(name="x", speed=9).digest()
    assert Outer(name="x").digest() != Outer(name="x", count=4).digest()
    assert Outer(name="x").digest() != Outer(name="x", inner=Inner(rate=0.1)).digest()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"nam": "x"}, "did you mean 'name'"),
        ({}, "needs 'name'"),
        ({"name": "x", "count": 1.5}, "whole number"),
        ({"name": "x", "inner": {"kind": "c"}}, "one of 'a', 'b'"),
        ({"name": "x", "inner": {"rat": 1}}, "did you mean 'rate'"),
        ({"name": "x", "maybe": "much"}, "a number"),
        ({"name": "x", "maybe": float("nan")}, "a number"),
        ({"name": "x", "inner": 3}, "group of fields"),
    ],
)
def test_trap_31_spec_refuses_what_it_does_not_know(values: dict, says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        Outer.from_dict(values)


def test_spec_file_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\ninner:\n  rate: 3\n")
    (tmp_path / "a.toml").write_text('name = "x"\n[inner]\nrate = 3\n')
    for file in ("a.yaml", "a.toml"):
        spec = Outer.from_file(tmp_path / file, {"inner.kind": "b", "count": 7})
        assert spec == Outer(name="x", count=7, inner=Inner(rate=3.0, kind="b"))
    (tmp_path / "bad.yaml").write_text("a: [")
    for file in ("bad.yaml", "none.yaml"):
        with pytest.raises(UnweaveError, match=file):
            Outer.from_file(tmp_path / file)


def test_run_is_named_by_what_was_asked_and_finished_once(tmp_path: Path) -> None:
    with Run.open(tmp_path, "train", Outer(name="x"), kind=Plain) as run:
        assert not run.done
        with pytest.raises(UnweaveError, match="not finished"):
            _ = run.result
        run.log("step", {"loss": 1.0})
        run.finish(Plain({"loss": 0.5}))
    with Run.open(tmp_path, "train", Outer(name="x", speed=5), kind=Plain) as again:
        assert again.path == run.path and again.reused and again.result == Plain({"loss": 0.5})
        assert [line["loss"] for line in again.events("step")] == [1.0]
    for other in (
        Run.open(tmp_path, "train", Outer(name="y")),
        Run.open(tmp_path, "train", Outer(name="x"), version=2),
        Run.open(tmp_path, "train", Outer(name="x"), inputs={"sae": "1"}),
    ):
        assert other.path != run.path and not other.done


def test_run_directory_is_held_by_one_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from unweave.core.run import Run; from unweave.core.spec import Spec\n"
        "with Run.open(Path(sys.argv[1]), 's', Spec()): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with Run.open(tmp_path, "s", Spec()):
        held = subprocess.run(command, capture_output=True, text=True, check=False)
    assert held.returncode != 0 and "another process is working" in held.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot write")])
def test_full_disk_and_unwritable_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_module.os, "fsync", refuse)
    with pytest.raises(UnweaveError, match=says) as caught:
        write_json(tmp_path / "a.json", {})
    assert str(tmp_path / "a.json") in str(caught.value) and "remedy" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", ["torch", "text"])
def test_full_disk_by_whatever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    """The temporary file leads to a device that is always full."""
    target = tmp_path / "a.bin"
    (tmp_path / f".a.bin.{os.getpid()}.tmp").symlink_to("/dev/full")
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: usage)
    big = torch.ones(100_000)
    with pytest.raises(UnweaveError, match="disk is full"), atomic_write(target) as temporary:
        if writer == "torch":
            torch.save({"x": big}, temporary)
        else:
            temporary.write_text("x" * 100_000)
    assert not target.exists()


def test_a_file_in_the_place_of_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UnweaveError, match="cannot write here"):
        Run.open(tmp_path / "runs", "s", Spec())


@given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_codes_agree_with_dense(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, width, generator=generator).relu() * (torch.rand(rows, width, generator=generator) > 0.5)
    codes = Codes.from_dense(dense)
    assert torch.equal(codes.dense(), dense)
    assert torch.equal(codes.counts(), (dense > 0).sum(0))
    assert torch.equal(codes.maxima(), dense.max(0).values if rows else torch.zeros(width))
    assert torch.equal(Codes.cat([codes.rows(0, rows // 2), codes.rows(rows // 2, rows)]).dense(), dense)
    values, indices = dense.topk(min(2, width), dim=1)
    kept = torch.zeros_like(dense).scatter(1, indices, values)
    assert torch.equal(Codes.from_topk(values, indices, width).dense(), kept)


def test_codes_file(tmp_path: Path) -> None:
    codes = Codes.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]]))
    codes.save(tmp_path / "codes.safetensors")
    assert torch.equal(Codes.load(tmp_path / "codes.safetensors").dense(), codes.dense())
    (tmp_path / "codes.safetensors").write_bytes((tmp_path / "codes.safetensors").read_bytes()[:-4])
    with pytest.raises(UnweaveError, match="sparse codes"):
        Codes.load(tmp_path / "codes.safetensors")


SITES_THERE = [Site("embed")] + [
    Site(point, layer) for layer in range(3) for point in ("mlp_in", "mlp_add", "resid_post")
]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("resid_post.1", ["resid_post.1"]),
        ("resid_post.*", ["resid_post.0", "resid_post.1", "resid_post.2"]),
        ("mlp_add.{2,0}", ["mlp_add.0", "mlp_add.2"]),
        ("{mlp_in,mlp_add}.1", ["mlp_in.1", "mlp_add.1"]),
        ("mlp_*.2", ["mlp_in.2", "mlp_add.2"]),
        ("mlp_in.*->mlp_add.*", ["mlp_in.0->mlp_add.0", "mlp_in.1->mlp_add.1", "mlp_in.2->mlp_add.2"]),
        ("mlp_in.{0,1} -> mlp_add.{1,2}", ["mlp_in.0->mlp_add.1", "mlp_in.1->mlp_add.2"]),
    ],
)
def test_patterns_name_sites(pattern: str, names: list[str]) -> None:
    found = matching(pattern, SITES_THERE)
    assert [str(read) if read == write else f"{read}->{write}" for read, write in found] == names


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("resid_pre.*", "no site of this model fits"),
        ("mlp_in.*->mlp_add.0", "3 sites to read and 1 to write"),
        ("mlp_add.{0,1", "unbalanced braces"),
        ("resid_past.1", "is not a site"),
    ],
)
def test_patterns_that_fit_nothing(pattern: str, says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        matching(pattern, SITES_THERE)


def test_a_process_alone_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.arange(3)
    assert SOLO.sum(t) is t and SOLO.broadcast(t) is t and SOLO.gather(t)[0] is t
    assert [Group(rank, 3).share(8) for rank in range(3)] == [slice(0, 2), slice(2, 5), slice(5, 8)]
    assert len(list(SOLO.in_turn())) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    world.cache_clear()
    with pytest.raises(UnweaveError, match="MASTER_ADDR, MASTER_PORT not set"):
        world()


@dataclass(frozen=True, kw_only=True)
class _MaybeNone(Spec):
    summed: Literal["none", "positions"] | None = None
    size: int | None = 3


def test_the_word_none_is_a_value_where_a_field_has_it() -> None:
    """Elsewhere it says that nothing is given."""
    assert _MaybeNone.from_dict({"summed": "none"}).summed == "none"
    assert _MaybeNone.from_dict({"summed": None, "size": "none"}) == _MaybeNone(size=None)
