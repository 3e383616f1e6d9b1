"""How well two labellings of the same rows agree, and how rows spread over clusters."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln


@dataclass
class Contingency:
    """How many rows of each cluster have each class: the filled cells of that table, and no others.

    clusters, classes, counts: (M,) int64, a cell each, counts at least 1; ids are from 0. Of 10,000 clusters
    and 1,000 classes most of the ten million cells are empty.
    """

    clusters: np.ndarray
    classes: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, classes: np.ndarray) -> "Contingency":
        """Of two labellings (N,) of the same rows; ids are whole numbers from 0."""
        if labels.shape != classes.shape or labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"cannot compare labels of shapes {labels.shape} and {classes.shape}")
        width = int(classes.max()) + 1
        cells, counts = np.unique(labels.astype(np.int64) * width + classes, return_counts=True)
        return cls(cells // width, cells % width, counts)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def sizes(self) -> list[np.ndarray]:
        """Rows of each filled cluster, and of each class that there is, int64."""
        found = (np.bincount(ids, self.counts) for ids in (self.clusters, self.classes))
        return [sizes[sizes > 0].astype(np.int64) for sizes in found]

    def with_counts(self, counts: np.ndarray) -> "Contingency":
        """The same cells with other counts (M,); those that are 0 go."""
        kept = counts > 0
        return Contingency(self.clusters[kept], self.classes[kept], counts[kept])

    def scores(self) -> dict[str, float]:
        """How well clusters and classes agree: nmi, nmi_arithmetic, ami, ari; see `compare` for the first.

        nmi_arithmetic: mutual information over the arithmetic mean of the entropies, scikit-learn's default
        since 0.22. ari: Hubert and Arabie, 'Comparing partitions', 1985. All equal scikit-learn's.
        """
        sizes = self.sizes()
        return agreement(*sizes, self.counts) | {"ari": adjusted_rand(*sizes, self.counts)}

    def most_frequent_class(self) -> np.ndarray:
        """(clusters,) int64: the class of most of a cluster's rows, of equals the first; -1: no row."""
        order = np.lexsort((-self.classes, self.counts))  # the last that is written counts
        mapping = np.full(int(self.clusters.max()) + 1, -1)
        mapping[self.clusters[order]] = self.classes[order]
        return mapping

    def best_one_to_one(self) -> np.ndarray:
        """(clusters,) int64: a class of its own for each cluster, so that most rows are right; -1: none left.

        The Hungarian problem on a dense table: 80 MB for 10,000 clusters and 1,000 classes.
        """
        dense = np.zeros((int(self.clusters.max()) + 1, int(self.classes.max()) + 1), np.int64)
        dense[self.clusters, self.classes] = self.counts
        mapping = np.full(len(dense), -1)
        rows, columns = linear_sum_assignment(dense, maximize=True)
        mapping[rows] = columns
        return mapping

    def accuracy(self, mapping: np.ndarray) -> float:
        """Share of rows that are right where cluster c stands for class mapping[c]; -1, and beyond: none."""
        known = self.clusters < len(mapping)
        right = mapping[self.clusters[known]] == self.classes[known]
        return float(self.counts[known][right].sum() / self.total)


def compare(labels_a: np.ndarray, labels_b: np.ndarray) -> dict[str, float]:
    """How well two labellings (N,) of the same rows agree: {"nmi": ..., "ami": ...}.

    NMI is mutual information over the geometric mean of the entropies, scikit-learn's
    average_method='geometric' (the definition of 2018); it is not corrected for chance. AMI is, and equals
    scikit-learn's: (MI - expected MI) / (mean entropy - expected MI), Vinh et al., JMLR 2010. It is written
    out here because scikit-learn's takes minutes for 10,000 x 10,000 clusters.
    """
    if labels_a.shape != labels_b.shape or labels_a.ndim != 1 or len(labels_a) == 0:
        raise ValueError(f"cannot compare labels of shapes {labels_a.shape} and {labels_b.shape}")
    a, b = (labels.astype(np.int64) - labels.min() for labels in (labels_a, labels_b))
    table = Contingency.of(a, b)
    found = agreement(*table.sizes(), table.counts)
    return {name: found[name] for name in ("nmi", "ami")}


def agreement(sizes_a: np.ndarray, sizes_b: np.ndarray, joint: np.ndarray) -> dict[str, float]:
    """nmi, nmi_arithmetic and ami of sizes of groups and of what two groups share; all positive int64."""
    n = int(joint.sum())
    if len(sizes_a) == len(sizes_b) == 1:
        return {"nmi": 1.0, "nmi_arithmetic": 1.0, "ami": 1.0}
    entropy_a, entropy_b, entropy_joint = (_entropy(sizes, n) for sizes in (sizes_a, sizes_b, joint))
    mutual = max(entropy_a + entropy_b - entropy_joint, 0.0)
    if mutual < np.finfo(np.float64).eps:
        nmi = arithmetic = 0.0
    else:
        nmi = mutual / np.sqrt(entropy_a * entropy_b)
        arithmetic = mutual / ((entropy_a + entropy_b) / 2)
    expected = _expected_mutual_information(sizes_a, sizes_b, n)
    room = (entropy_a + entropy_b) / 2 - expected
    ami = (mutual - expected) / (np.copysign(max(abs(room), np.finfo(np.float64).eps), room))
    return {"nmi": float(nmi), "nmi_arithmetic": float(arithmetic), "ami": float(ami)}


def adjusted_rand(sizes_a: np.ndarray, sizes_b: np.ndarray, joint: np.ndarray) -> float:
    """The Rand index, corrected for chance, of sizes as in `agreement`; 1 where both are one group."""
    pairs_a, pairs_b, pairs = (int((sizes * (sizes - 1)).sum()) for sizes in (sizes_a, sizes_b, joint))
    n = int(joint.sum())
    expected = pairs_a * pairs_b / max(n * (n - 1), 1)
    room = (pairs_a + pairs_b) / 2 - expected
    return float((pairs - expected) / room) if room else 1.0


def hungarian_accuracy(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of rows that are right under the best one-to-one map from clusters to classes.

    labels and classes: (N,) int64 from 0; a cluster without a class of its own counts as wrong.
    """
    table = Contingency.of(labels, classes)
    return table.accuracy(table.best_one_to_one())


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
