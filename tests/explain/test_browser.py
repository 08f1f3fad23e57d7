"""The page in a real browser: what it shows and computes is what the library does."""

import json
import random
import time

import pytest
import torch

from browser import Opened, browser, findings
from languages import LANGUAGES
from minigpt2 import GPT2, GPT2Config, SamplingConfig, Tokenizer
from minigpt2.explain.inside import Reading, inside
from minigpt2.explain.live import rounded_model
from minigpt2.explain.page import Subject, page
from minigpt2.sampling import probabilities
from tokenizer_folders import END, preferring, with_words, word

PROMPT = "The lamp <b>went</b> out, and the lamp</script> went שלום \u202e\x07 café 灯"
CONFIG = GPT2Config(vocab_size=600, block_size=100, n_embd=24, n_layer=3, n_head=4)


def subject(name: str = "first", seed: int = 0, **values) -> Subject:
    model = GPT2(GPT2Config(**{**vars(CONFIG), **values})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Subject(name, model, Tokenizer.gpt2(600))


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def first():
    return subject()


@pytest.fixture(scope="module")
def file(first, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(page([first], PROMPT), "utf-8")
    return path


@pytest.fixture
def tab(chromium, file):
    with Opened(chromium, file) as found:
        yield found


def read(tab, text: str) -> None:
    """Type a text, and wait for what the page makes of it."""
    tab.fill("#text", text)
    wait_until(lambda: tab.evaluate("scene.text") == text, tab)


def wait_until(happened, tab) -> None:
    """The page's policy forbids what playwright's own waiting for an expression needs."""
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, tab.inner_text("#told")
        tab.wait_for_timeout(20)


HOW = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CAMEL = ("temperature", "topK", "topP", "minP", "repetitionPenalty")


def sampling_case(draw: random.Random) -> tuple[list[float], list[float], list[int]]:
    """A row of scores, many of them equal, how to sample, and the text so far."""
    size = draw.choice([1, 2, 7, 50])
    step = draw.choice([0.5, 0.01, 1e-6])
    logits = [round(draw.gauss(0, 3) / step) * step for _ in range(size)]
    how = [
        draw.choice([0, 0.004, 0.3, 1, 1.7]),
        draw.choice([0, 1, 2, 5, 40, 60]),
        draw.choice([0, 0.1, 0.5, 0.77, 0.95, 1]),
        draw.choice([0, 0.05, 0.3, 1]),
        draw.choice([1, 1.2, 0.7]),
    ]
    return logits, how, [draw.randrange(size) for _ in range(draw.randrange(4))]


def kept(probs: torch.Tensor) -> torch.Tensor:
    """Numbers that float32 barely holds are zero with some routines."""
    return probs > 1e-37


def test_the_sliders_compute_what_sampling_does(tab):
    draw = random.Random(0)
    cases = [sampling_case(draw) for _ in range(1000)]
    asked = [[x, dict(zip(CAMEL, how)), text] for x, how, text in cases]
    script = "cases => cases.map(([x, how, text]) => "
    script += "[...probabilities(Float32Array.from(x), how, text)])"
    shown = tab.evaluate(script, asked)
    for (logits, how, text), found in zip(cases, map(torch.FloatTensor, shown)):
        row, config = torch.tensor([logits]), SamplingConfig(**dict(zip(HOW, how)))
        expected = probabilities(row, config, [text])[0]
        assert torch.equal(kept(found), kept(expected)), (logits, how, text)
        close(found, expected)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def texts() -> list[str]:
    lines = [line for lines in LANGUAGES.values() for line in lines]
    odd = ["", " ", "\n\n  x", "a\u2028b\u0085c\ufeffd", "x  \t", "it's they'LL 12½ Ⅷ", "\x00\x1f"]
    odd += ["<|endoftext|>", "a\u3000 b", "é e\u0301 \U0001f468\u200d\U0001f469", "  \u200b  "]
    draw = random.Random(1)
    pool = [c for line in lines + odd for c in line] + list("  \n\t'")
    mixed = ["".join(draw.choices(pool, k=draw.randrange(40))) for _ in range(200)]
    return lines + odd + mixed


@pytest.mark.parametrize("vocab_size", [257, 600, 50257])
def test_typed_texts_have_the_ids_that_the_tokenizer_gives(chromium, tmp_path, vocab_size):
    tokenizer = Tokenizer.gpt2(vocab_size)
    model = GPT2(GPT2Config(vocab_size=vocab_size, block_size=20, n_embd=4, n_layer=1, n_head=1))
    (tmp_path / "page.html").write_text(page([Subject("m", model.eval(), tokenizer)], "a"), "utf-8")
    with Opened(chromium, tmp_path / "page.html") as tab:
        found = typed_ids(tab, texts())
    for text, ids in zip(texts(), found):
        assert ids == tokenizer.encode(text), repr(text)


def typed_ids(tab, texts: list[str]) -> list[list[int]]:
    script = (
        "texts => (({ tokenizer }) => texts.map((t) => encode(tokenizer, t)))(makeReader(data))"
    )
    return tab.evaluate(script, texts)


NAMES = ["<u>", "uv", "<|user|>", "a b", " b", "b ", "\n\n", "aa", "aab", "éa", "日本", "_x", "-+"]
NAMES += ["a.*", "[a]", "\\d", "\U0001f468", "</script>", "\u202e\x07"]
AROUND = [*" ab\n\tuv3x", "\xa0", "\u3000", "\x85", "\ufeff", "²", "\u0301", "Ⓐ", "‿", "\u200d"]
AROUND += ["\U0001f130", "\U0001d54f", "\U00010fff", END]


def hostile_words(draw: random.Random) -> list[dict]:
    flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
    return [
        word(name, **{flag: draw.random() < 0.4 for flag in flags})
        for name in draw.sample(NAMES, 12)
    ]


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("seed", range(4))
def test_added_words_are_found_in_what_is_typed(
    chromium, tmp_path, tmp_path_factory, seed, special
):
    draw = random.Random(seed)
    settings = {"add_prefix_space": True} if seed % 2 else {}
    folder = with_words(tmp_path / "model", tmp_path_factory, *hostile_words(draw), **settings)
    tokenizer = Tokenizer.from_folder(folder)
    typed = ["".join(draw.choices(NAMES + AROUND, k=draw.randrange(14))) for _ in range(200)]
    model = GPT2(GPT2Config(vocab_size=320, block_size=128, n_embd=4, n_layer=1, n_head=1)).eval()
    made = page([Subject("m", model, tokenizer)], "a<u> b" + END, special=special)
    (tmp_path / "page.html").write_text(made, "utf-8")
    with Opened(chromium, tmp_path / "page.html") as tab:
        chips = "#tokens .chip small"
        in_prompt = tab.locator(chips).all_inner_texts()
        found = typed_ids(tab, typed)
        names = tab.evaluate(
            "Array.from({ length: 312 }, (_, id) => [...makeReader(data).name(id)])"
        )
        read(tab, "u" + typed[0] + END)
        assert tab.locator(chips).count() == len(
            tokenizer.encode("u" + typed[0] + END, special=special)
        )
        assert ("Special tokens" in tab.inner_text("#tokens")) == special
    assert in_prompt == list(map(str, tokenizer.encode("a<u> b" + END, special=special)))
    for text, ids in zip(typed, found):
        assert ids == tokenizer.encode(text, special=special), repr(text)
    assert list(map(bytes, names)) == [tokenizer.token_bytes(id) for id in range(312)]


VARIANTS = [
    {},
    {"activation_function": "gelu", "n_inner": 17},
    {"tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
    {"scale_attn_weights": False, "vocab_size": 640},
]


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_what_is_typed_is_measured_as_the_library_does_on_the_same_weights(
    chromium, tmp_path, values
):
    made = subject(**values)
    (tmp_path / "page.html").write_text(page([made], "a lamp"), "utf-8")
    text = "What a lamp, what a light. What a\nlamp!"
    with Opened(chromium, tmp_path / "page.html") as tab:
        read(tab, text)
        script = "JSON.stringify(scene.models[0].inside, (name, held) =>"
        script += " ArrayBuffer.isView(held) ? [...held] : held)"
        found = json.loads(tab.evaluate(script))
        logits = tab.evaluate("[...forward(makeReader(data).models[0], scene.ids).logits]")
    rounded = Subject("rounded", rounded_model(made.model), made.tokenizer)
    ids = made.tokenizer.encode(text)
    reading = Reading.of(rounded.model, rounded.tokenizer, ids)
    assert (torch.tensor(logits) - reading.trace.logits.flatten()).abs().max() < 1e-3
    same(found, plain(inside(reading)[0]))


def plain(value):
    """What `packed` made, as arrays of numbers."""
    from base64 import b64decode

    import numpy as np

    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, dict) and "kind" in value:
        kind = {"f32": "<f4", "f16": "<f2", "i32": "<i4", "share": "<u2"}[value["kind"]]
        numbers = np.frombuffer(b64decode(value["data"]), kind)
        numbers = numbers / 65535 if value["kind"] == "share" else numbers
        return {"shape": value["shape"], "data": [float(x) for x in numbers]}
    if isinstance(value, dict):
        return {name: plain(held) for name, held in value.items()}
    return value


def same(found, expected, where: str = "") -> None:
    """Equal up to rounding, wherever there are numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, held in expected.items():
            same(found[name], held, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for at, (x, y) in enumerate(zip(found, expected)):
            same(x, y, f"{where}[{at}]")
    elif expected is None or isinstance(expected, str):
        assert found == expected, where
    elif found is None:  # what JSON has for infinite numbers
        assert not -1e30 < expected < 1e30, where
    else:
        assert found == pytest.approx(expected, abs=2e-3, rel=2e-3), where


def test_texts_of_the_prompt_are_shown_and_never_obeyed(tab, first):
    assert tab.locator("main b, main script").count() == 0
    chips = tab.locator("#tokens .chip bdi").all_inner_texts()
    assert len(chips) == len(first.tokenizer.encode(PROMPT))
    shown = "".join(chips)
    assert "<" in shown and "\\x07" in shown.replace("\\u{0007}", "\\x07")
    assert not {"\u202e", "\x07"} & set(shown)
    assert tab.input_value("#text") == PROMPT


def test_tokens_of_the_vocabulary_are_shown_escaped(chromium, tmp_path, tmp_path_factory):
    names = ["</script><b>x", "\u202eright\x07", "<!--", "\ud7ff\ufdd0\u200b"]
    folder = with_words(tmp_path / "model", tmp_path_factory, *(word(name) for name in names))
    ids = [300, 301, 302, 303]
    made = Subject("m", preferring(ids, 304), Tokenizer.from_folder(folder))
    html = page([made], "a")
    assert "<b>x" not in html and "<!--" not in html
    (tmp_path / "page.html").write_text(html, "utf-8")
    with Opened(chromium, tmp_path / "page.html") as tab:
        for text in (None, "ab"):  # measured by the library, and by the page
            if text:
                read(tab, text)
            shown = tab.locator("#next tbody th").all_inner_texts()[:4]
            assert shown[:3] == ["</script><b>x", r"\u{202e}right\u{0007}", "<!--"]
            assert r"\u{200b}" in shown[3] and "\u200b" not in shown[3]
            assert tab.locator("main b, main script").count() == 0
            assert not {"\u202e", "\x07"} & set(tab.inner_text("body"))


def test_the_page_follows_what_is_typed(tab, first):
    read(tab, "A lamp went")
    ids = first.tokenizer.encode("A lamp went")
    assert tab.locator("#tokens .chip small").all_inner_texts() == list(map(str, ids))
    assert f"{len(ids)} tokens, read in this page" in tab.inner_text("#told")
    tab.fill("#text", "a b " * 300)
    wait_until(lambda: "tokens: the page reads 100 at most" in tab.inner_text("#told"), tab)
    assert "What is below is still about the text before." in tab.inner_text("#told")
    assert tab.evaluate("document.body.className") == "stale"
    tab.fill("#text", "")
    wait_until(lambda: "at least one token" in tab.inner_text("#told"), tab)
    assert tab.locator("#tokens .chip").count() == len(ids)  # nothing is lost


def test_what_is_typed_is_read_beside_the_page_and_the_newest_text_counts(tab):
    script = """() => {
        globalThis.shown = [];
        const told = document.getElementById("told"), box = document.getElementById("text");
        drawAll = ((draw) => () => (shown.push(scene.text), draw()))(drawAll);
        new MutationObserver(() => {
            if (told.textContent !== "Reading …" || shown.includes("meanwhile")) return;
            document.querySelectorAll("#tokens .chip")[1].click(); // the page can be used
            shown.push(scene.text, state.token, "meanwhile");
            box.value = "a lamp"; // typed on
        }).observe(told, { childList: true });
    }"""
    tab.evaluate(script)
    tab.fill("#text", "a")
    wait_until(lambda: tab.evaluate("scene.text") == "a lamp", tab)
    assert tab.evaluate("shown") == [PROMPT, 1, "meanwhile", "a lamp"]


def test_sliders_move_the_table(tab, first):
    ids = first.tokenizer.encode(PROMPT)
    logits = first.model(torch.tensor([ids]))[0, -1:, :600].detach()
    tab.locator("#slider-topK").fill("7")
    tab.locator("#slider-temperature").fill("0.5")
    expected = probabilities(logits, SamplingConfig(temperature=0.5, top_k=7), [ids])[0]
    assert "7 of 600 tokens can come" in tab.inner_text("#next .kept")
    rows = tab.locator("#next tbody tr").all()
    assert len(rows) == 7
    for row, id in zip(rows, expected.argsort(descending=True).tolist()):
        cells = row.locator("th, td").all_inner_texts()
        assert cells[1] == str(id)
        assert float(cells[3].split()[-2]) == pytest.approx(100 * float(expected[id]), abs=0.05)
    tab.get_by_text("All off").click()
    assert tab.inner_text("#next output >> nth=1") == "0"


def test_hover_and_arrow_keys_tell_what_a_token_looks_at(tab, first):
    ids = first.tokenizer.encode(PROMPT)
    n = len(ids)
    reading = Reading.of(first.model, first.tokenizer, ids)
    map_ = tab.locator("#attention .matrix")
    box = map_.bounding_box()
    told = tab.locator("#attention .told-cell")
    map_.hover(position={"x": box["width"] * 2.5 / n, "y": box["height"] * 5.5 / n})
    share = 100 * float(reading.trace.layers[0].probs[0, 0, 5, 2])
    assert told.inner_text().startswith("5: ") and " looks at 2: " in told.inner_text()
    assert float(told.inner_text().split("share ")[1].split()[0]) == pytest.approx(share, abs=0.06)
    map_.focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    assert told.inner_text().startswith("6: ") and " looks at 1: " in told.inner_text()
    tab.keyboard.press("Enter")
    assert tab.locator("#look-token").input_value() == "6"
    for _ in range(7):
        tab.keyboard.press("ArrowRight")
    assert "may not look at" in told.inner_text()


def test_the_sides_of_the_map_name_tokens_at_their_rows_and_columns(tab, first):
    n = len(first.tokenizer.encode(PROMPT))
    step, shown = -(-n // 12), tab.locator("#tokens .chip bdi").all_inner_texts()
    box = tab.locator("#attention .matrix").bounding_box()
    for side, start, size in (("down", "y", "height"), ("across", "x", "width")):
        labels = tab.locator(f"#attention .{side} bdi").all()
        assert [label.inner_text() for label in labels] == shown[::step]
        for i, label in enumerate(labels):
            found = label.bounding_box()
            middle = found[start] + found[size] / 2 - box[start]
            assert middle == pytest.approx((i * step + 0.5) / n * box[size], abs=1.5)
    assert "this token ↓" in tab.inner_text("#attention .framed")


@pytest.mark.parametrize("n_models", [1, 2])
def test_on_a_phone_wide_tables_scroll_in_their_box_and_the_page_never_does(
    chromium, tmp_path, first, n_models
):
    models = [first, subject("a-name-that-is-long/and-has-no-place-to-break", seed=1)][:n_models]
    (tmp_path / "page.html").write_text(page(models, PROMPT), "utf-8")
    with Opened(chromium, tmp_path / "page.html", width=390) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach((found) => (found.open = true))")
        tab.wait_for_timeout(50)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        tab.evaluate("window.scrollTo(1000, 1000)")
        assert tab.evaluate("[scrollX, scrollY]") == [0, 1000]
        wide = "[...document.querySelectorAll('.scroll')].filter((x) => x.scrollWidth > 390).length"
        assert tab.evaluate(wide) > 4


def test_everything_is_reached_by_keyboard(tab):
    tab.locator("#tokens .chip[tabindex='0']").focus()
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#look-token").input_value() == "1"
    assert tab.evaluate("document.activeElement.className") == "chip"
    tab.locator("#heads .head[tabindex='0']").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    looks = [tab.locator(f"#look-{name}").input_value() for name in ("layer", "head")]
    assert looks == ["1", "1"]
    tab.locator("#slider-topK").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#next output >> nth=1") == "1"
    tab.locator("#attention a").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#code details[open]").count() == 1


@pytest.mark.parametrize(
    ("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)]
)
def test_every_width_and_scheme_is_without_serious_findings(chromium, tmp_path, first, width, dark):
    out = tmp_path / "page.html"
    out.write_text(page([first], "a <b> lamp"), "utf-8")  # axe-core takes long for large tables
    with Opened(chromium, out, width=width, dark=dark) as tab:
        for details in tab.locator("details").all():
            details.evaluate("found => (found.open = true)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert findings(tab) == []


def test_two_models_stand_side_by_side_and_differ_as_typed(chromium, tmp_path, first):
    from minigpt2.explain import differences

    second = subject("second", seed=1)
    (tmp_path / "page.html").write_text(page([first, second], "a lamp went"), "utf-8")
    text = "A lamp <i>went"
    with Opened(chromium, tmp_path / "page.html") as tab:
        assert tab.locator("#next .model h3").all_inner_texts() == ["first", "second"]
        read(tab, text)
        found = tab.evaluate(
            "[[...scene.differences.divergence.data], [...scene.differences.streams.data]]"
        )
        assert findings(tab) == []
    idx = torch.tensor([first.tokenizer.encode(text)])
    expected = differences(*(rounded_model(s.model) for s in (first, second)), idx)
    torch.testing.assert_close(torch.tensor(found[0]), expected.divergence, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        torch.tensor(found[1]), expected.streams.flatten(), atol=2e-3, rtol=2e-3
    )


def test_a_page_without_weights_says_why_its_text_is_fixed(chromium, tmp_path, first):
    made = subject(activation_function="mish")
    (tmp_path / "page.html").write_text(page([made], PROMPT), "utf-8")
    with Opened(chromium, tmp_path / "page.html") as tab:
        assert tab.locator("textarea").count() == 0
        assert "fixed: the page has no mish" in tab.inner_text("#prompt")
        assert r"שלום \u{202e}\u{0007} café" in tab.inner_text("#prompt pre")
        assert findings(tab) == []


def test_what_is_printed_is_painted_and_a_text_that_is_far_too_long_is_refused_whole(tab):
    # a canvas that nothing was painted on has the size that browsers give it
    blank = """() => [...document.querySelectorAll("canvas")]
        .filter(({ width, height }) => width === 300 && height === 150).length"""
    assert tab.evaluate(blank) > 0, "the check is weak"
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(blank) == 0
    tab.fill("#text", "a" * 50_001)
    wait_until(
        lambda: "50,001 characters: the page reads 100 tokens" in tab.inner_text("#told"), tab
    )
    read(tab, "a")
    assert "1 token, read in this page" in tab.inner_text("#told")
    assert tab.evaluate("document.body.className") == ""
