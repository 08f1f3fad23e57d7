"""What a run's records say in words."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.runs.record import Metrics
from minigpt2.runs.wording import clean, shown_bits, shown_duration, shown_perplexity, shown_size
from minigpt2.runs.wording import summary as summary_of

NAN = math.nan


def summary(lines, **more):
    """The sentence on a run of such metrics, where None is no number."""
    metrics = [{name: NAN if v is None else v for name, v in line.items()} for line in lines]
    return summary_of([Metrics(**line) for line in metrics], **more)


def run_of(val, loss=()):
    """Metrics lines of a run judged every 10 steps: val[i] at step 10 i, and a training loss of
    loss[i] in the 10 steps before it.
    """
    lines = [{"step": 0, "val_loss": math.log(val[0])}]
    for i, perplexity_there in enumerate(val[1:], start=1):
        trained = loss[i - 1] if loss else 5 - i
        lines += [{"step": 10 * i - 10 + k, "loss": trained} for k in range(1, 11)]
        lines[-1]["val_loss"] = math.log(perplexity_there)
    return lines


def test_a_run_that_memorised_is_said_to_have():
    lines = run_of([35.0, 25, 21.4, 22, 24])
    assert summary(lines) == (
        "best at step 20: val perplexity 21.4 (untuned 35.0); after that the run memorised"
    )


def with_bits(lines, per_nat):
    """The lines of a run whose evaluations know their bits per byte."""
    judged = [
        {"bits_per_byte": line["val_loss"] * per_nat} if "val_loss" in line else {}
        for line in lines
    ]
    return [line | more for line, more in zip(lines, judged)]


def test_bits_per_byte_stand_beside_perplexity_where_they_are_known():
    lines = run_of([35.0, 25, 21.4, 22, 24])
    told = summary(with_bits(lines, 0.3))
    assert told == (
        "best at step 20: val perplexity 21.4, bits per byte 0.919 (untuned 35.0 and 1.067); "
        "after that the run memorised"
    )
    assert summary([*lines[:20], *with_bits(lines[20:], 0.3)]) == told, "the text is one"
    assert summary(with_bits(run_of([35.0, 36.2, 35.1], loss=[3.0, 2.5]), 0.3)).startswith(
        "never better than untuned (val perplexity 35.0, bits per byte 1.067): the next best is"
    )
    assert summary(with_bits(lines[:1], 0.3)) == (
        "judged once, before training: val perplexity 35.0, bits per byte 1.067"
    )


def test_a_run_from_random_weights_was_never_untuned():
    told = summary(run_of([35.0, 25, 21.4, 22, 24]), pretrained=False)
    assert "(at the start 35.0)" in told
    assert "untuned" not in told


def test_a_run_that_got_worse_while_training_loss_rose_did_not_memorise():
    told = summary(run_of([35.0, 21.4, 24], loss=[3.0, 3.5]))
    assert told.endswith("; after that it got worse (val perplexity 24.0)")


def test_a_small_rise_after_the_best_is_level_and_no_memorising():
    assert summary(run_of([35.0, 21.4, 21.6])).endswith("; after that it stayed level")


def test_a_run_that_recovered_to_its_best_did_not_memorise():
    assert summary(run_of([35.0, 21.4, 27, 21.5])).endswith("; after that it stayed level")


def test_a_run_that_ends_at_its_best_is_still_improving_or_level():
    assert summary(run_of([35.0, 30, 25])) == (
        "best at step 20: val perplexity 25.0 (untuned 35.0); still improving, more steps may help"
    )
    assert summary(run_of([35.0, 25.01, 25])).endswith("; level at the end")


def test_a_run_never_better_than_untuned_says_so_and_what_to_try():
    assert summary(run_of([35.0, 36.2, 35.1], loss=[3.0, 2.5])) == (
        "never better than untuned (val perplexity 35.0): the next best is 35.1 at step 20; "
        "try a lower --learning-rate or more text"
    )


def test_a_run_that_memorised_from_the_first_step_on_says_so():
    told = summary(run_of([35.0, 37, 45]))
    assert told.startswith("never better than untuned (val perplexity 35.0)")
    assert told.endswith("the run memorised its text, and more text would help most")


def test_without_held_out_text_nothing_is_claimed_about_new_text():
    told = summary([{"step": 1, "loss": 4.0}, {"step": 1200, "loss": 3.25}])
    assert told == (
        "no held-out text, so nothing says how well it does on new text; "
        "training loss 4.00 at step 1, 3.25 at step 1,200"
    )


def test_one_evaluation_alone_is_compared_with_nothing():
    line = {"step": 0, "val_loss": math.log(35)}
    assert summary([line]) == "judged once, before training: val perplexity 35.0"
    assert summary([line | {"step": 50}]) == "judged once, at step 50: val perplexity 35.0"


def test_no_lines_are_no_result():
    assert summary([]) == "nothing was measured yet"


@pytest.mark.parametrize("broken", [NAN, math.inf, None])
def test_a_loss_that_is_no_number_is_never_the_best(broken):
    lines = run_of([35.0, 25, 24])
    assert summary([*lines, {"step": 30, "val_loss": broken}]) == (
        "best at step 20: val perplexity 24.0 (untuned 35.0); "
        "held-out loss was not a number at step 30"
    )
    assert summary([lines[0], {"step": 10, "val_loss": broken}]).endswith(
        "after that held-out loss was not a number"
    )
    assert "never a number" in summary([{"step": 0, "val_loss": broken}])


numbers = st.none() | st.floats() | st.integers() | st.booleans()
metrics_of_anything = st.lists(
    st.builds(
        Metrics,
        st.integers(0),
        loss=numbers,
        val_loss=numbers,
        bits_per_byte=numbers,
        seconds=numbers,
    ),
    max_size=12,
)


@settings(deadline=None)
@given(metrics_of_anything, st.booleans())
def test_a_summary_is_one_line_whatever_was_measured(metrics, pretrained):
    told = summary_of(metrics, pretrained=pretrained)
    assert told
    assert "\n" not in told
    assert "nan" not in told


def test_sizes_times_and_perplexities_are_short():
    assert [shown_duration(s) for s in (0, 48.4, 720, 12000)] == [
        "0 s",
        "48 s",
        "12 min",
        "3 h 20 min",
    ]
    assert [shown_size(n) for n in (0, 3 << 20, 1500 << 20, 5000 << 30)] == [
        "0 MiB",
        "3 MiB",
        "1.46 GiB",
        "5,000 GiB",
    ]
    assert [shown_perplexity(math.log(p)) for p in (1.234, 21.44, 2066.4)] == [
        "1.23",
        "21.4",
        "2,066.4",
    ]
    assert [shown_bits(bits) for bits in (0.91926, 12.0, 1e29)] == ["0.919", "12.000", "1.0e+29"]


def test_clean_text_can_be_written_and_holds_no_control_characters():
    hostile = "a\r\nb\tc\x00\x1b[31m\x7f\x85\ud800\ufffe\U0001ffff\u202eé漢"
    cleaned = clean(hostile)
    assert cleaned == "a\nb\tc\ufffd\ufffd[31m" + "\ufffd" * 5 + "\u202eé漢"
    cleaned.encode()


def test_a_run_that_diverged_and_fell_back_has_not_memorised():
    lines = [{"step": 0, "val_loss": 5.7}, {"step": 1, "loss": 5.7}]
    lines += [{"step": 5, "loss": 900.0, "val_loss": 1027.0}, {"step": 6, "loss": 341.0}]
    lines += [{"step": 10, "loss": 300.0, "val_loss": 293.0}]
    assert "memorised" not in summary(lines)
    assert summary(lines).endswith("try a lower --learning-rate or more text")


def test_the_perplexity_of_a_hopeless_model_is_shown_as_infinite():
    assert shown_perplexity(1e6) == "inf"
