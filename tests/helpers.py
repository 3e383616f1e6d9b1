"""Small helpers of the tests."""

import contextlib
import io
import re
from pathlib import Path

import torch

from util import UserError

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def refuses(match=""):
    """What runs inside must end as a user's mistake does: one line that `match` is found in.

    That is a UserError, or from a parser exit code 2 with the line on standard error.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except UserError as error:
        line = str(error)
    except SystemExit as end:
        assert end.code == 2, f"exit code {end.code}: {stderr.getvalue()}"
        line = stderr.getvalue().strip()
    else:
        raise AssertionError(f"not refused (expected {match!r})")
    assert line and "\n" not in line, f"not one line: {line!r}"
    assert re.search(match, line), f"{match!r} is not in {line!r}"


def equal(a, b):
    """Whether two nests of tensors, dicts, lists and numbers are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b
