"""The samplers: how often each cluster and each image is drawn."""

import numpy as np
import pytest

from data.sampling import ShareSampler, released_draws, uniform_draws
from tests import reference


def labels_of_sizes(*sizes: int, seed: int = 0) -> np.ndarray:
    """Labels in random order, of which sizes[c] are c."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("total", [0, 1, 3, 100, 103, 104, 1000, 4001])
def test_every_non_empty_cluster_is_drawn_equally_often(total):
    labels = labels_of_sizes(1, 0, 400, 26, 500, 0, 73)
    draws = uniform_draws(labels, total, seed=1)
    assert draws.shape == (total,) and draws.dtype == np.int64
    counts = np.bincount(labels[draws], minlength=7)[[0, 2, 3, 4, 6]]
    assert counts.max() - counts.min() <= 1


def test_replacement_exactly_when_the_cluster_is_not_larger_than_its_draws():
    # 4 clusters, 99 draws: int(99 / 4) + 1 = 25 each, at most one of them cut
    labels = labels_of_sizes(24, 25, 26, 1000)
    repeats = np.zeros(4, int)
    for seed in range(20):
        draws = uniform_draws(labels, 99, seed)
        counts = np.bincount(draws, minlength=len(labels))
        for cluster in range(4):
            repeats[cluster] += counts[labels == cluster].max() > 1
    assert repeats[0] == 20 and repeats[1] == 20  # with: 25 different of 25 has a chance of 1e-10
    assert repeats[2] == 0 and repeats[3] == 0


def test_images_of_a_cluster_are_equally_likely():
    labels = labels_of_sizes(4, 40)
    counts = np.zeros(44)
    for seed in range(4000):
        counts += np.bincount(uniform_draws(labels, 20, seed), minlength=44)
    for cluster, size in enumerate((4, 40)):
        expected = 4000 * 10 / size
        assert np.abs(counts[labels == cluster] - expected).max() < 5 * np.sqrt(expected)


def test_counts_agree_with_the_cluster_by_cluster_form():
    labels = labels_of_sizes(3, 50, 0, 200, 12)
    ours = np.mean([np.bincount(uniform_draws(labels, 90, s), minlength=265) for s in range(2000)], axis=0)
    plain = np.mean(
        [np.bincount(reference.uniform_draws(labels, 90, s), minlength=265) for s in range(2000)], axis=0
    )
    for cluster in (0, 1, 3, 4):
        assert ours[labels == cluster].sum() == pytest.approx(plain[labels == cluster].sum(), abs=0.1)


def test_the_order_is_shuffled_across_clusters():
    labels = labels_of_sizes(500, 500)
    drawn = labels[uniform_draws(labels, 1000, seed=0)]
    changes = int((np.diff(drawn) != 0).sum())
    assert 400 < changes < 600  # sorted: 1; alternating: 999


def test_a_seed_fixes_the_draws():
    labels = labels_of_sizes(10, 200, 3)
    assert np.array_equal(uniform_draws(labels, 150, 7), uniform_draws(labels, 150, 7))
    assert not np.array_equal(uniform_draws(labels, 150, 7), uniform_draws(labels, 150, 8))
    seed = 2**62 + 5  # as derive_seed makes them
    assert np.array_equal(released_draws(labels, 150, seed), released_draws(labels, 150, seed))


def test_released_draws_are_positions_in_the_list_written_cluster_after_cluster():
    labels = labels_of_sizes(5, 0, 60, 35)
    order = [i for cluster in range(4) for i in range(100) if labels[i] == cluster]
    draws = uniform_draws(labels, 80, seed=3)
    assert released_draws(labels, 80, seed=3).tolist() == [order[d] for d in draws]


def test_released_draws_favour_large_clusters():
    labels = labels_of_sizes(100, 900)
    counts = np.bincount(labels[released_draws(labels, 1000, seed=0)])
    assert counts[1] > 5 * counts[0]


@pytest.mark.parametrize("labels", [[], [-1, 2], [[1, 2]]])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(ValueError, match="cannot draw"):
        uniform_draws(np.array(labels, dtype=np.int64), 10, seed=0)


def test_a_sampler_tells_the_position_and_starts_where_it_is_told():
    draws = np.array([7, 3, 3, 9])
    assert list(ShareSampler(draws, batch=2)) == [[(0, 7), (1, 3)], [(2, 3), (3, 9)]]
    late = ShareSampler(draws, batch=2, first=1)
    assert list(late) == [[(2, 3), (3, 9)]] and len(late) == 1
    assert list(ShareSampler(draws, batch=2, first=9)) == [] and len(ShareSampler(draws, 2, first=9)) == 0
