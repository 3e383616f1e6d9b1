"""benchmarks/scale.py: counts against sums by hand, formulae that can be worked out, the document."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import epoch, epoch_deepercluster, scale, two_level
from tests.helpers import ROOT
from util import UserError

JOB = epoch.Job(1000, 10, nodes=1, gpus=1, batch=100)


def test_counted_flops_of_alexnet_equal_the_sum_over_its_layers():
    convs = [(55, 11, 2, 96), (27, 5, 96, 256), (13, 3, 256, 384), (13, 3, 384, 384), (13, 3, 384, 256)]
    macs = sum(side**2 * kernel**2 * inputs * outputs for side, kernel, inputs, outputs in convs)
    macs += 9216 * 4096 + 4096 * 4096
    macs += 224**2 * (3 + 2 * 9)  # grey, Sobel
    assert epoch.count("alexnet").forward == 2 * macs
    parameters = sum(k**2 * i * o + 3 * o for _, k, i, o in convs) + 9217 * 4096 + 4097 * 4096
    assert epoch.count("alexnet").body == parameters


def test_all_reduce_is_free_on_one_gpu_and_a_ring_on_two():
    assert epoch.all_reduce(1e9, JOB) == 0
    ring = 1e9 / (epoch.NVLINK * epoch.ASSUMED["links"])  # 2 (2 - 1) / 2 = 1
    assert epoch.all_reduce(1e9, replace(JOB, gpus=2)) == pytest.approx(ring)
    assert epoch.all_reduce(1e9, replace(JOB, gpus=2, nodes=2)) > 5 * ring  # the network is slower


def test_arithmetic_is_divided_over_ranks_but_sgd_is_not():
    one, four = JOB, replace(JOB, gpus=4)
    assert epoch.feature_forward(one) == pytest.approx(4 * epoch.feature_forward(four))
    sgd = (4 * epoch.step_arithmetic(four) - epoch.step_arithmetic(one)) / 3
    moved = 4 * (5 * one.network.body + 3 * one.head) * one.steps
    assert sgd == pytest.approx(moved / (epoch.HBM * epoch.ASSUMED["links"]))


def test_an_epoch_is_the_sum_of_its_passes_and_a_pass_its_slowest_part():
    found = epoch.phases(scale.JOBS["ImageNet, 1 GPU"])
    names = ("feature pass", "PCA", "k-means", "labels, sampler, logs", "training pass", "checkpoint")
    assert found["epoch"] == pytest.approx(sum(found[name] for name in names))
    assert found["feature pass"] == max(found["- read"], found["- decode and crop"], found["- forward"])


def test_document_holds_the_tables(tmp_path):
    document = ROOT / "docs" / "scale.md"
    scale.check_document(str(document))
    changed = tmp_path / "scale.md"
    changed.write_text(
        document.read_text(encoding="utf-8").replace("| - forward | 11 |", "| - forward | 12 |")
    )
    with pytest.raises(UserError, match="alexnet, bf16, seconds"):
        scale.check_document(str(changed))


def test_the_published_period_has_the_sizes_that_the_paper_s_run_had():
    period = scale.PUBLISHED
    assert (period.fine, period.classes) == (80_000, 16)
    work = epoch_deepercluster.clustering_work(period)
    assert work["search"] == pytest.approx(11 * 2 * period.images * 80_004 * 4096)
    found = epoch_deepercluster.memory(period)
    rows, theirs = found["host: rows, whitened in place, 4 N d / W"]
    assert rows == theirs == pytest.approx(24.6e9, rel=0.01)
    assert found["disk: files of rows between the levels, all ranks"] == (0, pytest.approx(1.57e12, rel=0.01))
    assert found["host: first rank, rows for the covariance"] == (0, pytest.approx(137e9, rel=0.01))


def test_the_search_of_a_period_falls_with_super_clusters_and_ranks():
    one = epoch_deepercluster.clustering_work(scale.PERIODS["one super-cluster"])["search"]
    four = epoch_deepercluster.clustering_work(scale.PUBLISHED)["search"]
    assert one / four == pytest.approx(4, rel=0.001)
    found = epoch_deepercluster.seconds(scale.PUBLISHED)
    parts = ("feature pass", "whitening", "labels to all, twice", "training pass", "checkpoint")
    parts += ("k-means: search", "k-means: sums", "k-means: messages")
    assert found["period"] == pytest.approx(sum(found[name] for name in parts))


def test_the_fit_finds_the_rates_that_measurements_were_made_of():
    rates = np.array([2e-11, 1e-9, 4e-9, 1e-3, 2e-8, 5e-3])
    grid = itertools.product((5_000, 40_000), (100, 1600), (1, 4), (1, 2, 4))
    jobs = [two_level.Clustering(n, k, m, 128, 10, ranks, 2) for n, k, m, ranks in grid]
    found = two_level.fit(jobs, [two_level.predict(rates, job) for job in jobs])
    assert found == pytest.approx(rates, rel=1e-6)


def test_amounts_of_a_clustering_by_hand():
    job = two_level.Clustering(n=1000, k=40, m=4, d=8, niter=10, ranks=2, cores=2)
    assert job.amounts() == [
        2 * 1000 * (4 + 10) * 8 * 11 / 2,
        0,
        2 * 1000 * 8 * 10 / 2,
        3 * 10 * 5,
        8 * 10 * 44 * 8,
        5,
    ]
