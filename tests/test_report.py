"""The report: one file that loads nothing, shows what it was given and nothing that the data could smuggle in."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest

from unweave.methods.report import (
    Attribution,
    AttributionRow,
    ContextEntry,
    DensityHistogram,
    LatentEntry,
    ReportData,
    SAESummary,
    Steering,
    TrainingCurve,
    latent_html,
    render,
)
from unweave.methods.report.explorer import payload
from unweave.methods.report.numbers import MEASURES, sentence
from unweave.show.pieces import KINDS
from unweave.show.theme import HEAT_LEVELS, asset

HOSTILE = [
    "</script><b>",
    " &",
    '"><img src=x onerror=alert(1)>',
    "<!--",
    "\n",
    "\ud83d",
    "\x00",
    "",
    "  ",
    "\u2028",
    "�",
]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Parses a document strictly: elements must be balanced; keeps ids, links and what the scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data: dict[str, str] = {}
        self.text: list[str] = []
        self._script = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice in <{tag}>: {attrs}"
        self.tags.append(tag)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "poster")
        ]
        assert not any(name.startswith("on") for name in given), f"a handler in <{tag}>"
        if tag == "script":
            self._script = given.get("id") or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data[self._script] = self.data.get(self._script, "") + data
        elif not (self.open and self.open[-1] == "style"):
            self.text.append(data)

    def words(self) -> str:
        return " ".join("".join(self.text).split())


def entry(index: int, tokens: list[str] | None = None) -> LatentEntry:
    tokens = tokens or [" the", " keys", " to", " the", " cabinet", " are"]
    acts = [0.0] * len(tokens)
    acts[-1] = 4.0 + index / 10
    acts[1] = 0.01
    contexts = [
        ContextEntry("top", tokens, acts, len(tokens) - 1),
        ContextEntry("quantile", tokens[::-1], [value / 2 for value in acts[::-1]], 0, "50 %"),
        ContextEntry("random", tokens, [-1.0] * len(tokens), 2),
    ]
    return LatentEntry(index, 0.0042, 4.0 + index / 10, [(tokens[0], 0.5)], [(tokens[1], -0.25)], contexts)


def full() -> ReportData:
    rows = [AttributionRow(j, 1 / (1 + j), 0.9 / (1 + j), 0.7 / (1 + j)) for j in range(4)]
    rows += [AttributionRow(5, 0.01, 0.012, 0.008, chosen=False), AttributionRow(6, None, 0.2, 0.1)]
    return ReportData(
        title="A report & more",
        model="tiny-model",
        model_note="dequantised from Q4_1",
        site="resid_post.9",
        sae=SAESummary("TopK", 576, 8, 32, 2_000_000, 480_000, 4.17),
        evaluation={
            "unexplained_variance": 0.18, "explained_variance": 0.82, "cosine": 0.9, "l0": 32.0, "ce_clean": 3.0,
            "ce_sae": 3.1, "ce_mean": 7.0, "ce_zero": 9.0, "recovered_vs_mean": 0.975, "kl_sae": math.nan,
            "tokens": 21_000, "excluded": {"special tokens": 77}, "notes": ("A note.",), "drift": 0.125,
        },
        density=DensityHistogram([-4, -3, -2, -1], [0, 5, 2], 1),
        training=TrainingCurve([1e5 * i for i in range(1, 50)], [1 / i for i in range(1, 50)], [0.1] * 49),
        latents=[*map(entry, range(7)), LatentEntry(7, 0.0, 0.0)],
        attribution=Attribution(
            "subject-verb agreement", 120, rows,
            {"ig_pearson": 0.98, "random_ig_pearson": 0.4, "ap_spearman": math.nan},
            [("clean", "The keys"), ("patch", "The key")],
        ),
        steering=Steering(3, "Tell me.", [("unedited", "A walk."), (4.0, "The sea & the sea.")], [" sea"]),
        settings={"train": {"lr": 0.001, "sites": ["resid_post.9"]}},
        provenance={"sha256": "ab" * 32},
        timings=[("train", 312.0), ("eval", 2.5)],
        notes=["The weights were dequantised."],
    )  # fmt: skip


@cache
def full_page() -> str:
    return render(full())


# ---- the page ----


def test_page_is_balanced_and_its_ids_are_unique() -> None:
    page = Page(full_page())
    assert len(page.ids) == len(set(page.ids))
    assert {"training", "evaluation", "latents", "attribution", "steering", "making"} <= set(page.ids)
    assert page.tags.count("svg") == 6  # the ornament, loss, losses, density, two scatters
    assert page.tags.count("h1") == 1


def test_page_loads_nothing() -> None:
    text = full_page()
    page = Page(text)
    assert page.links and all(link.startswith("#") for link in page.links)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "@import" not in text and "fetch(" not in text and "XMLHttpRequest" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", text))
    assert "default-src 'none'" in text
    # the only addresses are the names of the SVG vocabulary, which nothing fetches
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_links_inside_the_page_lead_somewhere() -> None:
    page = Page(full_page())
    latents = {f"#latent-{e.index}" for e in full().latents or ()}
    assert {link for link in page.links if link.startswith("#latent-")} <= latents
    rest = {link[1:] for link in page.links if not link.startswith("#latent-")}
    assert rest <= set(page.ids)


def test_hostile_tokens_stay_text() -> None:
    data = replace(full(), latents=[entry(3, HOSTILE)], title="</title><script>", model='"><b>')
    text = render(data)
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert page.data["latents-data"].count("<") == 0
    text.encode("utf-8")  # a lone surrogate could not be written to the file
    assert "</title><script>" in page.words()


def test_every_step_that_was_not_run_names_its_command() -> None:
    page = Page(render(ReportData("Nothing yet", "tiny-model")))
    for command in ("train", "eval", "latents", "trace", "steer"):
        assert f"unweave {command}" in page.words()
    assert "latents-data" not in page.data
    assert "n/a" not in page.words()


@pytest.mark.parametrize("absent", ["sae", "evaluation", "density", "training", "latents", "attribution", "steering"])
def test_each_part_may_be_absent(absent: str) -> None:
    words = Page(render(replace(full(), **{absent: None}))).words()
    assert words.count("This step was not run") == (0 if absent in ("density", "training") else 1)


def test_equal_data_gives_equal_bytes_in_another_process() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_report as t, hashlib;"
        "print(hashlib.sha256(t.render(t.full()).encode()).hexdigest())"
    )
    here = os.path.dirname(__file__)
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, here],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert len(runs[0].strip()) == 64 and runs[0] == runs[1]


def test_page_of_a_whole_sae_stays_small() -> None:
    def context(kind: str, j: int, k: int) -> ContextEntry:
        tokens = [f" w{(j * 7919 + k * 104729 + i * 31) % 20000}" for i in range(25)]
        return ContextEntry(kind, tokens, [0.5] * 25, 12)

    kinds = ["top"] * 5 + ["quantile"] * 3 + ["random"] * 2
    latents = [
        LatentEntry(
            j,
            0.01,
            1.0,
            [(f" w{j}", 0.5)] * 8,
            [(f" w{j}", -0.5)] * 8,
            [context(kind, j, k) for k, kind in enumerate(kinds)],
        )
        for j in range(4608)
    ]
    size = len(render(ReportData("Big", "tiny-model", latents=latents)).encode())
    assert size < 15e6


def test_page_says_what_it_leaves_out() -> None:
    words = Page(render(replace(full(), recorded=131_072))).words()
    assert f"These are {len(full().latents or ()):,} of 131,072 latents" in words
    assert "unweave report --latents none" in words
    assert "of 131,072" not in Page(render(replace(full(), recorded=len(full().latents or ())))).words()


# ---- numbers in words ----


def test_numbers_are_said_in_plain_words() -> None:
    words = Page(full_page()).words()
    assert "The 32 active latents leave out 18 % of how activations vary; 0 is perfect, 1 is no better" in words
    assert "0.1 nats worse than untouched" in words.replace("0.100", "0.1")
    assert "special tokens 77" in words and "21,000 tokens" in words and "A note." in words
    assert "drift" in words and "0.125" in words  # a number the page does not know is still shown
    assert "KL divergence, SAE in place" not in words  # not finite: left out rather than shown as nan
    assert "nan" not in re.findall(r"\w+", words)


def test_every_measure_has_its_sentence() -> None:
    values = {measure.key: 0.5 for measure in MEASURES}
    said = [sentence(measure.key, values, SAESummary("ReLU", 8, 64)) for measure in MEASURES]
    assert all(text and text.endswith(".") for text in said) and len(set(said)) == len(said)
    assert sentence("l0", {}, None) is None and sentence("l0", {"l0": None}, None) is None


def test_notebook_card_brings_its_style() -> None:
    html = latent_html(entry(3, HOSTILE))
    page = Page(html)
    assert page.tags.count("style") == 1 and "script" not in page.tags and "b" not in page.tags
    assert "--uw-ink" in html and "Latent 3" in page.words() and KINDS["top"] in page.words()
    assert "never fired" in latent_html(LatentEntry(9, 0.0, 0.0))


# ---- the explorer ----


def decode(data: dict) -> list[LatentEntry]:
    """What the page's script reads from the data, written independently of the packing."""
    words, kinds = data["tokens"], data["kinds"]
    out = []
    for index, rate, largest, promoted, suppressed, contexts, note in data["latents"]:
        pairs = [[(words[p[i]], p[i + 1]) for i in range(0, len(p), 2)] for p in (promoted, suppressed)]
        read = []
        for kind, codes, digits, peak, value in contexts:
            tokens = [words[int(code, 36)] for code in codes.split(" ")]
            acts = [int(digit) / 9 * largest for digit in digits]
            assert value >= 0
            acts[peak] = value
            read.append(ContextEntry(kinds[kind][0], tokens, acts, peak, kinds[kind][1]))
        out.append(LatentEntry(index, rate, largest, *pairs, read, note))
    return out


