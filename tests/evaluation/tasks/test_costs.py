"""What rows cost equals a plain forward pass, and means their textbook formulas."""

import math
import statistics

import pytest
import torch

from judged import EOT, TOKENIZER, judge, plain
from minigpt2.evaluation.tasks import costs
from minigpt2.evaluation.tasks.costs import Row, mean, ratio


def test_a_row_costs_what_one_forward_pass_says(monkeypatch):
    monkeypatch.setattr(costs, "ROWS_AT_ONCE", 3)
    told = []
    found = judge(progress=lambda *done: told.append(done))
    generator = torch.Generator().manual_seed(2)
    rows = []
    for n_ids, n_scored in [(2, 1), (13, 12), (13, 1), (7, 3), (9, 0)]:
        ids = torch.randint(299, (n_ids,), generator=generator).tolist()
        if n_scored == 3:  # a row that the model would have written
            for at in range(n_ids - 3, n_ids):
                ids[at] = found.model.eval()(torch.tensor([ids[:at]]))[0, -1].argmax().item()
        rows.append(Row(ids, n_scored))
    for row, cost in zip(rows, found.costs(iter(rows), len(rows))):
        nats, best = plain(found.model, row.ids, row.n_scored) if row.n_scored else (0, [])
        assert cost.nats == pytest.approx(nats, rel=1e-12)
        assert cost.greedy == all(best)
        assert not best or cost.last_greedy == best[-1]
    assert told == [(3, 5), (5, 5)]
    assert found.costs([rows[3]], 1)[0].greedy


@pytest.mark.parametrize("n_tokens", [0, 1, 11, 12, 13, 24, 30])
def test_a_rolling_text_scores_each_token_once_after_all_that_fits(n_tokens):
    found, text = judge(), "!" * n_tokens
    ids = [EOT, *TOKENIZER.encode(text)]
    rows = found.rolling(text)
    assert sum(row.n_scored for row in rows) == len(ids) - 1
    assert [id for row in rows for id in row.ids[len(row.ids) - row.n_scored :]] == ids[1:]
    assert all(len(row.ids) <= 13 for row in rows)
    assert all(len(row.ids) == 13 for row in rows[-1:]) or len(ids) < 13  # as early as it can


def test_a_continuation_is_scored_after_its_context():
    found = judge()
    context, word = TOKENIZER.encode("a lamp"), TOKENIZER.encode(" and")
    assert found.continued("a lamp", " and") == (context + word, len(word))
    assert found.continued("a lamp ", "and") == (context + word, len(word))
    both = [EOT, *TOKENIZER.encode(" and")]
    assert found.continued("", " and") == found.continued(" ", "and") == (both, len(word))
    long = TOKENIZER.encode("a lamp and a wall and a boat")
    row = found.continued("a lamp and a wall and a", " boat")
    assert list(row.ids) == long[-13:] and len(long) > 13
    # longer than the model can read: all of it is scored, in windows
    row = found.continued("a", " lamp and a wall and a boat")
    assert row.n_scored == len(long) - 1 and list(row.ids) == long
    assert math.isfinite(found.costs([row], 1)[0].nats)


def test_means_have_the_errors_of_textbooks():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean(values) == pytest.approx((0.6, statistics.stdev(values) / math.sqrt(5)))
    assert mean([3.0]) == (3.0, None)
    assert ratio([3.0], [2.0]) == (1.5, None)
    # equal sizes: the mean of the amounts over the size
    value, error = ratio([2.0, 4.0, 9.0], [10.0] * 3)
    spread = statistics.stdev([0.2, 0.4, 0.9]) / math.sqrt(3)
    assert (value, error) == pytest.approx((0.5, spread))
    assert ratio([1.0, 2.0], [2.0, 4.0])[1] == pytest.approx(0)
