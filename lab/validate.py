"""Did the forecast come true? Forecast against measured difference, over the cells of the map.

    python -m lab.forecast --model tiny --data scenes --kinds --output results/forecast-scenes      and so on, once a regime;
                                                                     the verbose ones with --max_new_tokens 96
    python -m lab.experiments map                                    the runs that it is compared with
    python -m lab.benchmark lab/rules/entropy_80_20.py               and those of 80/20; of random_tokens.py, too
    python -m lab.validate                                           results/forecast_validation.md and .json

A point is a method in a cell of the map. Its forecast is the progress of a step relative to DAPO's, from the gradients of the untrained
policy. Its measured value is the difference to DAPO in held-out avg@8, paired by seed. If the forecast predicts, points with a larger
forecast have a larger difference: a rank correlation (Spearman's) above 0. Its interval is a bootstrap: points are drawn again and, for
each, a forecast and a difference within their own uncertainty. Only seeds whose runs are there count, at least two for a point.

TAS, TGF and VPPO differ little from DAPO. 80/20 and random filtering are the other methods that lab.forecast knows. They run in the four
regimes, as rules of the benchmark. (80/20 ranks entropy over the batch there, and within a response in the forecast.)
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, command_line, option
from lab import figures, runs
from lab.experiments import CELLS, Flags, benchmarked, method, settings_of

PARTS = {"TAS": method("tas"), "TGF": method("tgf"), "VPPO": method("vppo")}
METHODS = PARTS | {"80/20": benchmarked("entropy_80_20"), "random": benchmarked("random_tokens")}
DRAWS = 10_000


@dataclass
class ValidateConfig:
    """Flags of lab/validate.py."""

    seeds: int = option(10, "seeds of the map to look for")
    output: str = option("", "folder of forecasts, records and the result; default results")


def progress(row, plain, b):
    """Progress of a step relative to DAPO's at b groups, from the rows of a forecast: cosine * sqrt(snr / (snr + 1 / b)), over the same of DAPO.

    snr is |mu|^2 / tr, the inverse of the noise scale. Example: cosine 0.9, snr 0.1 for both: 0.9 at any b.
    """
    (cosine, *_), (mine, *_), (other, *_) = row["cosine"], row["signal / noise"], plain["signal / noise"]
    return cosine * (mine / (mine + 1 / b)) ** 0.5 / (other / (other + 1 / b)) ** 0.5


def points(folder, seeds):
    """[{cell, method, b, forecast, forecast_half, differences}] of all points for which forecast and runs are there."""
    found = []
    for name, cell in CELLS.items():
        file = folder / f"forecast-{cell['data']}" / "forecast.json"
        if not file.exists():
            continue
        record, b = json.loads(file.read_text()), cell.get("prompts_per_step", Config.prompts_per_step)
        rows, as_made = record["rows"], b == record["facts"]["prompts_per_step"]  # at another b, progress is computed anew
        for label, settings in METHODS.items():
            pairs = []
            for seed in range(seeds):
                both = {m: [settings_of(words | cell, seed, Flags(output=str(folder)))] for m, words in (("dapo", method("dapo")), (label, settings))}
                both = runs.with_base(both, folder / "runs")
                pairs.append([runs.find(settings, folder / "runs") for (settings,) in both.values()])
            differences = [100 * (mine["test"] - dapo["test"]) for dapo, mine in pairs if dapo and mine]
            if len(differences) > 1:
                made, low, high = rows[label]["progress"]
                forecast = made if as_made else progress(rows[label], rows["DAPO"], b)
                found.append({"cell": name, "method": label, "b": b, "forecast": forecast, "forecast_half": (high - low) / 2,
                              "differences": differences})  # fmt: skip
    return found


def spearman(x, y):
    """The rank correlation of two lists. Example: (1, 2, 3) and (1, 3, 2): 0.5."""
    return float(np.corrcoef(runs.ranks(np.asarray(x)), runs.ranks(np.asarray(y)))[0, 1])


def correlation(found):
    """(rank correlation over the points, low, high): a 95 % bootstrap over points and over what is uncertain in each."""
    rng = np.random.default_rng(0)
    forecast, half = (np.array([p[key] for p in found]) for key in ("forecast", "forecast_half"))
    mean = np.array([statistics.mean(p["differences"]) for p in found])
    error = np.array([statistics.stdev(p["differences"]) / len(p["differences"]) ** 0.5 for p in found])
    drawn = []
    for _ in range(DRAWS):
        i = rng.integers(len(found), size=len(found))
        if len(set(i)) > 2:
            noise = rng.standard_normal((2, len(found)))
            drawn.append(spearman(forecast[i] + half[i] / 1.96 * noise[0], mean[i] + error[i] * noise[1]))
    return spearman(forecast, mean), *(float(end) for end in np.quantile(drawn, [0.025, 0.975]))


def parts(found):
    """The points of TAS, TGF and VPPO."""
    return [point for point in found if point["method"] in PARTS]


def report(found, command):
    """The page."""
    rows = []
    for p in found:
        mean, half = figures.interval(p["differences"])
        forecast = f"{p['forecast']:.2f} +- {p['forecast_half']:.2f}"
        rows.append([p["cell"], p["method"], str(p["b"]), forecast, f"{mean:+.1f} +- {half:.1f}", str(len(p["differences"]))])
    head = ["cell", "method", "groups a step", "forecast progress / DAPO's", "measured, points of avg@8", "seeds"]
    findings = []
    for names, some in ((", ".join(PARTS), parts(found)), ("all methods", found)):
        rho, low, high = correlation(some)
        right = sum((p["forecast"] > 1) == (statistics.mean(p["differences"]) > 0) for p in some)
        findings.append(
            f"* {names}: rank correlation over {len(some)} points {rho:.2f}, 95 % interval {low:.2f} to {high:.2f}. The forecast and the mean "
            f"difference are on the same side, faster and better or slower and worse, in {right} of {len(some)} points."
        )
    findings = "\n".join(findings)
    return f"""# Did the forecast come true?

    {command}

Forecast before training against the measured difference to DAPO, paired by seed, both with 95 % intervals.

{figures.grid(head, rows)}
{findings}
"""


def main(argv=None):
    """The command line."""
    flags = ValidateConfig(**vars(command_line(ValidateConfig, __doc__).parse_args(argv)))
    folder = Path(flags.output) if flags.output else runs.ROOT / "results"
    found = points(folder, flags.seeds)
    if len(parts(found)) < 4:
        words = f"{len(parts(found))} points of {', '.join(PARTS)}, and 4 are the least"
        raise ValueError(f"{folder} has forecast and runs for {words}: --help names the commands that make them")
    words = [] if flags.seeds == ValidateConfig.seeds else ["--seeds", str(flags.seeds)]
    text = report(found, " ".join(["python -m lab.validate", *words]))
    (folder / "forecast_validation.md").write_text(text)
    result = {"points": found, "correlation": correlation(parts(found)), "of all": correlation(found)}
    (folder / "forecast_validation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"lab.validate: {error}")
