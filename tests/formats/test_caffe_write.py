"""Caffe's files of ours agree with PyTorch when OpenCV runs them."""

import numpy as np
import pytest
import torch

import checkpoint
import models
from formats import caffe_format, caffe_read, caffe_write
from tests.formats.caffe_files import (
    SIZE,
    activations,
    assert_same,
    call,
    entry,
    layer,
    make_net,
    pixels,
)
from util import UserError

pytest.importorskip("google.protobuf")


@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("head", [6, None])
def test_written_and_read_back_gives_the_same_activations(tmp_path, sobel, keep, head):
    net = make_net(sobel, head)
    caffe_write.write_network(net, tmp_path / "out", SIZE, keep)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.caffemodel", "model.prototxt"]
    read = caffe_read.read_network(tmp_path / "out" / "model.caffemodel", "tiny")
    assert_same(net, read, net.activation_names)
    if keep:
        assert torch.allclose(read.features[1].running_mean, net.features[1].running_mean)


def cv2_with_caffe():
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2.dnn, "readNetFromCaffe"):
        pytest.skip(f"OpenCV {cv2.__version__} reads no Caffe files")
    return cv2


@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_opencv_gives_the_same_activations_on_raw_bgr_pixels(tmp_path, sobel, keep):
    cv2 = cv2_with_caffe()
    net = make_net(sobel)
    caffe_write.write_network(net, tmp_path, SIZE, keep)
    bgr = pixels().numpy()[:, ::-1].astype(np.float32)
    last = "scale{}" if keep else "conv{}"
    layers = {
        "conv1.pre": last.format(1), "conv2.pre": last.format(2), "conv1": "relu1", "conv2": "relu2",
        "fc6.pre": "fc6", "fc6": "relu_fc6", "fc7.pre": "fc7", "fc7": "relu_fc7", "logits": "top_layer",
    }  # fmt: skip
    expected = activations(net, list(layers))
    for name, layer_name in layers.items():  # as a user would: a fresh network, one output, its defaults
        reader = cv2.dnn.readNetFromCaffe(
            str(tmp_path / "model.prototxt"), str(tmp_path / "model.caffemodel")
        )
        reader.enableFusion(not layer_name.startswith("scale"))  # see caffe_write.py
        reader.setInput(bgr)
        found = reader.forward(layer_name).reshape(expected[name].shape)
        assert np.abs(found - expected[name].numpy()).max() <= 1e-3 * expected[name].abs().max(), name


@pytest.mark.parametrize("v1", [False, True])
def test_opencv_reads_the_hand_encoded_files_as_we_do(tmp_path, v1):
    """The encoder of these tests speaks Caffe's format, old and new, not only ours."""
    cv2 = cv2_with_caffe()
    net = make_net(True)
    caffe_write.write_network(net, tmp_path, SIZE)
    content = entry(1, "hand")
    for part in caffe_format.read_layers(tmp_path / "model.caffemodel"):
        if part.blobs:
            content += layer(part.type, part.name, "", part.name, *part.blobs, v1=v1)
    (tmp_path / "hand.caffemodel").write_bytes(content)
    results = []
    for name in ("model", "hand"):
        reader = cv2.dnn.readNetFromCaffe(
            str(tmp_path / "model.prototxt"), str(tmp_path / f"{name}.caffemodel")
        )
        reader.setInput(pixels().numpy()[:, ::-1].astype(np.float32))
        results.append(reader.forward("fc7"))
    assert np.array_equal(*results) and np.abs(results[0]).max() > 1


def test_the_prototxt_is_text_without_weights(tmp_path):
    caffe_write.write_network(make_net(False), tmp_path, SIZE)
    text = (tmp_path / "model.prototxt").read_text(encoding="utf-8")
    assert "blobs" not in text and len(text) < 4000
    names = [line.split('"')[1] for line in text.splitlines() if line.startswith("  name:")]
    assert names == [
        "data", "normalise", "conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc6", "relu_fc6", "fc7",
        "relu_fc7", "top_layer",
    ]  # fmt: skip
    assert text.count("dim: 22") == 2 and "kernel_size: 5" in text and "stride: 2" in text


def test_image_sizes_at_which_caffe_would_differ_are_refused(tmp_path):
    for size, message in ((24, "rounds up"), (30, "the last map is 3 wide"), (3, "rounds up")):
        with pytest.raises(UserError, match=message):
            caffe_write.write_network(make_net(True), tmp_path, size)


def test_at_224_both_networks_can_be_written_and_no_name_comes_twice(monkeypatch):
    monkeypatch.setattr(
        caffe_write, "_numpy", lambda tensor: np.empty(tensor.shape, np.float32)
    )  # sizes only
    for arch, convs in (("alexnet", 5), ("vgg16", 13)):
        with torch.device("meta"):
            monkeypatch.setattr("models.flat.initialise", lambda *_: None)
            net = models.ARCHITECTURES[arch](False).eval()
        layers, given = caffe_write.build_layers(net, 224, keep_batch_norm=True)
        names = [message.name for message, _ in layers]
        assert len(set(names)) == len(names) and sum(name.startswith("conv") for name in names) == convs
        assert [list(message.bottom) for message, _ in layers[1:]] == [[name] for name in names[:-1]]
        assert given[f"conv{convs}"] == f"relu{convs}" and given["fc7"] == "relu_fc7"
        assert given["pool"] == f"pool{convs}"


def test_files_that_disagree_are_not_kept(tmp_path, monkeypatch):
    net = make_net(True)

    def wrong(*_):
        return lambda images, wanted: {
            k: v + 1 for k, v in caffe_write._activations(net, images, list(wanted)).items()
        }

    monkeypatch.setattr(caffe_write, "_opencv_runner", wrong)
    with pytest.raises(UserError, match="differ from PyTorch by"):
        caffe_write.write_network(net, tmp_path, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    net = make_net(True)
    with torch.no_grad():
        net.features[5].running_var[3] = float("nan")
    checkpoint.save(tmp_path / "nan.pth.tar", {"arch": "tiny", "state_dict": net.state_dict()})
    with pytest.raises(UserError, match=r"nan\.pth\.tar: features\.5\.running_var has .* not finite"):
        call(caffe_write, "--model", tmp_path / "nan.pth.tar", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
