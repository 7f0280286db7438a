"""--log wandb, without network: what a run writes for it offline, that it goes on under the same id, and what is said where it cannot."""

import json
import struct
import sys
from pathlib import Path

import pytest
from test_checkpoint import family_run
from test_resume import metrics, one_thread, signals  # noqa: F401 (fixtures)

import train


@pytest.fixture
def wandb(tmp_path, tmp_path_factory, monkeypatch):
    """The module, offline, with nothing known of the person who runs the tests."""
    module = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path_factory.mktemp("home"))
    for name, value in {"WANDB_MODE": "offline", "HOME": home, "NETRC": f"{home}/netrc"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    module.teardown()  # it reads the environment once
    yield module
    module.teardown()


def history(file):
    """The steps in a file of wandb: [{name: value}]. It holds pieces of records in blocks of 32 KiB, like LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, place, record, found = Path(file).read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            parsed = wandb_internal_pb2.Record.FromString(record)
            if parsed.WhichOneof("record_type") == "history":
                found.append({(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in parsed.history.item})
            record = b""
    return [{name: value for name, value in step.items() if name[0] != "_"} for step in found]


def test_every_step_is_written_once_and_a_resumed_run_keeps_its_id(wandb, tmp_path):
    flags = family_run("qwen2_5_vl", tmp_path)
    train.main([*flags, "--log", "wandb", "--output", "out"])
    (file,) = Path("out/wandb").glob("offline-run-*/*.wandb")
    logged = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert history(file) == [{name: value for name, value in record.items() if value is not None} for record in logged]
    assert len(logged) == 3 and "loss" in logged[0]
    before = metrics("out")
    train.main(["--resume", "out/checkpoints/step-000001"])
    files = sorted(Path("out/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name == f"run-{Path('out/wandb/id').read_text()}.wandb"
    assert [step["step"] for step in history(next(other for other in files if other != file))] == [2, 3] and metrics("out") == before
    assert wandb.run is None  # it was finished


def test_without_a_key_it_says_so_and_asks_nobody(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--log wandb finds no key: set WANDB_API_KEY, run wandb login once, or set WANDB_MODE=offline") as error:
        train.main(["--log", "wandb", "--output", "out"])
    assert "\n" not in str(error.value) and sorted(tmp_path.iterdir()) == before


def test_a_key_that_is_none(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    with pytest.raises(ValueError, match="--log wandb: .*key"):
        train.main(["--log", "wandb", "--output", "out"])
    assert not Path("out").exists()


@pytest.mark.parametrize("flags, package", [("--log wandb", "wandb"), ("--log tensorboard", "tensorboard"), ("--lora_rank 4", "peft")])
def test_a_package_that_is_missing(flags, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # what Python makes of a package that is not there
    with pytest.raises(ImportError, match=f"{flags.removesuffix(' 4')} needs: pip install {package}"):
        train.main([*flags.split(), "--output", "out"])
    assert not list(tmp_path.iterdir())
