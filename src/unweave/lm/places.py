"""Where a chat template puts each message's words.

It is found by marks, never by looking for the words: a template may write the same words itself.

1. Every content is replaced by a run of one private character, as long as the content. If this rendering with the
   contents put back reads as the real one, the runs stand where the contents do.
2. Else the template's own words depend on what is said, or it takes contents apart. Then each message is followed by
   itself, the others as they are: by its run as in 1, or by marks at its beginning, at its end and before its words,
   which move along with what the template keeps of them. Without the marks that rendering must read as the real one.
3. A content whose words the template takes out altogether (a switch such as SmolLM3's "/no_think") stands nowhere.

What cannot be followed is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from unweave.core.errors import UnweaveError
from unweave.lm.template import Message

Render = Callable[[Sequence[Message]], str]

_FIRST = 0x100000  # the last plane of characters for private use, in which nobody writes
_MOST = 0xFF00
_EDGE = 16
"""so many words at the ends of a content are looked at for being taken out"""
_MARK = re.compile("[\U00100000-\U0010ffff]")
_RUN = re.compile("([\U00100000-\U0010ffff])\\1*")
_WORD = re.compile(r"(?<=\s)(?=\S)")


class Place(NamedTuple):
    """A stretch of the rendering that is words of a message."""

    start: int
    end: int
    message: int


def find_places(render: Render, messages: Sequence[Message], text: str) -> list[Place]:
    """The stretches of ``text``, the messages' rendering, that are somebody's words, in order and disjoint.

    Raises UnweaveError for a content that cannot be followed.
    """
    contents = [str(message["content"]) for message in messages]
    if len(messages) > _MOST or any(not string.isascii() and _MARK.search(string) for string in (text, *contents)):
        what = "the conversation holds characters from U+100000 on, or too many messages to tell apart"
        raise UnweaveError(what, remedy="take them out of the text")
    places = _by_runs(render, messages, dict(enumerate(contents)), text)
    if places is not None:
        return places
    places = []
    for index, content in enumerate(contents):
        alone = _by_runs(render, messages, {index: content}, text)
        if alone is None and not content.strip():
            continue  # no words that somebody could be given
        if alone is None:
            alone = _by_marks(render, messages, index, text)
        if alone is None:
            raise UnweaveError(
                f"the content of message {index} ({messages[index]['role']}) does not appear in the template's "
                "rendering, or cannot be told from the template's own words",
                remedy="the template drops or rewrites it; change the message or the template",
            )
        places += alone
    return sorted(places)


def _with(messages: Sequence[Message], contents: dict[int, str]) -> list[Message]:
    """The messages with other contents for some of them."""
    return [{**message, "content": contents[i]} if i in contents else message for i, message in enumerate(messages)]


def _by_runs(render: Render, messages: Sequence[Message], contents: dict[int, str], text: str) -> list[Place] | None:
    """Where these contents stand, by runs in their place; None unless they account for the whole text."""
    try:
        marked = render(_with(messages, {i: chr(_FIRST + i) * len(content) for i, content in contents.items()}))
    except UnweaveError:
        return None
    places: list[Place] = []
    at, behind = 0, 0  # in the text, and in the marked rendering
    runs = list(_pieces(marked, contents))
    for number, (run, end, index) in enumerate(runs):
        before = marked[behind:run]
        following = marked[end : runs[number + 1][0]] if number + 1 < len(runs) else marked[end:]
        at, behind = at + len(before), end
        form = _form(text, at, contents[index], following) if text.startswith(before, at - len(before)) else None
        if form is None:
            return None
        if form:
            places.append(Place(at, at + len(form), index))
        at += len(form)
    shown = {index for _, _, index in runs}
    hidden = any(content.strip() and i not in shown for i, content in contents.items())
    return None if hidden or text[at:] != marked[behind:] else places


def _pieces(marked: str, contents: dict[int, str]) -> Iterator[tuple[int, int, int]]:
    """Start, end and message of each content in the marked rendering; a run of twice the length is two of them."""
    for match in _RUN.finditer(marked):
        index = ord(match[1]) - _FIRST
        size = len(contents[index])
        whole = match.end() - (match.end() - match.start()) % size
        for start in range(match.start(), whole, size):
            yield start, start + size, index


def _form(text: str, at: int, content: str, following: str) -> str | None:
    """How a content stands in the text before the template's ``following``: whole, or stripped of blanks."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(form, at) and text.startswith(following, at + len(form)):
            return form
    return None


