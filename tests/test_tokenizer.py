"""Oracles: transformers' GPT2Tokenizer, the published files of GPT-2's release, published ids."""

import hashlib
import json
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from minigpt2 import tokenizer as module
from minigpt2.errors import InputError, NotFoundError
from minigpt2.tokenizer import SPACES, TextStream, Tokenizer, merges_of, split_long_whitespace

SIZES = [257, 300, 1024, 50257]
ASSETS = Path(module.__file__).parent / "assets"
# The SHA-256 of the release's files, as tiktoken publishes them (tiktoken_ext/openai_public.py).
VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
R50K_BASE = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
PUBLISHED = {  # minGPT bpe.py, LLMs-from-scratch, transformers test_modeling_gpt2.py, tiktoken
    "Hello!! I'm Andrej Karpathy. It's 2022. w00t :D 🤗": [
        *(15496, 3228, 314, 1101, 10948, 73, 509, 5117, 10036, 13, 632, 338, 33160, 13, 266, 405),
        *(83, 1058, 35, 12520, 97, 245),
    ],
    "Hello, I am": [15496, 11, 314, 716],
    "The dog": [464, 3290],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    "\0": [188],
    "\n\n": [628],
    "": [],
}
FRAGMENTS = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u3000", "\u2028", "\x1c", "\x85", "\x0b"),
    *(
        "'s",
        "'ll",
        "'RE",
        "IT'TING",
        "’s",
        "don't",
        "Hello",
        "world",
        " the",
        "naïve",
        "日本",
        "ß",
        "²",
        "Ⅷ",
    ),
    *(
        "🤗",
        "👩‍👩‍👧",
        "e\u0301",
        "\ufeff",
        "\ufffd",
        "\0",
        "1234",
        "!!",
        "_x",
        "def f(x):\n    return x**2",
    ),
    *("<|endoftext|>", "</s>", "Ġ", "\\u0120"),
]
texts = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
)
quick = settings(max_examples=60, deadline=None)


@cache
def gpt2(vocab_size: int = 50257) -> Tokenizer:
    return Tokenizer.gpt2(vocab_size)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hf_reads(folder: Path):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return AutoTokenizer.from_pretrained(folder)


