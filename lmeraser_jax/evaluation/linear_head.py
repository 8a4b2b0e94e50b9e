"""A plain linear head on frozen features: multinomial logistic regression on all private records."""

import warnings

import numpy as np

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C, chosen by the accuracy on a fifth of the training records


def fit_predict(features: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Fits on standardised features, float32 [N, D] with labels int32 [N], and predicts others, [M, D] -> int32 [M]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        return np.full(len(queries), labels[0] if len(labels) else 0, np.int32)
    held_out = np.arange(len(labels)) % 5 == 0
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTIES[0], max_iter=300))
    if len(np.unique(labels[~held_out])) > 1:
        folds = PredefinedSplit(np.where(held_out, 0, -1))
        model = GridSearchCV(model, {"logisticregression__C": PENALTIES}, cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels).predict(queries)
