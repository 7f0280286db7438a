"""Lets the tests import the flat scripts from the repository's root, and keeps torch from fighting over cores."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def tiny_folder():
    """The warmed-up tiny model, built once and kept under runs/ as train.py keeps it."""
    import tiny

    return tiny.ensure(Path(__file__).parent / "runs", progress=False)[0]


@pytest.fixture
def policy(tiny_folder):
    """A fresh Policy on the warmed-up tiny model."""
    from model import Policy, load

    return Policy(*load(tiny_folder))


@pytest.fixture
def raw_policy():
    """A Policy on the tiny model with random weights: no warm-up needed."""
    import tiny
    from model import Policy

    processor = tiny.build_processor()
    return Policy(tiny.build_model(processor, **tiny.RECIPE), processor)
