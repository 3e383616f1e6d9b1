"""Views, batches, workers, and what a network is given."""

import pickle
import signal
import subprocess
import sys

import pytest
import torch
from torchvision import transforms as v1

import data
from data import decode
from tests.helpers import ROOT
from util import derive_seed

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, photo) -> data.ImageList:
    for i in range(7):
        photo.rotate(10 * i).save(tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}")
    return data.list_images(tmp_path)


def test_plain_view_gives_views_and_indexes_in_order(folder):
    view = data.PlainView(folder, data.central_crop(48))
    assert len(view) == 7
    batches = list(data.make_loader(view, 4, 0, CPU))
    assert [batch.views.shape for batch in batches] == [(4, 3, 48, 48), (3, 3, 48, 48)]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(7))
    assert [batch.broken for batch in batches] == [[], []]
    views = torch.cat([batch.views for batch in batches])
    expected = [data.central_crop(48)(decode.decode_file(folder.path(i))) for i in range(7)]
    assert torch.equal(views, torch.stack(expected))
    assert batches[0].views.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers, make, shape", [(0, data.central_crop, ()), (1, data.ten_crops, (10,))])
def test_broken_images_are_named_and_have_no_row(folder, workers, make, shape):
    folder.path(3).write_bytes(folder.path(3).read_bytes()[:-200])
    folder.path(0).write_bytes(b"")
    view = data.PlainView(folder, make(48))
    (batch,) = data.make_loader(view, 7, workers, CPU)
    assert batch.index.tolist() == [1, 2, 4, 5, 6] and batch.broken == [0, 3]
    assert batch.views.shape == (5, *shape, 3, 48, 48)
    assert torch.equal(batch.views[1], view[2][0])
    alone = list(data.make_loader(view, 1, workers, CPU))[3]
    assert (alone.index.tolist(), alone.broken, len(alone.views)) == ([], [3], 0)
    assert alone.index.dtype == torch.int64
    assert "truncated" in data.broken_reason(folder, 3)
    assert data.broken_reason(folder, 1) is None


def two_views(image):
    return [data.train_crop(48)(image), data.train_crop(32)(image)]


class TurnedView(data.RandomView):
    """Draws are (position, image, how often to turn it)."""

    def view(self, seed, i, turns):
        return [view.rot90(turns, (-2, -1)) for view in super().view(seed, i)]


def test_a_view_of_several_crops_is_a_list_of_batches_and_draws_carry_more(folder):
    view = TurnedView(folder, two_views).at(5, 2)
    order = [(0, 3, 0), (1, 6, 1)]
    (batch,) = data.make_loader(view, 2, 0, CPU, sampler=order)
    assert [group.shape for group in batch.views] == [(2, 3, 48, 48), (2, 3, 32, 32)]
    assert batch.index.tolist() == [3, 6] and [more.tolist() for more in batch.more] == [[0, 1]]
    torch.manual_seed(derive_seed(5, "crop", 2, 1))
    for group, expected in zip(batch.views, two_views(folder.decode(6))):
        assert torch.equal(group[1], expected.rot90(1, (-2, -1)))
    large, small = data.to_input(batch.views, CPU)
    assert torch.equal(small, data.to_input(batch.views[1], CPU)) and large.dtype == torch.float32


def test_what_a_network_sees_is_normalised_and_channels_last(folder):
    (batch,) = data.make_loader(data.PlainView(folder, data.central_crop(48)), 7, 0, CPU)
    x = data.to_input(batch.views, CPU)
    assert torch.equal(x, data.normalise(batch.views)) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(data.to_input(batch.views, CPU, (0, 0, 0), (1, 1, 1)), batch.views / 255, atol=1e-7)


def test_a_batch_sampler_makes_the_batches(folder):
    view = data.RandomView(folder, data.train_crop(48)).at(5, 2)
    batches = list(data.make_loader(view, 3, 0, CPU, batch_sampler=[[(0, 1)], [(1, 2), (2, 2)]]))
    assert [batch.index.tolist() for batch in batches] == [[1], [2, 2]]
    assert torch.equal(batches[1].views[1], view[2, 2][0])


def test_random_view_depends_on_seed_epoch_and_position_only(folder):
    def views(workers: int, order: list[tuple[int, int]], seed=5, epoch=2) -> dict:
        view = data.RandomView(folder, data.train_crop(48)).at(seed, epoch)
        batches = list(data.make_loader(view, 3, workers, CPU, sampler=order))
        assert torch.cat([batch.index for batch in batches]).tolist() == [i for _, i in order]
        return dict(zip(order, torch.cat([batch.views for batch in batches])))

    order = [(position, (3 * position) % 7) for position in range(10)]
    first = views(0, order)
    for other in (views(2, order), views(1, order[::-1]), {item: views(0, [item])[item] for item in order}):
        assert all(torch.equal(first[item], other[item]) for item in order)
    assert len({view.numpy().tobytes() for view in first.values()}) == 10
    for other in (views(0, order, seed=6), views(0, order, epoch=3)):
        assert not any(torch.equal(first[item], other[item]) for item in order)


