"""Runs of train.py one after the other on the same processes. The argument is a file with a list of [folder to run in, flags]."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import distributed  # noqa: E402
import train  # noqa: E402

for folder, flags in json.loads(Path(sys.argv[1]).read_text()):
    os.chdir(folder)
    train.main(flags)
distributed.leave()
