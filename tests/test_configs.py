"""configs/: what --dry_run says of each, by hand; that it needs no network; and that each field has a source in the table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import train
from config import parse
from dryrun import KNOWN, count_parameters
from lab.bench import peak_memory
from laptop import tiny
from loss import token_entropy

ROOT = Path(train.__file__).parent
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
# Any attempt to reach another machine ends the process at once, whatever would catch an exception.
NO_NETWORK = """
import os, sys
def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os._exit(97)
sys.addaudithook(guard)
"""


def offline(folder, *words, **environment):
    """Run python without network and with an empty hub cache, both under `folder`."""
    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    here = {"PYTHONPATH": str(folder / "guard"), "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1", **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    return subprocess.run([sys.executable, *words], cwd=folder, env=kept | here, capture_output=True, text=True)


def described(capsys, *flags):
    """What --dry_run prints, in this process."""
    assert train.main([*flags, "--dry_run"]) is None
    return capsys.readouterr().out


def table(text):
    """The rows of the table of GPU counts: {GPUs: cells}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {int(cells[0]): cells[1:] for cells in rows[1:]}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder as working directory, and nothing in the hub's cache."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Each config, from the command line
# ---------------------------------------------------------------------------------------------------------------------
def test_the_guard_ends_whoever_asks_the_network(tmp_path):
    assert offline(tmp_path, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))").returncode == 97
    assert offline(tmp_path, "-c", "import socket; socket.getaddrinfo('huggingface.co', 443)").returncode == 97
    assert offline(tmp_path, "-c", "pass").returncode == 0


