"""lab/experiments.py: intervals and pairing by hand, records kept and found again, and two experiments from end to end."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from config import Config
from lab import experiments, figures, runs
from lab.experiments import TABLES, Flags
from vppo import Batch

QUICK = ["--quick", "--data", "digits", "--jobs", "1"]
FLAGS = Flags(data="digits", quick=True, output="nowhere")
# Tables whose runs take hours; a name leaves this list with its results.
NOT_MADE_YET = ["own_scenes-honest", "rates_scenes-verbose", "own_scenes-verbose", "rates_scenes-verbose-honest", "own_scenes-verbose-honest"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """The processes of runs get theirs through os.environ: put back what was there."""
    monkeypatch.chdir(runs.ROOT)
    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")


# --- statistics ------------------------------------------------------------------------------------------------------
def test_interval_by_hand():
    assert figures.interval([1, 2, 3]) == (2, pytest.approx(4.303 / 3**0.5))  # standard deviation 1
    assert figures.interval([0, 2]) == (1, pytest.approx(12.706))  # standard deviation sqrt(2), over sqrt(2)
    assert figures.interval([5.0]) == (5, None) and figures.interval([1, None]) == figures.interval([]) == (None, None)


@pytest.mark.parametrize("freedom", range(1, 20))
def test_quantiles_are_students(freedom):
    # Its density is proportional to (1 + x^2 / f)^(-(f + 1) / 2); with x = sqrt(f) tan(a) to cos(a)^(f - 1) da.
    angle = np.linspace(0, np.pi / 2, 200_001)
    mass = np.cos(angle) ** (freedom - 1)
    inside = angle <= np.arctan(figures.T975[freedom - 1] / freedom**0.5)
    assert mass[inside].sum() / mass.sum() == pytest.approx(0.95, abs=2e-4)


def test_pairing_sees_what_the_spread_over_seeds_hides():
    a, b = [10.0, 20.0, 30.0], [11.0, 21.5, 31.5]  # differences 1, 1.5, 1.5: mean 4/3, standard deviation 0.2887
    mean, half = figures.difference(b, a)
    assert mean == pytest.approx(4 / 3) and half == pytest.approx(4.303 * 0.288675 / 3**0.5)
    assert figures.verdict(1, mean, half) == "holds"
    assert figures.difference(b[::-1], a)[1] > 20  # other seeds beside each other: nothing to be seen
    assert figures.difference(a, b[:2]) == figures.difference(a[:2], b[:2])  # the seeds that both have


def test_verdicts():
    cases = {(1, 2.0, 1.0): "holds", (-1, -2.0, 1.0): "holds", (1, -2.0, 1.0): "does not hold",
             (0, 2.0, 1.0): "does not hold", (1, 2.0, 3.0): "undecided", (1, 2.0, None): "undecided",
             (0, 0.0, 0.0): "undecided", (None, 2.0, 1.0): ""}  # fmt: skip
    assert {case: figures.verdict(*case) for case in cases} == cases
    near = {(1, 0.5, 1.4): "equal within 2", (1, 0.5, 1.6): "undecided", (1, 1.0, 0.5): "holds", (1, -1.0, 0.5): "does not hold"}
    assert {case: figures.verdict(*case, 2) for case in near} == near


def test_how_often_chance_settles_a_comparison():
    """docs/results.md says what looking after 3, 6, 9 and 12 seeds does: of two equal methods one in eight seems better or worse."""
    draws, wrong = np.random.default_rng(0).normal(0, 3, (2000, 12)), 0
    for row in draws:
        ends = (figures.interval(row[:n].tolist()) for n in (3, 6, 9, 12))
        mean, half = next((end for end in ends if figures.settled(*end, 2)), (0, 1))
        wrong += abs(mean) > half
    assert 0.11 < wrong / len(draws) < 0.15


def trained(test, curve, seconds=60.0):
    """What evaluate_rows reads of a record."""
    return {"test": test, "test_ci": 0.02, "curve": curve, "seconds": seconds, "blind": test / 10}


def test_rows_compare_with_their_reference():
    records = {"a": [trained(0.50, [[5, 0.2], [10, 0.4]]), trained(0.60, [[5, 0.3], [10, 0.5]])],
               "b": [trained(0.52, [[5, 0.4], [10, 0.6]]), trained(0.62, [[5, 0.5], [10, 0.7]])]}  # fmt: skip
    rows = [("a", {}, 55.0, None), ("b", {}, 57.5, "a")]
    a, b = figures.evaluate_rows(rows, records, TABLES["table1"].value)
    assert a["mean"] == pytest.approx(55) and a["half"] == pytest.approx(12.706 * 5) and a["curve"] == pytest.approx(35)
    assert a["within"] == pytest.approx(2) and "difference" not in a
    assert b["difference"] == pytest.approx(2) and b["difference_half"] == pytest.approx(0, abs=1e-9)
    assert b["blind"] == pytest.approx(5.7) and b["blind_difference"] == pytest.approx(0.2)
    assert b["curve_difference"] == pytest.approx(20) and b["published_difference"] == 2.5 and b["direction"] == "holds"
    worse = figures.evaluate_rows([rows[0], ("b", {}, "<", "a")], records, TABLES["table1"].value)[1]
    assert worse["direction"] == "does not hold" and worse["published_difference"] is None


def test_ranks_and_roc_area():
    assert runs.ranks(np.array([20, 10, 30, 20])).tolist() == [2.5, 1, 4, 2.5]
    # Positives 3 and 1 against negatives 2 and 1: wins 3>2, 3>1, half for 1=1, none for 1<2: 2.5 of 4.
    assert runs.roc_area(np.array([3, 1, 2, 1]), np.array([True, True, False, False])) == 2.5 / 4


def test_runs_of_a_seed_start_from_the_same_weights(tmp_path, monkeypatch):
    """Two rows, two seeds. Seed 0 has both records from another machine's weights, seed 1 has one from there and one from here."""
    monkeypatch.setattr(runs, "base_of", lambda model, data, build=False: "here" if build or data == "scenes" else "")
    common = {"model": "tiny", "data": "scenes", "steps": 2}
    table = {name: [common | {"method": name, "seed": seed} for seed in (0, 1)] for name in ("dapo", "vppo")}
    for name, seed, base in [("dapo", 0, "there"), ("vppo", 0, "there"), ("dapo", 1, "there"), ("vppo", 1, "here"), ("dapo", 0, "here")]:
        settings = common | {"method": name, "seed": seed, "base": base}
        runs.file_of(settings, tmp_path).write_text(json.dumps({"identity": runs.identity(settings)}))
    with_base = runs.with_base(table, tmp_path)
    assert {name: [settings["base"] for settings in row] for name, row in with_base.items()} == {"dapo": ["there", "here"], "vppo": ["there", "here"]}
    assert [runs.find(settings, tmp_path) is None for row in with_base.values() for settings in row] == [False, True, False, False]
    # Weights that are not there yet are built only for runs that are to be made.
    other = {"dapo": [common | {"method": "dapo", "seed": 0, "data": "scenes-honest"}]}
    assert [runs.with_base(other, tmp_path, build)["dapo"][0]["base"] for build in (False, True)] == ["", "here"]


