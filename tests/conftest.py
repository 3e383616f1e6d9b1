"""What all tests share: the small networks under their names, a folder of crops, a finished run.

Plain helpers are in tests/helpers.py (refuses, equal) and tests/small_run.py (write_crops, train).
"""

import pytest

import models
from tests import runs, small_run, tiny, toy


@pytest.fixture(scope="session", autouse=True)
def small_networks():
    """`--arch tiny` and `--arch toy` exist in every test, and in what fixtures of any scope run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.ARCHITECTURES, "tiny", tiny.tiny)
        patch.setitem(models.ARCHITECTURES, "toy", toy.toy)
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """60 crops of 6 photographs, 48 pixels, in class folders. To be read only: copy what you change."""
    return small_run.write_crops(tmp_path_factory.mktemp("photos") / "small", pictures=6, each=10)


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """EXP of a run of the tiny network on `photos`, two epochs with 5 clusters. To be read only."""
    return small_run.train(photos, tmp_path_factory.mktemp("finished") / "exp")


@pytest.fixture(scope="session")
def whole(photos, tmp_path_factory):
    """EXP of a run of 3 epochs of 4 steps, 8 clusters, a checkpoint every 3 steps. To be read only."""
    return runs.train(photos, tmp_path_factory.mktemp("whole") / "exp", "--checkpoints", 3)
