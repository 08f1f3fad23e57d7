"""The page as a file: whole, closed to the outside, and written only where nothing is lost."""

import inspect
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from minigpt2 import GPT2, GPT2Config, InputError, Tokenizer
from minigpt2.explain.page import MARK, Subject, check_place, page, write_page
from minigpt2.explain.sections import SECTIONS, Code, sections_of, shown_code
from minigpt2.system.files import ASSETS

CONFIG = GPT2Config(vocab_size=300, block_size=128, n_embd=8, n_layer=2, n_head=2)
NAME = "my </title><script>alert(1)</script>\u202e"


def subject(name: str = NAME, **values) -> Subject:
    model = GPT2(GPT2Config(**{**vars(CONFIG), **values})).eval()
    return Subject(name, model, Tokenizer.gpt2(300))


class Elements(HTMLParser):
    """The tags of a page and their attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_a_page_is_one_file_whose_texts_are_no_markup():
    html = page([subject()], "</script><img src=x>&\u2028")
    found = Elements(html)
    assert found.tags.count("script") == 3 and "img" not in found.tags
    assert html.count("default-src 'none'") == 1 and "worker-src blob:;" in html
    for name, value in found.attributes:
        assert name not in ("src", "srcset", "action") and not name.startswith("on")
        assert name != "href" or value.startswith("#")
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML", html)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert data["prompt"] == "</script><img src=x>&\u2028"
    assert data["models"][0]["name"] == NAME.replace("\u202e", r"\u{202e}")
    assert "\u202e" not in html


def test_every_part_has_its_view_and_its_code():
    script = (ASSETS / "explain" / "page.js").read_text("utf-8")
    html = page([subject(), subject("second")], "a lamp")
    for section in sections_of(2):
        assert f'<section id="{section.name}"' in html
        assert re.search(rf"\b{section.name}: \w+View\b", script)
        assert len(section.text) < 450 and section.code
    for code in shown_code(sections_of(2)):
        assert html.count(f'id="{code.id}"') == 1 and f'href="#{code.id}"' in html


def test_code_is_shown_as_it_stands_in_its_file():
    for code in shown_code(SECTIONS):
        lines = (ASSETS.parent / code.file).read_text("utf-8").splitlines()
        shown = code.text.splitlines()
        assert [line.strip() for line in lines[code.line - 1 :][: len(shown)]] == [
            line.strip() for line in shown
        ]
        assert f"def {code.name.split('.')[-1]}(" in code.text
    assert Code.of(inspect.unwrap(GPT2.read)).name == "GPT2.read"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty: give it at least one word"),
        ("~" * 129, "the prompt has 129 tokens, a page shows 128 at most: give a shorter one"),
        ("~" * 5000, "the prompt has 5,000 tokens, a page shows 128 at most"),
        ("a\udcff", "lone surrogate '.udcff' at character 1"),
    ],
    ids=["none", "129", "5000", "no UTF-8"],
)
def test_a_prompt_that_no_page_can_show_is_refused(tmp_path, prompt, message):
    out = tmp_path / "page.html"
    with pytest.raises(InputError, match=message):
        write_page(out, [subject()], prompt)
    assert not out.exists()


def test_a_prompt_may_be_as_long_as_the_model_reads():
    short = subject("short", block_size=5)
    assert page([short], "~" * 5)
    with pytest.raises(InputError, match="6 tokens, short reads 5 at most"):
        page([short], "~" * 6)


def test_models_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="n_layer is 2 in the first and 3 in the second"):
        page([subject(), subject(n_layer=3)], "a")
    other = Subject("other", subject().model, Tokenizer.gpt2(299))
    with pytest.raises(InputError, match="a and other have different tokens"):
        page([subject("a"), other], "a")


def test_damaged_weights_are_refused():
    broken = subject()
    with torch.no_grad():
        broken.model.wte.weight[3] = float("nan")
    with pytest.raises(InputError, match="scores are not finite"):
        page([broken], "a")


def test_only_a_page_of_its_kind_is_overwritten(tmp_path):
    out = tmp_path / "page.html"
    write_page(out, [subject()], "a")
    assert MARK in out.read_text("utf-8")
    write_page(out, [subject("again")], "b")
    assert "<bdi>again</bdi>" in out.read_text("utf-8")
    out.write_text("mine")
    with pytest.raises(InputError, match="is no page of this kind: name another file"):
        write_page(out, [subject()], "a")
    assert out.read_text() == "mine"
    with pytest.raises(InputError, match="is a folder: name a file"):
        check_place(tmp_path)
    with pytest.raises(InputError, match="is no folder: make it first"):
        check_place(tmp_path / "nowhere" / "page.html")


def test_a_large_model_has_a_fixed_prompt_and_no_weights():
    large = subject(n_embd=1000, n_layer=1)  # 12 million parameters
    html = page([large], "a")
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert data["models"][0]["live"] is None and data["tokenizer"] is None
    assert re.match(r"its weights are \d\d MB in float16, and a page carries 20", data["fixed"])


def test_special_tokens_are_tokens_where_that_is_asked_for():
    prompt, end = "a<|endoftext|>b", Tokenizer.gpt2(300).eot
    for special in (False, True):
        html = page([subject()], prompt, special=special)
        data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
        assert data["ids"] == Tokenizer.gpt2(300).encode(prompt, special=special)
        assert (end in data["ids"]) == special == (len(data["pieces"]) == 3)
        assert data["special"] == ("<|endoftext|>" if special else None)
