"""The text that one sees of an HTML page.

Knows tags, nothing of files.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

HIDDEN = {"script", "style", "title", "template", "noscript", "svg", "iframe", "object"}
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote"}
PARAGRAPHS |= {"pre", "hr", "figure", "section", "article"}
LINES = {"div", "li", "dt", "dd", "tr", "caption", "figcaption", "header", "footer", "nav", "main"}
LINES |= {"aside", "address", "form", "fieldset", "details", "summary", "option", "body"}
HTML_SPACE = re.compile(r"[ \t\n\r\f]+")


class Page(HTMLParser):
    """What one sees of an HTML page: lines where its blocks are, one space for any white space."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._seen = False  # any text
        self._newlines, self._tab, self._space = 0, False, False  # due before more text
        self._n_hidden, self._n_pre = 0, 0  # elements that are open
        self._pre_begins = False

    def take(self) -> str:
        """The text since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        return text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break_at(tag)
        self._n_hidden += tag in HIDDEN
        self._n_pre += tag == "pre"
        self._pre_begins = tag == "pre"
        self._tab |= tag in ("td", "th")
        if tag == "br":
            self._newlines = min(2, self._newlines + 1)

    def handle_endtag(self, tag: str) -> None:
        self._break_at(tag)
        self._n_hidden = max(0, self._n_hidden - (tag in HIDDEN))
        self._n_pre = max(0, self._n_pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._n_hidden:
            return
        if self._n_pre:
            self._append(data.removeprefix("\n") if self._pre_begins else data)
            self._pre_begins = False
            return
        text = HTML_SPACE.sub(" ", data)
        self._space |= text.startswith(" ")
        self._append(text.strip(" "))
        if text.strip(" "):
            self._space = text.endswith(" ")

    def _break_at(self, tag: str) -> None:
        wanted = 2 if tag in PARAGRAPHS else tag in LINES
        self._newlines = max(self._newlines, int(wanted))

    def _append(self, text: str) -> None:
        if not text:
            return
        if self._seen:
            gap = "\n" * self._newlines or "\t" * self._tab or " " * self._space
            self._parts.append(gap)
        self._parts.append(text)
        self._seen = True
        self._newlines, self._tab, self._space = 0, False, False
