"""Forgetting quality of the machine unlearning challenge at NeurIPS 2023 (Triantafillou et al., 2024).

For each forgotten record, the best of all thresholds on its margin that tell slices that unlearned it from slices that
never saw it says how large the epsilon of (epsilon, 0)-unlearning is at least. Without the challenge's factors for the
accuracy on retained and test images, which stand in a table of their own.
"""

import numpy as np

BINS, WIDTH = 13, 0.5  # of epsilon, as published; beyond them counts as in the last


def epsilon(unlearned: np.ndarray, never: np.ndarray) -> float:
    """max over thresholds t and both directions of log((1 - FPR) / FNR) and log((1 - FNR) / FPR).

    FPR is the share of margins above t that never saw the record, FNR the share of the others that are not above. As
    published, a threshold at which just one of them is 0 does not count, and infinity is told where both are.

    Args:
        unlearned, never: float [a] and [b], margins of a record under the slices of either kind.

    Returns:
        At least 0.
    """
    cuts = np.concatenate([unlearned, never])[:, None]
    false, missed = (never > cuts).mean(axis=1), (unlearned <= cuts).mean(axis=1)
    false, missed = np.append(false, 1 - false), np.append(missed, 1 - missed)  # the other direction: below t
    if ((false == 0) & (missed == 0)).any():
        return np.inf
    counts = (false > 0) & (missed > 0) & (false < 1) & (missed < 1)
    false, missed = false[counts], missed[counts]
    return float(np.log(np.concatenate([(1 - false) / missed, (1 - missed) / false, [1.0]])).max())


def quality(epsilons: np.ndarray) -> float:
    """Mean over records of 2 / 2^n, for epsilon float [w] in the n-th bin: 1 where all are below 0.5."""
    if not len(epsilons):
        return np.nan
    bins = np.minimum(np.floor(np.minimum(epsilons, BINS * WIDTH) / WIDTH), BINS - 1)
    return float(np.mean(2.0**-bins))
