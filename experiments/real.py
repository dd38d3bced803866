"""Reconstruct real captures with the embedded model, dense and sparse, and note the errors.

    python experiments/real.py -o results/nano/real.jsonl office=bundled kitchen=path/to/7scenes

Writes a row per capture and policy.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from hess.evaluation.provenance import provenance
from hess.files import write_atomically

POLICIES = ("dense", "uniform", "hess")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captures", nargs="+", metavar="NAME=PATH")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, default=Path("out/real"))
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"))
    lines = []
    for capture in args.captures:
        name, path = capture.split("=", 1)
        for policy in POLICIES:
            folder = args.pictures / f"{name}-{policy}"
            command = ["hess", "reconstruct", path, "-o", str(folder), "--policy", policy]
            command += ["--dense-below", "0"]
            found = subprocess.run(
                [sys.executable, "-m", "hess.cli.main", *command[1:], "--json"],
                check=True,
                capture_output=True,
                text=True,
            )
            result = json.loads(found.stdout)
            row = {
                "capture": name,
                "policy": policy,
                "num_views": result["num_views"],
                "block_sparsity": result["block_sparsity"],
                "errors": result["errors"],
                "model": "nano",
                "commit": origin.commit,
                "dirty": origin.dirty,
                "machine": origin.machine,
            }
            lines.append(json.dumps(row) + "\n")
            print(name, policy, result["errors"])
    write_atomically(args.output, "".join(lines).encode())


if __name__ == "__main__":
    main()
