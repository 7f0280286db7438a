"""A benchmark for credit rules: what does a rule do, beside DAPO and VPPO, in the four regimes of the scenes task?

    python -m lab.benchmark my_rule.py              24 runs, 20 to 22 minutes on 2 cores; the first rule an hour
    python -m lab.benchmark lab/rules/papo.py       a rule that is here already
    python -m lab.benchmark --table                 docs/benchmark.md from all rules in lab/rules and their records
    python -m lab.benchmark my_rule.py --quick      one seed, two steps: does it run?

lab/rules/__init__.py says what a rule's file holds. A rule runs from the same base policies on the same prompts as DAPO and VPPO
(table "map" of lab.experiments has such runs), six seeds in each regime, at the learning rate that all share. The
differences are paired by seed. Held-out handwriting is used once, at the end of a run. Finished runs are kept: the same command goes on.

Base policies are warmed up on each machine, and another kind of processor ends at other weights. So the first rule on a machine needs
48 runs of DAPO and VPPO, too, from its own base policies: an hour in all, beside the warm-up. Later rules find them.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from config import command_line, option
from lab import figures, runs
from lab.experiments import PLANS, QUICK, cost, run_all
from laptop.scenes import REGIMES
from rollout import Rollout

SEEDS = 6
METHODS = {"DAPO": "dapo", "VPPO": "vppo"}  # what a rule is compared with
TABLE = runs.ROOT / "docs" / "benchmark.md"


@dataclass
class Flags:
    """Flags of lab/benchmark.py, beside the rule's file."""

    jobs: int = option(0, "runs at a time; 0: one per core")
    output: str = option("", "folder of the records; default results, with --quick runs/quick")
    quick: bool = option(False, "one seed, two steps: does everything run?")
    table: bool = option(False, "write docs/benchmark.md from the rules in lab/rules whose records are there")


def settings_of(regime, seed, quick, **changes):
    """The settings of one run: the regime's plan, without the validation curve for a rule, which nobody looks at."""
    settings = PLANS[regime] | {"data": regime, "model": "tiny", "seed": seed} | changes
    if "rule" in changes:
        settings["eval_every"] = 0
    return settings | ({name: min(value, settings.get(name, value)) for name, value in QUICK.items()} if quick else {})


def rows_of(quick, **changes):
    """{regime: [settings of each seed]} of a rule or a method."""
    return {regime: [settings_of(regime, seed, quick, **changes) for seed in range(1 if quick else SEEDS)] for regime in REGIMES}


