"""GPTCache, installed apart and run apart, so that its dependencies do not meet ours."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perf.prompt_pairs import Pair
from scripts.serving.installation import PROJECT

FOLDER = PROJECT / ".build" / "gptcache"
PACKAGES = ("gptcache==0.1.44", "cachetools", "faiss-cpu", "sqlalchemy>=2,<3", "numpy<2")
PEER = Path(__file__).parent / "peers" / "gptcache_peer.py"


def run_gptcache(pairs: Sequence[Pair], vectors: dict[str, Any], entries: int) -> dict[str, Any]:
    """Return `found` for each pair, and `latency` at so many entries. Raises CalledProcessError."""
    if not FOLDER.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(FOLDER), *PACKAGES]
        subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory() as folder:
        archive, task = Path(folder, "vectors.npz"), Path(folder, "task.json")
        np.savez(archive, vectors=np.array(list(vectors.values())))
        asked = {"prompts": list(vectors), "pairs": [(pair.first, pair.second) for pair in pairs], "entries": entries}
        task.write_text(json.dumps(asked))
        environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
        done = subprocess.run(
            [sys.executable, str(PEER), str(archive), str(task)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
