"""download_model.sh against a server on this machine that breaks off, lies, lacks ranges or lacks files."""

import http.server
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BODY = bytes(range(256)) * 40  # 10,240 bytes
CAFFE = "/alexnet/model.caffemodel"

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


class Handler(http.server.BaseHTTPRequestHandler):
    """GET with ranges and HEAD for server.files; server.cuts counts how often a file still breaks off."""

    protocol_version = "HTTP/1.1"

    def answer(self, body):
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        content = server.files.get(self.path)
        if content is None or self.path in server.failing:
            self.send_error(server.failing.get(self.path, 404))
            return
        start = 0
        if self.headers.get("Range") and server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.sizes:
            claimed = server.claims.get(self.path, len(content)) if not body else len(content) - start
            self.send_header("Content-Length", str(claimed))
        self.send_header("Connection", "close")
        self.end_headers()
        if body:
            rest = content[start:]
            if server.cuts.get(self.path, 0) > 0:
                server.cuts[self.path] -= 1
                rest = rest[: len(rest) // 2]
            self.wfile.write(rest)
        self.close_connection = True

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {CAFFE: BODY, "/alexnet/model.prototxt": b'name: "a"\n'}
    server.requests, server.cuts, server.claims, server.failing = [], {}, {}, {}
    server.ranges = server.sizes = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(folder, server, *names, python=None, cwd=None, **settings):
    """(exit code, stdout, stderr) of the script; python None: files are not opened."""
    base = server if isinstance(server, str) else f"http://127.0.0.1:{server.server_address[1]}"
    fake = (cwd or folder.parent) / "no-torch"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"MODELROOT": str(folder), "BASE": base, "WAIT": "0", "RETRIES": "3"}
    environment |= {"PYTHON": str(python or fake), "OMP_NUM_THREADS": "1"} | settings
    done = subprocess.run(
        [ROOT / "download_model.sh", *names],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def gets(server, path=CAFFE):
    return [wanted for command, file, wanted in server.requests if (command, file) == ("GET", path)]


def test_a_whole_download_and_again_nothing(tmp_path, server):
    folder = tmp_path / "models"
    code, out, _ = download(folder, server, "alexnet-caffe")
    assert code == 0 and f"alexnet/model.caffemodel: complete ({len(BODY)} bytes)" in out
    assert (folder / "alexnet/model.caffemodel").read_bytes() == BODY
    assert sorted(p.name for p in (folder / "alexnet").iterdir()) == ["model.caffemodel", "model.prototxt"]
    asked = len(server.requests)
    code, out, _ = download(folder, server, "alexnet-caffe")
    assert code == 0 and out.count("already there") == 2 and len(server.requests) == asked


def test_a_download_that_breaks_off_is_continued_in_the_same_run(tmp_path, server):
    server.cuts[CAFFE] = 2
    code, out, _ = download(tmp_path / "m", server, "alexnet-caffe")
    assert code == 0 and (tmp_path / "m" / "alexnet/model.caffemodel").read_bytes() == BODY
    assert gets(server) == [None, "bytes=5120-", "bytes=7680-"]
    assert "broke off at 5120 bytes; attempt 2" in out


def test_one_that_breaks_off_for_good_is_continued_by_the_next_run(tmp_path, server):
    server.cuts[CAFFE] = 1
    code, _, err = download(tmp_path / "m", server, "alexnet-caffe", RETRIES="0")
    assert code == 2 and err.splitlines()[-1].endswith("broke off (curl's error 18); run again to continue")
    assert "/alexnet/model.caffemodel: " in err.splitlines()[-1]
    assert not (tmp_path / "m" / "alexnet/model.caffemodel").exists()
    code, out, _ = download(tmp_path / "m", server, "alexnet-caffe")
    assert code == 0 and "10240 bytes, 5120 of them there" in out
    assert gets(server) == [None, "bytes=5120-"]
    assert (tmp_path / "m" / "alexnet/model.caffemodel").read_bytes() == BODY


def test_a_part_that_was_whole_already_only_gets_its_name(tmp_path, server):
    part = tmp_path / "m" / "alexnet" / "model.caffemodel.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BODY)
    assert download(tmp_path / "m", server, "alexnet-caffe")[0] == 0
    assert gets(server) == [] and part.with_suffix("").read_bytes() == BODY and not part.exists()


def test_a_server_without_ranges_is_asked_for_the_whole(tmp_path, server):
    server.ranges = False
    server.cuts[CAFFE] = 1
    code, _, _ = download(tmp_path / "m", server, "alexnet-caffe")
    assert code == 0 and (tmp_path / "m" / "alexnet/model.caffemodel").read_bytes() == BODY


def test_a_server_that_gives_no_size_is_trusted(tmp_path, server):
    server.sizes = False
    code, out, _ = download(tmp_path / "m", server, "alexnet-caffe")
    assert code == 0 and "unknown number of bytes" in out
    assert (tmp_path / "m" / "alexnet/model.caffemodel").read_bytes() == BODY


@pytest.mark.parametrize(
    ("claimed", "message"),
    [
        (20000, "got 10240 bytes, the server says 20000"),
        (10000, "got 10240 bytes, the server says 10000"),
    ],
)
def test_a_wrong_size_is_refused(tmp_path, server, claimed, message):
    server.claims[CAFFE] = claimed
    code, _, err = download(tmp_path / "m", server, "alexnet-caffe", RETRIES="1")
    assert code == 2 and message in err.splitlines()[-1]
    assert not (tmp_path / "m" / "alexnet/model.caffemodel").exists()


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "the server has no such file (404)"), (503, "the server refuses or fails (503)")],
)
def test_what_the_server_lacks_is_named(tmp_path, server, status, message):
    server.failing["/vgg16/checkpoint.pth.tar"] = status
    code, _, err = download(tmp_path / "m", server, "vgg16")
    assert code == 2 and err.count("\n") == 1
    assert "/vgg16/checkpoint.pth.tar: " in err and message in err


