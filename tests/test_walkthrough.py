"""walkthrough.ipynb: it runs from start to end, prints what was saved in it, and repeats none of the project's functions.

    python tests/test_walkthrough.py        run the notebook and save it with its new outputs: after every change of its cells

The saved numbers belong to one warmed-up model. The number of cores does not change it (laptop/tiny.py: THREADS), but another kind
of processor rounds differently while it is built, and 680 steps of learning make another model of that. So the notebook carries a checksum
of the weights it was run on. Where the numbers differ and the weights do too, the comparison is skipped and says so. All else is tested.
"""

import ast
import base64
import hashlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `python tests/test_walkthrough.py`

from laptop import tiny  # noqa: E402

FILE = ROOT / "walkthrough.ipynb"
LIMIT = 1_000_000  # bytes
WHY = "the walkthrough needs nbclient, nbformat, ipykernel and matplotlib: pip install -r requirements-extra.txt"
nbformat = pytest.importorskip("nbformat", reason=WHY)
nbclient = pytest.importorskip("nbclient", reason=WHY)
for name in ("ipykernel", "matplotlib"):
    pytest.importorskip(name, reason=WHY)

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def execute(notebook, home):
    """Run all cells of a notebook in the repository root, with the interpreter that runs this, whatever kernels are installed.

    home: a folder for what IPython writes. Raises nbclient's CellExecutionError if a cell raises.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    # Without folders to search, "python3" is ipykernel's own description of the running interpreter.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    environment = os.environ | {"IPYTHONDIR": str(home), "CUDA_VISIBLE_DEVICES": ""}
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=600, resources={"metadata": {"path": str(ROOT)}}, record_timing=False,
        coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
    )  # fmt: skip
    client.execute(env=environment)
    return notebook


def checksum(folder):
    """The first digits of the SHA-256 of a model's weights."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()[:16]


def printed(notebook):
    """[(number of the cell, the text it printed)]; a picture counts as the word "picture"."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = output["text"] if output.output_type == "stream" else "picture" if "image/png" in data else data.get("text/plain", "")
            found.append((number, f"stderr: {text}" if output.get("name") == "stderr" else text))
    return found


def as_number(text):
    """(value, what one unit of its last printed digit is worth)."""
    text = text.replace(",", "")
    mantissa, _, exponent = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(text), 10.0 ** (int(exponent or 0) - decimals) if "." in mantissa or exponent else 0.0


def difference(saved, now):
    """A sentence on the first thing in which two printed texts differ by more than rounding, or None.

    Words must be equal. A number with digits after its point may differ by 1e-3 of itself and by one unit of its last digit; a
    whole number must be equal. Below 1e-5 all numbers are rounding errors.
    """
    if re.split(r"\s+", NUMBER.sub("#", saved)) != re.split(r"\s+", NUMBER.sub("#", now)):
        return f"other words: {saved!r} became {now!r}"
    for old, new in zip(NUMBER.findall(saved), NUMBER.findall(now), strict=True):
        (a, unit), (b, _) = as_number(old), as_number(new)
        if abs(a - b) > max(1e-3 * abs(a) + 1.001 * unit, 1e-5 if unit else 0.0):
            return f"{old} became {new} in {saved!r}"
    return None


def source():
    """The code of all cells, without lines that speak to IPython."""
    cells = [cell.source for cell in nbformat.read(FILE, 4).cells if cell.cell_type == "code"]
    return "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """(the notebook as saved, the same after a run now)."""
    return nbformat.read(FILE, 4), execute(nbformat.read(FILE, 4), tmp_path_factory.mktemp("ipython"))


def test_every_cell_runs_and_draws_what_it_drew(runs):
    saved, now = runs
    shape = [[(number, text if text == "picture" else "text") for number, text in printed(notebook)] for notebook in runs]
    assert shape[0] == shape[1] and shape[0].count("picture") == 0 and len(shape[0]) > 20
    assert not [text for _, text in printed(now) if text.startswith("stderr")]


def test_every_printed_number_is_the_saved_one(runs, tiny_folder):
    saved, now = runs
    pairs = zip(printed(saved), printed(now), strict=True)
    found = [f"cell {number}: {what}" for (number, old), (_, new) in pairs if (what := difference(old, new))]
    if found and saved.metadata["weights"] != checksum(tiny_folder):
        pytest.skip(f"this machine's warm-up made other weights than the saved notebook's, so {len(found)} outputs differ: {found[0]}")
    assert not found, "\n".join(found)


def test_the_warmed_up_model_does_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    """A short warm-up, with 1 thread set and with 8. It uses two."""
    recipe = tiny.RECIPE | {"scenes": 40, "batch": 8, "drill_steps": 2, "clean_steps": 2, "noisy_steps": 2}
    monkeypatch.setitem(tiny.RECIPES, ("tiny", "digits"), recipe)
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 8):
            torch.set_num_threads(threads)
            sums.append(checksum(tiny.ensure(tmp_path / str(threads), progress=False)[0]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1]


def test_the_comparison_notices_what_matters():
    assert difference("loss -0.1076  kept 31", "loss  -0.1077 kept 31") is None  # rounding, and space to align columns
    assert difference("a 123.45", "a 123.50") is None
    assert difference("rest 1.2e-08", "rest 0.0e+00") is None
    assert "became" in difference("loss -0.1076", "loss -0.1079")
    assert "became" in difference("kept 31", "kept 32")
    assert "became" in difference("a 0.2", "a 0.4")
    assert "other words" in difference("so we bet : 3", "so i bet : 3")
    assert "other words" in difference("[1, 0]", "[1, 0, 0]")


def test_it_is_small_and_holds_nothing_of_the_machine_that_ran_it():
    text = FILE.read_text()
    assert len(text.encode()) < LIMIT
    notebook = nbformat.read(FILE, 4)
    assert notebook.metadata["kernelspec"]["name"] == "python3" and "execution" not in str([cell.metadata for cell in notebook.cells])
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(range(1, 1 + len(source_cells(notebook))))
    outputs = " ".join(text for _, text in printed(notebook))
    assert not re.search(r"(^|[\s'\"])/(\w+/)+|[A-Z]:\\\\|tiny-[0-9a-f]{6}", outputs)
    for cell in source_cells(notebook):
        for output in cell.outputs:
            if png := output.get("data", {}).get("image/png"):
                assert base64.b64decode(png).startswith(b"\x89PNG") and len(png) < 100_000


def source_cells(notebook):
    """Its code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_defines_no_function_of_the_project():
    own = {node.name for node in ast.walk(ast.parse(source())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    files = [file for folder in (".", "laptop", "lab", "exercises/solutions", "examples") for file in (ROOT / folder).glob("*.py")]
    theirs = {
        node.name for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    assert own and not own & theirs


def test_it_uses_the_projects_functions():
    names = {alias.name for node in ast.walk(ast.parse(source())) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names >= {"encode", "generate", "grade_example", "group_advantages", "mask_images", "with_images", "kl", "measure", "shaping_factors",
                     "token_filter", "modulate", "policy_loss", "update", "train_step", "evaluate"}  # fmt: skip


if __name__ == "__main__":
    import tempfile

    folder = tiny.ensure(ROOT / "runs")[0]  # first, so that the notebook does not print that it builds the model
    notebook = nbformat.read(FILE, 4)
    with tempfile.TemporaryDirectory() as home:
        execute(notebook, home)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "weights": checksum(folder),
    }
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, FILE)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes, run on weights {checksum(folder)}")
