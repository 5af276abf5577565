"""Fields of configurations: each type is read by its own rule, and the error names file and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.sae_files import K, base, saelens, sparsify, v6
from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
from unweave.sae.module import SAE

HUGE = 10**5000
NOT_BOOLEAN = ["false", "true", "", 0, 1, 0.0, [], [True], {}, None]
NOT_WHOLE = ["5", True, False, 5.9, float("nan"), float("inf"), -1, HUGE, -HUGE, [5], {"k": 5}]
NOT_NUMBER = ["0.5", True, float("nan"), float("inf"), -float("inf"), HUGE, 1e300, [0.5], {}]
NOT_TEXT = [5, 0.5, True, ["a"], {"a": "b"}]


def refused(value: Any, read: str, **options: Any) -> str:
    with pytest.raises(UnweaveError, match=r"outer\.field") as caught:
        getattr(Fields({"outer": {"field": value}}, "cfg.json").mapping("outer"), read)("field", **options)
    assert caught.value.where == "cfg.json" and caught.value.remedy
    assert len(str(caught.value)) < 500
    return caught.value.what


@pytest.mark.parametrize(
    "values, read",
    [(NOT_BOOLEAN, "flag"), (NOT_WHOLE, "integer"), (NOT_NUMBER, "number"), (NOT_TEXT, "text"), (NOT_TEXT, "choice")],
)
def test_values_of_another_type_are_refused(values: list[Any], read: str) -> None:
    options = {"options": ("a",), "default": "a"} if read == "choice" else {}
    for value in values:
        refused(value, read, **options)


def test_lists_and_groups_of_another_kind_are_refused() -> None:
    for value in ([1], "a", 5, True):
        refused(value, "mapping")
    for value in ({}, "a", 5, True):
        refused(value, "sequence")
        refused(value, "integers")
        refused(value, "numbers")
    for value in ([1, "2"], [1, True], [1, None], [1.5], [[1]], [-1]):
        refused(value, "integers")
    refused([{}, 3], "sequence")
    for value in ([1], "words", 5, None, True):
        with pytest.raises(UnweaveError, match="named fields"):
            Fields(value, "cfg.json")


def test_values_of_the_type_are_taken() -> None:
    fields = Fields({"yes": True, "no": False, "five": 5, "also": 5.0, "half": 0.5, "word": "a", "nothing": None}, "")
    assert fields.flag("yes") is True and fields.flag("no") is False and fields.flag("absent", True) is True
    assert (fields.integer("five"), fields.integer("also"), fields.integer("absent")) == (5, 5, None)
    assert isinstance(fields.integer("also"), int)
    assert (fields.number("five"), fields.number("half"), fields.number("nothing")) == (5.0, 0.5, None)
    assert fields.text("word") == "a" and fields.text("nothing") is None and fields.boolean("nothing") is None
    assert fields.choice("word", ("a", "b"), "b") == "a" and fields.choice("absent", ("a", "b"), "b") == "b"
    assert not fields.mapping("absent") and fields.integers("absent") == ()
    assert Fields({"n": [1, 2.0]}, "").integers("n") == (1, 2) and Fields({"n": [1, 0.5]}, "").numbers("n") == (1, 0.5)


def test_ranges() -> None:
    refused(0, "integer", least=1)
    refused(7, "integer", most=6)
    refused(0, "number", above=0)
    assert "5,00" not in refused(HUGE, "integer") and "about 500" in refused(HUGE, "integer")


@pytest.mark.parametrize("value", NOT_BOOLEAN)
def test_a_quoted_boolean_in_a_configuration_is_refused(value: Any, tmp_path: Path) -> None:
    """Each of these moved the numbers: "false" counted as true."""
    if value is not None:  # for SAELens null says nothing, which is refused too, in other words
        with pytest.raises(UnweaveError, match="apply_b_dec_to_input"):
            SAE.load(saelens(tmp_path / "a", v6("standard", apply_b_dec_to_input=value), base()))
    with pytest.raises(UnweaveError, match="rescale_acts_by_decoder_norm"):
        SAE.load(saelens(tmp_path / "b", v6("topk", k=K, rescale_acts_by_decoder_norm=value), base()))
    for name in ("transcode", "skip_connection", "signed"):
        with pytest.raises(UnweaveError, match=name):
            SAE.load(sparsify(tmp_path / name / "layers.1", **{name: value}))


@pytest.mark.parametrize("value", [value for value in NOT_WHOLE if isinstance(value, (str, list, dict, bool, float))])
def test_a_k_that_is_no_whole_number_is_refused(value: Any, tmp_path: Path) -> None:
    where = sparsify(tmp_path / "layers.1", k=value)
    with pytest.raises(UnweaveError, match="k"):
        SAE.load(where)
    with pytest.raises(UnweaveError, match="k"):
        SAE.load(saelens(tmp_path / "a", v6("topk", k=value), base()))


def test_a_k_of_more_latents_than_there_are_names_the_file(tmp_path: Path) -> None:
    for k in (21, 10**30, HUGE // 10**4500):
        with pytest.raises(UnweaveError) as caught:
            SAE.load(sparsify(tmp_path / str(len(str(k))) / "layers.1", k=k))
        assert "layers.1" in caught.value.where


@pytest.mark.parametrize("part", ["train", "model", "data", "reference", "source", "accepted"])
@pytest.mark.parametrize("value", ["text", 5, True, [1]])
def test_a_provenance_of_other_types_is_refused(part: str, value: Any, tmp_path: Path) -> None:
    folder = SAE.load(sparsify(tmp_path / "layers.1")).save(tmp_path / "ours")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["unweave"]["provenance"][part] = value
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UnweaveError, match=f"provenance.{part}"):
        SAE.load(folder)


def test_damaged_fingerprints_and_policies_are_refused(tmp_path: Path) -> None:
    folder = SAE.load(sparsify(tmp_path / "layers.1")).save(tmp_path / "ours")
    whole = (folder / "cfg.json").read_text()
    bad: list[tuple[str, Any]] = [
        ("provenance", {"model": {"fingerprint": {"norms": [1.0, 2.0], "products": [1.0]}}}),
        ("provenance", {"model": {"fingerprint": {"norms": [1.0]}}}),
        ("provenance", {"model": {"fingerprint": {"norms": ["1"], "products": [1.0]}}}),
        ("provenance", {"model": {"name": 5}}),
        ("provenance", {"data": {"begins_with_bos": "false"}}),
        ("provenance", {"data": {"context": "128"}}),
        ("provenance", {"train": {"model": ["gpt2"]}}),
        ("provenance", {"train": {"stream": "fast"}}),
        ("provenance", {"reference": {"l0": "5"}}),
        ("policy", {"exclude_ids": "0"}),
        ("policy", {"exclude_ids": [0.5]}),
        ("policy", {"exclude_ids": [10**30]}),
        ("policy", {"max_norm": "5"}),
        ("policy", [1]),
        ("read", 5),
        ("read", "resid_post." + "9" * 5000),
        ("read", "nowhere.3"),
    ]
    for name, value in bad:
        config = json.loads(whole)
        config["metadata"]["unweave"][name] = value
        (folder / "cfg.json").write_text(json.dumps(config))
        with pytest.raises(UnweaveError) as caught:
            SAE.load(folder)
        assert "ours" in caught.value.where, (name, value)
