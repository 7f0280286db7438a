"""Starting and killing runs of several processes: what test_distributed.py and test_resume.py share."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def python(processes):
    """The start of a command line: torchrun with so many processes, or for 0 plain python."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(run if processes else [])]


def children(pid):
    """The process ids started by a process (Linux)."""
    return [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]


def kill(pid):
    """kill -9 a process and, before anyone can tell them to clean up, its children: torchrun gives them sessions of their own."""
    for victim in [pid, *children(pid)]:
        os.kill(victim, signal.SIGKILL)