def test_explorer_data_hold_what_was_given() -> None:
    given_ = [entry(2), replace(entry(40), note="plural subjects"), LatentEntry(7, 0.0, 0.0)]
    page = Page(render(replace(full(), latents=given_)))
    read = decode(json.loads(page.data["latents-data"]))
    assert len(read) == len(given_)
    for a, b in zip(given_, read, strict=True):
        assert (a.index, a.firing_rate, a.max_activation, a.note) == (b.index, b.firing_rate, b.max_activation, b.note)
        assert (list(a.promoted), list(a.suppressed)) == (b.promoted, b.suppressed)
        assert [(c.kind, c.label, list(c.tokens), c.peak) for c in a.contexts] == [
            (c.kind, c.label, c.tokens, c.peak) for c in b.contexts
        ]
        for c, d in zip(a.contexts, b.contexts, strict=True):
            for position, (want, got) in enumerate(zip(c.activations, d.activations, strict=True)):
                # to a ninth of the largest, except that firing at all is never rounded to nothing
                assert abs(max(want, 0.0) - got) <= a.max_activation / (18 if want > 0.3 or want <= 0 else 9) + 1e-9
                assert (got > 0) == (want > 0)
                assert position != c.peak or got == pytest.approx(max(want, 0.0), rel=5e-3)


def test_explorer_data_name_the_latents_of_the_other_sections() -> None:
    data = json.loads(Page(full_page()).data["latents-data"])
    # the strongest effect first; the one that was not measured by its estimate, the random one not at all
    assert data["tags"] == [["subject-verb agreement", [0, 1, 2, 3, 6]], ["steered", [3]]]


def test_frequent_tokens_have_short_codes() -> None:
    latents = [entry(0, ["a", " b", "a", "a"])]
    assert payload(latents, {})["tokens"][0] == "a"  # type: ignore[index]


def test_script_and_pieces_agree() -> None:
    script = asset("explorer.js")
    for kind, heading in KINDS.items():
        assert f'{kind}: "{heading}"' in script
    assert f"LEVELS = {HEAT_LEVELS}" in script
    styles = asset("pieces.css") + asset("explorer.css")
    assert int(re.search(r"ROW = (\d+)", script)[1]) == int(re.search(r"uw-item \{[^}]*height: (\d+)px", styles)[1])  # type: ignore[index]
    assert "innerHTML" not in script  # tokens reach the document as text only
