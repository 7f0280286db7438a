"""Other processes: starting and killing runs of several, and running a test in one that has a pretend GPU."""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


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


def on_pretend_gpu(name):
    """Run one test by pytest in this process, which gets the pretend GPU. Returns what pytest wrote if the test failed, else ""."""
    import pretend_cuda  # noqa: F401  makes the device, and must come before torch: nothing above imports that
    import pytest

    os.environ["PYTEST_ADDOPTS"] = ""  # a selection of tests was made before they came here
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = pytest.main([name, "-q", "--no-header", "-p", "no:cacheprovider"])
    return text.getvalue() if status else ""
