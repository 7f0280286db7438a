"""What the tests share: the tiny models, as many threads as there are cores for one of them, and that they see no GPU."""

import os
from pathlib import Path

# The numbers that tests expect are a CPU's. The processes that tests start see no GPU either. torch reads this when it looks for one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def tiny_folder():
    """The warmed-up tiny model, built once and kept under runs/ as train.py keeps it."""
    from laptop import tiny

    return tiny.ensure(Path(__file__).parents[1] / "runs", progress=False)[0]


@pytest.fixture
def policy(tiny_folder):
    """A fresh Policy on the warmed-up tiny model."""
    from model import Policy, load

    return Policy(*load(tiny_folder))


@pytest.fixture
def raw_policy():
    """A Policy on the tiny model with random weights: no warm-up needed."""
    from laptop import tiny
    from model import Policy

    processor = tiny.build_processor()
    return Policy(tiny.build_model(processor, **tiny.RECIPE), processor)
