"""A circuit's file: what is written is read, and what does not fit together is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unweave.attribute.result import SiteSum
from unweave.circuits.about import About, Example
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError
from unweave.core.result import to_plain
from unweave.core.site import Site

LOW, HIGH = Site("resid_post", 0), Site("mlp_add", 1)
ALONG = f"edges/{LOW} -> {HIGH}"
TO_Y = f"edges/{HIGH} -> y"
ABOUT = About(
    "x", of="classifier", neurons=True, tokens=("a", " b"), examples=(Example("clean", "t", "u"),),
    sums=(SiteSum(LOW, 0.5, 0.25, False, 3),),
)  # fmt: skip
HEAD: dict[str, Any] = {"version": 3, "positions": True, "n_examples": 3, "about": to_plain(ABOUT)}


def circuit_tensors() -> dict[str, torch.Tensor]:
    """Two sites of 3 and 2 latents at 4 positions, with edges at the first and last node of each."""
    ends = {"low": [[0, 0], [3, 3]], "high": [[0, 0], [3, 2]], "y": [[0, 0], [0, 0]]}
    low, high, y = (torch.tensor(rows) for rows in ends.values())
    return {
        f"nodes/{LOW}": torch.randn(4, 4), f"nodes/{HIGH}": torch.randn(4, 3),
        f"{ALONG}/up": low, f"{ALONG}/down": high, f"{ALONG}/weight": torch.tensor([0.5, -0.25]),
        f"{TO_Y}/up": high.clone(), f"{TO_Y}/down": y, f"{TO_Y}/weight": torch.tensor([1.0, 2.0]),
    }  # fmt: skip


def test_a_circuit_that_is_whole_is_read_as_it_was_written(tmp_path: Path) -> None:
    held = circuit_tensors()
    save_file(held, tmp_path / "c.safetensors", {"unweave.circuit": json.dumps(HEAD)})
    circuit = Circuit.load(tmp_path / "c.safetensors")
    assert list(circuit.nodes) == [LOW, HIGH] and list(circuit.edges) == [(LOW, HIGH), (HIGH, None)]
    assert (circuit.positions, circuit.n_examples, circuit.about) == (True, 3, ABOUT)
    circuit.save(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(held) and all(torch.equal(again[name], value) for name, value in held.items())


def _with(name: str, value: list[Any], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=dtype)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_with(f"{ALONG}/up", [[0, 0], [3, 4]]), "position 3, slot 4: there is no such node"),
        (_with(f"{ALONG}/down", [[0, 0], [3, 3]]), "position 3, slot 3: there is no such node"),
        (_with(f"{ALONG}/down", [[4, 0], [3, 2]]), "position 4, slot 0: there is no such node"),
        (_with(f"{ALONG}/up", [[0, -1], [3, 3]]), "slot -1: there is no such node"),
        (_with(f"{TO_Y}/down", [[0, 0], [0, 1]]), "position 0, slot 1: there is no such node"),
        (_with(f"{ALONG}/up", [[3, 3], [3, 3]]) | _with(f"{ALONG}/down", [[0, 0], [0, 0]]), "an edge twice"),
        (_with(f"{ALONG}/up", [[0, 0]]), r"\[1, 2\], not int64 \[2, 2\]"),
        (_with(f"{ALONG}/up", [0, 0]), r"not int64 \[2, 2\]"),
        (_with(f"{ALONG}/up", [[0.0, 0.0], [1.0, 1.0]]), "float32"),
        (_with(f"{ALONG}/weight", [[0.5, 1.0]]), r"not \[edges\]"),
        (_with(f"{ALONG}/weight", [0.5, float("nan")]), "NaN or infinity"),
        (_with(f"{ALONG}/weight", [1, 2]), "not floats"),
        (_with(f"nodes/{LOW}", [[0.0, float("inf")]] * 4), "NaN or infinity"),
        (_with(f"nodes/{LOW}", [[0.0, 1.0, 2.0, 3.0]] * 3), "not 3 as elsewhere|not 4 as elsewhere"),
        (_with(f"nodes/{LOW}", [[0.0]] * 4), "latents"),
        (_with(f"nodes/{LOW}", [0.0]), "latents|positions"),
        (_with(f"nodes/{LOW}", [[1] * 4] * 4), "not floats"),
        (_with("nodes/resid_past.0", [[0.0] * 4] * 4), "is not a site"),
        (_with("nodes/resid_post.07", [[0.0] * 4] * 4), "is written"),
        (_with("else", [1.0]), "no circuit has"),
        (_with(f"{ALONG}/more", [1.0]), "no circuit has"),
        (_with(f"edges/{LOW}/up", [[0, 0]]), "no circuit has"),
        ({f"edges/{HIGH} -> {LOW}/{part}": value for part, value in zip(
            ("up", "down", "weight"), (torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), torch.ones(1)), strict=True
        )}, "earlier site to a later"),
        ({f"{ALONG}/up": None}, "lacks up"),
        ({f"{ALONG}/weight": None}, "lacks weight"),
        ({f"nodes/{LOW}": None}, "no nodes"),
        ({f"nodes/{HIGH}": None}, "no nodes"),
        (dict.fromkeys(circuit_tensors()), "no nodes"),
    ],
)  # fmt: skip
def test_a_circuit_whose_parts_do_not_fit_is_refused(
    change: dict[str, torch.Tensor | None], says: str, tmp_path: Path
) -> None:
    held = {name: value for name, value in (circuit_tensors() | change).items() if value is not None}
    save_file(held, tmp_path / "c.safetensors", {"unweave.circuit": json.dumps(HEAD)})
    with pytest.raises(UnweaveError, match=rf"cannot read a circuit[\s\S]*({says})[\s\S]*c\.safetensors[\s\S]*remedy"):
        Circuit.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"positions": False}, "summed over positions"), ({"positions": 1}, "no bool"), ({"n_examples": 0}, "is none"),
        ({"n_examples": True}, "no int"), ({"n_examples": 2.5}, "no int"), ({"n_examples": "3"}, "no int"),
        ({"about": []}, "no dict"), ({"version": 1}, "version 1"), ({"more": 1}, "nothing else"),
        ({"about": None}, "no dict"), ({"about": {"x": float("nan")}}, "header is damaged"),
        ({"about": {"x": 1}}, "the fields of About"),
        ({"about": HEAD["about"] | {"neurons": "no"}}, r"about\.neurons"), (None, "nothing else"),
    ],
)  # fmt: skip
def test_a_circuit_whose_header_makes_no_sense_is_refused(
    change: dict[str, Any] | None, says: str, tmp_path: Path
) -> None:
    head = [] if change is None else HEAD | change
    save_file(circuit_tensors(), tmp_path / "c.safetensors", {"unweave.circuit": json.dumps(head)})
    with pytest.raises(UnweaveError, match=rf"cannot read a circuit[\s\S]*{says}"):
        Circuit.load(tmp_path / "c.safetensors")
    save_file(circuit_tensors(), tmp_path / "c.safetensors")
    with pytest.raises(UnweaveError, match="nothing of a circuit"):
        Circuit.load(tmp_path / "c.safetensors")
