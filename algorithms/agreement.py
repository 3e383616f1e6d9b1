"""How well two labellings of the same rows agree, and how rows spread over clusters."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln


def compare(labels_a: np.ndarray, labels_b: np.ndarray) -> dict[str, float]:
    """How well two labellings (N,) of the same rows agree: {"nmi": ..., "ami": ...}.

    NMI is mutual information over the geometric mean of the entropies, scikit-learn's
    average_method='geometric' (the definition of 2018); it is not corrected for chance. AMI is, and equals
    scikit-learn's: (MI - expected MI) / (mean entropy - expected MI), Vinh et al., JMLR 2010. It is written
    out here because scikit-learn's takes minutes for 10,000 x 10,000 clusters.
    """
    if labels_a.shape != labels_b.shape or labels_a.ndim != 1 or len(labels_a) == 0:
        raise ValueError(f"cannot compare labels of shapes {labels_a.shape} and {labels_b.shape}")
    n = len(labels_a)
    a, b = (labels.astype(np.int64) - labels.min() for labels in (labels_a, labels_b))
    sizes_a, sizes_b = (counts[counts > 0] for counts in (np.bincount(a), np.bincount(b)))
    if len(sizes_a) == len(sizes_b) == 1:
        return {"nmi": 1.0, "ami": 1.0}
    _, joint = np.unique(a * (b.max() + 1) + b, return_counts=True)
    entropy_a, entropy_b, entropy_joint = (_entropy(sizes, n) for sizes in (sizes_a, sizes_b, joint))
    mutual = max(entropy_a + entropy_b - entropy_joint, 0.0)
    if mutual < np.finfo(np.float64).eps:
        nmi = 0.0
    else:
        nmi = mutual / np.sqrt(entropy_a * entropy_b)
    expected = _expected_mutual_information(sizes_a, sizes_b, n)
    room = (entropy_a + entropy_b) / 2 - expected
    ami = (mutual - expected) / (np.copysign(max(abs(room), np.finfo(np.float64).eps), room))
    return {"nmi": float(nmi), "ami": float(ami)}


def hungarian_accuracy(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of rows that are right under the best one-to-one map from clusters to classes.

    labels and classes: (N,) int64 from 0; a cluster without a class of its own counts as wrong.
    """
    joint = np.zeros((labels.max() + 1, classes.max() + 1), np.int64)
    np.add.at(joint, (labels, classes), 1)
    return float(joint[linear_sum_assignment(joint, maximize=True)].sum() / len(labels))


def describe_sizes(sizes: np.ndarray) -> dict[str, float]:
    """How rows spread over clusters of sizes (k,): filled ones, their smallest, median and largest, entropy.

    The entropy of the sizes is in nats; log(k) would be all equal.
    """
    filled = sizes[sizes > 0]
    return {
        "number": len(sizes),
        "nonempty": len(filled),
        "min": int(filled.min()),
        "median": float(np.median(filled)),
        "max": int(filled.max()),
        "entropy": _entropy(filled, int(sizes.sum())),
    }


def _entropy(sizes: np.ndarray, n: int) -> float:
    """Entropy in nats of a partition of n rows into groups of these sizes, all positive."""
    return float(np.log(n) - (sizes * np.log(sizes)).sum() / n)


def _expected_mutual_information(sizes_a: np.ndarray, sizes_b: np.ndarray, n: int) -> float:
    """Expected mutual information in nats of two random labellings with these cluster sizes.

    Vinh, Epps, Bailey, JMLR 2010, equation 24a: clusters of sizes a and b share m rows with the
    hypergeometric probability a! b! (n-a)! (n-b)! / (n! m! (a-m)! (b-m)! (n-a-b+m)!). Clusters of equal size
    are counted once, and m runs only where that probability is not negligible: 10 standard deviations around
    its mean, and 30 more for the tail that is longer than a normal one.
    """
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    (a_sizes, a_times), (b, b_times) = (np.unique(s, return_counts=True) for s in (sizes_a, sizes_b))
    expected = 0.0
    for a, times in zip(a_sizes, a_times):
        mean = a * b / n
        reach = 10 * np.sqrt(mean) + 30
        low = np.maximum(np.maximum(1, a + b - n), np.floor(mean - reach).astype(np.int64))
        high = np.minimum(np.minimum(a, b), np.ceil(mean + reach).astype(np.int64))
        m = low[:, None] + np.arange((high - low).max() + 1)
        beyond = m > high[:, None]
        m = np.minimum(m, high[:, None])
        column = b[:, None]
        log_probability = (
            (log_factorial[a] + log_factorial[n - a] - log_factorial[n])
            + (log_factorial[b] + log_factorial[n - b])[:, None]
            - log_factorial[m]
            - log_factorial[a - m]
            - log_factorial[column - m]
            - log_factorial[n - a - column + m]
        )
        information = m / n * np.log(n * m / (a * column)) * np.exp(log_probability)
        information[beyond] = 0
        expected += times * (b_times * information.sum(1)).sum()
    return float(expected)