def test_offline_says_so_in_a_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for base in (nobody, "http://no-such-host.invalid/deepcluster"):
        code, _, err = download(tmp_path / "m", base, "alexnet")
        assert code == 2 and err == (
            f"download_model.sh: {base}/alexnet/checkpoint.pth.tar: offline? cannot reach it; "
            "what is already there stays, try again later\n"
        )


def test_names_are_checked_before_anything_is_fetched(tmp_path, server):
    code, _, err = download(tmp_path / "m", server, "alexnet-caffe", "resnet50")
    assert code == 2 and "resnet50: unknown; ./download_model.sh list" in err and server.requests == []


# The 16 files of the three ResNet methods and the four of DeeperCluster.
RESNETS = (
    "swav_800ep swav_400ep swav_200ep swav_100ep swav_200ep_bs256 swav_400ep_bs256 swav_400ep_2x224 "
    "deepclusterv2_800ep deepclusterv2_400ep deepclusterv2_400ep_2x224 selav2_400ep selav2_400ep_2x224 "
    "swav_RN50w2_400ep swav_RN50w4_400ep swav_RN50w5_400ep"
).split()
DEEPER = {
    "ours/ours.pth",
    "deepcluster/deepcluster_flickr.pth",
    "rotnet/rotnet_flickr.pth",
    "rotnet/rotnet_imagenet.pth",
}
LATER = {f"{name}_pretrain.pth.tar" for name in RESNETS} | {"swav_800ep_eval_linear.pth.tar"} | DEEPER


def test_the_later_methods_files_are_listed_and_fetched_by_name(tmp_path, server):
    _, out, _ = download(tmp_path / "m", server, "list")
    assert len(LATER) == 20 and LATER <= {line.split()[1] for line in out.splitlines()[1:]}
    server.files = {f"/{file}": b"x" for file in LATER}
    assert download(tmp_path / "m", server, "resnets", "deepercluster")[0] == 0
    found = {path.relative_to(tmp_path / "m").as_posix() for path in (tmp_path / "m").rglob("*.pth*")}
    assert found == LATER
    for name in ("swav_300ep", "deepclusterv2_100ep", "swav_800ep_pretrain"):
        code, _, err = download(tmp_path / "n", server, name)
        assert code == 2 and f"{name}: unknown" in err


