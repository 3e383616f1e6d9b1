"""Features and points that the tests of this folder share."""

import numpy as np


def decaying_features(n: int, d: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    """Correlated columns with a mean of their own and a spectrum that falls like that of real features."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) / np.arange(1, d + 1)[:, None] ** 0.7
    return (rng.standard_normal((n, d)) @ mixing + 3 * rng.standard_normal(d)).astype(dtype)


def blobs(n: int, d: int, centres: int, spread: float, seed: int = 0) -> np.ndarray:
    """Unit vectors around `centres` random directions, (n, d) float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((centres, d))[rng.integers(0, centres, n)] + spread * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def cosine_errors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the inner products of rows differ: free of signs and rotations."""
    x, y = x[:1000].astype(np.float64), y[:1000].astype(np.float64)
    return np.abs(x @ x.T - y @ y.T)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings differ by names only."""
    pairs = len(np.unique(np.stack([a, b]), axis=1).T)
    return pairs == len(np.unique(a)) == len(np.unique(b))
