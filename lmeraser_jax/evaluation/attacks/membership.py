"""Membership inference: was this record among those that a slice was tuned on?

A threshold on the loss (Yeom et al., 2018) and, stronger, LiRA (Carlini et al., 2022). Each compares the forgotten
records with images that no slice saw.
"""

import numpy as np

from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.report import Finding
from lmeraser_jax.evaluation.attacks.statistics import RATES, SIGNIFICANT


def membership(name: str, members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Finding:
    """What scores tell under three slices: kept, unlearned, and from scratch, the reference.

    Scores are float [3, m] of the forgotten records and [3, n] of records that no slice saw. The finding has the
    `Separation` of each column, and the AUCs of the first two above that of the third.
    """
    pairs = list(zip(members, others, strict=True))
    columns = [statistics.separation(*pair) for pair in pairs]
    differences = [statistics.auc_difference(members[[c, 2]], others[[c, 2]], rng) for c in range(2)]
    reference = min(columns[2].p, 1 - columns[2].p)  # two-sided
    rates = [
        (f"TPR at {rate:.1%} FPR", *(statistics.cell(column.rates[i]) for column in columns))
        for i, rate in enumerate(RATES)
    ]
    return Finding(
        name,
        detected=(*(difference.p < SIGNIFICANT for difference in differences), reference < SIGNIFICANT / 2),
        smallest_p=differences[0].smallest_p,
        lines=[
            ("AUC", *(str(column.auc) for column in columns)),
            ("above from scratch (by chance)", *map(str, differences), ""),
            *rates,
        ],
        values={"columns": columns, "differences": differences},
        curves=tuple(statistics.roc(*pair) for pair in pairs),
    )


def lira(margins: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of each margin under the Gaussians of shadows that saw the record, and that did not.

    Margins are float [C, n] under C slices under attack and [N, n] under N shadows; `inside`, bool [N, n], says which
    shadows saw the record, at least two of either kind. Returns float64 [C, n].
    """
    all_rows = np.ones((1, len(shadows)), bool)
    seen, unseen = (statistics.moments(shadows, mask, all_rows) for mask in (inside, ~inside))
    return statistics.log_ratio(margins, seen, unseen)
