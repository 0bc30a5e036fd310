"""Classifiers, discriminative and generative: logistic.py models P(Y|X), naive_bayes.py P(X, Y).

Ng and Jordan 2001, "On discriminative vs. generative classifiers": `python -m gmkernels compare
classifiers` draws their comparison.
"""

from gmkernels.models.logistic import GaussianPrior, LaplacePrior, LogisticRegression
from gmkernels.models.naive_bayes import BernoulliNaiveBayes, GaussianNaiveBayes

__all__ = [
    "BernoulliNaiveBayes",
    "GaussianNaiveBayes",
    "GaussianPrior",
    "LaplacePrior",
    "LogisticRegression",
]
