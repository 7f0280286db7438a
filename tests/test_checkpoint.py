"""Checkpoints that lack something: states of parameters without a gradient, files, bits, lines; and what is done about each."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, TIED, build
from PIL import Image
from processes import ONE_THREAD, ROOT, python
from safetensors.torch import load_file, save_file
from test_resume import metrics, one_thread, same, signals, state  # noqa: F401 (fixtures among them)

import checkpoint
import train
from laptop import tiny
from model import Policy, load


# ---------------------------------------------------------------------------------------------------------------------
# Parameters without a gradient have no optimizer state: layers that nothing reads, a vision tower before the first image
# ---------------------------------------------------------------------------------------------------------------------
def family_run(family, folder, text_first=False):
    """A model of a family and rows for it; flags of a run of three steps whose first step sees text alone, if asked."""
    build(family, folder / "model")
    (folder / "rows" / "train").mkdir(parents=True)
    order = np.random.default_rng([0, 0]).permutation(8).tolist()  # of the rows of the first epoch (prompts.example_at)
    lines = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "rows" / "train" / f"{i}.png")
        names = [] if text_first and i in order[:2] else [f"{i}.png"]
        lines.append(json.dumps({"file_names": names, "problem": "what is the digit ?", "answer": str(i)}))
    (folder / "rows" / "train" / "metadata.jsonl").write_text("\n".join(lines))
    words = "--steps 3 --prompts_per_step 2 --group_size 2 --max_new_tokens 6 --method vppo_grpo --entropy_penalty 0.1 --lr 1e-2 --save_every 1"
    flags = [*words.split(), "--model", str(folder / "model"), "--data", str(folder / "rows"), "--instruction", "", "--system_prompt", ""]
    return [*flags, "--text_only", "train"] if text_first else flags


def stateless(folder, step):
    """How many parameters of a checkpoint have no optimizer state."""
    path = Path(folder) / "checkpoints" / f"step-{step:06d}"
    return len(load_file(path / "model.safetensors")) - len(torch.load(path / "trainer.pt", weights_only=True)["optimizer"]["state"])


UNREAD = ("llava", "llava_onevision", "gemma3", "gemma3-tied")  # they have layers that nothing reads, which never get a state


def check(family, text_first, folder):
    """What the checkpoints of a run on the family's rows must lack, and nothing else: states of parameters without a gradient so far."""
    first, last = stateless(folder / "whole", 1), stateless(folder / "whole", 3)
    assert (last > 0) == (family in UNREAD) and (first > last if text_first else first == last)
    last = folder / "whole" / "checkpoints" / "step-000003"
    assert load_file(last / "model.safetensors").keys() == load_file(folder / "model" / "model.safetensors").keys()


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *TIED])
def test_every_family_resumes_exactly(family, text_first, tmp_path, monkeypatch):
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs: pip install num2words")
    monkeypatch.chdir(tmp_path)
    flags = family_run(family, tmp_path, text_first)
    train.main([*flags, "--output", "whole"])
    check(family, text_first, tmp_path)
    shutil.copytree("whole", "again")
    train.main(["--resume", "again/checkpoints/step-000001"])
    assert same(state("again", 3), state("whole", 3)) and metrics("again") == metrics("whole")


