"""Oracles: transformers' GPT2Tokenizer and the published files of GPT-2's release."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from transformers import GPT2Tokenizer

import vocabularies
from minigpt2.errors import InputError, NotFoundError
from minigpt2.formats.vocabulary import gpt2_tokens, has_vocabulary, merges_of
from minigpt2.system.files import ASSETS
from minigpt2.tokenizer import Tokenizer
from tokenizer_folders import END, small, whole, word, write
from vocabularies import SIZES, change_json, copy, gpt2, hf_encode, hf_reads, quick, sha256, texts

saved, trained = vocabularies.saved, vocabularies.trained
# The SHA-256 of the release's files, as tiktoken publishes them (tiktoken_ext/openai_public.py).
VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
R50K_BASE = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


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
    tokens = gpt2_tokens()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, parts in enumerate(merges_of(tokens), start=256):
        assert len(parts) == 2 and b"".join(parts) == tokens[rank]
        assert max(ranks[part] for part in parts) < rank


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
    assert (len(hf), hf.bos_token_id, hf.eos_token_id, hf.unk_token_id) == (600, 0, 2, 2)
    assert hf.pad_token_id == 1
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


def test_added_words_keep_their_ids_and_only_plain_ones_are_found_in_plain_text(saved, tmp_path):
    hf = saved(300)[1].from_pretrained(saved(300)[0])
    hf.add_special_tokens({"pad_token": "<|pad|>"})
    hf.add_tokens(["ok"])
    hf.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.vocab_size, ours.eot, ours.roles()["pad_token_id"]) == (302, 299, 300)
    assert ours.decode([300, 301]) == "<|pad|>ok"
    assert ours.encode("<|pad|>ok") == [*gpt2(300).encode("<|pad|>"), 301]
    assert ours.encode("<|pad|>ok", special=True) == [300, 301]
    ours.save(tmp_path / "again")
    assert Tokenizer.from_folder(tmp_path / "again").identity == ours.identity
    again = hf_reads(tmp_path / "again")
    assert again.convert_tokens_to_ids(["<|pad|>", "ok", "<|endoftext|>"]) == [300, 301, 299]
    assert hf_encode(again, "<|pad|>ok") == ours.encode("<|pad|>ok")


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
    "ids as text": (
        lambda f: change_json(f / "vocab.json", a="65"),
        "the id of 'a' is '65', allow",
    ),
    "negative ids": (lambda f: change_json(f / "vocab.json", a=-1), "the id of 'a' is -1, allowed"),
    "no word": (
        lambda f: change_json(f / "tokenizer_config.json", eos_token=[1]),
        r"tokenizer_config\.json: eos_token is \[1\], expected the text of a token",
    ),
    "two ids": (
        lambda f: (f / "added_tokens.json").write_text('{"<|endoftext|>": 300}'),
        "one token has two",
    ),
    "other class": (
        lambda f: change_json(f / "tokenizer_config.json", tokenizer_class="CLIPTokenizer"),
        "tokenizer_class is 'CLIPTokenizer', supported is GPT2Tokenizer only",
    ),
    "not a table": (
        lambda f: change_json(f / "tokenizer_config.json", added_tokens_decoder=[1]),
        r"tokenizer_config\.json: added_tokens_decoder is \[1\], allowed is an object",
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
    with pytest.raises(InputError, match=r"supported is byte-level|allowed is a") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2-large", "distilbert/distilgpt2"],
)
def test_the_public_models_need_no_network(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "minigpt2.formats.vocabulary.model_folder", lambda *a: pytest.fail("asked the Hub")
    )
    assert Tokenizer.from_pretrained(name).identity == gpt2().identity


def test_other_sources_go_through_the_hub_with_their_revision(monkeypatch, saved):
    asked = []
    folder, _ = saved(300)

    def model_folder(source, revision=None, *, with_weights=True):
        asked.append((source, revision, with_weights))
        return folder

    monkeypatch.setattr("minigpt2.formats.vocabulary.model_folder", model_folder)
    for name in ("someone/gpt2", "gpt2-medium-german"):
        assert Tokenizer.from_pretrained(name, "v1").identity == gpt2(300).identity
    assert asked == [("someone/gpt2", "v1", False), ("gpt2-medium-german", "v1", False)]


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


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_folder_has_a_vocabulary_if_it_has_ids_or_merges(tmp_path, name):
    for other in ("config.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / other).write_text("{}")
    assert not has_vocabulary(tmp_path)
    (tmp_path / name).write_text("")
    assert has_vocabulary(tmp_path)


# What others say beside the vocabulary


def test_the_end_of_text_of_special_tokens_map_json_goes_before(tmp_path, tmp_path_factory):
    vocab, merges = small(tmp_path_factory)
    object_of = {"__type": "AddedToken", **word(END, normalized=True)}
    config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), object_of)
    roles = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    write(
        tmp_path,
        vocab={**vocab, END: 299},
        merges=merges,
        added_tokens={"<|start|>": 300, "<|end|>": 301, "<|pad|>": 302},
        special_tokens_map={**roles, "unk_token": END},
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", **config},
    )
    ours, hf = Tokenizer.from_folder(tmp_path), hf_reads(tmp_path)
    expected = {"bos_token_id": 300, "eos_token_id": 301, "pad_token_id": 302}
    assert ours.roles() == expected and ours.eot == hf.eos_token_id == 301
    ours.save(tmp_path / "again")
    again = hf_reads(tmp_path / "again")
    assert {name: getattr(again, name) for name in expected} == expected
    assert again.unk_token == END


def test_a_vocabulary_without_all_bytes_is_refused_with_its_reason(tmp_path, tmp_path_factory):
    vocab, merges = small(tmp_path_factory)
    rest = {name: id for name, id in vocab.items() if name not in ("Ā", "ā")}
    write(tmp_path, vocab={**rest, END: 299}, merges=merges)
    with pytest.raises(InputError, match="lacks 2 of the 256 bytes, such as 'Ā': texts that have"):
        Tokenizer.from_folder(tmp_path)


def test_a_map_is_not_asked_where_the_config_has_all_added_words(saved, tmp_path):
    copy(saved(300)[0], tmp_path)
    write(tmp_path, special_tokens_map={"eos_token": "<|other|>"})
    assert Tokenizer.from_folder(tmp_path).eot == hf_reads(tmp_path).eos_token_id == 299


def test_all_settings_and_words_are_written_as_they_were_read(tmp_path, tmp_path_factory):
    vocab, merges = small(tmp_path_factory)
    words = {299: word(END), 300: word("<|start|>"), 301: word("<|pad|>", lstrip=True)}
    words |= {302: word("paradox", special=False, single_word=True), 303: word("<|user|>")}
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<|start|>",
        "eos_token": END,
        "pad_token": "<|pad|>",
        "extra_special_tokens": ["<|user|>"],
        "model_max_length": 64,
        "padding_side": "left",
        "own": {"kept": [1, None]},
    }
    bos = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [300], "tokens": ["<|start|>"]}},
    }
    write(
        tmp_path,
        tokenizer=whole(({**vocab, END: 299}, merges), words, post_processor=processor),
        tokenizer_config=config,
        chat_template="{{ messages }}",
    )
    write(tmp_path / "additional_chat_templates", tools="{{ tools }}")
    (tmp_path / "additional_chat_templates" / "config.json").unlink()
    for folder in (tmp_path / "once", tmp_path / "once"):  # in place, too
        Tokenizer.from_folder(folder if folder.exists() else tmp_path).save(folder)
        before, after = hf_reads(tmp_path), hf_reads(folder)
        text = "a paradox, paradoxes <|user|>hi  <|pad|>"
        assert after(text)["input_ids"] == before(text)["input_ids"] != before.encode("")
        for skip in (False, True):
            ids = before(text)["input_ids"]
            assert after.decode(ids, skip) == before.decode(ids, skip)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length"):
            assert getattr(after, name) == getattr(before, name), name
        assert after.chat_template == before.chat_template
        assert {*after.chat_template} == {"default", "tools"} and after.padding_side == "left"
        found = json.loads((folder / "tokenizer_config.json").read_text())
        assert config.items() <= found.items()
        assert Tokenizer.from_folder(folder).identity == Tokenizer.from_folder(tmp_path).identity


def test_templates_of_an_earlier_tokenizer_in_the_folder_go(tmp_path):
    write(tmp_path, chat_template="old")
    gpt2(300).save(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()


def test_a_role_whose_word_has_no_id_gets_the_next(saved, tmp_path):
    copy(saved(300)[0], tmp_path)
    change_json(tmp_path / "tokenizer_config.json", pad_token="[PAD]", eos_token="<end>")
    ours, hf = Tokenizer.from_folder(tmp_path), hf_reads(tmp_path)
    assert {ours.roles()["pad_token_id"], ours.eot} == {300, 301}
    assert {hf.pad_token_id, hf.eos_token_id} == {300, 301}


def test_without_a_name_the_end_of_text_is_that_of_config_json(tmp_path, tmp_path_factory):
    vocab, merges = small(tmp_path_factory)
    write(tmp_path, vocab={**vocab, "<s>": 299, "</s>": 300}, merges=merges)
    with pytest.raises(InputError, match=r"lacks 1 tokens \['<\|endoftext\|>'\]"):
        Tokenizer.from_folder(tmp_path)
    change_json(tmp_path / "config.json", eos_token_id=300)
    assert Tokenizer.from_folder(tmp_path).eot == 300


@pytest.mark.parametrize("in_json", [False, True])
def test_a_space_in_front_is_honoured(tmp_path, tmp_path_factory, in_json):
    vocab, merges = small(tmp_path_factory)
    merged = {**vocab, END: 299}, merges
    words = {299: word(END), vocab["x"]: word("x", special=False)}
    if in_json:
        pieces = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        whole_file = whole(merged, words, pre_tokenizer=pieces)
        write(tmp_path, tokenizer=whole_file, tokenizer_config=config)
    else:
        config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
        config["added_tokens_decoder"] = words
        write(tmp_path, vocab=merged[0], merges=merges, tokenizer_config=config)
    ours, hf = Tokenizer.from_folder(tmp_path), hf_reads(tmp_path)
    ours.save(tmp_path / "again")
    again = hf_reads(tmp_path / "again")
    for text in ("the end", " the", "\nthe", "", f"the{END}the", "the x the", "axa"):
        ids = ours.encode(text, special=True)
        assert ids == hf.encode(text) == again.encode(text)
        assert ours.decode(ids) == hf.decode(ids)
    assert ours.identity != gpt2(300).identity