def _by_marks(render: Render, messages: Sequence[Message], index: int, text: str) -> list[Place] | None:
    """Where one content stands, by marks within it; [] where the template takes all its words out; None: unknown."""
    content = str(messages[index]["content"])
    words = [match.span() for match in re.finditer(r"\S+", content)]
    for start, end in ((0, len(content)), (words[0][0], words[-1][1])):
        places = _by_marks_in(render, messages, index, (start, end), text)
        if places is not None:
            return places
    # Words that the template takes out at an end may leave blanks that it strips, but not before a mark.
    left = list(words)
    while left and len(words) - len(left) < _EDGE and _used_up(render, messages, index, left[-1]):
        left.pop()
    while left and len(words) - len(left) < _EDGE and _used_up(render, messages, index, left[0]):
        left.pop(0)
    if not left:
        return []
    return _by_marks_in(render, messages, index, (left[0][0], left[-1][1]), text) if len(left) < len(words) else None


def _by_marks_in(
    render: Render, messages: Sequence[Message], index: int, part: tuple[int, int], text: str
) -> list[Place] | None:
    """As ``_by_marks``, with marks in one part of the content; the rest of it is as it was, and nobody's."""
    content, (start, end) = str(messages[index]["content"]), part
    words = content[start:end]
    cuts = sorted({0, *(match.start() for match in _WORD.finditer(words)), len(words)})
    cuts = cuts if len(cuts) <= _MOST else [*cuts[: _MOST - 1], len(words)]
    parts = [chr(_FIRST + k) + words[a:b] for k, (a, b) in enumerate(zip(cuts, [*cuts[1:], None], strict=True))]
    marked = _rendered(render, messages, index, content[:start] + "".join(parts) + content[end:])
    groups = list(_mark_groups(marked, len(cuts)))
    return _places_between(text, groups, words, cuts, index) if groups and _MARK.sub("", marked) == text else None


def _used_up(render: Render, messages: Sequence[Message], index: int, word: tuple[int, int]) -> bool:
    """Whether a template puts a word's marks into the rendering, and the word not: then it has taken the word out."""
    content, (start, end) = str(messages[index]["content"]), word
    word_marked = chr(_FIRST) + content[start:end] + chr(_FIRST + 1)
    marked = _rendered(render, messages, index, content[:start] + word_marked + content[end:])
    groups, bare = list(_mark_groups(marked, 2)), _MARK.sub("", marked)
    return bool(groups) and all(len(marks) == 2 and not bare[marks[0][1] : marks[1][1]].strip() for marks in groups)


def _rendered(render: Render, messages: Sequence[Message], index: int, content: str) -> str:
    """The rendering with another content for one message; nothing where the template refuses it."""
    try:
        return render(_with(messages, {index: content}))
    except UnweaveError:
        return ""


def _mark_groups(marked: str, n_marks: int) -> Iterator[list[tuple[int, int]]]:
    """(number, place without marks) of the marks that are left, for each time that the content was put in."""
    group: list[tuple[int, int]] = []
    for count, match in enumerate(_MARK.finditer(marked)):
        number = ord(match[0]) - _FIRST
        if group and number <= group[-1][0]:
            yield group
            group = []
        if number < n_marks:
            group.append((number, match.start() - count))
    if group:
        yield group


def _places_between(
    text: str, groups: list[list[tuple[int, int]]], words: str, cuts: list[int], index: int
) -> list[Place] | None:
    """Each time from the first mark left to the last, which must be the content's end. What stands between them must
    be the content's: with words taken out where its beginning is there too, else exactly."""
    places = []
    for marks in groups:
        (first, start), (last, end) = marks[0], marks[-1]
        shown, expected = text[start:end], words[cuts[first] :]
        left = iter(expected)
        ours = all(character in left for character in shown) if first == 0 else shown == expected
        if last != len(cuts) - 1 or not ours:
            return None
        if shown:
            places.append(Place(start, end, index))
    return places