def test_of_several_bases_that_which_has_most_seeds_is_taken(tmp_path, monkeypatch):
    """This machine has seed 0 and another one seeds 0 and 1: both seeds are of the other. With one seed each, this machine's counts."""
    monkeypatch.setattr(runs, "base_of", lambda *_, **__: "here")
    table = {"dapo": [{"model": "tiny", "data": "scenes", "steps": 2, "method": "dapo", "seed": seed} for seed in (0, 1)]}
    for seed, base in [(0, "here"), (0, "a"), (1, "a")]:
        settings = table["dapo"][seed] | {"base": base}
        runs.file_of(settings, tmp_path).write_text(json.dumps({"identity": runs.identity(settings)}))
    assert [settings["base"] for settings in runs.with_base(table, tmp_path)["dapo"]] == ["a", "a"]
    assert [settings["base"] for settings in runs.with_base({"dapo": table["dapo"][:1]}, tmp_path)["dapo"]] == ["here"]


def test_own_rate_is_the_best_on_validation(tmp_path):
    """The largest of the three rates is best for TAS. TGF and the other cell have no row, so they take the rate that all share."""
    rows = {label: overrides for label, overrides, *_ in TABLES["own_scenes"].rows}
    cells = [{"settings": rows["scenes: TAS"] | {"lr": lr}, "mean": mean} for lr, mean in zip(experiments.RATES, (40.0, 41.0, 42.0), strict=True)]
    (tmp_path / "rates_scenes.json").write_text(json.dumps({"cells": cells}))
    flags = Flags(output=str(tmp_path))
    assert experiments.settings_of(rows["scenes: TAS"], 0, flags)["lr"] == 6e-4
    assert experiments.settings_of(rows["scenes: TGF"], 0, flags)["lr"] == experiments.settings_of(rows["scenes, 4 prompts: TAS"], 0, flags)["lr"] == 3e-4
    wanted = [label for data in experiments.REGIMES for label, *_ in TABLES[f"own_{data}"].rows]
    assert sorted(wanted) == sorted(label for label, *_ in TABLES["map"].rows)  # no cell is left out


