"""Estimators: scikit-learn's checks pass, and answers are those of scikit-learn's own."""

import numpy as np
import pytest
from sklearn import linear_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from convexprune import estimators
from convexprune.errors import ProblemError

ALL = [getattr(estimators, name) for name in estimators.__all__]
FEW = {"alphas": 5, "cv": 2}


@parametrize_with_checks([estimators.Lasso()])
def test_the_checks_of_scikit_learn_pass(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([kind(**(FEW if "CV" in kind.__name__ else {})) for kind in ALL])
def test_the_checks_of_scikit_learn_pass_for_all(estimator, check):
    check(estimator)


def data(tasks: int = 0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)) @ (np.eye(8) + 0.3 * rng.normal(size=(8, 8)))
    y = 2 + x[:, : max(tasks, 1)] + 0.5 * rng.normal(size=(60, max(tasks, 1)))
    return x, y if tasks else y[:, 0]


@pytest.mark.parametrize("name, given, tasks", [
    ("Lasso", {"alpha": 0.1}, 0), ("Lasso", {"alpha": 0.1, "positive": True}, 0), ("Lasso", {"alpha": 0.1}, 3),
    ("Lasso", {"alpha": 0.1, "fit_intercept": False}, 0), ("ElasticNet", {"alpha": 0.1, "l1_ratio": 0.7}, 0),
    ("MultiTaskLasso", {"alpha": 0.2}, 3),
    ("LassoCV", {"alphas": 20, "cv": 4}, 0), ("ElasticNetCV", {"alphas": 20, "cv": 4, "l1_ratio": 0.7}, 0),
    ("MultiTaskLassoCV", {"alphas": 20, "cv": 4}, 3),
])  # fmt: skip
def test_answers_are_those_of_scikit_learn(name, given, tasks):
    x, y = data(tasks)
    ours = getattr(estimators, name)(**given, tol=1e-10).fit(x, y)
    theirs = getattr(linear_model, name)(**given, tol=1e-12, max_iter=100_000).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), atol=1e-4)
    assert ours.solution_.certificate.relative_gap <= 1e-10
    if "CV" in name:
        np.testing.assert_allclose(ours.mse_path_, theirs.mse_path_, rtol=1e-4)
        assert ours.alpha_ == pytest.approx(theirs.alpha_)


def test_strengths_by_target_and_groups_and_pipelines():
    x, y = data(2)
    rows = estimators.Lasso(alpha=np.array([[0.05], [5.0]]), tol=1e-9).fit(x, y)
    alone = estimators.Lasso(alpha=0.05, tol=1e-9).fit(x, y[:, 0])
    np.testing.assert_allclose(rows.coef_, [alone.coef_, np.zeros(8)], atol=1e-5)
    groups = np.arange(8) // 2
    grouped = estimators.GroupLasso(alpha=0.3, groups=groups).fit(x, y[:, 0]).coef_.reshape(4, 2)
    assert ((grouped == 0).all(1) | (grouped != 0).all(1)).all() and (grouped == 0).any()
    search = GridSearchCV(make_pipeline(StandardScaler(), estimators.Lasso()), {"lasso__alpha": [0.01, 1.0]}, cv=3)
    assert search.fit(x, y[:, 0]).best_params_ == {"lasso__alpha": 0.01}


def test_a_fit_that_does_not_end_warns():
    x, y = data()
    with pytest.warns(ConvergenceWarning, match="Lasso: The "):
        estimators.Lasso(alpha=1e-3, tol=1e-18).fit(x, y)


@pytest.mark.parametrize("wrong", [
    {"alphas": 0}, {"alphas": []}, {"alphas": "auto"}, {"eps": 2}, {"l1_ratio": 2}, {"l1_ratio": "a"},
    {"l1_ratio": [0.1, 0.5]},
])  # fmt: skip
def test_alphas_that_cannot_be_made_are_refused_with_what_came(wrong: dict):
    x = np.random.default_rng(0).normal(size=(9, 4))
    with pytest.raises(ProblemError, match=r"=.*Accepted: a number"):
        estimators.ElasticNetCV(**wrong).fit(x, x[:, 0])


@pytest.mark.parametrize("name, free", [
    ("ElasticNetCV", {"l1_ratio": 0.0}), ("LassoCV", {"alpha": np.r_[0, np.ones(7)]}), ("GroupLassoCV", {"alpha": 0.0}),
    ("MultiTaskLassoCV", {"alpha": np.r_[0, np.ones(7)]}),
])  # fmt: skip
def test_where_no_alpha_makes_all_weights_zero_alphas_have_to_be_given(name: str, free: dict):
    x, y = data(2)
    with pytest.raises(ProblemError, match="No alpha makes all weights zero"):
        getattr(estimators, name)(**free).fit(x, y)
    assert getattr(estimators, name)(**free, alphas=[0.1], cv=2, tol=1.0).fit(x, y).alpha_ == 0.1


@pytest.mark.parametrize("groups", [[0, 1], [0, 0, 1, -1], [0.5, 1, 1, 2]])
def test_groups_that_are_no_numbers_of_groups_are_refused(groups: list[float]):
    x = np.random.default_rng(0).normal(size=(9, 4))
    with pytest.raises(ProblemError, match="Accepted: a whole number from 0 for each of 4 features"):
        estimators.GroupLasso(groups=groups).fit(x, x[:, 0])
