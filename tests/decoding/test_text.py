"""Texts end where they must, hold nothing that is banned, and come in whole characters."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoded import (
    BYTES,
    EOT,
    GREEDY,
    MODEL,
    SAMPLED,
    random_model,
    reads_of,
    scripted,
    uncached,
    up_to,
)
from minigpt2.decoding.cpu_layout import pack
from minigpt2.decoding.drafters import ModelDrafter, NGramDrafter
from minigpt2.decoding.int8 import quantize
from minigpt2.decoding.text import (
    Completion,
    check_fits,
    complete,
    drawable,
    stream,
    stream_text,
)
from minigpt2.errors import InputError
from minigpt2.evaluation.score import score
from minigpt2.generate import generate
from minigpt2.sampling import SamplingConfig, row_generator
from minigpt2.tokenizer import Tokenizer
from tokenizer_folders import END, preferring, small, word, write


@pytest.mark.parametrize("was_training", [True, False])
def test_the_models_mode_is_restored_when_a_stream_is_abandoned(was_training):
    model = random_model().train(was_training)
    pieces = stream_text(model, BYTES, "abc", max_new_tokens=9)
    next(pieces)
    pieces.close()
    assert model.training == model.h[0].mlp.dropout.training == was_training
    pieces = stream_text(model, BYTES, "abc", max_new_tokens=9)
    next(pieces)
    del pieces
    assert model.training == was_training


def test_between_two_pieces_the_model_has_its_callers_mode_and_streams_do_not_disturb_each_other():
    model = random_model(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.h[1].eval()  # a part that is not trained
    modes = [module.training for module in model.modules()]
    expected = "".join(stream_text(MODEL, BYTES, "abc", max_new_tokens=20, seed=1))
    first, second = (stream_text(model, BYTES, "abc", max_new_tokens=20, seed=n) for n in (1, 2))
    text = next(first)
    next(second)
    assert [module.training for module in model.modules()] == modes
    text += next(first)
    second.close()
    assert [module.training for module in model.modules()] == modes
    assert text + "".join(first) == expected
    assert [module.training for module in model.modules()] == modes


def test_no_gradient_is_prepared_inside_and_the_caller_between_tokens_keeps_gradients(monkeypatch):
    model, outputs = random_model().requires_grad_(True), []
    hidden = model.hidden

    def spy(idx, cache=None):
        outputs.append(hidden(idx, cache))
        return outputs[-1]

    monkeypatch.setattr(model, "hidden", spy)
    pieces = stream_text(model, BYTES, "abc", max_new_tokens=9)
    for n_pieces in (1, 2):
        next(pieces)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert [output.requires_grad for output in outputs] == [False] * n_pieces


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_a_stream_leaves_the_global_random_state_alone(sampling):
    model = random_model(attn_pdrop=0.5).train()
    before = torch.get_rng_state()
    "".join(stream_text(model, BYTES, "abc", max_new_tokens=5, sampling=sampling))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_new_tokens_is_the_empty_text():
    (written,) = complete(MODEL, BYTES, ["abc"], max_new_tokens=0)
    assert (written.text, written.ids, written.finish_reason) == ("", [], "length")
    assert "".join(stream_text(MODEL, BYTES, "abc", max_new_tokens=0)) == ""


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), SAMPLED], ids=str)
def test_ids_that_the_tokenizer_has_not_are_never_drawn(sampling):
    model = scripted(*range(257, 277), vocab_size=311)
    (written,) = complete(model, BYTES, [""], max_new_tokens=20, sampling=sampling)
    assert written.ids and max(written.ids) < 257


def written_by(text, *, tokenizer=BYTES, n=None, then=(EOT,), prompt="", stop=()):
    """What a model that says `text` is heard to say: by `complete`, and by `stream_text`."""
    tokens = [*tokenizer.encode(text), *then][:n]
    model = scripted(*tokens, vocab_size=tokenizer.vocab_size)
    options = {"max_new_tokens": len(tokens), "sampling": GREEDY, "stop": stop}
    (written,) = complete(model, tokenizer, [prompt], **options)
    pieces = list(stream_text(model, tokenizer, prompt, **options))
    assert "".join(pieces) == written.text
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    return written


texts = st.text(st.sampled_from("aab\n é€😀"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(texts, st.lists(st.text(st.sampled_from("ab\né😀"), min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_text_however_tokens_cut_it(text, stop):
    found = [text.find(s) for s in stop if s in text]
    assert written_by(text, stop=stop).text == text[: min(found, default=len(text))]


@settings(deadline=None, max_examples=20)
@given(text=texts, vocab_size=st.sampled_from([257, 300, 2048]))
def test_text_is_written_whole(text, vocab_size):
    tokenizer = Tokenizer.gpt2(vocab_size)
    written = written_by(text, tokenizer=tokenizer, then=(tokenizer.eot,))
    assert (written.text, written.finish_reason) == (text, "eot")
    assert written.ids == [*tokenizer.encode(text), tokenizer.eot]


@pytest.mark.parametrize("tokens", [[40, 198, 198, 40], [40, 628, 40], [40, 198, 628, 40]])
def test_a_stop_text_is_found_across_tokens_of_the_full_vocabulary(tokens):
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.decode([198]) * 2 == tokenizer.decode([628]) == "\n\n"
    model = scripted(*tokens, vocab_size=50257)
    options = {"max_new_tokens": 4, "sampling": GREEDY, "stop": ["\n\n"]}
    (written,) = complete(model, tokenizer, [""], **options)
    assert (written.text, written.finish_reason) == ("I", "stop")
    assert "".join(stream_text(model, tokenizer, "", **options)) == "I"


def test_a_stop_text_within_a_token_ends_the_text_there():
    tokenizer = Tokenizer.gpt2()
    hello = tokenizer.encode(" hello")
    assert len(hello) == 1
    written = written_by(" hello", tokenizer=tokenizer, then=hello, stop=["ll"])
    assert (written.text, written.ids, written.finish_reason) == (" he", hello, "stop")


def test_the_beginning_of_a_stop_text_is_written_when_the_rest_does_not_come():
    written = written_by("a\nb\n", stop=["\n\n"])
    assert (written.text, written.finish_reason) == ("a\nb\n", "eot")


@pytest.mark.parametrize(
    ("text", "n", "stop", "expected", "reason"),
    [
        ("abc", None, [], "abc", "eot"),
        ("abc", 3, [], "abc", "length"),
        ("abc", 2, ["c"], "ab", "length"),
        ("abc", None, ["c"], "ab", "stop"),
        ("abc", 3, ["c"], "ab", "stop"),
        ("abc", None, ["x", "bc", "c"], "a", "stop"),
        ("", None, ["a"], "", "eot"),
    ],
)
def test_the_finish_reason_is_what_ended_the_text(text, n, stop, expected, reason):
    written = written_by(text, n=n, stop=stop)
    assert (written.text, written.finish_reason) == (expected, reason)


@pytest.mark.parametrize("n", [None, 3])
def test_a_stop_text_that_only_the_end_made_certain_is_the_finish_reason(n):
    # "abcd" might have begun before "bc", and did not come
    written = written_by("abc", n=n, stop=["abcd", "bc"])
    assert (written.text, written.finish_reason) == ("a", "stop")


def test_the_spelling_of_end_of_text_does_not_end_a_text():
    written = written_by("a<|endoftext|>b")
    assert (written.text, written.finish_reason) == ("a<|endoftext|>b", "eot")


def test_rows_end_for_their_own_reasons():
    model = scripted(*BYTES.encode("ab\ncd"), EOT, *BYTES.encode("xyz"))
    prompts = ["", "12", "1234", "1234567"]  # position 0, 1, 3, 6
    done = complete(model, BYTES, prompts, max_new_tokens=3, sampling=GREEDY, stop=["\n"])
    assert [(written.text, written.finish_reason) for written in done] == [
        ("ab", "stop"),
        ("b", "stop"),
        ("cd", "eot"),
        ("xyz", "length"),
    ]


@pytest.mark.parametrize(
    ("n", "expected"), [(1, "\ufffd"), (2, "é"), (3, "é\ufffd"), (4, "é\ufffd"), (6, "é😀")]
)
def test_a_character_cut_by_max_new_tokens_is_one_replacement_character(n, expected):
    written = written_by("é😀", n=n)
    assert (written.text, written.finish_reason) == (expected, "length")


def test_pieces_come_as_soon_as_their_characters_are_whole(monkeypatch):
    model = scripted(*BYTES.encode("aé\nb\n"), EOT)
    shapes = reads_of(model, monkeypatch)
    pieces = stream_text(model, BYTES, "", max_new_tokens=9, sampling=GREEDY, stop=["\n\n"])
    seen = [(piece, len(shapes)) for piece in pieces]
    assert seen == [("a", 1), ("", 2), ("é", 3), ("", 4), ("\nb", 5), ("", 6), ("", 7), ("\n", 7)]


@pytest.mark.parametrize("seed", range(5))
def test_streamed_pieces_are_the_text_of_complete(seed):
    # random bytes: most are no characters
    options = {"max_new_tokens": 90, "sampling": SamplingConfig(), "seed": seed, "stop": ["zz"]}
    (written,) = complete(MODEL, BYTES, ["Ein Wort, "], **options)
    assert "".join(stream_text(MODEL, BYTES, "Ein Wort, ", **options)) == written.text
    text = [token for token in written.ids if token != EOT]
    assert written.text == BYTES.decode(text) and len(text) > 5


def joined(pieces):
    """What pieces are together; all but the last must be without a reason to end."""
    *_, last = pieces = list(pieces)
    assert last.ids == () and [piece.finish_reason for piece in pieces[:-1]] == [None] * (
        len(pieces) - 1
    )
    lists = {
        name: list(itertools.chain.from_iterable(getattr(piece, name) for piece in pieces))
        for name in ("ids", "tokens", "logprobs", "top_logprobs")
    }
    return Completion("".join(piece.text for piece in pieces), **lists,
                      finish_reason=last.finish_reason)  # fmt: skip


def no_drafter():
    return None


def draft_model():
    """A drafter that is right now and then."""
    model = random_model()
    with torch.no_grad():
        model.h[2].mlp.c_proj.weight.add_(0.1)
    return ModelDrafter(model, SAMPLED, [row_generator(99, 0)], vocab_size=257)


def packed_int8():
    model = random_model()
    quantize(model)
    pack(model)
    return model


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("make", [random_model, packed_int8])
@pytest.mark.parametrize("drafter", [no_drafter, NGramDrafter, draft_model])
def test_the_pieces_of_a_stream_are_complete_and_their_text_and_ids_those_of_the_others(
    sampling, make, drafter
):
    model = make()
    options = {"max_new_tokens": 40, "sampling": sampling, "seed": 3}
    more = {**options, "stop": ["e", "zz"], "top_logprobs": 3}
    prompt = "abc abc é abc"
    pieces = list(stream(model, BYTES, prompt, drafter=drafter(), **more))
    found = joined(pieces)
    assert [found] == complete(model, BYTES, [prompt], drafter=drafter(), **more)
    del more["top_logprobs"]
    texts = stream_text(model, BYTES, prompt, drafter=drafter(), **more)
    assert list(texts) == [piece.text for piece in pieces]
    (ids,) = generate(
        model, [BYTES.encode(prompt)], stop_ids=[EOT], drafter=drafter(), vocab_size=257, **options
    )
    assert up_to(found.ids, [EOT]) == ids[: len(found.ids)]
    assert found.finish_reason == "stop" or up_to(found.ids, [EOT]) == ids
    if drafter is NGramDrafter and sampling == GREEDY:
        assert max(len(piece.ids) for piece in pieces) > 1, "no draft was accepted"


def test_a_piece_comes_for_every_step_with_the_ids_of_its_step_and_the_text_that_is_certain():
    model = scripted(*BYTES.encode("aé\nb\n"), EOT)
    pieces = list(stream(model, BYTES, "", max_new_tokens=9, sampling=GREEDY, stop="\n\n"))
    assert [piece.text for piece in pieces] == ["a", "", "é", "", "\nb", "", "", "\n"]
    assert [len(piece.ids) for piece in pieces] == [1] * 7 + [0]
    assert [*map("".join, (piece.tokens for piece in pieces))] == [
        *("a", "\ufffd", "\ufffd", "\n", "b", "\n", "<|endoftext|>", ""),
    ]
    assert pieces[-1].finish_reason == "eot"
    with pytest.raises(dataclasses.FrozenInstanceError):
        pieces[0].text = "b"


@pytest.mark.parametrize(
    "how",
    [
        {"sampling": GREEDY},
        {"sampling": SAMPLED, "ban": ["a", "e", "\n"]},
        {"sampling": SamplingConfig(temperature=3, no_repeat_ngram=2), "drafter": NGramDrafter()},
    ],
    ids=["greedy", "sampled, with bans", "wild, with drafts"],
)
def test_alternatives_are_the_models_own_likeliest_tokens_whatever_is_drawn(how):
    prompts = ["abc abc", "", "é"]
    done = complete(MODEL, BYTES, prompts, max_new_tokens=20, seed=2, top_logprobs=5, **how)
    outside = 0
    for prompt, written in zip(prompts, done):
        before = BYTES.encode(prompt) or [EOT]
        with torch.no_grad():
            logits = MODEL(torch.tensor([[*before, *written.ids[:-1]]]))[0, len(before) - 1 :]
        logprobs = logits.double().log_softmax(-1).tolist()
        assert len(logprobs) == len(written.ids) == len(written.top_logprobs)
        for row, id, logprob, top in zip(
            logprobs, written.ids, written.logprobs, written.top_logprobs
        ):
            expected = sorted(range(257), key=lambda other: -row[other])[:5]
            assert [other.id for other in top] == expected
            assert [other.logprob for other in top] == pytest.approx(
                [row[other] for other in expected], abs=1e-4
            )
            assert [other.token for other in top] == [BYTES.decode(other) for other in expected]
            assert logprob == pytest.approx(row[id], abs=1e-4)
            outside += id not in expected
    assert (outside > 0) == (how["sampling"] != GREEDY)


def test_of_equally_likely_tokens_the_one_that_greedy_decoding_takes_is_the_first_alternative():
    model = scripted(7, 8)
    with torch.no_grad():
        model.lm_head.weight[[200, 3]] = model.lm_head.weight[[7, 7]]
    for n in (1, 2, 5):
        (written,) = complete(model, BYTES, [""], max_new_tokens=1, sampling=GREEDY, top_logprobs=n)
        assert [top.id for top in written.top_logprobs[0]] == [3, 7, 200, 0, 1][:n]
        assert written.ids == [3]


def test_without_being_asked_for_there_are_no_alternatives_and_of_padding_there_are_none():
    (written,) = complete(MODEL, BYTES, ["x"], max_new_tokens=4, sampling=GREEDY)
    assert written.top_logprobs == [()] * 4
    model = scripted(*range(257, 261), vocab_size=311)
    (written,) = complete(
        model, BYTES, [""], max_new_tokens=4, sampling=SamplingConfig(), top_logprobs=257
    )
    assert all({top.id for top in tops} == {*range(257)} for tops in written.top_logprobs)


@pytest.mark.parametrize(
    ("n", "allowed"),
    [(-1, "0 or more"), (258, "from 0 to the 257 tokens"), (1.5, "a whole number"),
     (True, "a whole number")],
)  # fmt: skip
def test_more_alternatives_than_tokens_are_refused_at_once(n, allowed):
    for call in (complete, stream):
        with pytest.raises(InputError, match=f"top_logprobs is {n}, allowed is {allowed}"):
            call(MODEL, BYTES, "x", top_logprobs=n)


def test_complete_continues_each_prompt_as_generate_does_its_ids():
    prompts = ["Ein Wort", "", "Ein Wort", "und é"]
    done = complete(MODEL, BYTES, prompts, max_new_tokens=50, sampling=SAMPLED, seed=11)
    rows = [BYTES.encode(prompt) or [EOT] for prompt in prompts]
    ids = generate(MODEL, rows, max_new_tokens=50, sampling=SAMPLED, seed=11, stop_ids=[EOT])
    assert [up_to(written.ids, [EOT]) for written in done] == ids
    assert [written.text for written in done] == [BYTES.decode(row) for row in ids]
    fewer = complete(MODEL, BYTES, prompts[:2], max_new_tokens=50, sampling=SAMPLED, seed=11)
    assert [(w.text, w.ids) for w in fewer] == [(w.text, w.ids) for w in done[:2]]


def test_an_empty_prompt_starts_from_end_of_text():
    (written,) = complete(MODEL, BYTES, [""], max_new_tokens=30, sampling=GREEDY)
    assert up_to(written.ids, [EOT]) == up_to(uncached(MODEL, [EOT], 30), [EOT])
    pieces = stream_text(MODEL, BYTES, "", max_new_tokens=30, sampling=GREEDY)
    assert "".join(pieces) == written.text != ""


def test_a_tokenizer_may_have_fewer_ids_than_the_model_not_more():
    check_fits(BYTES, MODEL)
    check_fits(BYTES, random_model(vocab_size=311))
    with pytest.raises(InputError, match="the tokenizer has 259 ids, the model 257"):
        check_fits(Tokenizer.gpt2(259), MODEL)


def test_an_end_of_text_without_a_row_can_be_sampled_with_and_not_trained_on(caplog):
    check_fits(Tokenizer.gpt2(258), MODEL)
    assert "no text ends with it" in caplog.text
    with pytest.raises(InputError, match=r"none for end-of-text '<\|endoftext\|>', id 257"):
        check_fits(Tokenizer.gpt2(258), MODEL, training=True)


def test_a_long_prompt_may_be_text():
    text = "Ein langer Anfang, länger als das Fenster ist. " * 3
    (written,) = complete(MODEL, BYTES, [text], max_new_tokens=20, sampling=GREEDY)
    assert up_to(written.ids, [EOT]) == up_to(uncached(MODEL, BYTES.encode(text), 20), [EOT])


STORY = 'Ab 3.5 cd? "Ef gh!" (Ij.) Kl\nMn op'


@pytest.mark.parametrize(
    ("n", "expected", "reason"),
    [
        (1, "Ab 3.5 cd?", "sentence"),  # the point of 3.5 ends nothing
        (9, "Ab 3.5 cd?", "sentence"),
        (10, "Ab 3.5 cd?", "sentence"),  # it had just ended
        (11, "Ab 3.5 cd? ", "sentence"),  # and the space behind it is there, too
        (12, 'Ab 3.5 cd? "Ef gh!"', "sentence"),
        (20, 'Ab 3.5 cd? "Ef gh!" ', "sentence"),
        (21, 'Ab 3.5 cd? "Ef gh!" (Ij.)', "sentence"),
        (27, 'Ab 3.5 cd? "Ef gh!" (Ij.) Kl', "sentence"),  # a line ends one, too
        (30, STORY, "eot"),
    ],
)
def test_a_text_goes_on_to_the_end_of_its_sentence_when_asked(n, expected, reason):
    model = scripted(*BYTES.encode(STORY), EOT)
    options = {"max_new_tokens": n, "sampling": GREEDY, "finish_sentence": True}
    (written,) = complete(model, BYTES, [""], **options)
    assert (written.text, written.finish_reason) == (expected, reason)
    assert "".join(stream_text(model, BYTES, "", **options)) == expected
    assert n <= len(written.ids) == len(written.logprobs)


def test_a_sentence_without_end_is_given_up():
    model = scripted(*[BYTES.encode("a")[0]] * 200)
    (written,) = complete(
        model, BYTES, [""], max_new_tokens=7, sampling=GREEDY, finish_sentence=True
    )
    assert (len(written.ids), written.finish_reason) == (107, "length")
    (written,) = complete(
        model, BYTES, [""], max_new_tokens=0, sampling=GREEDY, finish_sentence=True
    )
    assert written.ids == []


@pytest.mark.parametrize("seed", range(4))
def test_banned_texts_are_not_written_and_the_prompt_does_not_count(seed):
    prompts, sampling = ["ab", "a"], SamplingConfig(temperature=1.5)
    options = {"max_new_tokens": 80, "sampling": sampling, "seed": seed}
    free = complete(MODEL, BYTES, prompts, **options)
    common = [next(c for c in written.text if c.isascii()) for written in free]
    for row in range(2):
        banned = complete(MODEL, BYTES, prompts, ban=common, **options)[row]
        assert not any(text in banned.text for text in common) and len(banned.text) > 3
        (alone,) = complete(MODEL, BYTES, [prompts[row]], ban=common, rows=[row], **options)
        assert alone.ids == banned.ids
    assert complete(MODEL, BYTES, ["ab"], ban=["ab\n\n\n\n"], **options)[0].ids == free[0].ids


def test_rows_name_the_random_numbers_of_each_prompt():
    options = {"max_new_tokens": 30, "sampling": SamplingConfig(), "seed": 4}
    ordered = complete(MODEL, BYTES, ["x"] * 4, **options)
    chosen = complete(MODEL, BYTES, ["x"] * 3, rows=[3, 0, 3], **options)
    assert [w.ids for w in chosen] == [ordered[k].ids for k in (3, 0, 3)]
    assert ordered[0].ids != ordered[3].ids
    pieces = stream_text(MODEL, BYTES, "x", row=3, **options)
    assert "".join(pieces) == ordered[3].text


def test_every_new_token_is_counted_once():
    counts = []
    done = complete(MODEL, BYTES, ["x", "yz"], max_new_tokens=40, sampling=SamplingConfig(),
                    on_tokens=counts.append)  # fmt: skip
    assert sum(counts) == sum(len(written.ids) for written in done) > 40


def test_one_prompt_one_stop_text_and_one_ban_may_stand_alone():
    [plain] = complete(MODEL, BYTES, ["hello"], max_new_tokens=20, sampling=GREEDY)
    assert complete(MODEL, BYTES, "hello", max_new_tokens=20, sampling=GREEDY) == [plain]
    middle = next(c for c in plain.text[1:] if c.isascii() and c.isprintable())
    for name in ("stop", "ban"):
        alone, listed = (
            complete(MODEL, BYTES, "hello", max_new_tokens=20, sampling=GREEDY, **{name: value})
            for value in (middle, [middle])
        )
        assert alone == listed and middle not in alone[0].text


BAD_OPTIONS = [
    ({"max_new_tokens": -1}, "max_new_tokens is -1, allowed is 0 or more"),
    ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5, allowed is a whole number"),
    ({"max_new_tokens": "3"}, "max_new_tokens is '3', allowed is a whole number"),
    ({"max_new_tokens": None}, "max_new_tokens is None, allowed is a whole number"),
    ({"seed": 1.5}, "seed is 1.5, allowed is a whole number"),
    ({"seed": "x"}, "seed is 'x', allowed is a whole number"),
    ({"sampling": None}, "sampling is None, allowed is a SamplingConfig"),
    ({"sampling": {"temperature": 1}}, "sampling is {'temperature': 1}, allowed is a"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_every_way_to_decode_refuses_the_same_options_in_the_same_words(options, message):
    calls = [
        lambda **how: generate(MODEL, [[1]], **{"max_new_tokens": 1, **how}),
        lambda **how: complete(MODEL, BYTES, ["x"], **how),
        lambda **how: list(stream_text(MODEL, BYTES, "x", **how)),
        lambda **how: complete(MODEL, BYTES, ["x"], finish_sentence=True, **how),
    ]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call(**options)
        assert message in str(caught.value) and "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 5}, "stop holds 5, allowed are texts"),
        ({"stop": ["a", None]}, "stop holds None, allowed are texts"),
        ({"ban": [5]}, "ban holds 5, allowed are texts"),
        ({"prompts": [5]}, "prompts holds 5, allowed are texts"),
        ({"prompts": [[1, 2]]}, "prompts holds [1, 2], allowed are texts"),
        ({"prompts": b"x"}, "prompts holds"),
        ({"rows": [0, 1]}, "rows is [0, 1], allowed is one number for each of 1 prompts"),
        ({"rows": [0.5]}, "row is 0.5, allowed is a whole number"),
    ],
)
def test_texts_that_are_none_are_refused(options, message):
    with pytest.raises(InputError) as caught:
        complete(MODEL, BYTES, **{"prompts": ["x"], "max_new_tokens": 1, **options})
    assert message in str(caught.value)


# Ids without a token, and tokens without a row


@pytest.fixture(scope="module")
def holed(tmp_path_factory):
    """A tokenizer of 306 ids, of which 300 to 303 have no token, and end-of-text is 299."""
    vocab, merges = small(tmp_path_factory)
    words = {299: word(END), 304: word("<|user|>"), 305: word("[PAD]")}
    config = {"added_tokens_decoder": words, "pad_token": "[PAD]"}
    folder = tmp_path_factory.mktemp("holed")
    write(folder, vocab={**vocab, END: 299}, merges=merges, tokenizer_config=config)
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(top_k=3), SamplingConfig()])
@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("n_rows", [305, 306, 320])
def test_ids_without_a_token_or_a_row_are_never_drawn(holed, n_rows, drafted, sampling):
    likely = [id for id in (300, 310, 303, 302, 304) if id < n_rows]
    model, n_drawable = preferring(likely, n_rows), min(n_rows, 306)
    drafter = None
    if drafted:  # by a model that has other rows
        ids, other = drawable(holed, model), preferring([301, 5], 311)
        drafter = ModelDrafter(other, sampling, [row_generator(9, row) for row in (0, 1)], **ids)
    found = complete(
        model,
        holed,
        ["Hello", "a longer prompt"],
        max_new_tokens=12,
        sampling=sampling,
        drafter=drafter,
        top_logprobs=n_drawable - 4,
    )
    for written in found:
        seen = {*written.ids, *(top.id for place in written.top_logprobs for top in place)}
        assert seen == {id for id in range(n_drawable) if not 300 <= id <= 303}
        assert all(math.isfinite(top.logprob) for top in written.top_logprobs[0])
    assert sampling != GREEDY or found[0].text == "<|user|>" * 12
    ids = drawable(holed, model)
    rows = generate(model, [[5], [6, 7]], max_new_tokens=12, sampling=sampling, **ids)
    assert not {300, 301, 302, 303} & {id for row in rows for id in row}


def test_bans_count_where_the_model_has_fewer_rows_than_there_are_ids(holed):
    model = preferring([304, 64, 65], 305)
    (written,) = complete(model, holed, ["x"], max_new_tokens=3, sampling=GREEDY, ban=["user"])
    assert written.text == "aaa"


def test_a_prompt_with_a_token_that_has_no_row_is_refused(holed):
    model = preferring([64], 305)
    with pytest.raises(InputError, match="ids from 305 to 305, the model knows 0 to 304"):
        complete(model, holed, ["[PAD]"], special=True)


def test_scores_are_those_of_the_tokens_that_there_are(holed):
    model = preferring([300, 64], 305)
    (written,) = complete(model, holed, ["x"], max_new_tokens=2, sampling=GREEDY)
    found = score(model, holed, "x" + written.text)
    assert found.nats[1:] == pytest.approx([-value for value in written.logprobs], abs=1e-5)