def test_random_view_gives_a_batch_as_it_gives_items(folder):
    view = data.RandomView(folder, data.train_crop(48), seed=5, epoch=2)
    items = [(3, 1), (0, 6), (9, 1)]
    torch.manual_seed(1)
    for (batch_view, index), item in zip(view.__getitems__(items), items):
        assert torch.equal(batch_view, view[item][0]) and index == item[1]


def test_random_view_is_the_crop_under_its_derived_seed(folder):
    view, index = data.RandomView(folder, data.train_crop(48), seed=5, epoch=2)[11, 4]
    torch.manual_seed(derive_seed(5, "crop", 2, 11))
    assert torch.equal(view, data.train_crop(48)(decode.decode_file(folder.path(4)))) and index == 4


def test_random_view_leaves_the_callers_random_state(folder):
    def fail(_):
        torch.rand(3)
        raise ValueError

    view = data.RandomView(folder, data.train_crop(48), seed=5, epoch=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    view[0, 0]
    with pytest.raises(ValueError):
        data.RandomView(folder, fail, 5, 2)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(view) == 7


def test_random_view_raises_for_a_broken_image(folder):
    folder.path(2).write_bytes(b"")
    with pytest.raises(data.ImageError, match=r"2.png: the file is empty"):
        data.RandomView(folder, data.train_crop(48), seed=5, epoch=2)[0, 2]


class WorkerState(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGHUP)]
        return torch.full((3, 1, 1), torch.get_num_threads()), int(all(ignored))


def test_workers_use_one_thread_and_ignore_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    (batch,) = data.make_loader(WorkerState(), 1, 1, CPU)
    assert batch.views.flatten().tolist() == [1, 1, 1] and batch.index.tolist() == [1]
    assert signal.getsignal(signal.SIGINT) == before


WITH_A_WORKER = """
import os, signal, subprocess, sys
import torch
import data
from tests.data.test_views import WorkerState

iterator = iter(data.make_loader(WorkerState(), 1, 1, torch.device("cpu")))
worker = iterator._workers[0]
next(iterator)
if sys.argv[1] == "others":
    for name in ("INT", "TERM", "USR1", "HUP"):  # not by this process
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(1)
    print("alive" if worker.is_alive() else f"ended: {worker.exitcode}")
sys.modules["kept"] = iterator  # as an exception's traceback keeps it
"""


@pytest.mark.parametrize("signals, output", [("others", "alive"), ("none", "")])
def test_a_worker_outlives_the_signals_of_others_but_not_the_main_process(signals, output):
    command = [sys.executable, "-c", WITH_A_WORKER, signals]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (process.returncode, process.stdout.strip(), process.stderr) == (0, output, "")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise_equals_totensor_and_normalize(memory_format):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    batch = levels.contiguous(memory_format=memory_format)
    before = batch.clone()
    normalised = data.normalise(batch)
    reference = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(batch.double() / 255)
    assert normalised.dtype == torch.float32
    assert (normalised - reference).abs().max() < 1e-6
    assert normalised.is_contiguous(memory_format=memory_format)
    assert torch.equal(batch, before)


def test_normalise_takes_ten_crops_and_leaves_floats_alone():
    batch = torch.randint(0, 256, (2, 10, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(data.normalise(batch)[1, 7], data.normalise(batch[1, 7]))
    floats = batch.float()
    data.normalise(floats)
    assert torch.equal(floats, batch.float())


def test_image_error_keeps_its_line_through_pickle_and_a_worker(tmp_path):
    error = data.ImageError("/a: b/x.jpg", "broken: very")
    copy = pickle.loads(pickle.dumps(error))
    assert str(error) == str(copy) == "/a: b/x.jpg: broken, very"
    assert (copy.path, copy.reason) == ("/a: b/x.jpg", "broken, very")
    (tmp_path / "x.jpg").write_text("no image")
    view = data.RandomView(data.list_images(tmp_path), data.train_crop(32))
    with pytest.raises(data.ImageError) as caught:
        list(data.make_loader(view, 1, 1, CPU, sampler=[(0, 0)]))
    assert str(caught.value) == f"{tmp_path / 'x.jpg'}: not an image in a format that Pillow reads"
    assert caught.value.path == str(tmp_path / "x.jpg")


def test_images_of_different_sizes_are_filled_up_with_zeros():
    views = [torch.full((3, 4, 6), 7, dtype=torch.uint8), torch.full((3, 5, 2), 9, dtype=torch.uint8)]
    batch = data.views.collate([(view, i) for i, view in enumerate(views)])
    assert batch.views.shape == (2, 3, 5, 6) and batch.views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.views[0, :, :4], views[0]) and torch.equal(batch.views[1, :, :, :2], views[1])
    assert not batch.views[0, :, 4:].any() and not batch.views[1, :, :, 2:].any()


def test_what_stands_behind_the_colours_is_not_normalised():
    views = torch.randint(0, 256, (2, 4, 5, 6), dtype=torch.uint8)
    x = data.to_input(views, torch.device("cpu"))
    assert torch.equal(x[:, :3], data.normalise(views[:, :3])) and torch.equal(x[:, 3], views[:, 3].float())


def test_a_mirrored_view_has_left_and_right_exchanged():
    view = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    assert data.mirrored(view, 0) is view and data.mirrored(view, 1).tolist() == [[[2, 1, 0], [5, 4, 3]]]