def test_a_run_from_other_weights_than_asked_for_is_refused(tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match="are not those that this run is to start from"):
        runs.perform({"model": "tiny", "data": "digits", "seed": 0, "base": "0" * 12}, tmp_path)


# --- variants of phase 3 ---------------------------------------------------------------------------------------------
def modulated(variant, updates=1):
    """alpha of 4 responses of 2 tokens whose mean S are 0, 0.1, 0.2 and 0.4."""
    mask = torch.ones(4, 2, dtype=torch.bool)
    batch = Batch(SimpleNamespace(response_mask=mask), [None] * 2, [0, 1], torch.tensor([1.0, 0, 1, 0]))
    batch.dependency = torch.tensor([[0, 0], [0.2, 0], [0.1, 0.3], [0.6, 0.2]])
    runs.VARIANTS[variant](batch, Config(group_size=2, prompts_per_step=2, updates_per_rollout=updates))
    assert torch.allclose(batch.advantages, batch.alpha * torch.tensor([1, -1, 1, -1]) / 2**0.5, atol=1e-5)
    return batch.alpha.tolist()


def test_scope_of_the_official_code(monkeypatch):
    # n = 0, 1/4, 1/2, 1. One micro-batch: mean n 7/16; of two: means 1/8 and 3/4; of one: n / n = 1, or the minimum.
    assert modulated("micro-batches of 8") == pytest.approx([0.9, 0.9 + 0.4 / 7, 0.9 + 0.8 / 7, 0.9 + 1.6 / 7])
    monkeypatch.setitem(runs.VARIANTS, "of 2", lambda *words: runs.official_scope(2, *words))
    assert modulated("of 2") == pytest.approx([0.9, 1.1, 0.9 + 0.2 / 3, 0.9 + 0.4 / 3])
    assert modulated("micro-batches of 1") == pytest.approx([0.9, 1, 1, 1])
    assert modulated("micro-batches of 1", updates=2) == pytest.approx([0.9, 1, 0.9, 1])  # a minimum in each update's share


def test_mean_over_the_kept_tokens():
    # ceil(0.4 * 2) = 1 token is kept: S = 0, 0.2, 0.3, 0.6, so n = 0, 1/3, 1/2, 1 with mean 11/24.
    assert modulated("mean of selected") == pytest.approx([0.9, 0.9 + 0.8 / 11, 0.9 + 1.2 / 11, 0.9 + 2.4 / 11])


# --- tables ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_whole(name):
    labels = [label for label, *_ in TABLES[name].rows]
    least = 2 if "validation" in TABLES[name].unit else 3  # a learning rate is chosen by two seeds and compared on ten others' data
    assert len(set(labels)) == len(labels) and TABLES[name].seeds >= least
    for i, (_, overrides, _, reference) in enumerate(TABLES[name].rows):
        assert reference is None or reference in labels[:i]
    for flags in (FLAGS, replace(FLAGS, quick=False)):
        for settings in sum(experiments.runs_of(name, flags).values(), []):
            assert runs.configure(settings)[0] in runs.KINDS and settings.get("variant", "") in runs.VARIANTS


