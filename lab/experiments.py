"""Every table and figure of the paper that a laptop can ask about, one command each; and three questions it leaves open.

    python -m lab.experiments --list                names, runs, minutes on 2 cores
    python -m lab.experiments table2 figure5        results/NAME.md, .json and .png; records of the runs in results/runs
    python -m lab.experiments all                   everything, in the order of the list; results/README.md sums up
    python -m lab.experiments all --quick           everything with one seed and two steps, into runs/quick: does it run?

A run is a process on one core, as many at a time as there are cores (lab/runs.py). Its record is kept when it ends, so that
a run several tables need is made once and stopping loses only the runs under way: the same command goes on from there.
In some tables a comparison that is open gets more seeds, three at a time and twelve at most (GROWING).
Held-out handwriting is used once, at the end of a run; the curve is on validation data.
"""

import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import dependency
from config import command_line, option
from lab import figures, runs
from laptop.scenes import FAILURES, REGIMES

# What all methods share, task by task: fixed before methods are compared, tuned on DAPO and validation data alone.
PLANS = {
    "scenes": {"steps": 40, "max_rounds": 2, "eval_every": 5, "eval_prompts": 48, "test_prompts": 256},
    "digits": {"steps": 40, "eval_every": 5, "eval_prompts": 48, "test_prompts": 256},
}
PLANS["scenes-honest"] = PLANS["scenes"] | {"eval_every": 10}
PLANS["scenes-verbose"] = PLANS["scenes-verbose-honest"] = PLANS["scenes-honest"] | {"max_new_tokens": 96}
# The cells of the map (table "map"): a regime, or a regime with a quarter of the prompts a step, twice the steps and one update a step.
FEW = {"prompts_per_step": 4, "steps": 80, "updates_per_rollout": 1, "eval_every": 20}
CELLS = {name: {"data": name} for name in PLANS if name != "digits"}
CELLS |= {f"{name}, 4 prompts": {"data": name, **FEW} for name in ("scenes", "scenes-verbose")}
RATES = (1.5e-4, 3e-4, 6e-4)  # the middle one is the learning rate that all methods share
QUICK = {"steps": 2, "prompts_per_step": 4, "eval_every": 1, "eval_prompts": 4, "test_prompts": 4, "eval_samples": 2}
# Seconds on one core: a run's start, a response trained on (the replaced ones on top), a response evaluated. Measured
# on VPPO; where a run's record is there, its own seconds count.
SECONDS = {"scenes": (3.0, 0.012, 0.003), "digits": (2.0, 0.014, 0.005)}
SECONDS |= {"scenes-honest": (3.0, 0.014, 0.004)} | dict.fromkeys(["scenes-verbose", "scenes-verbose-honest"], (3.0, 0.024, 0.007))


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------
class Table(NamedTuple):
    """Rows of (label, departures from the plan, published number or "<" or ">", label of the row to compare with).

    A comparison is settled once its interval does not contain 0, or lies within +-2 points (`equal`).
    """

    title: str
    rows: list
    seeds: int = 3
    note: str = ""
    unit: str = "held-out avg@8, %"
    value: Callable = lambda record, label: 100 * record["test"]
    picture: Callable = figures.dots
    most: int = 0  # if not 0, a comparison that is open gets more seeds, as many as `seeds` at a time, up to these

    @property
    def equal(self):
        """Differences within +- this count as none: 2 points of avg@8, nothing in other units."""
        return 2 if "avg@8" in self.unit else 0


def measured(record, label):
    """A value that the run itself has put under the row's label; None if this task has nothing of that name."""
    return record["values"].get(label)


def final_entropy(record, label):
    """Entropy of a token in nats, mean over the last five steps."""
    return statistics.mean(record["metrics"]["entropy"][-5:])


MEASURE = {"kind": "dependency", "eval_prompts": 128}
KINDS = ["digits read", "numbers", "positions", "relations", "operators", "fillers"]
QUALITY = [f"{mask}, {metric}, {way}" for mask in dependency.MASKS for metric in dependency.METRICS
           for way in ("prompt", "rollout", "mean of 8") if way == "prompt" or mask in ("blacken", "noise")]  # fmt: skip
