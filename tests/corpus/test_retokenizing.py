"""Token files in another vocabulary's ids. Oracle: each document's text, tokenized at once."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpora import Bytes, Forbidden, gpt2, rows_of, texts, write
from minigpt2.corpus import retokenizing
from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.prepared import prepare, retokenize
from minigpt2.errors import InputError


def text_of(ids, tokenizer):
    return b"".join(map(tokenizer.token_bytes, ids))


def documents_of(corpus):
    """(ids, part) of the documents to train on, and of those held out."""
    return rows_of(corpus.train), rows_of(corpus.val) if corpus.val else []


@settings(max_examples=30, deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=6).filter(any),
    st.floats(0, 0.9),
    st.integers(1, 9),
    st.booleans(),
)
@example(["🤗👩‍👩‍👧🤗" * 9], 0.5, 3, False)  # cut inside a character
@example(["a<|endoftext|>b 日本" * 9], 0.4, 1, True)
def test_every_document_keeps_its_side_its_place_and_its_text(contents, fraction, block, special):
    before, tokenizer = gpt2(300), gpt2(1000)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(retokenizing, "BLOCK", block)
        paths = write(Path(folder), **{f"{n}": text for n, text in enumerate(contents)})
        options = {"cache_dir": Path(folder) / "cache"}
        text = TextConfig(special_tokens=special)
        try:
            corpus = prepare(paths, before, val_fraction=fraction, text=text, **options)
            again = retokenize(corpus, before, tokenizer, **options)
        except InputError as problem:
            assert "0 tokens" in str(problem) or "too short to be tokenized again" in str(problem)
            return
        assert (again.n_documents, again.n_characters) == (corpus.n_documents, corpus.n_characters)
        assert again.n_tokens == sum(len(f.tokens) for f in (again.train, again.val) if f)
        moved = b""
        for old, new in zip(documents_of(corpus), documents_of(again)):
            assert [part for _, part in old] == [part for _, part in new]
            for (old_ids, part), (new_ids, _) in zip(old, new):
                written, whole = text_of(new_ids, tokenizer), text_of(old_ids, before)
                whole = moved + whole if part == 2 else whole
                if part == 1:
                    moved = whole.removeprefix(written)
                    assert len(moved) < 4 and whole == written + moved
                    assert new_ids == tokenizer.encode(written.decode(), special=special)
                else:
                    end = len(before.token_bytes(before.eot))
                    assert whole[:-end].decode() == written[:-end].decode()
                    expected = tokenizer.encode(whole[:-end].decode(), special=special)
                    assert new_ids == [*expected, tokenizer.eot]
        for old, new in ((corpus.train, again.train), (corpus.val, again.val)):
            if old and new:
                columns = [file.documents[["row", "source", "part"]] for file in (old, new)]
                assert columns[0].tolist() == columns[1].tolist() and old.sources == new.sources


def prompts_of(file):
    """The ids of the prompts of a token file, and those of the rest."""
    spans = [(int(span["start"]), int(span["end"])) for span in file.prompts]
    within = {at for start, end in spans for at in range(start, end)}
    ids = file.tokens.tolist()
    return [ids[at] for at in sorted(within)], [id for at, id in enumerate(ids) if at not in within]


def test_prompts_stay_prompts(tmp_path):
    rows = [{"prompt": f"Lamp {n} 日本?", "completion": f" Lit {n}." * n} for n in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([path], gpt2(300), cache_dir=tmp_path / "cache")
    again = retokenize(corpus, gpt2(300), gpt2(2000), cache_dir=tmp_path / "cache")
    assert corpus.val is not None and again.val is not None
    for file in (again.train, again.val):
        prompts, others = prompts_of(file)
        chosen = [rows[record["row"] - 1] for record in file.documents]
        encode = gpt2(2000).encode
        assert prompts == [id for row in chosen for id in encode(row["prompt"])]
        ends = [[*encode(row["completion"]), gpt2(2000).eot] for row in chosen]
        assert others == [id for ids in ends for id in ids]


def test_chats_are_what_they_would_have_been(tmp_path):
    """End-of-text that the template wrote is a token, and what a message says is text."""
    said = "a <|endoftext|> b <x> \ufdd03c\ufdd1 日本"
    chats = [
        [
            {"role": "user", "content": f"{said} {n}"},
            {"role": "assistant", "content": f"yes {n} {said}"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": said * n},
        ]
        for n in range(12)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    corpus = prepare([path], gpt2(300), **options)
    again = retokenize(corpus, gpt2(300), gpt2(2000), cache_dir=tmp_path / "cache")
    direct = prepare([path], gpt2(2000), **options)
    assert again.identity == direct.identity
    assert again.train.prompts.tolist() == direct.train.prompts.tolist()
    assert again.counts == corpus.counts and again.counts["chats"] == 12


def test_what_was_done_before_is_found_whatever_the_number_of_workers(tmp_path):
    corpus = prepare(write(tmp_path, a="lamp " * 99), gpt2(300), cache_dir=tmp_path / "cache")
    options = {"cache_dir": tmp_path / "cache"}
    first = retokenize(corpus, gpt2(300), Bytes(), **options)
    again = retokenize(corpus, gpt2(300), Forbidden(), workers=3, **options)
    assert first.identity == again.identity != corpus.identity


def test_held_out_text_of_ones_own_stays_held_out(tmp_path):
    a, b, c = write(tmp_path, a="one " * 50, b="two " * 50, c="three")
    options = {"cache_dir": tmp_path / "cache"}
    corpus = prepare([a, b], gpt2(300), val_paths=[c], **options)
    again = retokenize(corpus, gpt2(300), Bytes(), **options)
    assert again.val is not None
    assert [label.label for label in again.val.documents_at([0])] == [str(c)]
    assert [row for row, _ in rows_of(again.val)] == [[*b"three", 256]]
    assert [row for row, _ in rows_of(again.train)] == [
        [*b"one " * 50, 256],
        [*b"two " * 50, 256],
    ]