def test_names_stand_for_the_files_of_the_original_readme(tmp_path, server):
    code, out, _ = download(tmp_path / "m", server, "list")
    files = {line.split()[1] for line in out.splitlines()[1:]}
    files -= LATER
    assert code == 0 and files == {
        f"{arch}/{file}"
        for arch in ("alexnet", "vgg16")
        for file in (
            "checkpoint.pth.tar", "model.prototxt", "model.caffemodel", f"{arch}_cluster_assignment.pickle",
            f"{arch}_features.pkl",
        )
    }  # fmt: skip
    server.files = {f"/{file}": b"x" for file in files}
    assert download(tmp_path / "m", server)[0] == 0  # no name: the networks
    assert {path for _, path, _ in server.requests} == {
        f"/{arch}/{file}"
        for arch in ("alexnet", "vgg16")
        for file in ("checkpoint.pth.tar", "model.prototxt", "model.caffemodel")
    }
    assert download(tmp_path / "m", server, "clusters", "vgg16-features")[0] == 0
    assert len(list((tmp_path / "m").rglob("*_cluster_assignment.pickle"))) == 2
    assert [p.name for p in (tmp_path / "m").rglob("*_features.pkl")] == ["vgg16_features.pkl"]
    code, out, _ = download(tmp_path / "m", server, "--list")
    assert out.count("(there)") == 9
    code, out, _ = download(tmp_path / "m", server, "--help")
    assert code == 0 and "MODELROOT" in out and "set -euo" not in out


@pytest.mark.slow
def test_what_was_fetched_is_opened_where_python_is_at_hand(tmp_path, server):
    server.files["/alexnet/checkpoint.pth.tar"] = b"please log in"
    code, _, err = download(tmp_path / "m", server, "alexnet", python=sys.executable)
    assert code == 2 and "alexnet/checkpoint.pth.tar: was fetched whole but is not what" in err
    assert list((tmp_path / "m" / "alexnet").iterdir()) == []
    name = "alexnet_cluster_assignment.pickle"
    server.files[f"/alexnet/{name}"] = pickle.dumps([("a.JPEG", 3), ("b.JPEG", 3)], 2)
    code, out, _ = download(tmp_path / "m", server, "alexnet-clusters", python=sys.executable)
    assert code == 0 and "2 images in 1 clusters" in out
    assert (tmp_path / "m" / "alexnet" / name).is_file()


@pytest.mark.parametrize(
    "page", [b"<html>log in</html>", b"\n  <!DOCTYPE html>\n<HTML>", b'<?xml version="1.0"?><Error/>']
)
def test_a_page_in_place_of_a_file_is_refused_without_python_too(tmp_path, server, page):
    server.files[CAFFE] = page
    code, _, err = download(tmp_path / "m", server, "alexnet-caffe")
    assert code == 2 and "model.caffemodel: was fetched whole but is not what it should be; removed" in err
    assert [p.name for p in (tmp_path / "m" / "alexnet").iterdir()] == ["model.prototxt"]


def test_a_relative_modelroot_is_the_callers(tmp_path, server):
    """What is opened by Python, which starts in the repository's folder, is named in full."""
    name = "alexnet_cluster_assignment.pickle"
    server.files[f"/alexnet/{name}"] = pickle.dumps([("a.JPEG", 3)], 2)
    code, out, err = download(Path("m"), server, "alexnet-clusters", python=sys.executable, cwd=tmp_path)
    assert code == 0, err
    assert (tmp_path / "m" / "alexnet" / name).is_file() and f"everything is in {tmp_path}/m" in out