LARGE = {"model": "tiny-large"}
VERBOSE = CELLS["scenes-verbose-honest"]
GROWING = {"seeds": 3, "most": 12}  # three seeds, and three more at a time while a comparison is open
PENALTIES = [(0.02, 52.7), (0.04, 54.3), (0.06, 55.0), (0.08, 55.0)]


def method(name, **settings):
    """The settings of a row."""
    return {"method": name, **settings}


def last_validation(record, label):
    """Validation avg@8 in %, mean over the last two points of the curve: what a learning rate is chosen by."""
    return 100 * statistics.mean(avg for _, avg in record["curve"][-2:])


def by_rule(name):
    """The settings of a row that a file of lab/rules makes."""
    return {"method": "vppo", "rule": f"lab/rules/{name}.py"}


def benchmarked(name):
    """The same as lab.benchmark runs it: without a validation curve."""
    return by_rule(name) | {"eval_every": 0}


def among_fillers(rows):
    """Rows {label: settings} of a comparison that depends on the regime, in scenes-verbose-honest; each is compared with the first."""
    first, *others = (f"verbose-honest: {label}" for label in rows)
    settings = [mine | VERBOSE for mine in rows.values()]
    return [(first, settings[0], None, None), *((label, mine, None, first) for label, mine in zip(others, settings[1:]))]


def mapped(data=None, **settings):
    """The rows of the map, or of the cells of one regime: DAPO and the parts of VPPO, each compared with DAPO in the same cell."""
    return [
        (f"{cell}: {name}", method(key, **CELLS[cell], **settings), None, None if name == "DAPO" else f"{cell}: DAPO")
        for cell in CELLS if data in (None, CELLS[cell]["data"]) for name, key in (("DAPO", "dapo"), ("TAS", "tas"), ("TGF", "tgf"), ("VPPO", "vppo"))
    ]  # fmt: skip


def rates_of(data):
    """The table by which each method gets a learning rate of its own in the cells of a regime: three rates, on validation."""
    rows = [(f"{label}, lr {lr:g}", settings | {"lr": lr}, None, None) for label, settings, *_ in mapped(data) for lr in RATES]
    note = f"The mean of the last two validation points. The best rate of each method is the one that own_{data} takes."
    return Table(f"{data}: three learning rates, on validation", rows, 2, note, "validation avg@8, %", last_validation, figures.by_rate)


def own_of(data):
    """The table that is the map again, in the cells of a regime, where each method has the best of its three rates."""
    note = f"The rates were chosen on validation, by rates_{data}."
    return Table(f"{data}: the map again, each method at its own best learning rate", mapped(data, lr="own"), 10, note, picture=figures.against)


def share(record, label):
    """The share in % of held-out responses that are right, or that fail for the reason that the row's label begins with."""
    why = label.split(": ")[0]
    return 100 * (record["test"] if why == "right" else record["failures"][why])


def failing(cell):
    """Rows of (what becomes of a response: method), in a cell of the map: DAPO's compared with the base's, the others' with DAPO's."""
    methods = {"base": {"steps": 0}, "DAPO": method("dapo"), "DAPO without first words": by_rule("dapo_without_first_words")}
    methods |= {"TGF": method("tgf"), "TGF at half": by_rule("tgf_half"), "TGF with first words": by_rule("tgf_first_words"), "VPPO": method("vppo")}
    return [
        (f"{why}: {name}", CELLS[cell] | settings, None, {"base": None, "DAPO": f"{why}: base"}.get(name, f"{why}: DAPO"))
        for why in ("right", *FAILURES) for name, settings in methods.items()
    ]  # fmt: skip


def per_kind(prefix):
    """A row for each kind of token, compared with the fillers."""
    return [
        (f"{prefix}, fillers", MEASURE, None, None),
        *((f"{prefix}, {kind}", MEASURE, None, f"{prefix}, fillers") for kind in KINDS[:-1]),
    ]


