"""Measures of two sets of features, or of one set's class probabilities. All functions take arrays.

The Frechet distance is FID for the features of Inception-2015's pool3 [N, 2048]. It is sFID (Nash
et al. 2021) for the first 7 channels of mixed_6, flattened to [N, 2023].
"""

import dataclasses
import logging

import numpy as np

from dit_jax.errors import UserError
from dit_jax.evaluation import precision_recall

logger = logging.getLogger("dit_jax")

SPLIT_SIZE = 5_000  # of the Inception Score, as in the ADM evaluator

# Relative to a covariance's largest value or eigenvalue. Covariances that were summed in f32 are
# off by less.
COVARIANCE_ROUNDING = 1e-5
ROWS = 4096  # of features whose products are summed at a time


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] f64 of `n` features; n is None if a file does not say it."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None = None


class Moments:
    """Mean and covariance of features that come in blocks, in f64.

    Source: Chan et al. 1979, for the union of two sets.
    """

    def __init__(self):
        self._waiting = []  # fewer than ROWS rows: a merge takes as long as hundreds of them
        self._n, self._mean, self._scatter = 0, 0.0, 0.0

    def add(self, features: np.ndarray) -> None:
        """Adds features [n, D] of any float type, which are copied.

        Raises: ValueError if they are no matrix.
        """
        if np.ndim(features) != 2:
            raise UserError(f"features must be [N, D], not {list(np.shape(features))}.")
        for start in range(0, len(features), ROWS):
            self._waiting.append(np.array(features[start : start + ROWS], np.float64))
            if sum(map(len, self._waiting)) >= ROWS:
                self._merge()

    def _merge(self):
        """Merges the waiting features into count, mean and scatter (n - 1 covariances)."""
        deviations = np.concatenate(self._waiting)
        self._waiting.clear()
        mean = deviations.mean(axis=0)
        deviations -= mean[None]
        n = self._n + len(deviations)
        delta = mean - self._mean
        scaled = delta * np.sqrt(self._n * len(deviations) / n)
        scatter = np.outer(scaled, scaled)
        scatter += self._scatter
        scatter += deviations.T @ deviations  # of one array: half the products
        self._mean = self._mean + delta * (len(deviations) / n)
        self._n, self._scatter = n, scatter

    def gaussian(self) -> Gaussian:
        """Returns the mean and the unbiased covariance of all features so far.

        Raises: ValueError for fewer than two.
        """
        if self._waiting:
            self._merge()
        if self._n < 2:
            raise UserError(f"{self._n} samples have no covariance; take 2 or more.")
        return Gaussian(self._mean, self._scatter / (self._n - 1), self._n)


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """Returns the mean and covariance of features [N, D].   Raises: ValueError as `Moments`."""
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def check_gaussian(mean: np.ndarray, covariance: np.ndarray, dim: int) -> None:
    """Raises ValueError unless arrays are a mean [dim] and, up to rounding, a covariance."""
    kinds = mean.dtype.kind + covariance.dtype.kind
    if kinds != "ff" or (mean.shape, covariance.shape) != ((dim,), (dim, dim)):
        raise UserError(
            f"they are {mean.dtype} {list(mean.shape)} and {covariance.dtype} "
            f"{list(covariance.shape)}, not real numbers [{dim}] and [{dim}, {dim}]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError("they have values that are NaN or infinite")
    largest = np.abs(covariance).max()
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > COVARIANCE_ROUNDING * largest:
        raise UserError(
            f"the covariance is not symmetric: two values that must be equal differ by "
            f"{asymmetry:.3g}, the largest is {largest:.3g}"
        )
    values = np.linalg.eigvalsh(covariance.astype(np.float64))
    if values[0] < -COVARIANCE_ROUNDING * values[-1]:
        raise UserError(
            f"the covariance has eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, but "
            "variances are not negative"
        )


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Returns |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), exactly 0 for equal arguments.

    The trace of the root is that of (R S_b R)^(1/2) with R = S_a^(1/2), where all matrices are
    symmetric. Logs a warning if there are too few features for a covariance of full rank, since the
    distance is then biased.
    Raises: ValueError for shapes that do not fit; FloatingPointError for NaN or infinite values, or
      if a covariance is not positive, so that the distance is below zero.
    Source: Dowson & Landau 1982; as a measure of images, FID, Heusel et al. 2017.
    """
    dim = len(a.mean)
    shapes = [np.shape(array) for g in (a, b) for array in (g.mean, g.covariance)]
    if shapes != [(dim,), (dim, dim)] * 2:
        raise UserError(
            f"means and covariances of shapes {shapes} do not fit: both sets need features of the "
            "same layer."
        )
    for name, g in (("first", a), ("second", b)):
        if not (np.isfinite(g.mean).all() and np.isfinite(g.covariance).all()):
            raise FloatingPointError(
                f"the {name} mean or covariance has values that are NaN or infinite: are the "
                "images, and the features of them, finite?"
            )
    if few := [g.n for g in (a, b) if g.n is not None and g.n - 1 < dim]:
        logger.warning(
            "Frechet distance: fewer samples than features (%s of %d values), so a covariance is "
            "rank-deficient; compare it only with others of the same numbers.",
            " and ".join(map(str, few)),
            dim,
        )
    # Rounding would make the distance of equal sets a small number instead of 0.
    if np.array_equal(a.mean, b.mean) and np.array_equal(a.covariance, b.covariance):
        return 0.0
    # Eigenvalues near 0 may come out negative: they are set to 0 before the root.
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))[None]) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace_root = np.sqrt(np.maximum(product, 0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_root
    if distance < -1e-4 * abs(traces):  # more than the rounding of roots of eigenvalues near 0
        raise FloatingPointError(
            f"the Frechet distance is {distance:.6g}, below zero: a covariance is none. Make the "
            "reference again."
        )
    return max(float(distance), 0.0)


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> tuple[float, float]:
    """Returns the mean and deviation over splits of exp(E_x KL(p(y|x) || p(y))), from 1 to K.

    Splits are contiguous, in the samples' order, and the last may be short. Samples that are sorted
    by class therefore score low.
    Args: probabilities, [N, K]; rows sum to 1.
    Raises: ValueError if they are no probabilities; FloatingPointError for NaN or infinite ones.
    Source: Salimans et al. 2016, sec. 4.
    """
    if np.ndim(probabilities) != 2 or not len(probabilities):
        raise UserError(f"probabilities must be [N, K], not {list(np.shape(probabilities))}.")
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], np.float64)
        sums = p.sum(axis=1)
        if not np.isfinite(sums).all():
            raise FloatingPointError("a probability is NaN or infinite: are the images finite?")
        if p.min() < 0 or np.abs(sums - 1).max() > 1e-3:
            raise UserError(
                f"probabilities from {p.min():.4g}, whose rows sum to {sums.min():.4g}.."
                f"{sums.max():.4g}, are none: apply softmax to logits first."
            )
        # E_x sum_y p(y|x) log(p(y|x) / p(y)) = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y)
        scores.append(np.exp(_p_log_p(p).sum(axis=1).mean() - _p_log_p(p.mean(axis=0)).sum()))
    return float(np.mean(scores)), float(np.std(scores))


def _p_log_p(p):
    """Returns p log p, 0 where p is 0."""
    return p * np.log(np.where(p > 0, p, 1))


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Returns KID: mean and deviation of the unbiased MMD^2 over random subsets.

    The kernel is (x.y / D + 1)^3.
    Args:
      samples: [N, D].
      reference: [M, D].
      seed: draws the subsets as torch-fidelity does.
    Raises: ValueError if a set is smaller than a subset; FloatingPointError for a mean that is not
      finite.
    Source: Binkowski et al. 2018, eq. 4.
    """
    precision_recall.check_pair(samples, reference)
    if min(len(samples), len(reference)) < subset_size:
        raise UserError(
            f"{len(samples)} samples and {len(reference)} reference features do not fill subsets "
            f"of {subset_size}: take more, or a smaller subset_size."
        )
    rng, distances = np.random.RandomState(seed), []
    for _ in range(subsets):
        # In f64, since the terms are near 1 and their difference may be 1e-5.
        x, y = (
            features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)
            for features in (samples, reference)
        )
        # Unbiased: the kernel of a point with itself, on the diagonal, is left out.
        within = sum(k.sum() - np.trace(k) for k in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
        between = _cubic_kernel(x, y).mean()
        distances.append(within / (subset_size * (subset_size - 1)) - 2 * between)
    if not np.isfinite(distances).all():
        raise FloatingPointError("the kernel distance is not finite: are the features?")
    return float(np.mean(distances)), float(np.std(distances))


def _cubic_kernel(x, y):
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel  # a power takes ten times as long
