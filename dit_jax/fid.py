"""Frechet distance between sets of features, from streaming f64 moments."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Count, mean [D] and scatter [D, D] (sum of outer products of deviations), f64."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Statistics":
        """Of features [N, D]."""
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        deviations = features - mean[None]
        return cls(len(features), mean, deviations.T @ deviations)

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], the unbiased estimate."""
        return self.scatter / (self.n - 1)

    def merge(self, other: "Statistics") -> "Statistics":
        """Of both sets together.   Source: Chan et al. 1979."""
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        cross = np.outer(delta, delta) * (self.n * other.n / n)
        return Statistics(n, mean, self.scatter + other.scatter + cross)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), exactly 0 for equal statistics.

    The trace of the root is that of (R S_b R)^(1/2) with R = S_a^(1/2): all symmetric.
    Source: Dowson & Landau 1982.
    """
    s_a, s_b = a.covariance, b.covariance
    if np.array_equal(a.mean, b.mean) and np.array_equal(s_a, s_b):
        return 0.0
    values, vectors = np.linalg.eigh(s_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))[None]) @ vectors.T
    product = np.linalg.eigvalsh(root @ s_b @ root)
    trace_root = np.sqrt(np.maximum(product, 0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(s_a + s_b) - 2 * trace_root)
