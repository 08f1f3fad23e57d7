"""Token files: the documents in them, and that damage is found. Oracle: what was written."""

import hashlib
import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corpora import Bytes, Forbidden, ids_of, made_in, stream_of, write
from minigpt2.corpus import token_file
from minigpt2.corpus.prepared import prepare
from minigpt2.corpus.token_file import TokenFile
from minigpt2.errors import InputError
from text_files import quick


@quick
@given(
    st.lists(st.sampled_from(["", "a", "bc", "the sea ", "x" * 40]), min_size=1).filter(any),
    st.floats(0, 0.9),
    st.booleans(),
)
@example(["x" * 40], 0.5, False)
@example(["x" * 40, "", "the sea "], 0.1, False)
def test_every_token_leads_to_its_document(contents, val_fraction, own_val):
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), **{f"{n:03}": text for n, text in enumerate(contents)})
        own = write(Path(folder), val1="", val2="held out", val3="too") if own_val else []
        options = {"val_fraction": val_fraction, "cache_dir": Path(folder) / "cache"}
        corpus = prepare(paths, Bytes(), val_paths=own, **options)
        texts = {str(path): path.read_text() for path in [*paths, *own]}
        for file in filter(None, (corpus.train, corpus.val)):
            start = 0
            for number, record in enumerate(file.documents):
                end = int(record["end"])
                for position in range(start, end):
                    (document,) = file.documents_at([position])
                    assert (document.number, document.start, document.end) == (number, start, end)
                name, _, part = document.label.partition(" (")
                ids = stream_of([texts[name]], Bytes())
                found = file.tokens[start:end].tolist()
                if part == "first part)":
                    assert ids[: len(found)] == found and len(found) < len(ids)
                elif part == "last part)":
                    assert ids[-len(found) :] == found and len(found) < len(ids)
                else:
                    assert (ids, part) == (found, "")
                start = end
            assert start == len(file.tokens)
            numbers = [document.number for document in file.documents_at(range(start)[::-1])]
            assert numbers == [*range(len(file.documents))]


def test_documents_have_the_names_that_the_user_gave_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a="one", b="two")
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", q="one", r="two")
    options = {"val_fraction": 0, "cache_dir": tmp_path / "cache"}
    old = prepare(["a.txt", "b.txt"], Bytes(), **options).train
    new = prepare(["new"], Forbidden(), **options).train
    assert new.path == old.path
    assert [document.label for document in old.documents_at([3, 4])] == ["a.txt", "b.txt"]
    assert [document.label for document in new.documents_at([3, 4])] == [
        str(Path("new", "q.txt")),
        str(Path("new", "r.txt")),
    ]
    alone = TokenFile.open(old.path)
    assert [document.label for document in alone.documents_at([3, 4])] == [
        "document 0",
        "document 1",
    ]


def test_a_row_of_a_file_is_named_with_it(tmp_path):
    paths = write(tmp_path, a="one", b="two")
    file = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache").train
    rows = np.array([(3, 1, 1, 0), (8, 17, 1, 1)], token_file.DOCUMENT)
    first, second = replace(file, documents=rows).documents_at([0, 7])
    assert (first.label, second.label) == (
        f"{paths[1]}:row 1",
        f"{paths[1]}:row 17 (first part)",
    )


def test_the_json_beside_a_token_file_says_what_it_is(tmp_path):
    paths = write(tmp_path, a="one two three")
    corpus = prepare(paths, Bytes(), val_fraction=0.5, cache_dir=tmp_path / "cache")
    for file in (corpus.train, corpus.val):
        assert file is not None
        stored = json.loads(file.path.with_suffix(".json").read_text())
        assert stored == {
            "dtype": "uint16",
            "count": len(file.tokens),
            "vocab_size": 257,
            "tokenizer": "bytes",
            "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest(),
            "documents_sha256": hashlib.sha256(
                file.path.with_suffix(".documents").read_bytes()
            ).hexdigest(),
            "prompts_sha256": hashlib.sha256(
                file.path.with_suffix(".prompts").read_bytes()
            ).hexdigest(),
        }
        again = TokenFile.open(file.path)
        assert again.tokens.tolist() == file.tokens.tolist() and again.info == file.info
        assert isinstance(file.tokens, np.memmap) and not file.tokens.flags.writeable
    folder = corpus.train.path.parent
    assert TokenFile.open(folder).tokens.tolist() == corpus.train.tokens.tolist()
    assert TokenFile.open(str(folder)).info == corpus.train.info