TABLES = {
    "map": Table("DAPO, TAS, TGF and VPPO in every regime, at the learning rate that all share", mapped(), 10, picture=figures.against),
    **{f"{name}_{data}": table(data) for data in REGIMES for name, table in (("rates", rates_of), ("own", own_of))},
    "first_words": Table("why, one: what happens to the words that decide whether a response looks", [
        ("DAPO", method("dapo"), None, None), ("DAPO without first words", by_rule("dapo_without_first_words"), None, "DAPO"),
        ("TGF", method("tgf"), None, "DAPO"), ("TGF with first words", by_rule("tgf_first_words"), None, "TGF"),
        ("VPPO", method("vppo"), None, "DAPO"), ("VPPO with first words", by_rule("vppo_first_words"), None, "VPPO"),
        *(row for name in ("scenes-honest", "scenes-verbose", "scenes-verbose-honest") for row in [
            (f"{name}: VPPO", method("vppo", **CELLS[name]), None, None),
            (f"{name}: VPPO with first words", benchmarked("vppo_first_words") | CELLS[name], None, f"{name}: VPPO"),
        ]),
    ], 10, "First words are those before the first token with S > 0.5 nats. DAPO keeps their gradient, TGF mostly drops it. The rules are in lab/rules."),
    "dilution": Table("why, two: what the filter keeps beside the tokens that look, among many fillers", [
        ("DAPO", method("dapo", **VERBOSE), None, None), ("TGF", method("tgf", **VERBOSE), None, "DAPO"),
        ("TGF by threshold", by_rule("tgf_threshold") | VERBOSE, None, "TGF"), ("TGF by mass", by_rule("tgf_mass") | VERBOSE, None, "TGF"),
        ("TGF without noise", by_rule("tgf_without_noise") | VERBOSE, None, "TGF"),
    ], 6, "In scenes-verbose-honest 40 % of a response are more tokens than look, so TGF also keeps fillers. The rules leave these places empty."),
    "failures": Table("why, three: what goes wrong when a step has few prompts", failing("scenes, 4 prompts"), 10,
        "4 prompts a step instead of 16, 80 steps, one update a step. laptop/scenes.py: failure says what the reasons mean. TGF at half: what "
        "the filter drops counts half.", "share of held-out responses, %", share, figures.stacked),
    "table1": Table("base, GRPO, DAPO, VPPO", [
        ("base", {"steps": 0}, 38.3, None), ("GRPO", method("grpo"), 53.1, "base"), ("DAPO", method("dapo"), 55.0, "GRPO"),
        ("VPPO", method("vppo"), 57.5, "DAPO"),
    ], 10),
    "table1_large": Table("the same with a larger model, as the paper has 32B beside 7B", [
        ("base", {"steps": 0} | LARGE, 57.0, None), ("GRPO", method("grpo", **LARGE), 62.6, "base"),
        ("DAPO", method("dapo", **LARGE), 63.5, "GRPO"), ("VPPO", method("vppo", **LARGE), 64.6, "DAPO"),
    ], 10, "Published numbers: 32B. 1.6 million weights here instead of 1.1."),
    "table1_penalty": Table("DAPO and VPPO, both with an entropy penalty of 0.06 in its exact form", [
        ("DAPO", method("dapo", entropy_penalty=0.06), 55.0, None), ("VPPO", method("vppo", entropy_penalty=0.06), 57.5, "DAPO"),
    ], 10, "Penalty 0.06, exact form; table10 has what it does. The other tables have none."),
    "table2": Table("what the two parts do", [
        ("DAPO", method("dapo"), 55.0, None), ("TAS only", method("tas"), 56.3, "DAPO"),
        ("TGF only", method("tgf"), 57.1, "DAPO"), ("VPPO", method("vppo"), 57.5, "DAPO"),
    ], 10),
    "table3": Table("range of alpha, TAS only", [
        ("[0.9, dynamic]", method("tas"), 56.3, None),
        ("[0.9, 1.1]", method("tas", beta_max=1.1), 55.9, "[0.9, dynamic]"),
        ("[0.8, dynamic]", method("tas", beta_min=0.8), 56.2, "[0.9, dynamic]"),
        ("[0.8, 1.2]", method("tas", beta_min=0.8, beta_max=1.2), 55.9, "[0.9, dynamic]"),
    ], **GROWING),
    "table4": Table("which tokens to keep, TGF only", [
        ("dependency 0.4", method("tgf"), 57.1, None),
        ("random 0.4", method("tgf", select="random"), 54.8, "dependency 0.4"),
        *((f"entropy {k}", method("tgf", select="entropy", k=k), paper, "dependency 0.4")
          for k, paper in ((0.2, 56.0), (0.4, 55.7), (0.6, 55.8), (0.8, 55.3))),
        *among_fillers({"dependency 0.4": method("tgf"), "random 0.4": benchmarked("random_tokens"), "entropy 0.2": benchmarked("entropy_80_20")}),
    ], **GROWING),
    "table5": Table("VPPO on a GRPO base", [
        ("GRPO", method("grpo"), 53.1, None), ("VPPO on GRPO", method("vppo_grpo"), 54.8, "GRPO"),
        ("VPPO on DAPO", method("vppo"), 57.5, "VPPO on GRPO"),
    ], **GROWING),
    "table6": Table("binary or soft token mask", [
        ("binary", method("vppo"), 57.5, None), ("soft", method("vppo", soft=True), 56.2, "binary"),
        *among_fillers({"binary": method("vppo"), "soft": benchmarked("vppo_soft")}),
    ], **GROWING),
    "table7": Table("alpha scales the advantage or the reward", [
        ("advantage", method("vppo"), 57.5, None), ("reward", method("vppo", shape="reward"), 56.8, "advantage"),
    ], **GROWING),
    "table10": Table("entropy penalty on DAPO", [
        ("0", method("dapo"), 49.0, None),
        *((f"{c}, exact", method("dapo", entropy_penalty=c), paper, "0") for c, paper in PENALTIES),
        *((f"{c}, sampled", method("dapo", entropy_penalty=c, entropy_form="sampled"), paper, "0")
          for c, paper in PENALTIES),
    ], **GROWING, note="The paper's runs used the official code's penalty, the sampled form; its gradient is not the entropy's."),
    "table11": Table("masks", [
        ("blacken", method("vppo"), 57.5, None),
        *((mask, method("vppo", mask=mask), paper, "blacken")
          for mask, paper in (("noise", 56.5), ("blur", 56.4), ("grey", 56.4))),
    ], **GROWING),
    "table12": Table("metrics of dependency", [
        ("kl", method("vppo"), 57.5, None),
        *((metric, method("vppo", metric=metric), paper, "kl")
          for metric, paper in (("jsd", 56.9), ("drop", 50.3), ("k3", None))),
        ("DAPO", method("dapo"), 55.0, "k3"),
    ], 10, "The official code computes k3 where the paper says KL."),
    "table13": Table("responses per prompt", [
        ("G = 8", method("vppo"), 57.5, None),
        *((f"G = {G}", method("vppo", group_size=G), paper, "G = 8") for G, paper in ((5, 56.5), (12, 57.4), (16, 57.7))),
    ], **GROWING, note="At equal steps, so a larger G sees more responses."),
    "table14": Table("overhead of the masked pass", [
        ("DAPO, seconds a step", {"kind": "overhead", "steps": 10}, None, None),
        ("VPPO, seconds a step", {"kind": "overhead", "steps": 10}, None, None),
        ("VPPO over DAPO, %", {"kind": "overhead", "steps": 10}, 9.7, None),
    ], unit="value", value=measured,
       note="Both methods take each step in turn, in one process, from the same weights on the same responses."),
    "table15": Table("DAPO given VPPO's time", [
        ("VPPO", method("vppo"), 57.5, None), ("DAPO", method("dapo"), 55.0, "VPPO"),
        ("DAPO, same time", method("dapo", steps="same time"), 55.0, "VPPO"),
        *among_fillers({"VPPO": method("vppo"), "DAPO": method("dapo")}),
    ], **GROWING, note="Same time: more steps by what a VPPO step is dearer in table14 (before that has run: by 9.7 %, as published)."),
    "figure3": Table("S of a token", [
        ("largest S", MEASURE, 10, None), ("share of tokens with S > 0.05", MEASURE, None, None), *per_kind("S"),
    ], unit="nats, share", value=measured, picture=figures.token_histogram, note="Of the warmed-up model, before RL."),
    "figure4": Table("mean S of a response", [
        ("mean", MEASURE, 0.09, None), ("largest", MEASURE, 0.30, None), ("skewness", MEASURE, None, None),
    ], unit="nats", value=measured, picture=figures.mean_histogram,
       note="Of the warmed-up model, before RL. Published: skewed to the right."),
    "figure5": Table("curves of GRPO, DAPO, VPPO", [
        ("GRPO", method("grpo"), 53.1, None), ("DAPO", method("dapo"), 55.0, "GRPO"), ("VPPO", method("vppo"), 57.5, "DAPO"),
    ], 10, picture=figures.curves),
    "figure6": Table("share k of tokens that carry gradient", [
        ("k = 0.4", method("vppo"), None, None),
        *((f"k = {k}", method("vppo", k=k), "<", "k = 0.4") for k in (0.2, 0.6, 0.8)),
        ("k = 1 (TAS only)", method("tas"), "<", "k = 0.4"),
        *among_fillers({"k = 0.4": method("vppo"), "k = 1 (TAS only)": method("tas")}),
    ], **GROWING),
    "figure7": Table("share of tokens that the filter keeps, by kind", per_kind("kept"),
                     unit="share", value=measured, picture=figures.tokens),
    "figure8": Table("what DAPO writes with and without entropy penalty", [
        ("penalty 0.06", method("dapo", entropy_penalty=0.06), 55.0, None),
        ("no penalty", method("dapo"), 49.0, "penalty 0.06"),
    ]),
    "figure9": Table("entropy of DAPO with and without penalty", [
        ("penalty 0.06", method("dapo", entropy_penalty=0.06), None, None),
        ("no penalty", method("dapo"), ">", "penalty 0.06"),
    ], unit="entropy of the last five steps, nats", value=final_entropy, picture=figures.entropy),
    "dependency_quality": Table("does S find the tokens that are read from the image?", [
        (QUALITY[0], MEASURE, None, None), *((label, MEASURE, None, QUALITY[0]) for label in QUALITY[1:]),
        ("k3 and kl: rank correlation", MEASURE, None, None), ("k3 and kl: overlap of the top 40%", MEASURE, None, None),
    ], unit="area under the ROC curve", value=measured,
       note="Mask, metric, and one draw of the mask per prompt, one per rollout, or the mean of S over 8 draws. Blur and "
       "grey draw nothing. k3 and kl: of blackened images, one draw per prompt. Before RL."),
    "tas_scope": Table("TAS over the batch, or per micro-batch as in the official code", [
        ("batch", method("vppo"), None, None),
        *((name, method("vppo", variant=name), None, "batch") for name in ("micro-batches of 8", "micro-batches of 1")),
        ("no TAS", method("tgf"), None, "batch"),
    ]),
    "shaping_mean": Table("TAS by the mean S of all tokens or of those kept", [
        ("all", method("vppo"), None, None), ("kept", method("vppo", variant="mean of selected"), None, "all"),
    ]),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Which runs
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Flags:
    """Flags of lab/experiments.py, beside the names."""

    data: str = option("scenes", "the task: " + " or ".join(PLANS))
    seeds: int = option(0, "seeds of each row; 0: as many as the table asks for")
    jobs: int = option(0, "runs at a time; 0: one per core")
    output: str = option("", "folder for results; default results, with --quick runs/quick")
    quick: bool = option(False, "one seed, two steps: does everything run?")
    list: bool = option(False, "show names, runs and minutes, and run nothing")


def same_time(flags):
    """How many times a DAPO step's seconds a VPPO step takes, as table14 measured it here; before that, as published."""
    file = Path(flags.output) / f"{file_name('table14', flags)}.json"
    return 1 + (json.loads(file.read_text())["cells"][2]["mean"] if file.exists() else 9.7) / 100


def own_rate(overrides, flags):
    """The learning rate that did best for a row of the map on validation (rates_of); before that has run, the shared one."""
    file = Path(flags.output) / f"rates_{overrides['data']}.json"
    cells = json.loads(file.read_text())["cells"] if file.exists() else []
    same = [cell for cell in cells if cell["settings"] | {"lr": "own"} == overrides]
    return max(same, key=lambda cell: cell["mean"])["settings"]["lr"] if same else RATES[1]


def settings_of(overrides, seed, flags):
    """The settings of one run: the task's plan, the row's departures from it, the seed."""
    data = overrides.get("data", flags.data)
    settings = PLANS[data] | {"data": data, "model": "tiny", "seed": seed} | overrides
    if settings.get("lr") == "own":
        settings["lr"] = own_rate(overrides, flags)
    if settings["steps"] == "same time":
        settings["steps"] = round(PLANS[flags.data]["steps"] * same_time(flags))
    if flags.quick:
        settings |= {name: min(value, settings.get(name, value)) for name, value in QUICK.items()}
    return settings


def open_rows(table, records):
    """Labels of the rows whose comparison is not settled by these records, and of those that they are compared with."""
    values = {label: [record and table.value(record, label) for record in row] for label, row in records.items()}
    pairs = [(label, reference) for label, _, _, reference in table.rows if reference]
    return {
        label for pair in pairs for label in pair
        if not figures.settled(*figures.difference(*(values[label] for label in pair)), table.equal)
    }  # fmt: skip


def runs_of(name, flags, build=False, ahead=False):
    """{label: [settings of each seed]} of a table. build: warm up the models that runs still to be made start from.

    In a table that has `most`, open comparisons get more seeds once the runs of their first ones are there; ahead: before that, too,
    as if none were settled. --seeds and --quick fix the number.
    """
    table, folder = TABLES[name], Path(flags.output) / "runs"
    first = 1 if flags.quick else flags.seeds or table.seeds
    most = first if flags.quick or flags.seeds else max(first, table.most)
    seeds = {label: first for label, *_ in table.rows}
    while True:
        rows = {label: [settings_of(overrides, seed, flags) for seed in range(seeds[label])] for label, overrides, *_ in table.rows}
        rows = runs.with_base(rows, folder, build)
        if first == most:
            return rows
        records = {label: [runs.find(settings, folder) for settings in row] for label, row in rows.items()}
        more = [label for label in open_rows(table, records) if seeds[label] < most]
        if not more or (not ahead and any(None in row for row in records.values())):
            return rows
        seeds |= {label: min(seeds[label] + first, most) for label in more}


def distinct(tables, folder):
    """{file of the record: settings}: each run once, however many rows of the tables need it."""
    return {runs.file_of(settings, folder): settings for table in tables for row in table.values() for settings in row}


def cost(settings, folder):
    """Seconds that a run took on one core, or will take, roughly."""
    record = runs.find(settings, folder)
    if record:
        return record["seconds"]
    kind, _, cfg = runs.configure(settings)
    begin, trained, evaluated = SECONDS[cfg.data]
    if kind == "dependency":
        return begin + 10 * cfg.eval_prompts * cfg.group_size * evaluated  # a generation, 18 masked passes
    steps = 2 * (cfg.steps + 1) if kind == "overhead" else cfg.steps
    points = -(-cfg.steps // cfg.eval_every) if kind == "train" and cfg.eval_every else 0
    tests = cfg.test_prompts if kind == "train" else 0
    return (
        begin
        + steps * cfg.prompts_per_step * cfg.group_size * trained
        + (points * cfg.eval_prompts + tests) * cfg.eval_samples * evaluated
    )


def listing(names, flags, folder):
    """The names with their runs, at most, and minutes on 2 cores; in the sum, shared runs count once."""
    tables = {name: runs_of(name, flags, ahead=True) for name in names}
    print(f"{'name':20}{'runs':>5}{'to do':>7}{'minutes':>9}  (on 2 cores: measured where the record is there, else estimated)")
    for name, chosen in [*((name, [table]) for name, table in tables.items()), ("together", tables.values())]:
        wanted = distinct(chosen, folder)
        todo = sum(runs.find(settings, folder) is None for settings in wanted.values())
        title = TABLES[name].title if name in TABLES else "runs that several need counted once"
        print(f"{name:20}{len(wanted):5}{todo:7}{sum(cost(settings, folder) for settings in wanted.values()) / 120:9.1f}  {title}")


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------
def run_all(todo, folder, jobs, target=runs.perform):
    """Each run in a process of its own, `jobs` at a time; returns the settings of those that failed, which harm no other."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # of the processes started from here on
    context = multiprocessing.get_context("forkserver")  # imports torch once, for all of them
    context.set_forkserver_preload(["lab.runs"])
    waiting, running, failed = list(todo), {}, []
    with tqdm(total=len(todo), desc="runs", disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                settings = waiting.pop(0)
                process = context.Process(target=target, args=(settings, folder), daemon=True)
                process.start()
                running[process.sentinel] = process, settings
            for sentinel in wait(running):
                process, settings = running.pop(sentinel)
                process.join()
                bar.update()
                if process.exitcode:
                    failed.append(settings)
    return failed


def file_name(name, flags):
    """The result's file without its ending: what is not the default stands in it."""
    return name if flags.data == Flags.data else f"{name}-{flags.data}"


def report(name, flags, folder):
    """Write NAME.md, NAME.json and NAME.png from the records, which must be there."""
    table, chosen = TABLES[name], runs_of(name, flags)
    records = {label: [runs.find(settings, folder) for settings in row] for label, row in chosen.items()}
    everything, seeds = [record for row in records.values() for record in row], [len(row) for row in records.values()]
    words = [f"--{flag} {getattr(flags, flag)}" for flag in ("data", "seeds") if getattr(flags, flag) != getattr(Flags, flag)]
    result = {
        "name": name, "title": table.title, "unit": table.unit, "note": table.note,
        "seeds": f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else max(seeds),
        "command": " ".join(["python -m lab.experiments", name, *words, *["--quick"] * flags.quick]),
        "commits": sorted({record["commit"] for record in everything}),
        "torch": sorted({record["torch"] for record in everything}),
        "base": ", ".join(f"{key} {value}" for key, value in settings_of({}, 0, flags).items() if key != "seed"),
        "cells": figures.evaluate_rows(table.rows, records, table.value, table.equal),
        "samples": [(label, s) for label, row in records.items() for s in row[0]["samples"]] if name == "figure8" else [],
        "records": sorted(file.name for file in distinct([chosen], folder)),
    }  # fmt: skip
    base = Path(flags.output) / file_name(name, flags)
    Path(f"{base}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = figures.markdown(result)
    Path(f"{base}.md").write_text(text)
    figures.draw(table.picture, result, records, f"{base}.png")
    print(text)


def sum_up(flags):
    """Write README.md over all results that are there."""
    folder = Path(flags.output)
    files = [folder / f"{file_name(name, flags)}.json" for name in TABLES]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    (folder / f"{file_name('README', flags)}.md").write_text(figures.overview(results))


def main(argv=None):
    """The command line."""
    parser = command_line(Flags, __doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(TABLES)}, or all")
    flags = parser.parse_args(argv)
    names = list(TABLES) if "all" in flags.names or (flags.list and not flags.names) else flags.names
    for name, value, known in [("name", name, [*TABLES, "all"]) for name in names or [""]] + [("--data", flags.data, PLANS)]:
        if value not in known:
            raise ValueError(f"{name} '{value}' is unknown: choose one of {', '.join(known)}")
    if not 0 <= flags.seeds <= len(figures.T975) + 1 or flags.jobs < 0:
        raise ValueError(
            f"--seeds must be from 0 to {len(figures.T975) + 1} and --jobs not negative, got {flags.seeds} and {flags.jobs}"
        )
    flags.output = flags.output or str(runs.ROOT / ("runs/quick" if flags.quick else "results"))  # from whatever folder it is called
    folder = Path(flags.output) / "runs"
    if flags.list:
        return listing(names, flags, folder)
    for name in names:
        while True:  # once, or until no comparison needs more seeds
            wanted = distinct([runs_of(name, flags, build=True)], folder)
            todo = [settings for settings in wanted.values() if runs.find(settings, folder) is None]
            minutes = sum(cost(settings, folder) for settings in todo) / 60
            print(f"{name}: {len(wanted)} runs, {len(todo)} to do, about {minutes:.0f} core minutes", flush=True)
            if not todo:
                break
            failed = run_all(todo, folder, flags.jobs or os.cpu_count())
            if failed:
                raise ValueError(
                    f"{name}: {len(failed)} of {len(todo)} runs failed, the others are kept: repeat the command ({failed[0]})"
                )
        report(name, flags, folder)
        sum_up(flags)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"lab.experiments: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.experiments: stopped; finished runs are kept, the same command goes on from there")
