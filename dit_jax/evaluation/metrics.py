"""Frechet distance, kernel distance and Inception Score, computed from arrays.

The Frechet distance is FID for the features of Inception-2015's pool3 [N, 2048]. It is sFID (Nash
et al. 2021) for the first 7 channels of mixed_6, flattened to [N, 2023].
"""

import dataclasses
import logging

import numpy as np

from dit_jax.errors import UserError

logger = logging.getLogger("dit_jax")

SPLIT_SIZE = 5_000  # images in a split of the Inception Score, as in the ADM evaluator

# Relative to a covariance's largest value or eigenvalue. The error of a covariance that was summed
# in f32 is smaller.
COVARIANCE_ROUNDING = 1e-5
BLOCK_SIZE = 4096  # features whose products are summed at a time


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] f64 of `n` feature vectors; n is None if it is not known."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None = None


class Moments:
    """Running mean and covariance, in f64, of features that arrive in blocks.

    Source: Chan et al. 1979, for the union of two sets.
    """

    def __init__(self):
        # Fewer than BLOCK_SIZE features. One merge takes as long as adding hundreds of them.
        self._waiting = []
        self._n, self._mean, self._scatter = 0, 0.0, 0.0

    def add(self, features: np.ndarray) -> None:
        """Adds a copy of features [n, D] of any float type.

        Raises: ValueError if the features are not a matrix.
        """
        if np.ndim(features) != 2:
            raise UserError(f"features must be [N, D], not {list(np.shape(features))}.")
        for start in range(0, len(features), BLOCK_SIZE):
            self._waiting.append(np.array(features[start : start + BLOCK_SIZE], np.float64))
            if sum(map(len, self._waiting)) >= BLOCK_SIZE:
                self._merge()

    def _merge(self):
        """Merges the waiting features into count, mean and scatter: (n - 1) * covariance."""
        deviations = np.concatenate(self._waiting)
        self._waiting.clear()
        mean = deviations.mean(axis=0)
        deviations -= mean[None]
        n = self._n + len(deviations)
        delta = mean - self._mean
        scaled = delta * np.sqrt(self._n * len(deviations) / n)
        scatter = np.outer(scaled, scaled)
        scatter += self._scatter
        # BLAS computes only half of a symmetric product X^T X.
        scatter += deviations.T @ deviations
        self._mean = self._mean + delta * (len(deviations) / n)
        self._n, self._scatter = n, scatter

    def gaussian(self) -> Gaussian:
        """Returns the mean and the unbiased covariance of all features so far.

        Raises: ValueError for fewer than two features.
        """
        if self._waiting:
            self._merge()
        if self._n < 2:
            raise UserError(f"{self._n} samples have no covariance. Take 2 or more.")
        return Gaussian(self._mean, self._scatter / (self._n - 1), self._n)


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """Returns the mean and covariance of features [N, D].   Raises: ValueError as `Moments`."""
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def check_gaussian(mean: np.ndarray, covariance: np.ndarray, dim: int) -> None:
    """Raises ValueError unless arrays are a mean [dim] and, up to rounding, a covariance."""
    are_floats = mean.dtype.kind == covariance.dtype.kind == "f"
    if not are_floats or (mean.shape, covariance.shape) != ((dim,), (dim, dim)):
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
            "the covariance is not symmetric: two values that must be equal differ by "
            f"{asymmetry:.3g}, and the largest value is {largest:.3g}"
        )
    eigenvalues = np.linalg.eigvalsh(covariance.astype(np.float64))  # in ascending order
    if eigenvalues[0] < -COVARIANCE_ROUNDING * eigenvalues[-1]:
        raise UserError(
            f"the covariance has eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}, "
            "but variances are not negative"
        )


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Returns |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), exactly 0 for equal arguments.

    tr (S_a S_b)^(1/2) is computed as tr (R S_b R)^(1/2) with R = S_a^(1/2), where all matrices are
    symmetric. The distance is biased if there are too few features for a covariance of full rank; a
    warning is logged then.
    Raises: ValueError for shapes that do not fit; FloatingPointError for NaN or infinite values, or
      if the distance is below zero because a covariance has negative eigenvalues.
    Source: Dowson & Landau 1982; as a measure of images, FID, Heusel et al. 2017.
    """
    _check_comparable(a, b)
    # Rounding would make the distance of equal sets a small number instead of 0.
    if np.array_equal(a.mean, b.mean) and np.array_equal(a.covariance, b.covariance):
        return 0.0
    # Rounding may make eigenvalues near 0 negative. They are set to 0 before the root.
    eigenvalues, eigenvectors = np.linalg.eigh(a.covariance)
    root = (eigenvectors * np.sqrt(np.maximum(eigenvalues, 0))[None]) @ eigenvectors.T
    squares = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace_of_root = np.sqrt(np.maximum(squares, 0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_of_root
    if distance < -1e-4 * abs(traces):  # more than the rounding of roots of eigenvalues near 0
        raise FloatingPointError(
            f"the Frechet distance is {distance:.6g}, but it cannot be below zero: a covariance "
            "matrix is damaged. Make the reference again."
        )
    return max(float(distance), 0.0)


def _check_comparable(a, b):
    """Raises unless two Gaussians are finite and of equal shapes; warns of too few features."""
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
                f"the {name} mean or covariance has values that are NaN or infinite. Are the "
                "images and their features finite?"
            )
    if too_few := [g.n for g in (a, b) if g.n is not None and g.n - 1 < dim]:
        logger.warning(
            "Frechet distance: too few samples (%s) for features of %d values, so a covariance is "
            "rank-deficient. Compare the distance only with distances of as many samples.",
            " and ".join(map(str, too_few)),
            dim,
        )


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> tuple[float, float]:
    """Returns the mean and deviation over splits of exp(E_x KL(p(y|x) || p(y))), from 1 to K.

    Splits are contiguous, in the samples' order, and the last may be short. Samples that are sorted
    by class therefore score low.
    Args: probabilities, [N, K]; each row sums to 1.
    Raises: ValueError for negative values, or rows that do not sum to 1; FloatingPointError for NaN
      or infinite values.
    Source: Salimans et al. 2016, sec. 4.
    """
    if np.ndim(probabilities) != 2 or not len(probabilities):
        raise UserError(f"probabilities must be [N, K], not {list(np.shape(probabilities))}.")
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], np.float64)
        sums = p.sum(axis=1)
        if not np.isfinite(sums).all():
            raise FloatingPointError("a probability is NaN or infinite. Are the images finite?")
        if p.min() < 0 or np.abs(sums - 1).max() > 1e-3:
            raise UserError(
                f"probabilities must be at least 0 and sum to 1, but the least is {p.min():.4g} "
                f"and rows sum to {sums.min():.4g}..{sums.max():.4g}. Apply softmax to logits."
            )
        # E_x sum_y p(y|x) log(p(y|x) / p(y)) = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y)
        scores.append(np.exp(_p_log_p(p).sum(axis=1).mean() - _p_log_p(p.mean(axis=0)).sum()))
    return float(np.mean(scores)), float(np.std(scores))


def _p_log_p(p):
    """Returns p log p, which is 0 where p is 0."""
    return p * np.log(np.where(p > 0, p, 1))


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Returns KID: the mean and deviation of the unbiased MMD^2 over random subsets.

    The kernel is (x.y / D + 1)^3.
    Args:
      samples: [N, D].
      reference: [M, D].
      seed: draws the subsets as torch-fidelity does.
    Raises: ValueError if a set is smaller than a subset; FloatingPointError if the result is not
      finite.
    Source: Binkowski et al. 2018, eq. 4.
    """
    check_pair(samples, reference)
    if min(len(samples), len(reference)) < subset_size:
        raise UserError(
            f"{len(samples)} samples and {len(reference)} reference features do not fill subsets "
            f"of {subset_size}. Take more samples, or a smaller subset_size."
        )
    rng, distances = np.random.RandomState(seed), []
    for _ in range(subsets):
        # f64, because the terms are near 1 and their difference may be 1e-5.
        x, y = (
            features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)
            for features in (samples, reference)
        )
        # The estimate is unbiased without the kernel of a point with itself, on the diagonal.
        within = sum(k.sum() - np.trace(k) for k in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
        between = _cubic_kernel(x, y).mean()
        distances.append(within / (subset_size * (subset_size - 1)) - 2 * between)
    if not np.isfinite(distances).all():
        raise FloatingPointError("the kernel distance is not finite. Are the features finite?")
    return float(np.mean(distances)), float(np.std(distances))


def _cubic_kernel(x, y):
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel  # a power takes ten times as long


def check_pair(samples: np.ndarray, reference: np.ndarray) -> None:
    """Raises ValueError unless both sets are matrices with the same number of columns."""
    shapes = np.shape(samples), np.shape(reference)
    if len(shapes[0]) != 2 or shapes[0][1:] != shapes[1][1:]:
        raise UserError(f"features must be [N, D] and [M, D], not {shapes[0]} and {shapes[1]}.")