# name: lines it must print; GPUs; on so many: prompts, responses, responses of an update; whether it fits 80 GB as it stands
EXPECTED = {
    # 202 x 384 = 77,568; / 38,870 = 1.9956; x 3 rounds = 232,704; / 38,870 = 5.987. 8.292e9 weights x 2, 4, 12 bytes.
    "qwen2.5-vl-7b": (
        ["384 prompts x 8 responses = 3,072 responses; 3 update(s) of 128 prompts = 1,024 responses",
         "202 steps = 77,568 prompts trained on = 2.00 epochs of 38,870 rows", "up to 232,704 prompts = 5.99 epochs",
         "8.292 billion weights", "16.6 GB in bfloat16", "33.2 GB of CPU memory", "99.5 GB a checkpoint",
         "lr = 1e-06  (default 0.0003)", "Fits 80 GB cards as it stands on: 4, 8, 16, 32 GPU(s)"],
        8, ["48", "384", "128"], "yes",
    ),
    # 33.453e9 weights x 2, 12, 8 bytes; 384 / 32 = 12 prompts, of which 4 an update
    "qwen2.5-vl-32b": (
        ["66.9 GB in bfloat16", "401.4 GB a checkpoint", "267.6 GB for optimizer states, of all ranks together", "responses of 4096",
         "Fits 80 GB cards as it stands on: 32 GPU(s)", "; 80 GB on 32 GPU(s)"],
        32, ["12", "96", "32"], "yes",
    ),
    # 129 x 48 = 6,192; / 2,101 = 2.947. 384 responses, 3 updates of 16 prompts = 128.
    "qwen2.5-vl-3b-single-gpu": (
        ["48 prompts x 8 responses = 384 responses; 3 update(s) of 16 prompts = 128 responses", "6,192 prompts trained on",
         "= 2.95 epochs of 2,101 rows", "7.5 GB in bfloat16"],
        1, ["48", "384", "128"], "yes",
    ),
    # 36 layers x rank 64 x (q and o: 2 x 4096, k and v: 2 x 2304, gate, up and down: 3 x 13,056) = 119.7e6 weights of an adapter, x 12 bytes
    "qwen2.5-vl-3b-lora-24gb": (
        ["0.120 billion weights, of an adapter of rank 64, in float32; the others stay as they are, in bfloat16", "7.5 GB of CPU memory",
         "1.4 GB a checkpoint", "lora_rank = 64  (default 0)", "Smallest card that holds it: 24 GB on 1, "],
        1, ["48", "384", "128"], "yes",
    ),
    # 256,484,928 weights
    "smolvlm-256m": (
        ["0.256 billion weights", "0.5 GB in bfloat16", "3.1 GB a checkpoint", "2.1 GB for optimizer states, for each rank",
         "Smallest card that holds it: 8 GB on 1, "],
        1, ["48", "384", "128"], "yes",
    ),
    # 130 x 384 = 49,920; / 38,870 = 1.284
    "qwen3-vl-8b": (
        ["49,920 prompts trained on = 1.28 epochs of 38,870 rows", "8.767 billion weights", "responses of 8192",
         "entropy_penalty = 0.12"],
        8, ["48", "384", "128"], "yes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_dry_run_of_each_config(name, tmp_path):
    lines, gpus, work, fits = EXPECTED[name]
    done = offline(tmp_path, ROOT / "train.py", "--config", ROOT / "configs" / f"{name}.json", "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    for line in lines:
        assert line in done.stdout
    row = table(done.stdout)[gpus]
    assert row[:3] == work and row[-1] == fits
    # nothing was downloaded, and there is no output folder
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"] == ["sitecustomize.py"]


def test_each_data_set_is_asked_for_by_itself(tmp_path):
    """A local --data with validation on the hub asks no network either; flags on rows are checked without any row."""
    words = [ROOT / "train.py", "--val_data", "OWNER/NAME", "--dry_run"]
    done = offline(tmp_path, *words)
    assert done.returncode == 0 and "OWNER/NAME: from the hub" in done.stdout
    done = offline(tmp_path, *words, "--min_pixels", "10", "--max_pixels", "5")
    assert done.returncode == 1 and done.stderr.startswith("train.py: --min_pixels 10")


def test_every_config_is_expected():
    assert {path.stem for path in CONFIGS} == set(EXPECTED)


def test_memory_of_the_7b_rollout_by_hand(capsys, workplace):
    out = described(capsys, "--config", str(ROOT / "configs" / "qwen2.5-vl-7b.json"))
    states = 12 * 8.292e9 / 8  # float32 weights and two Adam moments, over 8 GPUs
    whole = 2 * 8.292e9  # gathered in bfloat16
    # At the end of the rollout. 28 layers, keys and values, 4 heads of 128, 2 bytes; 64 responses of 4096 + 2048 tokens, and one layer of
    # the 8 prompts. (When it reads them, they have a cache of 28 layers, but the 64 have none, and the vision tower needs 1.1e10 bytes.)
    cache = 2 * 4 * 128 * 2 * (28 * 64 * (4096 + 2048) + 8 * 4096)
    # One token of each response in a layer, and its input, 4 x 3584; it may see 6144. With top-p its logits lie there eleven times.
    token = 64 * (16 * 3584 + 2 * (9 * 3584 + 4 * 18_944 + 6144) + 4 * 3584)
    logits = 11 * 64 * 4 * 152_064
    assert float(table(out)[8][3]) == pytest.approx((states + whole + cache + token + logits) / 2**30, abs=0.06)


def test_the_smallest_card_by_hand(capsys, workplace):
    """A card of N GB has N x 1e9 bytes; the table's figures are in GiB."""
    rows = described(capsys, "--config", str(ROOT / "configs" / "qwen2.5-vl-7b.json"))
    said = {int(gpus): card for card, counts in re.findall(r"(\d+) GB on ([\d, ]+) GPU", rows) for gpus in counts.split(", ")}
    cards = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
    for gpus, cells in table(rows).items():
        assert said[gpus] == str(next(card for card in cards if float(cells[6]) * 2**30 <= card * 1e9))


def test_the_page_on_clusters_has_these_peaks_and_they_fit(capsys, workplace):
    rows = re.findall(r"^\| `configs/(.*)\.json` \| .* \| (\d+) x (\d+) GB \| ([\d.]+) GiB \|$", (ROOT / "docs" / "cluster.md").read_text(), flags=re.M)
    assert {name for name, *_ in rows} == set(EXPECTED)
    for name, gpus, card, peak in rows:
        assert table(described(capsys, "--config", str(ROOT / "configs" / f"{name}.json")))[int(gpus)][6] == peak
        assert float(peak) * 2**30 <= int(card) * 1e9


def test_states_wait_in_cpu_memory_but_for_the_update(capsys, workplace):
    flags = ["--config", str(ROOT / "configs" / "qwen2.5-vl-7b.json")]
    here, away = (table(described(capsys, *flags, *more))[8] for more in ([], ["--offload_optimizer"]))
    states = 8 * 8.292e9 / 8 / 2**30
    for phase in (3, 4):
        assert float(here[phase]) - float(away[phase]) == pytest.approx(states, abs=0.11)
    # In the update they come when the activations have gone, which takes more room than they do.
    assert float(here[5]) - float(away[5]) == pytest.approx(states, abs=0.11)


def test_longer_prompts_take_more(capsys, workplace):
    flags = ["--config", str(ROOT / "configs" / "qwen2.5-vl-7b.json")]
    short, long = (float(table(described(capsys, *flags, "--max_prompt_tokens", n))[8][3]) for n in ("1024", "4096"))
    assert short < long


# ---------------------------------------------------------------------------------------------------------------------
# What else it says
# ---------------------------------------------------------------------------------------------------------------------
def test_laptop(capsys, workplace):
    out = described(capsys)
    assert "differ from their defaults:\n  none\n" in out and "epochs" not in out and "no download" in out
    # 16 prompts x 8, 2 updates; on 4 GPUs 4 prompts each; on 16 one prompt each, in one of the updates; 32 are too many
    assert "16 prompts x 8 responses = 128 responses; 2 update(s) of 8 prompts = 64 responses" in out
    rows = table(out)
    assert rows[4][:3] == ["4", "32", "16"] and rows[16][:3] == ["1", "8", "8"] and rows[32][-1] == "no, fewer prompts than GPUs"
    assert not list(workplace.iterdir())


def test_uneven_shares(capsys, workplace):
    out = described(capsys, "--prompts_per_step", "7", "--updates_per_rollout", "3", "--method", "grpo")
    assert "3 update(s) of 2 prompts = 16 responses or 3 prompts = 24 responses" in out and "dynamic" not in out
    assert table(out)[2][:3] == ["4", "32", "16"]  # the busier of two ranks: 4 prompts, at most 2 of them in an update


def test_the_flags_it_names_are_the_fewest_that_fit(capsys, workplace):
    flags = ["--config", str(ROOT / "configs" / "qwen2.5-vl-7b.json"), "--shard", "false", "--activation_checkpointing", "false"]
    named = table(described(capsys, *flags))[8][-1]
    assert named == "with --shard --activation_checkpointing"
    for advice, fits in ((named[5:], True), ("--shard", False), ("--activation_checkpointing", False)):
        assert (table(described(capsys, *flags, *advice.split()))[8][-1] == "yes") == fits


def test_torchrun_adds_its_number_of_processes(capsys, workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert table(described(capsys))[6][:3] == ["3", "24", "16"]
    monkeypatch.setenv("RANK", "1")
    assert described(capsys) == ""  # rank 0 speaks for all


def test_a_cached_config_counts_more_than_the_published_dimensions(capsys, tmp_path):
    config = tiny.build_model(tiny.build_processor(), **tiny.RECIPE).config
    cache = tmp_path / "hub" / "hub" / "models--Qwen--Qwen2.5-VL-7B-Instruct"
    config.save_pretrained(cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    done = offline(tmp_path, ROOT / "train.py", "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--dry_run")
    assert done.returncode == 0 and "0.002 billion weights (by its config.json on this machine)" in done.stdout
    config.save_pretrained(tmp_path / "mine")
    out = described(capsys, "--model", str(tmp_path / "mine"), "--output", str(tmp_path / "out"))
    assert "0.002 billion weights (by its config.json on this machine); no download" in out


def test_an_unknown_hub_id_is_no_error(capsys, workplace):
    assert "a/b: its config.json is not on this machine, so its memory cannot be estimated" in described(capsys, "--model", "a/b")


def test_dry_run_is_no_field(workplace):
    parse(["--method", "grpo"])
    Path("c.json").write_text('{"dry_run": true}')
    with pytest.raises(ValueError, match="unknown fields: dry_run"):
        parse(["--config", "c.json"])


@pytest.mark.parametrize("name, weights", [("Qwen/Qwen3-VL-8B", 8.77e9), ("Qwen/Qwen2.5-VL-7B", 8.29e9), ("HuggingFaceTB/SmolVLM-256M", 256.5e6)])
def test_known_dimensions(name, weights):
    assert count_parameters(KNOWN[f"{name}-Instruct"])[0] == pytest.approx(weights, rel=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# Unsound configs: exit status 1 and one sentence
# ---------------------------------------------------------------------------------------------------------------------
def test_an_unsound_config_ends_with_one_sentence(tmp_path):
    values = json.loads((ROOT / "configs" / "qwen2.5-vl-7b.json").read_text()) | {"updates_per_rollout": 400}
    (tmp_path / "c.json").write_text(json.dumps(values))
    done = offline(tmp_path, ROOT / "train.py", "--config", "c.json", "--dry_run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "train.py: --updates_per_rollout 400 exceeds --prompts_per_step 384\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model ./missing", "model './missing' is unknown: give tiny, a folder with a config.json, or a hub id OWNER/NAME"),
        ("--model text", r"model 'text' \(llama\) is not an image-text-to-text model"),
        ("--model broken", "model 'broken': its config.json cannot be used"),
        ("--data nowhere", "data 'nowhere' is unknown"),
        ("--data rows", "rows/metadata.jsonl, line 1: no problem"),
        ("--output text", "--output text already holds a run"),
        ("--prompts_per_step 3", "--prompts_per_step 3 must be at least the number of ranks, 4"),
    ],
)
def test_unsound(flags, message, workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("text", "broken", "rows"):
        (workplace / name).mkdir()
    AutoConfig.for_model("llama").save_pretrained("text")
    Path("broken/config.json").write_text("{")
    Path("rows/metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(ValueError, match=message) as error:
        train.main([*flags.split(), "--dry_run"])
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The table of sources, and what the estimate says of an entropy penalty
# ---------------------------------------------------------------------------------------------------------------------
def test_every_field_stands_in_the_table():
    """Two kinds of tables: a row for a field with a column for each config, and a row for a long value with the configs that have it."""
    lines = [line for line in (ROOT / "configs" / "README.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]
    short = ["7b", "32b", "3b-single-gpu", "qwen3-vl-8b", "3b-lora-24gb", "smolvlm-256m"]
    names = {path: next(name for name in short if path.stem.endswith(name)) for path in CONFIGS}
    wide, long = ["field", *short, "source"], ["field", "value", "configs", "source"]
    listed = {name: {} for name in names.values()}
    assert len(listed) == len(CONFIGS) == 6 and wide in rows and long in rows
    for row in rows:
        if row in (wide, long):
            header = row
            continue
        assert len(row) == len(header) and re.match("Table|Appendix|Section|Eq\\.|official|ours", row[-1]), row[0]
        values = dict(zip(wide[1:-1], row[1:-1])) if header == wide else dict.fromkeys(row[2].split(", "), row[1])
        for name, value in values.items():
            assert row[0] not in listed[name]  # each field once
            listed[name] |= {row[0]: value} if value != "-" else {}
    for path, name in names.items():
        values = json.loads(path.read_text())
        assert set(listed[name]) == set(values)
        for field, value in values.items():
            shown = listed[name][field]
            assert shown == value if isinstance(value, str) else json.loads(shown) == value, (path.name, field)


@pytest.mark.parametrize("exact, factor", [(False, 4), (True, 7)])
def test_logits_in_the_update(exact, factor):
    """Rows of float32 logits alive at once in the loss and its backward pass: what memory_per_gpu multiplies by."""
    V, N = 20_000, 64
    head, states, ids = torch.nn.Linear(16, V, bias=False), torch.randn(N, 16, requires_grad=True), torch.zeros(N, 1).long()
    head.weight.grad = torch.zeros_like(head.weight)

    def update():
        """model.Policy.logits and forward, reduced to what is of size N x V."""
        logits = torch.add(torch.zeros(V), head(states).float())
        value = logits.gather(-1, ids)[:, 0] - logits.logsumexp(-1)
        value = value + token_entropy(logits) if exact else value
        del logits
        value.sum().backward()

    weight_gradient = 16 / N  # V x 16, in units of N x V
    assert factor - 1 < peak_memory(update) / (4 * N * V) <= factor + weight_gradient
