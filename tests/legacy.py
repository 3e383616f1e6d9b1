"""Writes checkpoint files as Python 2 and PyTorch before 1.6 did, to test the reader on."""

import collections
import pickle
import struct
import sys
from typing import ClassVar

import torch

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


class Python2Pickler(pickle._Pickler):
    """Protocol 2, `str` as Python 2 wrote it (BINSTRING), tensors as made anew from CUDA storages.

    version: 1 is `_rebuild_tensor`, of PyTorch before 0.4; 2 is `_rebuild_tensor_v2`.
    """

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file, storages, version=1):
        super().__init__(file, protocol=2)
        self.storages, self.version = storages, version

    def save_str(self, text):
        data = text.encode("latin1")
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = save_str

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", obj.kind, obj.key, "cuda:0", obj.tensor.numel(), None)
        return None

    def reducer_override(self, obj):
        if isinstance(obj, torch.Tensor):
            storage = Storage(obj.contiguous(), str(94000 + len(self.storages)))
            self.storages.append(storage)
            arguments = (storage, 0, tuple(obj.shape), obj.contiguous().stride())
            if self.version == 1:
                return torch._utils._rebuild_tensor, arguments
            return torch._utils._rebuild_tensor_v2, (*arguments, False, collections.OrderedDict())
        return NotImplemented


class Storage:
    def __init__(self, tensor, key):
        self.tensor, self.key = tensor, key
        self.kind = {torch.float32: torch.cuda.FloatStorage, torch.int64: torch.cuda.LongStorage}[
            tensor.dtype
        ]


def string(text):
    return b"U" + bytes([len(text)]) + text.encode()


def storage(key, length):
    """The persistent id of a float storage on a GPU."""
    return (
        b"(" + string("storage") + b"ctorch.cuda\nFloatStorage\n" + string(key) + string("cuda:0")
        + b"K" + bytes([length]) + b"NtQ"
    )  # fmt: skip


def tensor(key, length, shape, strides):
    sizes = [b"".join(b"K" + bytes([n]) for n in numbers) for numbers in (shape, strides)]
    ends = {1: b"\x85", 2: b"\x86"}[len(shape)]
    arguments = storage(key, length) + b"K\x00" + ends.join(sizes) + ends
    return b"ctorch._utils\n_rebuild_tensor\n(" + arguments + b"tR"


# What torch.save of 2017 wrote under Python 2.7 on a 64-bit machine, byte by byte: its int has 64 bits, and
# cPickle writes one of more than 32 as opcode INT. The optimiser's parameters are their addresses.
PYTHON2_WITH_OPTIMISER = b"".join((
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",  # MAGIC
    b"\x80\x02M\xe9\x03.",  # PROTOCOL
    b"\x80\x02}q\x01(U\x10protocol_versionq\x02M\xe9\x03U\rlittle_endianq\x03\x88",
    b"U\ntype_sizesq\x04}q\x05(U\x05shortq\x06K\x02U\x03intq\x07K\x04U\x04longq\x08K\x04uu.",
    b"\x80\x02}q\x01(", string("epoch"), b"q\x02K\x07", string("arch"), b"q\x03", string("alexnet"), b"q\x04",
    string("state_dict"), b"q\x05ccollections\nOrderedDict\nq\x06]q\x07]q\x08(",
    string("top_layer.bias"), b"q\x09",
    tensor("94001", 2, [2], [1]), b"ea\x85q\x0aRq\x0b",
    string("optimizer"), b"q\x0c}q\x0d(", string("state"), b"q\x0e}q\x0fI140000000000000\n}q\x10",
    string("momentum_buffer"), b"q\x11", tensor("94002", 2, [1, 2], [2, 1]), b"ss",
    string("param_groups"), b"q\x12]q\x13}q\x14(", string("lr"), b"q\x15G?\xa9\x99\x99\x99\x99\x99\x9a",
    string("nesterov"), b"q\x16I00\n", string("params"), b"q\x17]q\x18I140000000000000\nauauu.",
    b"\x80\x02]q\x01(", string("94001"), b"q\x02", string("94002"), b"q\x03e.",
    struct.pack("<q2f", 2, 1.0, -2.0), struct.pack("<q2f", 2, 0.5, 3.0),
))  # fmt: skip


def write(path, state, version=1):
    """torch.save of 2017 (version 1) or 2018 (2) under Python 2, on a GPU machine."""
    storages = []
    system = {
        "protocol_version": PROTOCOL,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    with open(path, "wb") as file:
        pickle.dump(MAGIC, file, protocol=2)
        pickle.dump(PROTOCOL, file, protocol=2)
        Python2Pickler(file, []).dump(system)
        Python2Pickler(file, storages, version).dump(state)
        Python2Pickler(file, []).dump([storage.key for storage in storages])
        file.flush()
        for storage in storages:
            file.write(struct.pack("<q", storage.tensor.numel()))
            file.write(storage.tensor.numpy().tobytes())


def authors_state(net, data_parallel="features", optimizer=True, counters=False):
    """The dict that the authors' code saved: no num_batches_tracked (unless counters), DataParallel names.

    data_parallel: what was wrapped, "features", "all", "both" or None.
    """
    weights = collections.OrderedDict()
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked") and not counters:
            continue
        if data_parallel in ("features", "both"):
            name = name.replace("features.", "features.module.", 1)
        if data_parallel in ("all", "both"):
            name = "module." + name
        weights[name] = value
    state = {"epoch": 101, "arch": net.arch, "state_dict": weights}
    if optimizer:
        groups = [{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-5, "params": [140000000000000, 2]}]
        state["optimizer"] = {
            "state": {140000000000000: {"momentum_buffer": torch.ones(3)}},
            "param_groups": groups,
        }
    return state


if __name__ == "__main__":
    import models

    write(sys.argv[1], authors_state(models.build("alexnet", True, 10, seed=1)))
