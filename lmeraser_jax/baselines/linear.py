"""A plain linear head on frozen features: multinomial logistic regression on all private records."""

import warnings

import numpy as np


def fit_predict(features: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Fits on standardised features and predicts others.

    Args:
        features: float32 [N, D].
        labels: int32 [N].
        wanted: float32 [M, D].

    Returns:
        int32 [M], predicted labels.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        return np.full(len(wanted), labels[0] if len(labels) else 0, np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(features, labels)
    return head.predict(wanted)
