"""The report: one file that loads nothing, shows what it was given and nothing that the data could smuggle in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.paths import TESTS
from helpers.report import (
    ENTRIES,
    RESULTS,
    SITE,
    SUBJECT,
    Nothing,
    entry,
    evaluation,
    full,
    full_page,
    records,
    render,
    steering,
    training,
)
from unweave.core.run import Run
from unweave.inputs.subject import SAEInfo
from unweave.latents.view import section as latents_section
from unweave.methods import command_of
from unweave.methods.evaluate.numbers import MEASURES, sentence
from unweave.methods.evaluate.result import Evaluation
from unweave.methods.report import page as pages
from unweave.methods.report.runs import Shown
from unweave.methods.steer.result import Sample
from unweave.show.explorer import payload
from unweave.show.model import ContextEntry, LatentEntry
from unweave.show.page import Around
from unweave.show.pieces import KINDS, latent_html
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


# ---- the page ----


def test_page_is_balanced_and_its_ids_are_unique() -> None:
    page = Page(full_page())
    assert len(page.ids) == len(set(page.ids))
    assert {"training", "evaluation", "latents", "causes", "steering", "making"} <= set(page.ids)
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
    latents = {f"#latent-{j}" for j in ENTRIES}
    assert {link for link in page.links if link.startswith("#latent-")} <= latents
    rest = {link[1:] for link in page.links if not link.startswith("#latent-")}
    assert rest <= set(page.ids)


def test_hostile_tokens_stay_text() -> None:
    hostile = replace(SUBJECT, model='"><b>', note="</title><script>")
    texts = [token for token in HOSTILE if token != "\ud83d"]  # a result is written as UTF-8
    samples = tuple(Sample(text, 1.0, text, None, 1.0, None) for text in texts)
    results = full() | {
        "eval": replace(evaluation(), subject=hostile),
        "steer": replace(steering(), subject=hostile, label=("</script>", *HOSTILE[:2]), samples=samples),
    }
    text = render(results, {3: entry(3, HOSTILE)})
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert explorer(page).count("<") == 0
    text.encode("utf-8")  # a lone surrogate could not be written to the file
    assert "</title><script>" in page.words()


def test_every_step_that_was_not_run_names_its_command() -> None:
    page = Page(render({"train": training()}))
    for command in ("eval", "latents", "trace", "steer"):
        assert f"unweave {command}" in page.words()
    assert not [name for name in page.data if name.endswith("-data")]
    assert "n/a" not in page.words()


@pytest.mark.parametrize("absent", RESULTS)
def test_each_part_may_be_absent(absent: str) -> None:
    results = {name: result for name, result in full().items() if name != absent}
    words = Page(render(results)).words()
    assert words.count("This step was not run") == (0 if absent == "train" else 1)


def test_results_of_several_saes_stand_beside_each_other(tmp_path: Path) -> None:
    shown = []
    for number in range(3):
        with Run.open(tmp_path, "eval", Nothing(lr=number), inputs={"sae": f"{number}"}, kind=Evaluation) as run:
            run.finish(evaluation(unexplained_variance=0.1 + number / 100))
        command = command_of("eval")
        assert command is not None
        shown.append(Shown(run, command, run.result))
    page = Page(pages.render("Three", shown))
    assert {"evaluation", "evaluation-2", "evaluation-3"} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert all(text in page.words() for text in ("10 % of how", "11 % of how", "12 % of how"))


def test_a_result_shows_itself_in_a_notebook() -> None:
    for result in full().values():
        page = Page(result._repr_html_())  # type: ignore[operator]
        assert page.tags[:3] == ["div", "style", "h2"] and page.tags.count("h2") == 1


def test_equal_data_gives_equal_bytes_in_another_process() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hashlib; from helpers import report;"
        "print(hashlib.sha256(report.full_page().encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, str(TESTS)],
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
    size = len(render({"latents": records(4608)}, {e.index: e for e in latents}).encode())
    assert size < 15e6


def test_page_says_what_it_leaves_out() -> None:
    words = Page(render(full() | {"latents": records(131_072)}, limit=2)).words()
    assert "These are 5 of 131,072 latents" in words, "the first two, and those that other sections name"
    assert "unweave report --latents none" in words
    assert f"of {len(ENTRIES)} latents, the first" not in Page(full_page()).words()


# ---- numbers in words ----


def test_numbers_are_said_in_plain_words() -> None:
    words = Page(full_page()).words()
    assert "The 32 active latents leave out 18 % of how activations vary; 0 is perfect, 1 is no better" in words
    assert "0.1 nats worse than untouched" in words.replace("0.100", "0.1")
    assert "special tokens 77" in words and "21,000 tokens" in words and "A note." in words
    assert "L0 is 32.0 here and was 12.0" in words  # drift is a caveat at the page's end
    assert "Loss recovered, against zero ablation" not in words  # undefined: left out rather than shown as nan
    assert "nan" not in re.findall(r"\w+", words)


def test_every_measure_has_its_sentence() -> None:
    values = {measure.key: 0.5 for measure in MEASURES}
    said = [sentence(measure.key, values, SAEInfo(SITE, "relu", 8, 64, None, "")) for measure in MEASURES]
    assert all(text and text.endswith(".") for text in said) and len(set(said)) == len(said)
    assert sentence("l0", {}, None) is None and sentence("l0", {"l0": None}, None) is None


def test_notebook_card_brings_its_style() -> None:
    html = latent_html(entry(3, HOSTILE))
    page = Page(html)
    assert page.tags.count("style") == 1 and "script" not in page.tags and "b" not in page.tags
    assert "--uw-ink" in html and "Latent 3" in page.words() and KINDS["top"] in page.words()
    assert "never fired" in latent_html(LatentEntry(9, 0.0, 0.0))


# ---- the explorer ----


def explorer(page: Page) -> str:
    """The data of the page's one list of latents."""
    (data,) = [text for name, text in page.data.items() if name.endswith("-data")]
    return data


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
    given_ = [entry(2), LatentEntry(7, 0.0, 0.0), replace(entry(40), note="plural subjects")]
    page = Page(render({"latents": records(3)}, {e.index: e for e in given_}))
    read = decode(json.loads(explorer(page)))
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
    data = json.loads(explorer(Page(full_page())))
    # the strongest effect first, the random one not at all
    assert data["tags"] == [["subject-verb agreement: across pp", [0, 1, 2, 3, 6]], ["steered", [3]]]
    alone = latents_section(records(), Around(entries=ENTRIES))
    assert "uw-explorer" in alone.body and alone.scripts


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