def test_a_comparison_among_fillers():
    first, second = experiments.among_fillers({"a": {"method": "vppo"}, "b": experiments.benchmarked("b")})
    assert first == ("verbose-honest: a", {"method": "vppo", "data": "scenes-verbose-honest"}, None, None)
    assert second == ("verbose-honest: b", first[1] | {"rule": "lab/rules/b.py", "eval_every": 0}, None, "verbose-honest: a")


def test_what_one_core_can_do(capsys):
    experiments.main(["--list", "--data", "digits"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(TABLES)
    assert int(lines[-1].split()[1]) < sum(int(line.split()[1]) for line in lines[1:-1])  # shared runs count once


@pytest.mark.parametrize(
    "flags, word",
    [("table99", "table99"), ("", "name ''"), ("table2 --data maps", "--data"), ("table2 --seeds 21", "--seeds")],
)
def test_bad_flags(flags, word):
    with pytest.raises(ValueError, match=word):
        experiments.main(flags.split())


def test_open_comparisons_get_more_seeds(tmp_path, monkeypatch, capsys):
    """Scores are planted: b wins at once, c is noise that three more seeds do not settle, d equals within 2 after six."""
    scores = {"a": [0.5] * 6, "b": [0.6, 0.61, 0.6] + [0.0] * 3, "c": [0.4, 0.5, 0.7] * 2, "d": [0.52, 0.5, 0.49] + [0.5] * 3}
    rates = dict(zip(scores, (1e-4, 2e-4, 3e-4, 4e-4)))
    rows = [("a", {"lr": rates["a"]}, 50.0, None), *((name, {"lr": rates[name]}, 51.0, "a") for name in "bcd")]
    monkeypatch.setitem(TABLES, "grows", experiments.Table("grows", rows, 3, most=6))
    begun = []

    def planted(todo, folder, jobs):
        folder.mkdir(exist_ok=True)
        for settings in todo:
            name = next(name for name, rate in rates.items() if rate == settings["lr"])
            begun.append((name, settings["seed"]))
            record = trained(scores[name][settings["seed"]], [[2, 0.5]]) | {"identity": runs.identity(settings), "commit": "x", "torch": "y"}
            runs.file_of(settings, folder).write_text(json.dumps(record))

    monkeypatch.setattr(experiments, "run_all", planted)
    experiments.main(["grows", "--list", "--data", "digits", "--output", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["grows", "24", "24"]  # at most
    experiments.main(["grows", "--data", "digits", "--output", str(tmp_path)])
    assert sorted(begun) == [(name, seed) for name in scores for seed in range(3 if name == "b" else 6)]
    result = json.loads((tmp_path / "grows-digits.json").read_text())
    assert result["seeds"] == "3 to 6"
    assert [(row[0], row[1], row[-1]) for row in figures.compared(result)] == [
        ("b - a", "3", "holds"), ("c - a", "6", "undecided"), ("d - a", "6", "equal within 2")
    ]  # fmt: skip
    begun.clear()
    experiments.main(["grows", "--data", "digits", "--seeds", "3", "--output", str(tmp_path)])  # a number that is given is kept
    assert not begun and json.loads((tmp_path / "grows-digits.json").read_text())["seeds"] == 3


# --- records ---------------------------------------------------------------------------------------------------------
def test_a_record_belongs_to_its_settings_and_to_the_arithmetic(tmp_path, monkeypatch):
    settings = {"data": "digits", "steps": 3}
    file = runs.file_of(settings, tmp_path)
    assert file == runs.file_of(
        settings | {"method": "vppo", "tokens_per_batch": 99, "output": "x"}, tmp_path
    )  # no other numbers
    for other in ({"lr": 1e-4}, {"seed": 1}, {"variant": "mean of selected"}, {"kind": "overhead"}, {"beta_max": 1.1}):
        assert runs.file_of(settings | other, tmp_path) != file
    assert runs.find(settings, tmp_path) is None
    file.write_text(json.dumps({"identity": runs.identity(settings | {"lr": 1e-4})}))  # a file that has another's name
    assert runs.find(settings, tmp_path) is None
    file.write_text(json.dumps({"identity": runs.identity(settings)}))
    assert runs.find(settings, tmp_path)
    monkeypatch.setattr(runs, "NUMERICS", runs.NUMERICS + 1)
    assert runs.find(settings, tmp_path) is None


def test_every_record_of_the_results_is_found_under_its_name():
    """No record was orphaned: each lies under the name that its own settings lead to."""
    folder = runs.ROOT / "results" / "runs"
    files = sorted(folder.glob("*.json"))
    assert len(files) > 200
    rules = {runs.code_of(file): str(file) for file in (runs.ROOT / "lab" / "rules").glob("[!_]*.py")}
    for file in files:
        settings = {key: value for key, value in json.loads(file.read_text())["identity"].items() if key != "numerics"}
        if "rule" in settings:
            settings["rule"] = rules[settings["rule"]]
        assert runs.file_of(settings, folder) == file and runs.find(settings, folder)


def doomed(settings, folder):
    """A run that takes no time; seed 1 is killed."""
    if settings["seed"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(folder) / f"{settings['seed']}.json").write_text("{}")


def test_a_killed_run_loses_only_itself(tmp_path):
    failed = experiments.run_all([{"seed": seed} for seed in range(4)], tmp_path, jobs=2, target=doomed)
    assert failed == [{"seed": 1}] and sorted(file.stem for file in tmp_path.iterdir()) == ["0", "2", "3"]


# --- end to end ------------------------------------------------------------------------------------------------------
def test_two_experiments_and_their_records(tiny_folder, tmp_path, monkeypatch, capsys):
    flags = [*QUICK, "--output", str(tmp_path)]
    experiments.main(["table7", "figure7", *flags])
    out = capsys.readouterr().out
    assert "table7: 2 runs, 2 to do" in out and "figure7: 1 runs, 1 to do" in out and "| reward - advantage |" in out
    result = json.loads((tmp_path / "table7-digits.json").read_text())
    assert [cell["label"] for cell in result["cells"]] == ["advantage", "reward"] and (tmp_path / "figure7-digits.md").exists()
    records = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert len(records) == 3 and all((tmp_path / "runs" / name).stat().st_size < 40_000 for name in records)

    # Again: nothing is run. A table that shares a run: only the rest. A record that is gone: only that one.
    begun = []
    monkeypatch.setattr(experiments, "run_all", lambda todo, *_: begun.append(todo) or [])
    experiments.main(["table7", *flags])
    assert begun == [] and {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == records
    shared = experiments.distinct([experiments.runs_of("shaping_mean", replace(FLAGS, output=str(tmp_path)))], tmp_path / "runs")
    assert [settings.get("variant") for file, settings in shared.items() if not file.exists()] == ["mean of selected"]
    (tmp_path / "runs" / result["records"][0]).unlink()
    monkeypatch.setattr(experiments, "run_all", lambda todo, *_: todo)
    with pytest.raises(ValueError, match="1 of 1 runs failed"):
        experiments.main(["table7", *flags])


def test_a_run_is_train_py_s(tiny_folder, tmp_path):
    fields = {
        "data": "digits",
        "model": tiny_folder,
        "steps": 2,
        "prompts_per_step": 4,
        "eval_every": 1,
        "eval_prompts": 4,
        "eval_samples": 2,
    }
    ours = runs.train(Config(**fields, test_prompts=4))
    words = [f"--{name}={value}" for name, value in fields.items()]
    train.main([*words, "--test_prompts=0", "--save_every=0", f"--output={tmp_path / 'run'}"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward", "entropy", "grad_norm", "dependency_mean"):
        assert ours["metrics"][name] == pytest.approx([line[name] for line in lines], rel=1e-4)
    assert ours["curve"] == [[line["step"], pytest.approx(line["val_avg"], rel=1e-4)] for line in lines]
    assert len(ours["right"]) == 4 and sum(ours["right"]) / 8 == ours["test"]


def test_pictures(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    record = {"curve": [[1, 0.2], [2, 0.4]], "metrics": {"reward": [0.1, 0.3], "entropy": [0.5, None]},
              "S": [9, 1, 0], "mean_S": [0.1, 0.2], "problem": "?", "digits": "",
              "responses": [[["a ", 0.1, True], [" $b_$", 2.0, False]]]}  # fmt: skip
    other = record | {"curve": [[1, 0.4], [2, 0.8]]}
    result = {"seeds": 2, "unit": "x", "cells": [{"label": "a: b, lr 0.1", "mean": 1.0, "half": None, "values": [1.0]}]}
    for picture in {table.picture for table in TABLES.values()}:
        figures.draw(picture, result, {"a: b, lr 0.1": [record, other], "b": [other, other]}, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 3000
        (tmp_path / "picture.png").unlink()
    drawn = figure()
    figures.curves(drawn, result, {"a: b, lr 0.1": [record, other]})
    assert drawn.axes[0].lines[0].get_ydata().tolist() == pytest.approx([30, 60])


def test_the_page_over_all_results():
    cell = {"label": "b", "reference": "a", "mean": 52.0, "half": 1.5, "values": [0, 1], "published": 57.5, "difference": 2.0, "difference_half": 1.0,
            "curve_difference": None, "curve_difference_half": None, "blind_difference": None, "blind_difference_half": None,
            "published_difference": 2.5, "direction": "holds"}  # fmt: skip
    first = {"label": "a", "mean": 50.0, "half": 1.25, "published": 55.0, "values": [0, 1, 2]}
    silent = cell | {"label": "c", "published_difference": None, "published": 55.0, "direction": "", "difference": 1.5}
    other = cell | {"published_difference": None, "published": "<", "direction": "does not hold"}
    score = {"name": "t1", "title": "what", "unit": TABLES["table1"].unit, "seeds": 10, "cells": [first, cell, silent]}
    results = [score, {"name": "t2", "title": "how", "unit": "nats", "seeds": 3, "cells": [first, other]}]
    text = figures.overview(results)
    for row in ("| [t1](t1.md) | 10 | a | 50.0 +- 1.2 | 55 |  |", "|  |  | b | 52.0 +- 1.5 | 57.5 | b - a: +2.0 +- 1.0 (paper +2.5) |",
                "|  |  | c | 52.0 +- 1.5 | 55 | c - a: +1.5 +- 1.0 |", "* [t2](t2.md): how"):  # fmt: skip
        assert row in text.splitlines()
    assert figures.decided(other) == "b - a: +2.0 +- 1.0 (paper < 0)"
    assert "2 comparisons" in text and "holds: 1, does not hold: 1, equal within 2: 0, undecided: 0" in text
    assert text.splitlines()[-2:] == [
        "| [t1](t1.md) | b - a | 2 | 2 +- 1 | +2.5 | holds |",
        "| [t2](t2.md) | b - a | 2 | 2 +- 1 | < 0 | does not hold |",
    ]


def test_the_pages_of_results_are_those_of_their_numbers():
    """README.md and NAME.md are what lab/figures.py writes from NAME.json; test_docs.py compares docs/results.md with these."""
    folder = runs.ROOT / "results"
    made = [name for name in TABLES if name not in NOT_MADE_YET]
    results = [json.loads((folder / f"{name}.json").read_text()) for name in made]
    assert [result["title"] for result in results] == [TABLES[name].title for name in made]
    assert not any((folder / f"{name}.json").exists() for name in NOT_MADE_YET)
    assert (folder / "README.md").read_text() == figures.overview(results)
    for result in results:
        assert (folder / f"{result['name']}.md").read_text() == figures.markdown(result)


def test_the_list_is_the_same_from_another_folder(tmp_path, monkeypatch, capsys):
    lists = []
    for folder in (runs.ROOT, tmp_path):
        monkeypatch.chdir(folder)
        experiments.main(["table2", "--list"])
        lists.append(capsys.readouterr().out)
    assert lists[0] == lists[1]
