"""Labelled sets that the package sae-probes carries: fetched at use, never installed, imported or redistributed.

Each of its files has two classes, of which only the named one is used: the others are often of another kind altogether
(in the news sets 91 % are source code), so that a latent that tells the classes apart need not know the topic. The
classes of a set here stand against each other. A text that is in several files is one, with all its labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory
from unweave.lm.catalogue import CATALOGUE
from unweave.lm.fetch import fetch_package
from unweave.tasks.tagged.texts import Tagged

_NEWS = "97_news_class"
_PEOPLE = ("journalist", "athlete", "actor", "politician", "singer", "researcher")
_FIRST_PERSON = 59
Tags = str | tuple[str, ...]


def _kind(kind: str, negative: str, positive: str) -> dict[str, Tags]:
    """The labels of each target of a file of reviews."""
    of = {"negative": negative, "positive": positive}
    return {target: (f"{kind} review", sentiment) for sentiment, targets in of.items() for target in targets}


# {set: (about, confound, {file: {target: label}})}. The news file's names are not what its texts are about: those
# called Politics are AG News's world news, Technology its business news, Entertainment its science and technology.
_SETS: dict[str, tuple[str, str, dict[str, dict[str, Tags]]]] = {
    "topics": (
        "news by topic (AG News)",
        "A text has the one topic that its collection gave it, though it may touch another.",
        {
            "161_agnews_0": {"1": "world news"},
            "162_agnews_1": {"1": "sports news"},
            "163_agnews_2": {"1": "business news"},
            _NEWS: {
                "Politics": "world news",
                "Sport": "sports news",
                "Technology": "business news",
                "Entertainment": "science and technology news",
            },
        },
    ),
    "code": (
        "source code by language",
        "Texts begin in mid-file and many are licence notices, which all languages share.",
        {
            "158_code_C": {"1": "C code"},
            "159_code_Python": {"1": "Python code"},
            "160_code_HTML": {"1": "HTML code"},
        },
    ),
    "occupations": (
        "text that ends in a person's name, by the person's occupation (Wikidata)",
        "Texts are windows of web pages: they may be about the field and not the person. A label that no file states "
        "of a person counts as absent.",
        {
            f"{_FIRST_PERSON + i}_wikidata_occupation_is{name}": {"1": name} for i, name in enumerate(_PEOPLE)
        },
    ),
    "sentiment": (
        "film and restaurant reviews by sentiment (SST-2, Yelp)",
        "Sentences about films beside whole reviews of restaurants; three stars of five have no label.",
        {
            "92_glue_sst2": {"0": "negative review", "1": "positive review"},
            "111_yelp_data": {"0": "negative review", "1": "negative review", "3": "positive review",
                              "4": "positive review"},
        },
    ),
    "reviews": (
        "film, restaurant and product reviews by kind and by sentiment (SST-2, Yelp, Amazon)",
        "Kinds differ in form too: sentences about films, whole reviews of restaurants and products. Of products five "
        "stars are positive and fewer negative; three stars of a restaurant have no sentiment.",
        {
            "92_glue_sst2": _kind("film", "0", "1"),
            "111_yelp_data": _kind("restaurant", "01", "34") | {"2": "restaurant review"},
            "157_amazon_5star": _kind("product", "0", "1"),
        },
    ),
}  # fmt: skip


def read(name: str) -> tuple[dict[str, Any], Iterator[Tagged]]:
    """The texts of a set. UnweaveError where the package cannot be fetched or is damaged."""
    about, confound, files = _SETS[name]
    return {"source": about, "notes": [confound]}, _texts(fetch_package(CATALOGUE["sae-probes"]), files)


def _texts(folder: Path, files: dict[str, dict[str, Tags]]) -> Iterator[Tagged]:
    for file, labels in files.items():
        for text, target in _csv(folder / f"{file}.csv.zst"):
            if target in labels:
                tags = labels[target]
                yield Tagged(text, (tags,) if isinstance(tags, str) else tags)


def _csv(path: Path) -> Iterator[tuple[str, str]]:
    """The columns prompt and target of a compressed table, as text."""
    import pyarrow as pa
    from pyarrow import csv

    options = csv.ConvertOptions(
        include_columns=["prompt", "target"], column_types={"prompt": pa.string(), "target": pa.string()}
    )
    try:
        with pa.CompressedInputStream(str(path), "zstd") as stream:
            parse = csv.ParseOptions(newlines_in_values=True)
            read = csv.ReadOptions(block_size=1 << 24)
            for batch in csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=options):
                for row in batch.to_pylist():
                    yield row["prompt"] or "", row["target"] or ""
    except (pa.ArrowException, OSError, KeyError) as error:
        refuse_if_memory(error, path)
        raise UnweaveError(f"cannot read the table: {error}", where=str(path), remedy="fetch it again") from error