def hf_encode(hf, text: str) -> list[int]:
    return hf.encode(text, split_special_tokens=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """vocab_size -> the folder that `save` wrote, and transformers' tokenizer of it."""

    @cache
    def of(vocab_size: int):
        folder = tmp_path_factory.mktemp(f"gpt2-{vocab_size}")
        gpt2(vocab_size).save(folder, model_max_length=64)
        return folder, hf_reads(folder)

    return of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A GPT-2-style folder with merges and ids of its own, and special tokens in front."""
    folder = tmp_path_factory.mktemp("trained")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [Path(module.__file__).read_text(encoding="utf-8"), "日本 naïve 🤗 " * 9],
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>"],
        show_progress=False,
    )
    bpe.save_model(str(folder))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def copy(folder: Path, destination: Path, *names: str) -> Path:
    for name in names or [path.name for path in folder.iterdir()]:
        (destination / name).write_bytes((folder / name).read_bytes())
    return destination


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The vendored table


def test_the_table_is_the_one_that_tiktoken_publishes():
    assert sha256(ASSETS / "gpt2.tiktoken") == R50K_BASE


def test_the_table_makes_the_files_of_the_release_byte_for_byte(saved):
    folder, _ = saved(50257)
    assert sha256(folder / "merges.txt") == VOCAB_BPE
    assert sha256(folder / "vocab.json") == ENCODER_JSON


def test_the_licence_lies_beside_the_table():
    licence = (ASSETS / "LICENSE-gpt2.tiktoken").read_text(encoding="utf-8")
    assert licence.startswith("MIT License") and "Copyright (c) 2022 OpenAI" in licence


def test_every_token_is_made_of_two_earlier_ones():
    tokens = module._gpt2_tokens()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, parts in enumerate(merges_of(tokens), start=256):
        assert len(parts) == 2 and b"".join(parts) == tokens[rank]
        assert max(ranks[part] for part in parts) < rank


# Encoding and decoding


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(text):
    assert gpt2().encode(text) == PUBLISHED[text]
    assert gpt2().decode(PUBLISHED[text]) == text


@pytest.mark.parametrize("vocab_size", SIZES)
def test_ids_equal_those_of_transformers(saved, vocab_size):
    _, hf = saved(vocab_size)

    @quick
    @example(" ".join(FRAGMENTS))
    @given(texts)
    def law(text):
        assert gpt2(vocab_size).encode(text) == hf_encode(hf, text)

    law()


@quick
@given(texts, st.sampled_from(SIZES))
def test_decoding_gives_the_text_back(text, vocab_size):
    assert gpt2(vocab_size).decode(gpt2(vocab_size).encode(text)) == text


@quick
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_any_ids_decode_as_in_transformers(saved, ids):
    _, hf = saved(50257)
    assert gpt2().decode(ids) == hf.decode(ids)


@settings(max_examples=25, deadline=None)
@given(texts, st.integers(257, 50257))
def test_a_small_vocabulary_has_the_first_tokens_of_the_large_one(text, vocab_size):
    small = gpt2.__wrapped__(vocab_size)
    assert (small.vocab_size, small.eot) == (vocab_size, vocab_size - 1)
    ids = small.encode(text)
    assert all(id < small.eot for id in ids)
    assert [small.token_bytes(id) for id in ids] == [gpt2().token_bytes(id) for id in ids]
    # Only merges that the small vocabulary lacks can make the large one's ids differ.
    if max(gpt2().encode(text), default=0) < small.eot:
        assert ids == gpt2().encode(text)


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 50258])
def test_vocabulary_sizes_out_of_range_are_refused(vocab_size):
    with pytest.raises(InputError, match=f"vocab_size is {vocab_size}, allowed is 257 to 50257"):
        Tokenizer.gpt2(vocab_size)


@pytest.mark.parametrize("id", [-1, 50257, 10**12])
def test_an_unknown_id_is_named(id):
    for use in (gpt2().token_bytes, lambda id: gpt2().decode([464, id]), TextStream(gpt2()).push):
        with pytest.raises(InputError, match=f"token id {id} is not in the vocabulary of 50,257"):
            use(id)


@pytest.mark.parametrize("text", ["abc\ud83e", "abc\udd17\ud83e", "abc\udc80d"])
def test_a_lone_surrogate_is_refused_with_its_position(text):
    with pytest.raises(InputError, match=r"lone surrogate '\\ud.{3}' at character 3:"):
        gpt2().encode(text)


def test_bytes_that_are_not_utf8_decode_to_replacement_characters():
    assert gpt2().decode([8582, 97]) == "\ufffd"
    assert gpt2().decode([8582, 97, 245]) == "🤗"


# Long runs of whitespace


def test_spaces_are_exactly_what_tiktoken_calls_whitespace():
    every = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    finder = tiktoken.Encoding("s", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    found = finder.decode(finder.encode(every, disallowed_special=()))  # the rest falls out
    assert found == "".join(re.findall(f"[{SPACES}]", every)) and len(found) == 25


@quick
@example("a \n\n b", 2)
@example("a\n\n", 2)
@given(texts, st.integers(2, 6))
def test_cutting_at_whitespace_changes_no_id(text, longest):
    parts = list(split_long_whitespace(text, longest))
    assert "".join(parts) == text
    assert [id for part in parts for id in gpt2().encode(part)] == gpt2().encode(text)


@pytest.mark.parametrize("end", ["", "x", "\n"])
@pytest.mark.parametrize("unit", [" ", "\n", "\t", "\xa0", "\r\n", " \n\u3000"])
def test_a_long_run_has_the_ids_of_a_short_one_repeated(saved, unit, end):
    _, hf = saved(257)
    text = f"a{unit * 150_000}{end} b"
    assert gpt2(257).encode(text) == hf_encode(hf, text)


@pytest.mark.parametrize("unit", [" ", "\n", "\t", "\xa0", "\r\n"])
def test_a_million_whitespace_characters_are_no_problem(unit):
    text = unit * 1_000_001
    ids = gpt2().encode(text + "x")
    assert ids == gpt2().encode(text[:-1]) + gpt2().encode(text[-1] + "x")
    assert gpt2().decode(ids) == text + "x"


def test_a_million_spaces_have_the_ids_of_transformers(saved):
    _, hf = saved(50257)
    text = "a" + " " * 1_000_001 + "b" + "\n" * 1_000_001 + "c"
    assert gpt2().encode(text) == hf_encode(hf, text)


def test_a_megabyte_without_any_space():
    for text in ("a" * 1_000_000, "!?" * 500_000, "日" * 330_000):
        assert gpt2().decode(gpt2().encode(text)) == text


# Saving and loading


@pytest.mark.parametrize("vocab_size", SIZES)
def test_a_saved_tokenizer_reads_back_the_same(saved, vocab_size):
    folder, hf = saved(vocab_size)
    ours, back = gpt2(vocab_size), Tokenizer.from_folder(folder)
    assert (back.identity, back.eot, back.vocab_size) == (ours.identity, ours.eot, ours.vocab_size)
    assert (len(hf), hf.model_max_length) == (vocab_size, 64)
    assert {hf.bos_token_id, hf.eos_token_id, hf.unk_token_id} == {ours.eot}
    assert hf.decode(ours.encode("a . b , c 's"), skip_special_tokens=True) == "a . b , c 's"


def test_saving_again_changes_nothing(saved, trained, tmp_path):
    for folder in (saved(300)[0], trained):
        once, twice = tmp_path / f"{folder.name}-1", tmp_path / f"{folder.name}-2"
        Tokenizer.from_folder(folder).save(once)
        Tokenizer.from_folder(once).save(twice)
        assert {p.name: p.read_bytes() for p in once.iterdir()} == {
            p.name: p.read_bytes() for p in twice.iterdir()
        }
        assert sha256(once / "merges.txt") == sha256(folder / "merges.txt")
        assert json.loads((once / "vocab.json").read_text()) == json.loads(
            (folder / "vocab.json").read_text()
        )


def test_saving_removes_files_that_transformers_would_prefer(trained, tmp_path):
    GPT2Tokenizer.from_pretrained(trained).save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 900}')
    gpt2(300).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).identity == gpt2(300).identity
    assert hf_encode(hf_reads(tmp_path), "the end") == gpt2(300).encode("the end")


def test_a_folder_trained_elsewhere_has_its_own_ids_and_end_of_text(trained, tmp_path):
    hf, ours = hf_reads(copy(trained, tmp_path)), Tokenizer.from_folder(tmp_path)
    assert (ours.eot, ours.vocab_size) == (2, len(hf)) == (hf.eos_token_id, 600)
    assert ours.decode([0, 2]) == "<s></s>"

    @quick
    @given(texts)
    def law(text):
        assert ours.encode(text) == hf_encode(hf, text)
        assert ours.decode(ours.encode(text)) == text

    law()


def test_a_folder_trained_elsewhere_is_saved_with_its_end_of_text(trained, tmp_path):
    Tokenizer.from_folder(trained).save(tmp_path)
    hf = hf_reads(tmp_path)
    assert (len(hf), hf.bos_token_id, hf.eos_token_id, hf.unk_token_id) == (600, 2, 2, 2)
    assert hf.convert_tokens_to_ids(["<s>", "<pad>", "</s>"]) == [0, 1, 2]
    assert Tokenizer.from_folder(tmp_path).identity == Tokenizer.from_folder(trained).identity


def test_a_folder_with_permuted_ids(saved, tmp_path):
    vocab = json.loads((copy(saved(1024)[0], tmp_path) / "vocab.json").read_text())
    new_ids = random.Random(5).sample(range(1024), 1024)
    (tmp_path / "vocab.json").write_text(json.dumps({name: new_ids[vocab[name]] for name in vocab}))
    change_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={})
    hf, ours = hf_reads(tmp_path), Tokenizer.from_folder(tmp_path)
    assert ours.eot == new_ids[1023] and ours.identity != gpt2(1024).identity

    @quick
    @given(texts)
    def law(text):
        assert ours.encode(text) == [new_ids[id] for id in gpt2(1024).encode(text)]
        assert ours.encode(text) == hf_encode(hf, text)
        assert ours.decode(ours.encode(text)) == text

    law()


@pytest.mark.parametrize("old", [False, True], ids=["pairs", "strings"])
def test_tokenizer_json_serves_where_the_two_files_are_missing(trained, tmp_path, old):
    GPT2Tokenizer.from_pretrained(trained).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    if old:  # the form before tokenizers 0.20, as most folders on the Hub still have it
        path = tmp_path / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
        del data["model"]["type"]
        path.write_text(json.dumps(data))
    assert Tokenizer.from_folder(tmp_path).identity == Tokenizer.from_folder(trained).identity


def test_added_tokens_keep_their_ids_and_text_never_makes_them(saved, tmp_path, caplog):
    hf = saved(300)[1].from_pretrained(saved(300)[0])
    hf.add_special_tokens({"pad_token": "<|pad|>"})
    hf.add_tokens(["ok"])
    hf.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert "text never encodes to the added tokens ['ok']" in caplog.text
    assert (ours.vocab_size, ours.eot) == (302, 299)
    assert ours.decode([300, 301]) == "<|pad|>ok"
    assert ours.encode("<|pad|>ok") == gpt2(300).encode("<|pad|>ok")
    ours.save(tmp_path / "again")
    assert Tokenizer.from_folder(tmp_path / "again").identity == ours.identity
    again = hf_reads(tmp_path / "again")
    assert again.convert_tokens_to_ids(["<|pad|>", "ok", "<|endoftext|>"]) == [300, 301, 299]


def test_added_tokens_json_of_older_folders(saved, tmp_path):
    copy(saved(300)[0], tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|pad|>": 310}')
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.vocab_size == 311 and ours.decode([310]) == "<|pad|>"
    with pytest.raises(InputError, match="token id 305 is not"):
        ours.token_bytes(305)


def test_an_end_of_text_written_as_an_object(trained, tmp_path):
    copy(trained, tmp_path)
    change_json(tmp_path / "tokenizer_config.json", eos_token={"content": "<pad>"})
    assert Tokenizer.from_folder(tmp_path).eot == 1


def test_the_two_files_alone_are_enough(saved, tmp_path):
    copy(saved(300)[0], tmp_path, "vocab.json", "merges.txt")
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_folder(tmp_path).identity == gpt2(300).identity


def drop_lines(path: Path, count: int) -> None:
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(True)[:-count]), "utf-8")


def swap_ids(path: Path) -> None:
    vocab = json.loads(path.read_text())
    path.write_text(json.dumps(vocab | {"a": vocab["b"]}))


def with_merge(path: Path, line: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", "utf-8")


DAMAGE = {
    "no merges": (
        lambda f: (f / "merges.txt").unlink(),
        "has no vocab.json with merges.txt, and no",
    ),
    "merges cut short": (lambda f: drop_lines(f / "merges.txt", 3), "3 that no merge makes"),
    "vocabulary cut short": (
        lambda f: (f / "vocab.json").write_text('{"!": 0, "<|endoftext|>": 1}'),
        r"lacks 298 tokens \['\"'\]",
    ),
    "JSON cut short": (lambda f: (f / "vocab.json").write_text('{"!":'), "vocab.json is not valid"),
    "a page": (
        lambda f: (f / "merges.txt").write_text("<html> a b"),
        "merge '<html> a b' does not",
    ),
    "Latin-1": (lambda f: (f / "merges.txt").write_bytes(b"\xe9 a\n"), "merges.txt is not UTF-8"),
    "empty": (lambda f: (f / "merges.txt").write_bytes(b""), "43 that no merge makes"),
    "one part": (lambda f: with_merge(f / "merges.txt", "a"), "the merge 'a' does not"),
    "unknown part": (lambda f: with_merge(f / "merges.txt", "n</w> o"), "the merge 'n</w> o' does"),
    "a merge twice": (lambda f: with_merge(f / "merges.txt", "h e"), "the merge 'h e' does not"),
    "one id twice": (lambda f: swap_ids(f / "vocab.json"), "two tokens have the same id"),
    "ids as text": (lambda f: change_json(f / "vocab.json", a="65"), "has an id that is not 0, 1"),
    "negative ids": (lambda f: change_json(f / "vocab.json", a=-1), "has an id that is not 0, 1"),
    "no such end": (
        lambda f: change_json(f / "tokenizer_config.json", eos_token="<end>"),
        r"lacks 1 tokens \['<end>'\]",
    ),
    "two ids": (
        lambda f: (f / "added_tokens.json").write_text('{"<|endoftext|>": 300}'),
        "one token has two",
    ),
    "other class": (
        lambda f: change_json(f / "tokenizer_config.json", tokenizer_class="CLIPTokenizer"),
        "has a CLIPTokenizer, supported is GPT2Tokenizer only",
    ),
    "prefix space": (
        lambda f: change_json(f / "tokenizer_config.json", add_prefix_space=True),
        "add_prefix_space in tokenizer_config.json is not supported",
    ),
    "not a table": (
        lambda f: change_json(f / "tokenizer_config.json", added_tokens_decoder=[1]),
        "the tokenizer files are not as transformers writes them",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(saved, tmp_path, damage):
    break_it, message = DAMAGE[damage]
    break_it(copy(saved(300)[0], tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"has no vocab\.json"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_merges_that_tiktoken_would_read_another_way_are_refused(saved, tmp_path):
    folder = copy(saved(257)[0], tmp_path)
    (folder / "merges.txt").write_text("#version: 0.2\na b\nb c\na bc\n")
    new = {"ab": 257, "bc": 258, "abc": 259}
    change_json(folder / "vocab.json", **new)
    with pytest.raises(InputError, match="the merge 'a bc' is out of order"):
        Tokenizer.from_folder(folder)
    (folder / "merges.txt").write_text("#version: 0.2\na b\nb c\nab c\n")
    assert Tokenizer.from_folder(folder).encode("abc bc") == [259, 220, 258]


OTHER_KINDS = {
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {}}},
    "no pieces": {"pre_tokenizer": None},
    "own pieces": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
    "no expression": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    },
    "space in front": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "normalizer": {"normalizer": {"type": "NFC"}},
    "suffix": {"model": {"vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}},
    "dropout": {"model": {"vocab": {}, "merges": [], "dropout": 0.1}},
    "no model": {"model": None},
    "list": {"model": {"type": "BPE", "vocab": [], "merges": []}},
    "odd merges": {"model": {"type": "BPE", "vocab": {}, "merges": [3]}},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_tokenizer_json_of_another_kind_is_refused_in_one_line(trained, tmp_path, kind):
    GPT2Tokenizer.from_pretrained(trained).save_pretrained(tmp_path)
    change_json(tmp_path / "tokenizer.json", **OTHER_KINDS[kind])
    with pytest.raises(InputError, match=r"supported is byte-level|not as transformers") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2-large", "distilbert/distilgpt2"],
)
def test_the_public_models_need_no_network(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.hub, "model_folder", lambda *a: pytest.fail("asked the Hub"))
    assert Tokenizer.from_pretrained(name).identity == gpt2().identity


def test_other_sources_go_through_the_hub_with_their_revision(monkeypatch, saved):
    asked = []
    folder, _ = saved(300)

    def model_folder(source, revision=None):
        asked.append((source, revision))
        return folder

    monkeypatch.setattr(module.hub, "model_folder", model_folder)
    for name in ("someone/gpt2", "gpt2-medium-german"):
        assert Tokenizer.from_pretrained(name, "v1").identity == gpt2(300).identity
    assert asked == [("someone/gpt2", "v1"), ("gpt2-medium-german", "v1")]


def test_a_folder_named_like_a_public_model_is_that_folder(monkeypatch, saved, tmp_path):
    (tmp_path / "gpt2").mkdir()
    copy(saved(300)[0], tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert Tokenizer.from_pretrained("gpt2").identity == gpt2(300).identity


def test_identities_differ_where_tokenizers_do(saved, tmp_path):
    folder = copy(saved(300)[0], tmp_path)
    seen = {gpt2(299).identity, gpt2(300).identity}
    (folder / "added_tokens.json").write_text('{"<x>": 300}')
    seen.add(Tokenizer.from_folder(folder).identity)
    change_json(folder / "tokenizer_config.json", eos_token="<x>")
    seen.add(Tokenizer.from_folder(folder).identity)
    ids = json.loads((folder / "vocab.json").read_text())
    change_json(folder / "vocab.json", a=ids["b"], b=ids["a"])
    seen.add(Tokenizer.from_folder(folder).identity)
    assert len(seen) == 5 and all(re.fullmatch(r"[0-9a-f]{64}", identity) for identity in seen)


# TextStream


def stream(ids: list[int], stop=(), vocab_size: int = 50257) -> tuple[list[str], TextStream]:
    """What each push and the last finish return."""
    stream = TextStream(gpt2(vocab_size), stop)
    return [*(stream.push(id) for id in ids), stream.finish()], stream


def cut(text: str, stop) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


@quick
@given(st.one_of(texts.map(gpt2().encode), st.lists(st.integers(0, 50256), max_size=20)))
@example([8582, 97])
def test_a_stream_gives_the_decoded_text(ids):
    pieces, _ = stream(ids)
    assert "".join(pieces) == gpt2().decode(ids)


@quick
@given(st.lists(st.integers(0, 255), max_size=20))
def test_a_stream_of_single_bytes_gives_the_decoded_text(ids):
    assert "".join(stream(ids, vocab_size=257)[0]) == gpt2().decode(ids)


def test_characters_come_out_whole_and_as_soon_as_they_are():
    pieces, _ = stream(gpt2().encode("a🤗b"))
    assert pieces == ["a", "", "", "🤗", "b", ""]
    assert stream(gpt2().encode("a🤗")[:-1])[0] == ["a", "", "", "\ufffd"]


stops = st.lists(st.text("ab\n ", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.text("ab\n ", max_size=12), stops, st.sampled_from([257, 50257]))
@example("abc", ["abc", "b"], 257)
def test_a_stream_ends_before_the_earliest_stop(text, stop, vocab_size):
    pieces, done = stream(gpt2(vocab_size).encode(text), stop, vocab_size)
    assert "".join(pieces) == cut(text, stop)
    assert done.stopped == any(s in text for s in stop)


@quick
@given(st.lists(st.integers(0, 50256), max_size=12), st.data())
def test_a_stop_inside_any_ids(ids, data):
    text = gpt2().decode(ids)
    start = data.draw(st.integers(0, len(text)))
    stop = text[start : start + data.draw(st.integers(1, 5))] or "x"
    assert "".join(stream(ids, [stop])[0]) == cut(text, [stop])


@quick
@given(st.text("ab\n ", max_size=12), st.text("ab\n ", min_size=1, max_size=4))
def test_one_stop_is_seen_at_once_and_little_is_held_back(text, stop):
    unit, seen, out = TextStream(gpt2(257), [stop]), "", ""
    for char in text:
        out += unit.push(*gpt2(257).encode(char))
        seen += "" if unit.stopped and stop in seen else char
        assert unit.stopped == (stop in seen)
        assert unit.stopped or len(seen) - len(out) < len(stop)


@pytest.mark.parametrize("ids", [[40, 198, 198, 40], [40, 628, 40]])
def test_a_stop_split_over_tokens_is_found_and_never_printed(ids):
    pieces, done = stream(ids, ["\n\n"])
    assert "".join(pieces) == "I" and done.stopped
    assert done.push(40) == "" == done.finish()


def test_of_two_stops_with_one_beginning_the_shorter_ends_the_stream():
    unit = TextStream(gpt2(257), ["ab", "abc"])
    assert [(unit.push(*gpt2(257).encode(char)), unit.stopped) for char in "xab"] == [
        *(("x", False), ("", False), ("", True)),
    ]


def test_what_looked_like_a_stop_comes_out_after_all():
    ids = gpt2(257).encode("x\nUsed")
    assert stream(ids, ["\nUser:"], 257)[0] == ["x", "", "", "", "", "\nUsed", ""]
    assert stream(ids[:4], ["\nUser:"], 257)[0] == ["x", "", "", "", "\nUs"]


def test_a_stop_given_as_one_string_is_one_stop():
    assert "".join(stream(gpt2().encode("a b c"), " b")[0]) == "a"


def test_an_empty_stop_is_refused():
    with pytest.raises(InputError, match="a stop text is empty"):
        TextStream(gpt2(), ["x", ""])


# Starting up


def test_neither_torch_nor_the_hub_client_is_loaded():
    code = (
        "import sys; from minigpt2.tokenizer import Tokenizer; Tokenizer.gpt2().encode('x');"
        "print(*sorted({'torch', 'numpy', 'huggingface_hub', 'requests'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