def rehearse(module):
    """Call a rule on a made-up batch, so that a slip is found at once and not in the first run. Raises ValueError of one sentence."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(1, 17) % 9 + 4
    mask = torch.arange(12) < lengths[:, None]  # (16, 12)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    rollout = Rollout([{}, {}], ids, mask, ["\\boxed{3}"] * 16, torch.zeros(16, dtype=torch.bool))
    dependency, entropy = (torch.rand(mask.shape, generator=generator) * mask for _ in range(2))
    runs.apply_rule(module, rollout, dependency, entropy, (torch.arange(16) % 3 == 0).float())


def scores(records):
    """Held-out avg@8 of each record, in %."""
    return [100 * record["test"] for record in records]


def table_cell(mean, half, sign=""):
    """12.3 +- 1.2, in bold if it is a difference, which has a sign, and its interval does not contain 0."""
    text = f"{mean:{sign}.1f} +- {'?' if half is None else f'{half:.1f}'}"
    return f"**{text}**" if sign and figures.settled(mean, half) else text


def differences(records, reference):
    """A cell for each regime of {regime: [a record per seed]}: its difference to that of the reference, paired by seed."""
    return [table_cell(*figures.difference(scores(mine), scores(reference[regime])), "+") for regime, mine in records.items()]


def grid(rules, references):
    """The table in Markdown: DAPO's scores, VPPO's differences to them, and those of the rules, {name: {regime: [a record per seed]}}."""
    (first, base), *others = references.items()
    rows = [[first, "held-out, %", *(table_cell(*figures.interval(scores(mine))) for mine in base.values())]]
    rows += [[name, f"to {first}", *differences(records, base)] for name, records in others]
    rows += [[name, f"to {other}", *differences(records, theirs)] for name, records in rules.items() for other, theirs in references.items()]
    gaps = [cell for row in rows[1:] for cell in row[2:]]
    return figures.grid(["rule", " ", *base], rows) + (
        "\nHeld-out avg@8 of DAPO in %, and differences to it and to VPPO, paired by seed, with 95 % intervals over the seeds. Of the "
        f"{len(gaps)} differences {sum(cell.startswith('**') for cell in gaps)} are decided, in bold. Of equal rules chance decides one in twenty.\n"
    )


def rows_beside(quick, folder, build=False, **changes):
    """({regime: [settings of each seed]} of a rule, {method: the same}): all from the same base policies. build: warm them up if need be."""
    rows = {"": rows_of(quick, **changes), **{name: rows_of(quick, method=method) for name, method in METHODS.items()}}
    flat = {(name, regime): chosen for name, regimes in rows.items() for regime, chosen in regimes.items()}
    flat = runs.with_base(flat, folder, build)
    rows = {name: {regime: flat[name, regime] for regime in REGIMES} for name in rows}
    return rows.pop(""), rows


def found(wanted, folder):
    """{regime: records} of runs that have all been made, else None."""
    records = {regime: [runs.find(settings, folder) for settings in chosen] for regime, chosen in wanted.items()}
    return None if any(None in mine for mine in records.values()) else records


def main(argv=None):
    """The command line."""
    parser = command_line(Flags, __doc__)
    parser.add_argument("rule", nargs="?", default="", help="a Python file with a function `rule`")
    flags = parser.parse_args(argv)
    if bool(flags.rule) == flags.table:
        raise ValueError("give the file of a rule, or --table")
    if flags.jobs < 0:
        raise ValueError(f"--jobs must not be negative, got {flags.jobs}")
    folder = Path(flags.output or runs.ROOT / ("runs/quick" if flags.quick else "results")) / "runs"
    if flags.table:
        return write_table(folder)
    file = Path(flags.rule).resolve()
    rehearse(runs.load_rule(file))
    mine, methods = rows_beside(flags.quick, folder, build=True, method="vppo", rule=str(file))
    wanted = {runs.file_of(s, folder): s for table in (mine, *methods.values()) for chosen in table.values() for s in chosen}
    todo = [settings for file, settings in wanted.items() if runs.find(settings, folder) is None]
    jobs = flags.jobs or os.cpu_count()
    minutes = sum(cost(settings, folder) for settings in todo) / 60 / jobs
    print(f"{len(wanted)} runs, {len(todo)} to do, about {minutes:.0f} minutes with {jobs} at a time", flush=True)
    if failed := run_all(todo, folder, jobs):
        raise ValueError(f"{len(failed)} of {len(todo)} runs failed, the others are kept: repeat the command")
    references = {name: found(table, folder) for name, table in methods.items()}
    print(grid({Path(flags.rule).stem: found(mine, folder)}, references))


def write_table(folder):
    """docs/benchmark.md: its text stays, the table between its two marks is made anew from the records."""
    rules, references = {}, {}
    for file in sorted((runs.ROOT / "lab" / "rules").glob("[!_]*.py")):
        mine, methods = rows_beside(False, folder, method="vppo", rule=str(file))
        records, references = found(mine, folder), {name: found(table, folder) for name, table in methods.items()}
        if None in (records, *references.values()):
            print(f"{file.name} is left out: python -m lab.benchmark lab/rules/{file.name} makes its runs")
        else:
            rules[f"[{file.stem}](../lab/rules/{file.name})"] = records
    if not rules:
        raise ValueError(f"{folder} has not all runs of any rule: python -m lab.benchmark lab/rules/papo.py makes those of one")
    start, mark, end = "<!-- table -->", "<!-- end of table -->", TABLE.read_text()
    head, tail = end.split(start)[0], end.split(mark)[1]
    TABLE.write_text(f"{head}{start}\n{grid(rules, references)}{mark}{tail}")
    print(f"{len(rules)} rules written to {TABLE.name}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"lab.benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.benchmark: stopped; finished runs are kept, the same command goes on from there")
