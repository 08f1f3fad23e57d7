"""The text that one sees of an HTML page.

lxml cuts the page into tags and texts, as browsers do, and says where elements end that nothing
closes. Knows tags, nothing of files.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import lxml.etree as etree

logger = logging.getLogger(__name__)

PARSER = "libxml2 {}.{}.{}".format(*etree.LIBXML_VERSION)  # lxml's own: decides what texts are made
HIDDEN = {"head", "title", "script", "style", "template", "noscript", "svg", "iframe", "object"}
HIDDEN |= {"audio", "video", "canvas", "datalist", "noembed", "noframes"}  # for old browsers
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "dir", "menu", "table"}
PARAGRAPHS |= {"pre", "listing", "xmp", "plaintext", "blockquote", "hr", "figure"}
PARAGRAPHS |= {"section", "article"}
LINES = {"div", "li", "dt", "dd", "tr", "caption", "figcaption", "header", "footer", "nav", "main"}
LINES |= {"aside", "address", "form", "fieldset", "legend", "details", "summary", "option", "body"}
LINES |= {"center", "hgroup", "search", "dialog", "optgroup", "textarea"}
PRESERVED = {"pre", "listing", "xmp", "plaintext", "textarea"}  # their white space counts
# what is between their tags is text, whatever it looks like
RAW = {"script", "style", "title", "textarea", "xmp", "iframe", "noembed", "noframes", "plaintext"}
DIGITS = re.compile("[0-9A-Fa-f]+")
NUMBER = re.compile(r"&#[xX]?[0-9A-Fa-f]*\Z")
HTML_SPACE = re.compile(r"[ \t\n\r\f]{2,}|[\t\n\r\f]")  # what is not one space already

BLOCK = 4096  # characters that are parsed at once: at most 1400 tags
TAG = re.compile("(?=<)")
# These end a paragraph even where none is open, and a heading of another size; lxml passes them by.
ENDING = re.compile(r"(?=</(?:p|h[1-6])[ \t\n\f/>])", re.IGNORECASE)
MAY_BE_ENDING = re.compile(r"<(?:/(?:p|h[1-6]?)?)?\Z", re.IGNORECASE)  # the next block says so
# An end tag is sought among all open elements, so that more of them would take quadratic time.
DEEPEST = 1000
KEPT = DEEPEST // 2
REFERENCE = re.compile("&#?[0-9A-Za-z]*\\Z")  # a character's number or name that may go on
LONGEST_NUMBER = 4096  # digits
LONGEST_TAG = 2**25  # characters; a tag or comment is held in memory


class DamagedPage(Exception):
    """A page that cannot be parsed, with the reason."""


class Page:
    """What one sees of an HTML page: lines where its blocks are, one space for any white space.

    Takes memory for the text since the last `take` and for one tag or comment, and time in
    proportion to the page, whatever is in it. Where more than about 1000 elements are open in one
    another, the outermost are taken as ended. Raises DamagedPage.
    """

    def __init__(self) -> None:
        _warn_of_old_parser()
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True)
        self._seen, self._held = _Seen(), ""
        self._parser = _parser(self._seen)
        self._n_silent = 0  # characters since the last tag, text or comment
        self._n_digits = 0  # of a character's number that may go on, with the "&#" before it

    def feed(self, text: str) -> None:
        """Take more of the page, cut anywhere."""
        text = self._held + self._newlines.decode(text).replace("\0", "")
        at = 0
        with _problems_named():
            # However the page comes, its blocks are the same.
            while len(text) - at >= BLOCK:
                end = at + BLOCK
                if begun := MAY_BE_ENDING.search(text, end - 4, end):
                    end = begun.start()
                self._parse(text[at:end])
                at = end
        self._held = text[at:]

    def take(self) -> str:
        """The text since the last call."""
        return self._seen.take()

    def close(self) -> None:
        """Take what was held back: the page has ended."""
        with _problems_named():
            self._parse(self._held + self._newlines.decode("", final=True))
            self._parser.close()

    def _parse(self, block: str) -> None:
        border = TAG if len(self._seen.open) > DEEPEST else ENDING
        for piece in filter(None, border.split(block)):
            if ENDING.match(piece) and not self._seen.in_raw:
                self._feed_parser("<p></p>")
            self._feed_parser(piece)
            # Behind a tag that ends in such a piece the parser knows of nothing but text.
            behind_tag = border is TAG and self._seen.at_border and not REFERENCE.search(piece)
            if behind_tag and len(self._seen.open) > DEEPEST:
                self._begin_anew()

    def _feed_parser(self, text: str) -> None:
        before, self._seen.at_border = self._seen.n_events, False
        number = NUMBER.search(text)
        goes_on = self._n_digits > 0 and DIGITS.fullmatch(text) is not None
        # The number of a character is read from its beginning each time; one so long is none.
        if self._n_digits < LONGEST_NUMBER or not goes_on:
            self._parser.feed(text.encode())
        self._n_digits = self._n_digits + len(text) if goes_on else len(number[0]) if number else 0
        self._n_silent = self._n_silent + len(text) if self._seen.n_events == before else 0
        if self._n_silent > LONGEST_TAG:
            raise DamagedPage(f"a tag or comment is longer than {LONGEST_TAG:,} characters")

    def _begin_anew(self) -> None:
        """Go on with a parser that knows the innermost elements only, and what hides them."""
        elements = self._seen.open
        kept = [element for element in elements[:-KEPT] if element.begins] + elements[-KEPT:]
        self._seen.counts_tags = False
        self._parser.close()
        self._parser = _parser(self._seen, "".join(f"<{element.tag}>" for element in kept))
        self._seen.open, self._seen.counts_tags = [*AROUND, *kept], True


class _Element(NamedTuple):
    """One that is open."""

    tag: str
    hidden: bool  # it, or one that it is in
    preserved: bool  # and so is the white space in it
    begins: bool  # what is not so around it


OUTSIDE = _Element("", False, False, False)
AROUND = [OUTSIDE._replace(tag=tag) for tag in ("html", "body")]  # of all pages


class _Seen:
    """What the parser tells of a page, turned into text."""

    def __init__(self) -> None:
        self.open = [*AROUND]
        self.counts_tags = True
        self.n_events = 0
        self.at_border = False  # a tag was the last event, and no raw text follows
        self._parts: list[str] = []
        self._has_text = False
        self._newlines, self._tab, self._space = 0, False, False  # due before more text
        self._pre_begins = False

    @property
    def in_raw(self) -> bool:
        """Whether a tag would be text."""
        return bool(self.open) and self.open[-1].tag in RAW

    def take(self) -> str:
        """The text since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        return text

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """The parser's: an element begins."""
        if not self.counts_tags:
            return
        self.n_events += 1
        self.at_border = tag not in RAW
        around = self.open[-1] if self.open else OUTSIDE
        hides = tag in HIDDEN or "hidden" in attributes
        hides |= tag == "dialog" and "open" not in attributes
        hidden, preserved = around.hidden or hides, around.preserved or tag in PRESERVED
        begins = (hidden, preserved) != around[1:3]
        self.open.append(_Element(tag, hidden, preserved, begins))
        self._pre_begins = tag in PRESERVED
        if hidden:
            return
        self._break_at(tag)
        self._tab |= tag in ("td", "th")
        if tag == "br":
            self._newlines = min(2, self._newlines + 1)

    def end(self, tag: str) -> None:
        """The parser's: the innermost element ends."""
        if not self.counts_tags:
            return
        self.n_events += 1
        self.at_border = True
        if not self.open.pop().hidden:
            self._break_at(tag)

    def data(self, text: str) -> None:
        """The parser's: a piece of text."""
        self.n_events += 1
        element = self.open[-1] if self.open else OUTSIDE
        if element.hidden:
            return
        if element.preserved:
            self._append(text.removeprefix("\n") if self._pre_begins else text)
            self._pre_begins = False
            return
        text = HTML_SPACE.sub(" ", text)
        self._space |= text.startswith(" ")
        self._append(text.strip(" "))
        if text.strip(" "):
            self._space = text.endswith(" ")

    def comment(self, text: str) -> None:
        """The parser's: a comment, or what browsers take for one."""
        self.n_events += 1
        self._pre_begins = False

    def close(self) -> None:
        """The parser's: the page has ended."""

    def _break_at(self, tag: str) -> None:
        wanted = 2 if tag in PARAGRAPHS else tag in LINES
        self._newlines = max(self._newlines, int(wanted))

    def _append(self, text: str) -> None:
        if not text:
            return
        if self._has_text:
            gap = "\n" * self._newlines or "\t" * self._tab or " " * self._space
            self._parts.append(gap)
        self._parts.append(text)
        self._has_text = True
        self._newlines, self._tab, self._space = 0, False, False


def _parser(seen: _Seen, opened: str = "") -> etree.HTMLParser:
    """A parser of what is in a body, in these elements."""
    parser = etree.HTMLParser(target=seen, encoding="utf-8", huge_tree=True)
    counted, seen.counts_tags = seen.counts_tags, False
    # Text with nothing around it would be given a paragraph.
    parser.feed(f"<html><body>{opened}".encode())
    seen.counts_tags = counted
    return parser


@cache
def _warn_of_old_parser() -> None:
    """Say once, if so, that not all is read as browsers do: 2.14 is the first that does."""
    if etree.LIBXML_VERSION < (2, 14):
        logger.warning(
            f"lxml is here built with {PARSER}: from 2.14 on, as in lxml's packages for Linux and "
            "macOS, it also understands &nbsp without a semicolon, and broken tags as browsers do"
        )


@contextmanager
def _problems_named() -> Iterator[None]:
    try:
        yield
    except etree.LxmlError as problem:
        raise DamagedPage(str(problem)) from problem
