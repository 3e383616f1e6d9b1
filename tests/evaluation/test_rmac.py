"""evaluation/rmac.py: regions against the specification line by line, pooling, whitening, the descriptor."""

import numpy as np
import pytest
import torch

from evaluation import rmac
from tests import reference
from util import UserError

# -------------------------------------------------------------------------------- regions


def test_regions_of_hand_computed_maps():
    # square, w = 4: no extra. Level 1: one of 4. Level 2: floor(8 / 3) = 2, starts 0 and 2.
    assert rmac.regions(4, 4, 2).tolist() == [
        [0, 0, 4, 4], [0, 0, 2, 2], [2, 0, 2, 2], [0, 2, 2, 2], [2, 2, 2, 2],
    ]  # fmt: skip
    # 6 x 4: overlaps 1 - (2 / (steps - 1)) / 4 = 0.5, 0.75, ...: the first is nearest to 0.4, so one extra.
    # Level 2: side 2, three along x with b = (6 - 2) / 2 = 2.
    assert rmac.regions(6, 4, 1).tolist() == [[0, 0, 4, 4], [2, 0, 4, 4]]
    assert rmac.regions(6, 4, 2)[2:].tolist() == [
        [0, 0, 2, 2], [2, 0, 2, 2], [4, 0, 2, 2], [0, 2, 2, 2], [2, 2, 2, 2], [4, 2, 2, 2],
    ]  # fmt: skip
    # 64 x 48, a photograph at S = 1024: 2 + 6 + 12 regions; level 3 starts at floor(11 + 40 / 3 i) - 11.
    boxes = rmac.regions(64, 48, 3)
    assert len(boxes) == 20
    assert boxes[8:12].tolist() == [[0, 0, 24, 24], [13, 0, 24, 24], [26, 0, 24, 24], [40, 0, 24, 24]]
    # 40 x 10: overlaps 1 - 3 / (steps - 1) = ..., 0.25, 0.4, 0.5: the fifth, so six squares in level 1.
    assert rmac.regions(40, 10, 1)[:, 0].tolist() == [0, 6, 12, 18, 24, 30]


def test_regions_equal_the_slow_version_over_many_sizes():
    for width in range(2, 72):
        for height in range(2, 72, 1 if width % 7 == 0 else 5):
            for levels in (1, 2, 3):
                ours = [tuple(box) for box in rmac.regions(width, height, levels).tolist()]
                assert ours == reference.rmac_regions(width, height, levels), (width, height, levels)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 1), (2, 5), (3, 3), (64, 3)])
@pytest.mark.parametrize("levels", [1, 3, 5])
def test_regions_are_never_empty_and_never_leave_the_map(size, levels):
    boxes = rmac.regions(*size, levels)
    assert boxes.min(axis=0)[:2].tolist() == [0, 0] and boxes[:, 2:].min() >= 1
    assert (boxes[:, 0] + boxes[:, 2]).max() <= size[0] and (boxes[:, 1] + boxes[:, 3]).max() <= size[1]


@pytest.mark.parametrize("size", [(1, 1), (9, 4), (4, 9), (7, 7), (13, 12), (40, 30)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_equals_a_loop_over_regions(size, channels_last):
    maps = torch.randn(1, 11, size[1], size[0], generator=torch.Generator().manual_seed(0))
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    expected = [maps[0, :, y : y + h, x : x + w].amax((1, 2)) for x, y, w, h in rmac.regions(*size, 3)]
    assert torch.equal(rmac.pool_regions(maps[0], 3), torch.stack(expected))


# -------------------------------------------------------------------------------- whitening, descriptor


def test_whitened_rows_are_uncorrelated_and_of_unit_variance():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((9000, 6)) * [5, 4, 3, 2, 1, 0.5] @ rng.standard_normal((6, 6)) + 3).astype(
        "f4"
    )
    mean, matrix = rmac.fit_whitening(rows, 4)
    whitened = (rows - mean) @ matrix
    assert matrix.shape == (6, 4)
    np.testing.assert_allclose(whitened.T @ whitened / len(rows), np.eye(4), atol=1e-6)
    # the first axis is the one of largest variance
    values = np.linalg.eigvalsh(np.cov(rows.astype(float).T, bias=True))
    np.testing.assert_allclose(1 / np.linalg.norm(matrix[:, 0]) ** 2, values[-1], rtol=1e-6)


def test_small_eigenvalues_are_raised_to_the_floor():
    rng = np.random.default_rng(0)
    rows = np.zeros((500, 5), np.float32)
    rows[:, 0], rows[:, 1] = 3 * rng.standard_normal(500), rng.standard_normal(500)
    _, matrix = rmac.fit_whitening(rows)
    largest = np.var(rows[:, 0].astype(float))
    assert matrix.shape == (5, 5)
    np.testing.assert_allclose(np.linalg.norm(matrix[:, 2:], axis=0), 1 / np.sqrt(largest * 1e-5), rtol=1e-2)
    with pytest.raises(UserError, match="equal"):
        rmac.fit_whitening(np.ones((10, 3), np.float32))


def test_descriptor_follows_the_recipe_step_by_step():
    generator = torch.Generator().manual_seed(0)
    activation = torch.rand(6, 5, 8, generator=generator)
    whitening = rmac.Whitening(torch.rand(6, generator=generator), torch.randn(6, 3, generator=generator))
    expected = reference.rmac_descriptor(
        activation.numpy(), 3, whitening.mean.numpy(), whitening.matrix.numpy()
    )
    ours = rmac.rmac(rmac.region_descriptors(activation, 3), whitening)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_a_whitening_comes_back_from_its_file_and_damage_is_refused(tmp_path):
    path, settings = tmp_path / "pca.npz", {"dim": 3, "regions": {"S": 112, "model": "m"}}
    rng = np.random.default_rng(0)
    mean, matrix = rng.standard_normal(4), rng.standard_normal((4, 3))
    with pytest.raises(UserError, match=r"pca\.npz is missing: run --stage train_pca first"):
        rmac.read_whitening(path)
    rmac.write_whitening(path, mean, matrix, settings)
    whitening, found = rmac.read_whitening(path)
    assert found == settings and whitening.matrix.dtype == torch.float32
    np.testing.assert_array_equal(whitening.mean, mean.astype(np.float32))
    np.testing.assert_array_equal(whitening.matrix, matrix.astype(np.float32))
    content = bytearray(path.read_bytes())
    for damaged in (content[:-30], b"hello", b"", bytes(content).replace(mean.tobytes(), bytes(32))):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"pca\.npz: damaged; remove it"):
            rmac.read_whitening(path)
