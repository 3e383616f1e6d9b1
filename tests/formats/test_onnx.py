"""The ONNX file, run by onnxruntime on raw pixels, against the network on normalised ones."""

import numpy as np
import pytest
import torch

import checkpoint
import data
import models
from formats import onnx as export
from tests import tiny
from util import UserError

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def make_net(sobel, head=6):
    """A network whose batch norms are not the identity."""
    net = tiny.tiny(sobel, seed=3)
    net.set_head(head, seed=3)
    with torch.no_grad():
        net(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))  # moves the statistics
        for layer in net.features:
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_(0, 0.3)
    return net.eval()


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.astype(np.float32)})[0]


@pytest.mark.parametrize(
    ("sobel", "layer", "bgr", "size"),
    [
        (True, "fc7.pre", True, 22),  # the adaptive pool is the identity
        (True, "logits", False, 64),  # and here it averages windows of uneven sizes
        (False, "fc7", True, 9),  # and here it repeats a map of 1 x 1
        (False, "conv1.pre", False, 33),
        (True, "sobel", True, 20),
        (False, "pool", False, 50),
    ],
)
def test_raw_pixels_give_what_pytorch_gives_for_normalised_ones(tmp_path, sobel, layer, bgr, size):
    net = make_net(sobel)
    path = tmp_path / "new" / "net.onnx"
    assert export.export(net, path, layer, bgr, size) <= 1e-4
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]  # one file, weights inside
    images = np.random.default_rng(1).integers(0, 256, (5, 3, size, size), dtype=np.uint8)  # (B, RGB, S, S)
    images[:, 0, 0] = 255
    with torch.no_grad():
        expected = net.activations(data.normalise(torch.from_numpy(images)), [layer])[layer].numpy()
    for batch in (5, 1):
        found = run(path, (images[:, ::-1] if bgr else images)[:batch])
        assert np.abs(found - expected[:batch]).max() <= 1e-4 * np.abs(expected).max()
    if layer != "sobel":  # channels in the wrong order are something else
        assert (
            np.abs(run(path, images if bgr else images[:, ::-1]) - expected).max()
            > 1e-3 * np.abs(expected).max()
        )


def test_the_file_names_its_input_and_output_and_has_the_opset(tmp_path):
    export.export(make_net(True), tmp_path / "net.onnx", "conv2", image_size=40, opset=18)
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    (images,), (output,) = model.graph.input, model.graph.output
    sizes = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, output.name, sizes) == ("images", "conv2", ["batch", 3, 40, 40])
    assert model.opset_import[0].version == 18


def test_a_file_that_differs_is_not_kept_and_the_earlier_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"earlier")

    class Wrong(export.WithPreprocessing):
        def forward(self, images):
            return super().forward(images) * 1.001

    monkeypatch.setattr(export, "WithPreprocessing", Wrong)
    with pytest.raises(UserError, match=r"onnxruntime differs from PyTorch by 1\.0e-03; not kept"):
        export.export(make_net(True), path, image_size=22)
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_the_command_line_writes_from_a_checkpoint_and_checks_its_arguments(tmp_path, capsys):
    net = make_net(True)
    model, out = tmp_path / "checkpoint.pth.tar", tmp_path / "net.onnx"
    checkpoint.save(model, {"arch": "tiny", "state_dict": net.state_dict()})

    def main(*extra):
        export.main(export.get_parser().parse_args(["--model", str(model), "--out", str(out), *extra]))

    for extra, message in (
        (["--layer", "conv9"], "tiny has no layer conv9; it has sobel, conv1.pre"),
        (["--image-size", "22", "--opset", "99"], "--opset 99: "),
    ):
        with pytest.raises(UserError, match=message):
            main(*extra)
        assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        main("--image-size", "0")
    assert stop.value.code == 2 and "--image-size: 0: must be at least 1" in capsys.readouterr().err
    main("--image-size", "22", "--input", "bgr")
    assert "tiny to fc7.pre, takes images (B, 3, 22, 22), BGR in 0..255" in capsys.readouterr().out
    assert run(out, np.zeros((2, 3, 22, 22))).shape == (2, 40)


def test_a_resnet_gives_its_feature_and_any_map(tmp_path):
    net = models.build("resnet18s", sobel=True, seed=1)
    net(torch.randn(4, 3, 32, 32))
    net.eval()
    for layer, shape in ((None, (3, 512)), ("layer2", (3, 128, 16, 16))):
        path = tmp_path / "net.onnx"
        assert export.export(net, path, layer, image_size=32) <= 1e-4
        images = np.random.default_rng(1).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
        with torch.no_grad():
            name = layer or "avgpool"
            expected = net.activations(data.normalise(torch.from_numpy(images)), [name])[name].numpy()
        found = run(path, images)
        assert found.shape == shape and np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_images_too_small_or_too_large_for_the_network_are_one_line(tmp_path):
    for size in (3, 10**7):
        with pytest.raises(UserError, match=rf"--image-size {size}: alexnet cannot take it") as error:
            export.export(models.build("alexnet"), tmp_path / "net.onnx", image_size=size)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    net = make_net(True)
    with torch.no_grad():
        net.classifier[1].weight.fill_(float("nan"))
    model, out = tmp_path / "nan.pth.tar", tmp_path / "net.onnx"
    checkpoint.save(model, {"arch": "tiny", "state_dict": net.state_dict()})
    with pytest.raises(UserError, match=r"nan\.pth\.tar: classifier\.1\.weight has .* not finite"):
        export.main(export.get_parser().parse_args(["--model", str(model), "--out", str(out)]))
    assert not out.exists()