ENGINES = {"DDP": (False, []), "DDP, text first": (True, []), "sharded": (False, ["--shard"])}  # sharded runs refuse rows without an image


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *TIED])
def test_several_processes_resume_exactly(family, tmp_path):
    """Two processes make a whole run with each engine, and two others resume them all."""
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs: pip install num2words")
    folders = {engine: tmp_path / engine for engine in ENGINES}

    def train_all(flags):
        (tmp_path / "runs.json").write_text(json.dumps([[str(folders[engine]), flags[engine]] for engine in ENGINES]))
        command = [*python(2), str(ROOT / "tests" / "train_worker.py"), str(tmp_path / "runs.json")]
        done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]

    whole = {engine: family_run(family, folders[engine], text_first) + more for engine, (text_first, more) in ENGINES.items()}
    train_all({engine: [*flags, "--output", "whole"] for engine, flags in whole.items()})
    for engine, (text_first, _) in ENGINES.items():
        check(family, text_first, folders[engine])
        shutil.copytree(folders[engine] / "whole", folders[engine] / "again")
    train_all(dict.fromkeys(ENGINES, ["--resume", "again/checkpoints/step-000001"]))
    for engine, folder in folders.items():
        assert same(state(folder / "again", 3), state(folder / "whole", 3)), engine
        assert metrics(folder / "again") == metrics(folder / "whole"), engine


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints, logs and folders
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with two checkpoints of a model with random weights, after one and two updates, and logs of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    processor = tiny.build_processor()
    policy = Policy(tiny.build_model(processor, **tiny.RECIPE | {"layers": 1, "vision_layers": 1}), processor)
    optimizer = torch.optim.AdamW(policy.parameters())
    for step in (1, 2):
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        checkpoint.save_checkpoint(policy, optimizer, folder, {"step": step})
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.5}\n')
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {"gone": None, "empty": lambda data: b"", "half": lambda data: data[: len(data) // 2], "one bit": flip,
           "zeros": lambda data: bytes(len(data)), "longer": lambda data: data + b"\n"}  # fmt: skip
FILES = "model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json processor_config.json".split()
FILES += ["chat_template.jinja", "trainer.pt", "SHA256SUMS"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_the_newest_checkpoint_is_passed_over_whatever_happened_to_it(file, damage, broken, capsys):
    newest, older = checkpoint.every(broken)
    if damage == "gone":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(DAMAGES[damage]((newest / file).read_bytes()))
    with pytest.raises(ValueError, match="step-000002 is not a whole checkpoint") as error:
        checkpoint.checkpoint_of(newest)
    assert "\n" not in str(error.value) and newest.exists()
    assert checkpoint.checkpoint_of(broken) == older
    assert f"{newest} is damaged (" in capsys.readouterr().out
    assert sorted(path.name for path in newest.parent.iterdir()) == ["damaged-step-000002", "step-000001"]


def test_every_file_has_its_checksum(broken):
    path = checkpoint.every(broken)[0]
    assert sorted(FILES) == sorted(file.name for file in path.iterdir()) and checkpoint.damage(path) is None
    lines = (path / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == len(FILES) - 1
    (path / "SHA256SUMS").write_text("\n".join(lines[:-1]))
    assert checkpoint.damage(path) == "SHA256SUMS is cut off"
    if shutil.which("sha256sum"):
        (path / "SHA256SUMS").write_text("\n".join(lines) + "\n")
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=True)


def test_the_same_step_damaged_twice(broken):
    newest, older = checkpoint.every(broken)
    for count in (1, 2, 3):
        shutil.copytree(older, newest, dirs_exist_ok=True)
        (newest / "config.json").unlink()
        assert checkpoint.checkpoint_of(broken) == older
    names = ["damaged-step-000002", "damaged-step-000002-2", "damaged-step-000002-3", "step-000001"]
    assert sorted(path.name for path in older.parent.iterdir()) == names


def resum(path):
    """Checksums that fit whatever is there now: damage that was saved."""
    files = sorted((file for file in path.iterdir() if file.name != "SHA256SUMS"), key=lambda file: (file.name == "trainer.pt", file))
    (path / "SHA256SUMS").write_text("".join(f"{checkpoint.checksum(file)}  {file.name}\n" for file in files))


CONTENTS = [3, "text", [1], {}, {"optimizer": None}, {"progress": {"step": 2}}, {"optimizer": None, "progress": {}},
            {"optimizer": None, "progress": {"step": 7}}, {"optimizer": [1], "progress": {"step": 2}}, {"optimizer": None, "progress": None},
            torch.zeros(3), None]  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS, ids=str)
def test_a_trainer_file_of_other_content(content, broken):
    newest, older = checkpoint.every(broken)
    torch.save(content, newest / "trainer.pt")
    resum(newest)
    with pytest.raises(ValueError, match="step-000002 is not a whole checkpoint") as error:
        checkpoint.checkpoint_of(newest)
    assert "\n" not in str(error.value) and checkpoint.checkpoint_of(broken) == older


def test_a_pickle_in_the_trainer_file_is_not_run(broken, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    newest, older = checkpoint.every(broken)
    torch.save({"optimizer": None, "progress": {"step": 2, "bomb": Bomb()}}, newest / "trainer.pt")
    resum(newest)
    assert checkpoint.checkpoint_of(broken) == older and not (tmp_path / "ran").exists()


STATES = {
    "another shape": lambda states: states["model.lm_head.weight"].update(exp_avg=torch.zeros(3)),
    "another name": lambda states: states.update({"model.other": states.pop("model.lm_head.weight")}),
    "no moments": lambda states: states["model.lm_head.weight"].pop("exp_avg_sq"),
    "no tensors": lambda states: states.update({"model.lm_head.weight": 3}),
}


@pytest.mark.parametrize("name", STATES)
def test_the_optimizer_of_another_model(name, broken):
    path = checkpoint.every(broken)[0]
    content = torch.load(path / "trainer.pt", weights_only=True)
    STATES[name](content["optimizer"]["state"])
    torch.save(content, path / "trainer.pt")
    policy = Policy(*load(str(path)))
    with pytest.raises(ValueError, match=r"trainer.pt does not fit the model \(") as error:
        checkpoint.restore(policy, torch.optim.AdamW(policy.parameters()), path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["a file", "an empty folder", "a link to nothing", "a folder in place of a file"])
def test_a_checkpoint_that_is_something_else(kind, broken):
    newest, older = checkpoint.every(broken)
    if kind == "a folder in place of a file":
        (newest / "trainer.pt").unlink()
        (newest / "trainer.pt").mkdir()
    else:
        shutil.rmtree(newest)
        if kind == "a file":
            newest.write_text("nothing")
        elif kind == "an empty folder":
            newest.mkdir()
        else:
            newest.symlink_to(broken / "nowhere")
    with pytest.raises(ValueError, match="step-000002 is not a whole checkpoint"):
        checkpoint.checkpoint_of(newest)
    assert checkpoint.checkpoint_of(broken) == older


LINES = [b"", b"   ", b"\x00" * 30, b'{"step": 1, "rew', b"[1]", b"{}", b"3", b"null", b'{"step": "1"}', b'{"step": null}', b'{"step": true}',
         b'{"step": 1.5}', b'{"step": NaN}', b'{"step": [1]}', b"\xff\xfe", b"\xef\xbb\xbf{", b"[" * 100_000, b'{"step": 1}{"step": 2}',
         b"1" * 5000, b'"step"', b'{"Step": 1}', b'{"step": -Infinity}']  # fmt: skip


@pytest.mark.parametrize("place", ["first", "middle", "last", "torn"])
@pytest.mark.parametrize("index", range(len(LINES)))
def test_a_line_that_is_none_is_named_and_left_out(index, place, broken, capsys):
    good = [b'{"step": 1, "reward": 0.5}', b'{"step": 2, "reward": 0.25}', b'{"step": 3, "reward": 1}']
    at = {"first": 0, "middle": 1}.get(place, 3)
    lines = [*good[:at], LINES[index], *good[at:]]
    (broken / "metrics.jsonl").write_bytes(b"\n".join(lines) + (b"" if place == "torn" else b"\n"))
    checkpoint.clean(broken, checkpoint.every(broken)[0])
    assert (broken / "metrics.jsonl").read_bytes() == b"".join(line + b"\n" for line in good[:2])
    error = capsys.readouterr().err
    named = [f"{broken / 'metrics.jsonl'}, line {at + 1}: left out, for it is no JSON object with a step"]
    assert error.splitlines() == ([] if place == "torn" and not LINES[index] else named)


def test_empty_logs(broken, capsys):
    for content in (b"", b'{"step": 1}'):
        (broken / "metrics.jsonl").write_bytes(content)
        checkpoint.clean(broken, checkpoint.every(broken)[0])
        assert (broken / "metrics.jsonl").read_bytes() == content + (b"\n" if content else b"")
    assert capsys.readouterr() == ("", "")


def test_a_finished_run_without_checkpoints_is_not_emptied(broken):
    shutil.rmtree(broken / "checkpoints")
    assert checkpoint.checkpoint_of(broken) is None  # killed before its first: starts again
    (broken / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="the run is finished and has no checkpoint; for another one choose another --output"):
        checkpoint.checkpoint_of(broken)


@pytest.mark.parametrize("what", ["weights", "optimizer", "row"])
def test_a_resume_that_fails_changes_nothing(what, tmp_path, monkeypatch):
    """The older checkpoint does not load: newer ones, logs and summary are as before."""
    monkeypatch.chdir(tmp_path)
    train.main([*family_run("qwen2_5_vl", tmp_path), "--output", "out"])
    path = tmp_path / "out" / "checkpoints" / "step-000001"
    if what == "weights":
        save_file(load_file(path / "model.safetensors") | {"lm_head.weight": torch.full((74, 32), float("nan"))}, path / "model.safetensors")
    elif what == "optimizer":
        content = torch.load(path / "trainer.pt", weights_only=True)
        content["optimizer"]["state"]["model.lm_head.weight"]["exp_avg"] = torch.zeros(3)
        torch.save(content, path / "trainer.pt")
    else:
        shutil.rmtree(tmp_path / "rows")
    resum(path)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    with pytest.raises((ValueError, OSError)):
        train.main(["--resume", str(path)])
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_tied_weights_are_saved_once_and_resumed(tmp_path):
    """A head that is the embedding: one tensor, one optimizer state."""
    build("qwen2_5_vl-tied", tmp_path / "model")
    ends = []
    for start in (0, 1):  # one run goes through; another goes on from its first step
        path = checkpoint.checkpoint_of(tmp_path / "run")
        policy = Policy(*load(str(path or tmp_path / "model")))
        assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        if path:
            checkpoint.restore(policy, optimizer, path)
        for step in range(start + 1, 4):
            for number, parameter in enumerate(policy.parameters()):
                parameter.grad = torch.full_like(parameter, (step + number) % 5) if number % 2 or step > 1 else None
            optimizer.step()
            if step == 1:
                checkpoint.save_checkpoint(policy, optimizer, tmp_path / "run", {"step": 1})
                stored = load_file(checkpoint.checkpoint_of(tmp_path / "run") / "model.safetensors")
                assert len(stored) == len(list(policy.parameters())) and "lm_head.weight" not in stored
        ends.append(list(policy.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends))


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_the_device_decides_whether_the_optimizer_is_fused(before, after, tmp_path):
    """On a GPU all weights are updated by one fused kernel. A checkpoint of a CPU has another setting, which must not come along."""
    processor = tiny.build_processor()
    recipe = tiny.RECIPE | {"layers": 1, "vision_layers": 1}

    def start(fused):
        policy = Policy(tiny.build_model(processor, **recipe), processor)
        return policy, torch.optim.AdamW(policy.parameters(), lr=0.25, weight_decay=0.5, fused=fused)

    def steps(policy, optimizer, number):
        for _ in range(number):
            for parameter in policy.parameters():
                parameter.grad = parameter.detach().sin()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])

    policy, optimizer = start(before)
    steps(policy, optimizer, 2)
    checkpoint.save_checkpoint(policy, optimizer, tmp_path, {"step": 2})
    whole = steps(policy, optimizer, 2)
    path = checkpoint.checkpoint_of(tmp_path)
    policy = Policy(*load(str(path)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, fused=after)
    assert checkpoint.restore(policy, optimizer, path) == {"step": 2}
    (group,) = optimizer.param_groups
    assert group["fused"] is after and (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2}
    assert torch.allclose(steps(policy, optimizer, 2), whole, rtol=1e-4, atol=1e-5)
