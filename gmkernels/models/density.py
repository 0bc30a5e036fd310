"""Densities in closed form or by EM: histogram.py, mixture.py, factor_analysis.py."""

from gmkernels.models.factor_analysis import FactorAnalysis, ProbabilisticPCA
from gmkernels.models.histogram import Histogram
from gmkernels.models.mixture import GaussianMixture

__all__ = ["FactorAnalysis", "GaussianMixture", "Histogram", "ProbabilisticPCA"]
