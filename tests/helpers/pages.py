"""Code blocks of the documentation, the scripts in examples/, and data for both."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from helpers.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def fenced(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages ("" for blocks that name none)."""
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def write_text_and_pairs(folder: Path) -> None:
    """500 short texts, and six pairs of sentences for characters as tokens."""
    (folder / "text").mkdir()
    rng = random.Random(0)
    words = re.findall(
        r"\w+", "the keys to a cabinet are on the table near an old door while she was reading about rain"
    )
    texts = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 10)))}) for _ in range(500)]
    (folder / "text" / "rows.jsonl").write_text("\n".join(texts))
    pairs = [
        {"clean_prefix": f"the {a} {p}", "patch_prefix": f"the {b} {p}", "clean_answer": "s", "patch_answer": "t"}
        for a, b in (("key", "hat"), ("cat", "dog"), ("sea", "bed"))
        for p in ("near", "with")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