def test_a_block_is_a_copy_of_the_tokens_that_are_there(tmp_path):
    paths = write(tmp_path, a="abcdef")
    file = prepare(paths, Bytes(), val_fraction=0, cache_dir=tmp_path / "cache").train
    for start, end in [(0, 7), (2, 4), (5, 99), (7, 9)]:
        block = file.block(start, end)
        assert block.tolist() == file.tokens[start:end].tolist() and type(block) is np.ndarray


def damage_odd(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def damage_empty(path):
    path.write_bytes(b"")


def damage_long(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)


def damage_id(path):
    data = bytearray(path.read_bytes())
    data[4:6] = (301).to_bytes(2, "little")
    path.write_bytes(data)


def damage_gone(path):
    path.unlink()


def damage_no_json(path):
    path.with_suffix(".json").unlink()


def damage_bad_json(path):
    path.with_suffix(".json").write_text("{")


def damage_no_documents(path):
    path.with_suffix(".documents").unlink()


def damage_documents(path):
    path.with_suffix(".documents").write_bytes(bytes(32))


def change_json(**values):
    def change(path):
        stored = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(stored | values))

    return change


def damage_field_missing(path):
    path.with_suffix(".json").write_text('{"dtype": "uint16"}')


def both_empty(path):
    damage_empty(path)
    change_json(count=0, sha256=hashlib.sha256(b"").hexdigest())(path)


DAMAGES = [
    (damage_odd, "99 bytes are not 50 ids of uint16"),
    (damage_short, "98 bytes are not 50 ids of uint16"),
    (damage_long, "102 bytes are not 50 ids"),
    (damage_empty, "0 bytes are not 50 ids"),
    (damage_bit, "its bytes are not those written"),
    (damage_id, "id 301 at index 2 is outside the vocabulary of 257"),
    (damage_gone, r"\.bin does not exist"),
    (damage_no_json, r"\.json is missing or"),
    (damage_bad_json, r"\.json is missing or does not describe a token file"),
    (damage_field_missing, r"\.json is missing or does not describe a token file"),
    (change_json(count="50"), r"\.json is missing or does not describe a token file"),
    (change_json(dtype="uint32"), "is damaged"),
    (change_json(vocab_size=100_000), "is damaged"),
    (change_json(vocab_size=100), "id 1[0-9][0-9] at index 0 is outside the vocabulary of 100"),
    (change_json(more=1), r"\.json is missing or does not describe a token file"),
    (both_empty, "is damaged"),
    (damage_no_documents, r"\.documents is missing or damaged"),
    (damage_documents, r"\.documents is missing or damaged"),
]


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_token_file_is_refused_or_made_again(
    tmp_path, monkeypatch, caplog, part, damage, message
):
    monkeypatch.setattr(token_file, "BLOCK_BYTES", 4)
    paths = write(tmp_path, a="x" * 99)
    whole = ids_of(prepare(paths, Bytes(), val_fraction=0.5, cache_dir=tmp_path / "cache"))
    (folder,) = made_in(tmp_path / "cache")
    path = folder / f"{part}.bin"
    damage(path)
    with pytest.raises(InputError, match=message):
        TokenFile.open(path)
    caplog.clear()
    again = prepare(paths, Bytes(), val_fraction=0.5, cache_dir=tmp_path / "cache")
    assert ids_of(again) == whole
    (notice,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(path.with_suffix("")) in notice.getMessage()
    assert notice.getMessage().endswith("; prepare the text again: doing that now")
    assert made_in(tmp_path / "cache") == [folder]
    prepare(paths, Forbidden(), val_fraction=0.5, cache_dir=tmp_path / "cache")


def test_making_files_again_leaves_an_open_corpus_alone(tmp_path):
    paths = write(tmp_path, a="x" * 99)
    corpus = prepare(paths, Bytes(), cache_dir=tmp_path / "cache")
    before = ids_of(corpus)
    corpus.train.path.with_suffix(".json").unlink()
    prepare(paths, Bytes(), cache_dir=tmp_path / "cache")
    assert ids_of(corpus) == before
