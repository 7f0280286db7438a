"""train.py and eval.py from the command line: the files a run leaves, that it repeats to the bit, and bad input in one sentence."""

import json
import math
import os
import subprocess
import sys
import zlib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import eval as evaluation
import model
import reward
import train
from config import METHODS, RANGES, Config, check_fields, command_line, output_folder, parse
from laptop import digits, tiny

ROOT = Path(train.__file__).parent
SMALL = "--prompts_per_step 2 --group_size 8 --max_new_tokens 8 --steps 2 --test_prompts 2 --eval_prompts 2 --eval_samples 2"
SMALL = [*SMALL.split(), *"--updates_per_rollout 2 --eval_every 1 --save_every 1".split()]

COLLECTED = {"step", "reward", "no_signal", "prompts_sampled", "prompts_too_long", "bad_rows", "response_length", "truncated", "lr", "skipped"}
UPDATED = {"loss", "updates_skipped", "entropy", "clip_fraction", "approx_kl", "gradient_tokens", "grad_norm"}
MODULATED = {"dependency_mean", "dependency_std", "alpha_min", "alpha_max"}
TIMES = {"seconds_rollout", "seconds_score", "seconds_update", "seconds_eval"}
VALIDATED = {"val_avg", "val_avg_ci"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are fastest on one thread, and by far where other programs share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a tiny model with random weights."""
    processor = tiny.build_processor()
    recipe = tiny.RECIPE | {"layers": 1, "vision_layers": 1}
    folder = tmp_path_factory.mktemp("start")
    model.save(model.Policy(tiny.build_model(processor, **recipe), processor), folder)
    return str(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder as working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def some_right(monkeypatch):
    """Random weights never answer right. Call about half of all texts right, by checksum, so that groups carry signal."""
    monkeypatch.setattr(reward, "grade", lambda text, truth, grader="exact": float(zlib.crc32(text.encode()) % 2))


def run(start, *flags):
    """train.main with small settings; (output folder, summary)."""
    flags = [*SMALL, "--model", start, *flags]
    summary = train.main(flags)
    return Path(flags[flags.index("--output") + 1]) if "--output" in flags else None, summary


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------------
# What a run does and leaves
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_every_method(method, start, workplace, some_right):
    folder, summary = run(start, "--method", method, "--output", "out")
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == set(vars(Config())) and (config["method"], config["group_size"]) == (method, 8)

    metrics = lines(folder / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2]
    assert [record["lr"] for record in metrics] == pytest.approx([config["lr"], config["lr"] / 2])  # linear to 0
    modulated = {"tgf", "tas"} & METHODS[method]
    for record in metrics:
        assert set(record) == COLLECTED | UPDATED | TIMES | VALIDATED | (MODULATED if modulated else set())
        assert record["skipped"] == 0 and 0 < record["reward"] < 1 and record["grad_norm"] > 0
        assert all(math.isfinite(value) for value in record.values())
        # k = 0.4, each response's share rounded up
        filtered = "tgf" in METHODS[method]
        assert 0.4 <= record["gradient_tokens"] < 0.8 if filtered else record["gradient_tokens"] == 1

    samples = lines(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 2]
    for sample in samples:
        assert {"problem", "answer", "response", "reward", "advantage", "alpha", "dependency", "token_mask"} < set(sample)
        assert 1 <= len(sample["dependency"]) == len(sample["token_mask"]) <= 8
        length = len(sample["token_mask"])
        assert sum(sample["token_mask"]) == (math.ceil(0.4 * length) if filtered else length)

    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["method"], summary["seed"], summary["steps"], summary["seconds_warmup"]) == (method, 0, 2, 0.0)
    assert summary["seconds"] > 0
    for when in ("before", "after"):
        assert 0 <= summary[f"avg_at_2_{when}"] <= summary[f"pass_at_2_{when}"] <= 1
        records = lines(folder / f"test-{when}.jsonl")
        assert [record["name"] for record in records] == ["digits test[0]", "digits test[1]"]
        assert summary[f"avg_at_2_{when}"] == sum(sum(record["rewards"]) for record in records) / 4
        assert summary[f"pass_at_2_{when}"] == sum(max(record["rewards"]) for record in records) / 2

    saved = folder / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["step-000001", "step-000002"]
    states = [weights(path) for path in (start, saved / "step-000001", saved / "step-000002")]
    assert not equal(states[0], states[1]) and not equal(states[1], states[2])


def test_without_signal_nothing_is_learned(start, workplace, monkeypatch):
    monkeypatch.setattr(reward, "grade", lambda *_: 0.0)
    folder, summary = run(start, "--output", "out", "--max_rounds", "2")
    for record in lines(folder / "metrics.jsonl"):
        assert set(record) == COLLECTED | {"seconds_rollout", "seconds_eval"} | VALIDATED
        assert (record["skipped"], record["no_signal"], record["prompts_sampled"]) == (1, 1.0, 4)  # 2 rounds of 2 prompts
    assert not (folder / "samples.jsonl").exists()
    assert summary["avg_at_2_after"] == summary["pass_at_2_after"] == 0
    assert equal(weights(start), weights(folder / "checkpoints" / "step-000002"))


def test_a_seed_repeats_a_run_to_the_bit(start, workplace, some_right):
    results = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(len(results))  # what happened before the run must not matter
        folder, _ = run(start, "--output", name, "--seed", seed, "--mask", "noise")
        metrics = [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in lines(folder / "metrics.jsonl")]
        results.append((metrics, lines(folder / "samples.jsonl"), weights(folder / "checkpoints" / "step-000002")))
    first, again, other = results
    assert first[:2] == again[:2] and equal(first[2], again[2])
    assert first[0] != other[0] and not equal(first[2], other[2])


def test_a_checkpoint_loads_and_evaluates(start, workplace, some_right, capsys):
    folder, summary = run(start, "--output", "out")
    checkpoint = folder / "checkpoints" / "step-000002"
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert equal({k: v for k, v in loaded.state_dict().items()}, model.load(str(checkpoint))[0].state_dict())
    assert sum(p.numel() for p in loaded.parameters()) == sum(v.numel() for v in weights(start).values())

    evaluation.main(f"--model {checkpoint} --data digits --samples 2 --prompts 2 --max_new_tokens 8".split())
    result = json.loads((checkpoint / "eval-digits-test" / "eval.json").read_text())
    assert (result["prompts"], result["samples"], result["split"], result["data"]) == (2, 2, "test", "digits")
    # the run's own held-out table, by the other door: same prompts, same seed, same weights
    assert (result["avg"], result["pass"]) == (summary["avg_at_2_after"], summary["pass_at_2_after"])
    records = lines(checkpoint / "eval-digits-test" / "responses.jsonl")
    assert records == lines(folder / "test-after.jsonl")
    assert all(len(record["responses"]) == len(record["rewards"]) == 2 for record in records)
    assert "avg@2" in capsys.readouterr().out

    evaluation.main(f"--model {checkpoint} --split val --samples 1 --prompts 3 --max_new_tokens 4 --output elsewhere".split())
    assert [record["name"] for record in lines("elsewhere/responses.jsonl")] == [f"digits val[{i}]" for i in range(3)]


def test_a_folder_without_a_test_split(start, workplace, some_right, capsys):
    rows = []
    (workplace / "set").mkdir()
    for i in range(3):
        example = digits.Digits("train")[i]
        example.images[0].save(workplace / "set" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "problem": example.problem, "answer": example.answer}))
    (workplace / "set" / "metadata.jsonl").write_text("\n".join(rows))
    folder, summary = run(start, "--data", "set", "--output", "out", "--instruction", "")
    assert not any("_at_" in key for key in summary) and "held out" not in capsys.readouterr().out
    assert not list(folder.glob("test-*.jsonl"))
    assert all("val_avg" not in record for record in lines(folder / "metrics.jsonl"))
    assert not equal(weights(start), weights(folder / "checkpoints" / "step-000002"))
    # evaluated whole, as there are no splits
    evaluation.main(["--model", start, "--data", "set", "--samples", "1", "--max_new_tokens", "4", "--output", "scores"])
    assert json.loads(Path("scores/eval.json").read_text())["prompts"] == 3


def test_switched_off_evaluation_and_checkpoints(start, workplace, some_right):
    off = "--steps 1 --eval_every 0 --save_every 0 --test_prompts 0".split()
    folder, summary = run(start, "--output", "out", *off)
    left = {path.name for path in folder.iterdir()} - {"curves.png"}  # where matplotlib is installed
    assert left == {".lock", "config.json", "metrics.jsonl", "samples.jsonl", "summary.json"}
    assert not any("_at_" in key for key in summary)


def test_evaluation_samples_the_whole_softmax(start, workplace):
    """Temperature 1 and top-p 1 (Section 4), whatever the rollout does."""
    narrow, _ = run(start, "--output", "a", "--steps", "0", "--top_p", "0.3", "--temperature", "0.5")
    plain, _ = run(start, "--output", "b", "--steps", "0")
    assert lines(narrow / "test-before.jsonl") == lines(plain / "test-before.jsonl")


def test_interval():
    # Per-prompt means 0 and 1: standard deviation 0.7071 (n - 1), so 1.96 * 0.7071 / sqrt(2) = 0.98.
    mean, half = evaluation.interval(torch.tensor([0.0, 1.0]))
    assert mean == 0.5 and half == pytest.approx(0.98, abs=1e-6)
    assert evaluation.interval(torch.ones(5)) == (1.0, 0.0)
    mean, half = evaluation.interval(torch.tensor([0.25]))
    assert mean == 0.25 and half is None  # one prompt says nothing about its spread


def test_interval_is_clustered_by_prompt(start, monkeypatch):
    """Two prompts, one always right, one never: however many answers each has, the interval stays 0.5 +- 0.98."""
    policy = model.Policy(*model.load(start))
    task = digits.Digits("val", 2)
    right = task[0].answer
    assert right != task[1].answer
    monkeypatch.setattr(reward, "grade", lambda text, truth, grader="exact": float(truth == right))
    state = torch.get_rng_state()
    scores, records = evaluation.evaluate(policy, task, Config(max_new_tokens=2), 0, samples=6)
    assert torch.equal(torch.get_rng_state(), state)
    half = {"avg": 0.5, "avg_ci": pytest.approx(0.98), "pass": 0.5, "pass_ci": pytest.approx(0.98)}
    assert scores == half | {"majority": 0.0, "majority_ci": 0.0}  # two tokens make no box: nobody votes
    assert [record["rewards"] for record in records] == [[1.0] * 6, [0.0] * 6]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and output folder
# ---------------------------------------------------------------------------------------------------------------------
def test_default_output_is_numbered(workplace):
    names = []
    for flags in (["--seed", "3"], ["--seed", "3"], ["--seed", "3"], ["--method", "dapo"], ["--data", "some/where/set"]):
        folder = output_folder(parse(flags)[0])
        assert not folder.exists()  # a run that fails to start leaves no folder behind
        folder.mkdir(parents=True)
        names.append(str(folder))
    assert names == ["runs/vppo-digits-3", "runs/vppo-digits-3-2", "runs/vppo-digits-3-3", "runs/dapo-digits-0", "runs/vppo-set-0"]


def test_config_file_and_flags(workplace):
    values = {"method": "grpo", "steps": 7, "beta_max": 1.5, "share_prompt": False, "k": 0.25}
    Path("c.json").write_text(json.dumps(values))
    cfg, *_ = parse(["--config", "c.json", "--steps", "9"])
    assert vars(cfg) == vars(Config()) | values | {"steps": 9}
    assert parse(["--steps", "9", "--config=c.json"])[0] == cfg
    assert parse([])[0] == Config()


def test_a_runs_own_config_repeats_it(workplace):
    cfg, *_ = parse(["--method", "tas", "--lr", "3e-5", "--clip_high", "0.3", "--no_share_prompt"])
    Path("c.json").write_text(json.dumps(vars(cfg)))
    assert parse(["--config", "c.json"])[0] == cfg


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence that says what and where
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method ppo", "--method 'ppo' is unknown.*vppo"),
        ("--mask stripes", "--mask 'stripes' is unknown"),
        ("--dtype float16", "--dtype"),
        ("--grader kind", "--grader 'kind' is unknown"),
        ("--k 0", "--k must be from 0.0001 to 1, got 0"),
        ("--k 1.5", "--k must be from 0.0001 to 1, got 1.5"),
        ("--k nan", "--k must be"),
        ("--group_size 1", "--group_size must be from 2"),
        ("--beta_min 1.2 --beta_max 1.1", "--beta_min 1.2 exceeds --beta_max 1.1"),
        ("--beta_min 1.2", "--beta_min must be in"),
        ("--temperature 0", "--temperature must be from 0.01"),
        ("--top_p 0", "--top_p"),
        ("--steps -1", "--steps must be from 0"),
        ("--max_new_tokens 0", "--max_new_tokens must be from 1"),
        ("--updates_per_rollout 3", "--updates_per_rollout 3 exceeds --prompts_per_step 2"),
        ("--data nowhere", "data 'nowhere' is unknown"),
        ("--model here", "'here' has no config.json"),
        ("--model ./missing", "model './missing' is neither"),
        ("--max_prompt_tokens 9", r"digits train\[0\]: prompt of \d+ tokens exceeds --max_prompt_tokens 9"),
        ("--output held", "--output held already holds a run"),
        ("--output file.txt", "--output file.txt cannot be written"),
        ("--config none.json", "none.json cannot be read"),
        ("--config broken.json", "broken.json cannot be read"),
        ("--config unknown.json", "unknown.json has unknown fields: learning_rate"),
        ("--config method.json", "--method 'ppo' is unknown"),
        ("--config=", "--config '' cannot be read: it is no file"),
        ("--config pipe", "--config pipe cannot be read: it is no file"),
        ("--config deep.json", "deep.json cannot be read: maximum recursion depth"),
        ("--config null.json", "null.json: steps cannot be null: leave it out for its default"),
        ("--config list.json", r"list.json: data cannot be \[1\]: leave it out"),
        ("--config twice.json", "twice.json cannot be read: 'lr' stands in it twice"),
        ("--config binary.json", "binary.json cannot be read: .*codec can't decode"),
        ("--step 1", "unrecognized arguments: --step 1"),
        ("--output a\udcffb", r"--output 'a\\udcffb' is no text in UTF-8"),
        ("--config zero.json", r"--output 'a\\x00b' is no text in UTF-8"),
        ("--data=", "--data '' is unknown"),
    ],
)
def test_bad_input_of_training(flags, message, start, workplace):
    for name in ("here", "held"):
        (workplace / name).mkdir()
    (workplace / "held" / "config.json").write_text("{}")
    os.mkfifo("pipe")
    Path("binary.json").write_bytes(b'{"model": "\xff"}')
    texts = {"deep.json": 10**5 * '{"a":', "null.json": '{"beta_max": null, "steps": null}', "list.json": '{"data": [1]}',
             "twice.json": '{"lr": 1e-3, "k": 0.5, "lr": 1e-4}', "zero.json": '{"output": "a\\u0000b"}'}  # fmt: skip
    for name, text in texts.items():
        Path(name).write_text(text)
    for name, text in {"broken.json": "{", "unknown.json": '{"learning_rate": 1}', "method.json": '{"method": "ppo"}', "file.txt": ""}.items():
        (workplace / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        run(start, *flags.split())
    assert "\n" not in str(error.value)


def numeric(config):
    """The fields of a config dataclass that are numbers, with their types."""
    types = {field.name: field.type for field in fields(config)}
    return {name: int if kind is int else float for name, kind in types.items() if kind in (int, float, float | None)}


@pytest.mark.parametrize("config", [Config, evaluation.EvalConfig])
def test_every_number_has_a_range_and_its_ends_are_allowed(config):
    """Bad values are drawn from the type of each flag: beside both ends, far out, and what is no number."""
    assert set(numeric(config)) <= set(RANGES)
    for name, kind in numeric(config).items():
        low, high = RANGES[name]
        for end in (low, high):
            check_fields(config(**{name: kind(end)}))
        if kind is int:
            bad = [low - 1, high + 1, -(10**30), 2**63, 2**64, 10**30]
        else:
            bad = [math.nan, math.inf, -math.inf, math.nextafter(low, -1), math.nextafter(high, math.inf), -1.0, 1e300]
        for value in bad:
            cfg = command_line(config, "").parse_args([f"--{name}={value}"])
            with pytest.raises(ValueError, match=f"^--{name} must be from .* to .*, got ") as error:
                check_fields(cfg)
            assert "\n" not in str(error.value)


def test_every_range_belongs_to_a_flag():
    assert set(RANGES) == set(numeric(Config)) | set(numeric(evaluation.EvalConfig))


@pytest.mark.parametrize("flags", ["--no_such_flag 1", "--k much", "--steps 1.5"])
def test_flags_that_do_not_parse(flags, start, workplace):
    with pytest.raises(ValueError, match=flags.split()[0]) as error:
        run(start, *flags.split())
    assert "\n" not in str(error.value)


def test_math_verify_is_not_installed(start, workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for main in (train.main, evaluation.main):
        with pytest.raises(ImportError, match="pip install math-verify"):
            main(["--model", start, "--grader", "math-verify"])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--samples 0", "--samples must be from 1"),
        ("--temperature nan", "--temperature must be from 0.01"),
        ("--responses_at_once 0", "--responses_at_once must be from 1"),
        ("--seed 18446744073709551616", "--seed must be from 0"),
        ("--prompt 3", "unrecognized arguments: --prompt 3"),
        ("--dtype int8", "--dtype 'int8' is unknown"),
        ("--data nowhere", "data 'nowhere' is unknown"),
        ("--split dev", "no split 'dev'"),
        ("--grader kind", "--grader 'kind' is unknown"),
        ("--model ./missing", "model './missing' is neither"),
        ("--max_prompt_tokens 9", "exceeds --max_prompt_tokens 9"),
    ],
)
def test_bad_input_of_evaluation(flags, message, start, workplace):
    with pytest.raises(ValueError, match=message) as error:
        evaluation.main(["--model", start, "--prompts", "2", "--output", "out", *flags.split()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command, message",
    [
        ("train.py --method ppo", "train.py: --method 'ppo' is unknown"),
        ("train.py --shard", "train.py: --shard needs processes"),
        ("train.py --model here --data rows", "rows/metadata.jsonl, line 2: image 'b.png' does not exist"),
        ("eval.py --model here", "eval.py: model folder 'here' has no config.json"),
    ],
)
def test_one_line_on_stderr(command, message, workplace):
    for name in ("here", "rows"):
        (workplace / name).mkdir()
    Image.new("RGB", (28, 28)).save(workplace / "rows" / "a.png")
    rows = [{"file_name": name, "problem": "p", "answer": "1"} for name in ("a.png", "b.png")]
    (workplace / "rows" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script, *flags = command.split()
    done = subprocess.run([sys.executable, ROOT / script, *flags], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "command, message",
    [
        ("dryrun.py nope", "dryrun.py: unrecognized arguments: nope"),
        ("data.py digits", "data.py is no program: python train.py --data DATA --dry_run checks a data set"),
        ("-m lab.runs table2", "lab.runs is no program: python -m lab.experiments NAME"),
    ],
)
def test_what_is_no_program_says_so(command, message):
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1 and not done.stdout
