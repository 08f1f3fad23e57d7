"""The text that one sees of an HTML page. Oracles: written by hand, and the page in one part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.errors import InputError
from text_files import content_of, documents_of, quick, write

TAGS = [
    *(
        "a b",
        "\n",
        "日",
        "<",
        ">",
        "<p>",
        "</p>",
        "<b>",
        "<pre>",
        "</pre>",
        "<br/>",
        "<td>",
        "<a b='",
    ),
    *("&", "&amp", "&amp;", "&#x65E5;", "&unknown;", "<!--", "-->", "<!DOCTYPE html>", "<?x", "="),
    *("<script>", "</script>", "<style>", "</style>", "<title>", "</title>", "<![if x]>", "'"),
]


@pytest.mark.parametrize(
    ("page", "seen"),
    [
        ("plain", "plain"),
        ("<p>one<p>two", "one\n\ntwo"),
        ("<div>one</div>\n <div> two </div>", "one\ntwo"),
        ("<div><div><p>one</p></div></div><div>two", "one\n\ntwo"),
        ("a <b>bold</b>, <i> slanted</i>word", "a bold, slantedword"),
        ("a\n\t  b&#32;\r\n c", "a b c"),
        ("one<br>two<br/><br>three<br><br><br>four", "one\ntwo\n\nthree\n\nfour"),
        ("fish &amp; chips &lt;now&gt; &eacute;&#x65E5; &nbsp;x", "fish & chips <now> é日 \xa0x"),
        ("AT&T <3 a < b &unknown; &", "AT&T <3 a < b &unknown; &"),
        ("x<script>if (a < b) document.write('<p>y</p>')</script>z", "xz"),
        ("<style>p { color: red }</style><!-- no --><!DOCTYPE html>x", "x"),
        ("<html><head><title>no</title><meta name=a></head><body>yes</body></html>", "yes"),
        ("<head><title>no</title><body>yes", "yes"),
        ("<noscript>turn it <b>on</b></noscript><svg><title>no</title>no</svg>yes", "yes"),
        ("<pre>\n  a\n    b  </pre>c", "  a\n    b  \n\nc"),
        ("x <pre>  a <b> b</b>\n</pre>", "x\n\n  a  b\n"),
        ("<ul><li>one<li>two</ul>three", "one\ntwo\n\nthree"),
        ("<table><tr><th>a<th>b<tr><td>1</td> <td>2</td></table>", "a\tb\n1\t2"),
        ("<h1>Title</h1><p>text", "Title\n\ntext"),
        ("<P CLASS='a > b'>one</P>", "one"),
        ("</p></pre></script>x", "x"),
        ("</pre><pre> a  b</pre>", " a  b"),
        ("", ""),
        ("<p> </p>", ""),
    ],
)
def test_html_is_the_text_one_sees(tmp_path, page, seen):
    for name in ("a.html", "a.HTM"):
        assert documents_of(write(tmp_path, name, page)) == [(0, "", seen)]


@quick
@given(
    st.lists(st.sampled_from(TAGS), max_size=12).map("".join),
    st.integers(1, 9),
)
def test_html_does_not_depend_on_the_chunk_size(page, chunk_bytes):
    assert content_of("a.html", page, chunk_bytes=chunk_bytes) == content_of("a.html", page)


def test_html_that_cannot_be_parsed_is_named(tmp_path, monkeypatch):
    def fail(page, data):
        raise AssertionError("the parser's way")

    monkeypatch.setattr("minigpt2.corpus.sources.html_text.Page.feed", fail)
    with pytest.raises(InputError, match=r"a\.html is HTML that cannot be parsed, at line 1: "):
        documents_of(write(tmp_path, "a.html", "<![foo[ x ]]>"))
