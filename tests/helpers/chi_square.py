"""Whether counts follow a distribution."""

import torch
from scipy.stats import chi2


def chi_square(counts, probs):
    """The probability of counts at least so far from the expected ones."""
    expected = probs * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    kept = expected > 0
    assert not counts[~kept].any()
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    return float(chi2.sf(statistic, int(kept.sum()) - 1))
