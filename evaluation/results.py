"""The protocol beside the number: what every evaluation prints and puts into EXP/results.json."""

import json
import sys
from pathlib import Path
from typing import Any

from util import UserError, make_folder, write_json

RESULTS = "results.json"


def report(exp: str | Path, name: str, protocol: dict[str, Any], results: Any) -> None:
    """Print the protocol of evaluator `name` and put it with its results into EXP/results.json.

    The file keeps the results of other evaluators: {name: {"protocol": ..., "results": ..., "command": ...}}.
    """
    print(f"{name} protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()), flush=True)
    path = make_folder(exp) / RESULTS
    try:
        everything = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError:
        raise UserError(f"{path}: not valid JSON; move it away") from None
    everything[name] = {"protocol": protocol, "results": results, "command": sys.argv}
    write_json(path, everything)
