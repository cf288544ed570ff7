"""Linear probe: logistic regression by scikit-learn. Shapes and conventions as in `baselines`."""

from __future__ import annotations

import warnings

import numpy as np

from ..core.errors import UserError
from ..predict.fitting.inputs import Choice, Inputs, best, check, positive

# The sweep of the CLIP paper, appendix A.3: 96 values from 1e-6 to 1e6.
STRENGTHS = tuple(np.logspace(-6, 6, 96).tolist())
C_DEFAULT = 1.0


def logistic_regression(train_x, train_y, test_x, C: float = C_DEFAULT, max_iterations: int = 1000) -> np.ndarray:
    """Scores `(N, C)` of a linear classifier with bias, fitted by cross-entropy with an L2 penalty.

    The scores are those of scikit-learn's `LogisticRegression.decision_function`; of two classes, for which it gives one
    number, each gets half of it, with opposite signs. `softmax(scores)` is `predict_proba` for any number of classes.

    Args:
        train_x (`(n, D)`), train_y (`(n,)`), test_x (`(N, D)`): any features; each class needs an example.
        C: inverse strength of the penalty. The default is scikit-learn's 1, a strong penalty for unit-norm features that is
            safe for few of them; `choose` finds a better value on validation.
        max_iterations: of L-BFGS, which starts at 0. Weights that have not converged by then are used, with a warning.

    float32 features are fitted in float32, as scikit-learn does, all others in float64. There is no randomness.

    Raises:
        UserError: see `inputs.check`; a class without example; scikit-learn is not installed.

    References: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", appendix A.3.
    """
    positive(C=C, max_iterations=max_iterations)
    model = _model(C, max_iterations)
    inputs = check(train_x, train_y, test_x, dtype=None, every_class=True)
    return _scores(model, inputs)


def head(train_x, train_y, C: float = C_DEFAULT, max_iterations: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(C, D)` and bias `(C,)` of `logistic_regression`: its scores are `test_x @ weights.T + bias`.

    Fine-tuning may start there (`lp-ft`).
    """
    positive(C=C, max_iterations=max_iterations)
    model = _model(C, max_iterations)
    inputs = check(train_x, train_y, train_x, dtype=None, every_class=True)
    _fit(model, inputs)
    weights, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(weights) == 1:  # two classes
        return np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights, bias


def choose(train_x, train_y, val_x, val_y, max_iterations: int = 1000) -> Choice:
    """`C` of `logistic_regression` by accuracy on validation `(n_val, D)`, `(n_val,)`, from `STRENGTHS`.

    Each fit starts from 0, so that it equals that of `logistic_regression`: L-BFGS stops at a tolerance, and another start
    would lead to other weights.
    """
    model = _model(C_DEFAULT, max_iterations)
    inputs = check(train_x, train_y, val_x, dtype=None, every_class=True, test_name="val_x")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*failed to converge.*")
        return best(
            {"C": C_DEFAULT},
            [{"C": strength} for strength in STRENGTHS],
            lambda candidate: _scores(model.set_params(**candidate), inputs),
            val_y,
            inputs.classes,
        )


def _model(C: float, max_iterations: int):
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(
            "logistic regression (lp): expected scikit-learn, found none. Type: pip install 'mmft_hf[benchmark]'"
        ) from error
    return LogisticRegression(C=C, max_iter=max_iterations)


def _fit(model, inputs: Inputs) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes")  # one image per class is intended
        model.fit(inputs.train_x.cpu().numpy(), inputs.train_y.cpu().numpy())


def _scores(model, inputs: Inputs) -> np.ndarray:
    _fit(model, inputs)
    scores = model.decision_function(inputs.test_x.cpu().numpy()).astype(np.float64)
    return scores if scores.ndim == 2 else np.stack([-scores / 2, scores / 2], axis=1)
