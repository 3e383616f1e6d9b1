"""Call a function in several processes that form a group, as torchrun's do."""

import os
import pickle
import socket
import tempfile
from datetime import timedelta
from pathlib import Path

import faiss
import torch

import distributed
from util import UserError


def spawn(function, size, *args):
    """[function(*args) of rank 0, of rank 1, ...]; function is one of a module, results can be pickled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_on_rank, (function, size, port, folder, args), nprocs=size)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)]


def _on_rank(rank, function, size, port, folder, args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    distributed.TIMEOUT = timedelta(seconds=60)
    distributed.init("cpu")
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(*args)))
    distributed.shutdown()


def own_rows(x, counts=None):
    """This rank's rows of x: its share, or counts[rank] of them."""
    if counts is None:
        rows = distributed.share_of(len(x))
        return x[rows.start : rows.stop]
    first = sum(counts[: distributed.rank()])
    return x[first : first + counts[distributed.rank()]]


def error_of(function, *args, **options):
    """The text of the UserError that function raises, or None."""
    try:
        function(*args, **options)
    except UserError as error:
        return str(error)
    return None
