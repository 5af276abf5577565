"""Selections: what is written is read, and what cannot be used is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unweave import SAE, Site
from unweave.core.errors import UnweaveError
from unweave.latents.selection import Chosen, Selection, SiteChoice, by_site, read, write
from unweave.sae.activations import ReLU

NINE, TWENTY = Site("resid_post", 9), Site("resid_post", 20)


def sae_of(seed: int, site: Site = NINE) -> SAE:
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=g) for shape in ((4, 6), (6,), (6, 4), (4,))]
    return SAE(*parts, ReLU(), read=site)


def latents(sae: SAE, **changes: Any) -> Selection:
    sites = (
        SiteChoice(NINE, (Chosen(5, 0.5, "she"), Chosen(0, -0.25)), "runs/sae", sae.digest()),
        SiteChoice(TWENTY, ()),
    )
    fields: dict[str, Any] = {"name": "chosen", "kind": "latents", "sites": sites, "model": "m", "candidates": 100}
    return Selection(**fields | {"by": "query", "query": "gender"} | changes)


def test_latents_come_back_as_written(tmp_path: Path) -> None:
    sae = sae_of(0)
    selection = latents(sae)
    again = read(write(tmp_path / "chosen.json", selection))
    assert again == selection and len(again) == 2 and again.latents == {NINE: (5, 0)}
    assert again.saes == ("resid_post.9=runs/sae",) and [path.name for path in tmp_path.iterdir()] == ["chosen.json"]
    again.check({NINE: sae, TWENTY: sae_of(1, TWENTY)})


def test_directions_come_back_and_their_file_is_guarded(tmp_path: Path) -> None:
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    sites = (SiteChoice(NINE, (Chosen(0), Chosen(3, 0.5))),)
    selection = Selection("pca", "directions", sites, "m", 20, "rule", seed=3, directions={NINE: rows})
    path = write(tmp_path / "pca.json", selection)
    again = read(path)
    assert again == selection and again.seed == 3 and not again.latents
    torch.testing.assert_close(again.directions[NINE], rows, rtol=0, atol=0)
    again.check({})

    write(tmp_path / "other.json", Selection(**vars(selection) | {"directions": {NINE: rows + 1}}))
    (tmp_path / "other.safetensors").replace(tmp_path / "pca.safetensors")
    with pytest.raises(UnweaveError, match="not what was written"):
        read(path)
    (tmp_path / "pca.safetensors").unlink()
    with pytest.raises(UnweaveError, match="missing"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sites": (SiteChoice(NINE, ()),)}, "nothing is selected"),
        ({"sites": (SiteChoice(NINE, (Chosen(1),)), SiteChoice(NINE, (Chosen(2),)))}, "a site is named twice"),
        ({"sites": (SiteChoice(NINE, (Chosen(1), Chosen(1))),)}, "named twice"),
        ({"sites": (SiteChoice(NINE, (Chosen(-1),)),)}, "negative"),
        ({"kind": "directions"}, "do not fit"),
        ({"directions": {NINE: torch.zeros(2, 4)}}, "do not fit"),
        ({"kind": "directions", "sites": (SiteChoice(NINE, (Chosen(1),)),),
          "directions": {NINE: torch.full((1, 4), torch.nan)}}, "not finite"),
    ],
)  # fmt: skip
def test_selections_that_cannot_be(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UnweaveError, match=what):
        latents(sae_of(0), **changes)


def test_another_sae_is_refused() -> None:
    sae = sae_of(0)
    for saes, what in (({}, "no SAE is at this site"), ({NINE: sae_of(1)}, "were chosen in SAE")):
        with pytest.raises(UnweaveError, match=what):
            latents(sae).check(saes)
    unnamed = latents(sae, sites=(SiteChoice(NINE, (Chosen(6),)),))
    with pytest.raises(UnweaveError, match="latent 6 does not exist"):
        unnamed.check({NINE: sae})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda value: value.pop("by"), "the fields of"),
        (lambda value: value.update(name=3), "not str"),
        (lambda value: value["sites"][0].update(site="resid_post.x"), "resid_post.x"),
        (lambda value: value.update(sites=None), "no selection"),
        (lambda value: value["sites"][0]["chosen"][0].update(number=1.5), "not int"),
    ],
)
def test_files_that_are_no_selections(tmp_path: Path, change: Any, what: str) -> None:
    path = write(tmp_path / "chosen.json", latents(sae_of(0)))
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UnweaveError, match=what):
        read(path)


def test_choices_are_grouped_in_execution_order() -> None:
    grouped = by_site([(TWENTY, Chosen(1)), (NINE, Chosen(7)), (TWENTY, Chosen(0))])
    assert list(grouped) == [NINE, TWENTY] and [one.number for one in grouped[TWENTY]] == [1, 0]
