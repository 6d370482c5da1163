"""Records digests of short runs' files, to compare two commits bit for bit on one machine.

    python scripts/recordings.py before.json               # at one commit
    python scripts/recordings.py after.json before.json    # at another: exit code 1 if they differ

Trains every file of configs/digits for two epochs. With solo-learn's main branch on PYTHONPATH, the
runs use solo-learn's base classes and take 10 steps an epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from grap_solo.solo import BASE

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
FILES = ("weights.csv", "metrics.csv", "median_weights.yaml")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def record(file: str, directory: Path) -> dict[str, str]:
    """Trains one configuration file; returns digests of the run's files and final state dict."""
    changes = ["max_epochs=2", "+enable_progress_bar=false", "name=run"]
    changes += [f"checkpoint.dir={directory}", "log_every_n_steps=1"]
    if BASE == "solo-learn":
        changes += ["+limit_train_batches=10"]
    command = ["-m", "grap_solo.cli", "pretrain", "--config-path", CONFIGS, "--config-name", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command), *changes],
        check=True,
        env=environment,
    )
    run = directory / "run"
    found = {name: digest((run / name).read_bytes()) for name in FILES}
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, "cpu", weights_only=True)["state_dict"]
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            found[f"state/{name}"] = digest(value.contiguous().view(-1).numpy().tobytes())
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    given = parser.parse_args()
    found = {"base": {"base": BASE}}
    for file in sorted(CONFIGS.glob("*.yaml")):
        with TemporaryDirectory() as directory:
            found[file.stem] = record(file.stem, Path(directory))
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    if given.other is None:
        return 0
    other = json.loads(given.other.read_text())
    differing = [
        f"{file}: {name}"
        for file in other
        for name in {**other[file], **found.get(file, {})}
        if other[file].get(name) != found.get(file, {}).get(name)
    ]
    print("\n".join(differing) or f"{len(other)} runs: every file and tensor is the same")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
