"""From the records of an experiment to what a person reads: intervals, a table in markdown, a picture.

Intervals are 95 % by Student's t over seeds, the unit of evidence between runs. Comparisons are paired by seed: at one seed
two methods start from the same weights and draw from the same sequence of prompts; the interval is of their differences.
"""

import re
import statistics

import numpy as np

# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom.
T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)
STYLES = [("#000000", "-"), ("#d55e00", "--"), ("#56b4e9", "-."), ("#009e73", ":")]  # apart in grey print, too


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------
def interval(values):
    """(mean, half width of its 95 % interval) over seeds; half width None for one seed, both None where a value is missing.

    Example: (1, 2, 3): mean 2, standard deviation 1, half width 4.303 / sqrt(3) = 2.484.
    """
    if not values or any(value is None for value in values):
        return None, None
    n = len(values)
    return statistics.mean(values), T975[n - 2] * statistics.stdev(values) / n**0.5 if n > 1 else None


def difference(values, reference):
    """`interval` of the paired differences: both lists in the order of the same seeds, of which one may have more."""
    pairs = list(zip(values, reference))
    return (None, None) if any(None in pair for pair in pairs) else interval([a - b for a, b in pairs])


def settled(mean, half, equal=0):
    """Whether an interval ends a comparison: it does not contain 0, or it lies within +- equal.

    Example: 3 +- 2.9 and 0.5 +- 1.4 with equal = 2 are settled, 1 +- 1.5 is not.
    """
    return half is not None and (abs(mean) > half or abs(mean) + half <= equal > 0)


def verdict(sign, mean, half, equal=0):
    """Whether the published direction (1, -1, 0 for equal, None for none) holds: only a settled interval decides."""
    if sign is None or mean is None:
        return ""
    if not settled(mean, half, equal):
        return "undecided"
    if abs(mean) <= half:
        return f"equal within {equal}"
    return "holds" if mean * sign > 0 else "does not hold"


def curve_mean(record):
    """The mean over the validation curve in %, which says more than its last point; None for runs that have none."""
    return 100 * statistics.mean(avg for _, avg in record["curve"]) if record.get("curve") else None


def evaluate_rows(rows, records, value, equal=0):
    """The cells of a table. rows: (label, settings, published, reference); records: {label: [a record per seed]}.

    value(record, label) gives a cell's number. A row's `published` is a number or, where the paper gives none, "<" or ">": on
    which side of the reference row it lies.
    """
    cells, published = {}, {label: number for label, _, number, _ in rows}
    for label, settings, paper, reference in rows:
        mine = records[label]
        measures = {  # the prefix of a measure's keys: its values, seed by seed
            "": [value(record, label) for record in mine],
            "curve_": [curve_mean(record) for record in mine],
            "blind_": [100 * record["blind"] if "blind" in record else None for record in mine],
        }
        cell = cells[label] = {"label": label, "settings": settings, "published": paper}
        for prefix, values in measures.items():
            cell[f"{prefix}values"] = values
            cell[prefix[:-1] or "mean"], cell[f"{prefix}half"] = interval(values)
            if reference:
                compare = difference(values, cells[reference][f"{prefix}values"])
                cell[f"{prefix}difference"], cell[f"{prefix}difference_half"] = compare
        cell["seconds"] = statistics.mean(r["seconds"] for r in mine)
        cell["within"] = statistics.mean(100 * (r["test_ci"] or 0) for r in mine) if "test_ci" in mine[0] else None
        if reference:
            sign, gap = {"<": -1, ">": 1}.get(paper), None
            if isinstance(paper, (int, float)) and isinstance(published[reference], (int, float)):
                gap = round(paper - published[reference], 3)
                sign = (gap > 0) - (gap < 0)
            direction = verdict(sign, cell["difference"], cell["difference_half"], equal)
            cell |= {"reference": reference, "published_difference": gap, "direction": direction}
    return list(cells.values())


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------
def spread(mean, half):
    """12.3 +- 1.2, with ? for an interval that one seed cannot give; empty where there is nothing."""
    return "" if mean is None else f"{mean:.4g} +- {'?' if half is None else f'{half:.2g}'}"


def grid(head, rows):
    """A markdown table without the columns that are empty."""
    full = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in full], ["---"] * len(full), *([row[i] for i in full] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value, form=".4g"):
    """A number as text; text as it is; empty where there is nothing."""
    return value if isinstance(value, str) else "" if value is None else f"{value:{form}}"


PAIRED = ["seeds", "difference", "over the curve", "responses that read nothing", "paper", "direction of the paper"]


def side(published):
    """< 0 or > 0 where the paper gives only the side of the reference."""
    return f"{published} 0" if isinstance(published, str) else ""


def compared(result):
    """A table row for each cell that has a reference: label - reference, then PAIRED."""
    seeds = {c["label"]: len(c["values"]) for c in result["cells"]}
    return [
        [f"{c['label']} - {c['reference']}", str(min(seeds[c["label"]], seeds[c["reference"]])), spread(c["difference"], c["difference_half"]),
         spread(c["curve_difference"], c["curve_difference_half"]), spread(c.get("blind_difference"), c.get("blind_difference_half")),
         number(c["published_difference"], "+.4g") or side(c["published"]), c["direction"]]
        for c in result["cells"] if "reference" in c
    ]  # fmt: skip


def decided(cell):
    """A cell's comparison in words if its interval does not contain 0, else nothing."""
    mean, half, paper = (cell.get(key) for key in ("difference", "difference_half", "published_difference"))
    if half is None or abs(mean) <= half:
        return ""
    said = number(paper, "+.1f") or side(cell["published"])
    return f"{cell['label']} - {cell['reference']}: {mean:+.1f} +- {half:.1f}" + f" (paper {said})" * bool(said)


def scores(result, link):
    """The rows of a page in short: label, mean and interval, the paper's number, and the comparison if it is decided."""
    rows = []
    for cell in result["cells"]:
        paper = "" if cell["published"] in ("<", ">") else number(cell["published"])
        start = ["", ""] if rows else [link, str(result["seeds"])]
        rows.append([*start, cell["label"], f"{cell['mean']:.1f} +- {cell['half'] or 0:.1f}", paper, decided(cell)])
    return rows


def overview(results):
    """One page over all results: their scores in short, then every comparison whose direction the paper states."""
    link = {r["name"]: f"[{r['name']}]({r['name']}.md)" for r in results}
    short = [row for r in results if "held-out avg@8" in r["unit"] for row in scores(r, link[r["name"]])]
    table = grid(["page", "seeds", "", "here, %", "paper, %", "decided difference"], short)
    titles = "\n".join(f"* {link[r['name']]}: {r['title']}" for r in results)
    rows = [[link[r["name"]], *row] for r in results for row in compared(r) if row[-1]]
    ends = [row[-1] for row in rows]
    counts = ", ".join(f"{end}: {ends.count(end)}" for end in ("holds", "does not hold", "equal within 2", "undecided"))
    return f"""# The paper's tables and figures at laptop size

    python -m lab.experiments all

{titles}

## Scores

Mean held-out avg@8 and its 95 % interval over seeds, then the paper's number. Differences are paired by seed. One is shown where
its interval does not contain 0, which decides its sign.

{table}
## Does the direction of the paper hold?

{len(rows)} comparisons paired by seed, with 95 % intervals: {counts}. An interval decides that does not contain 0, \
or that lies within +-2 points. Of so many, one in twenty leaves 0 out by chance. Each page says what its numbers are.

{grid(["page", "", *PAIRED], rows)}"""


def markdown(result):
    """The report: where the numbers come from, the cells, the comparisons with the published ones."""
    cells, unit = result["cells"], result["unit"]
    text = f"# {result['name']}: {result['title']}\n\n    {result['command']}\n\n"
    text += f"{result['seeds']} seed(s); 95 % intervals by Student's t over seeds. "
    text += f"Records made at commit {', '.join(result['commits'])}. "
    text += f"Base: {result['base']}.\n" + (f"\n{result['note']}\n" if result["note"] else "") + "\n"
    head = ["", unit, "mean over the curve", "read nothing, %", "+- within a run",
            "seconds", "paper"]  # fmt: skip
    text += grid(
        head,
        [[c["label"], spread(c["mean"], c["half"]), spread(c["curve"], c["curve_half"]),
          spread(c["blind"], c["blind_half"]), number(c["within"], ".2g"), number(c["seconds"], ".0f"), number(c["published"])] for c in cells],
    )  # fmt: skip
    if any(c["curve"] is not None for c in cells):
        text += "\nThe curve is that of validation. A response that reads nothing names no digit. Within a run, the prompt is the unit.\n"
    if pairs := compared(result):
        text += "\nPaired by seed:\n\n" + grid(["", *PAIRED], pairs)
    for label, sample in result["samples"]:
        text += f"\n{label}: {sample['problem']} (answer {sample['answer']})\n\n    {sample['response'] or '(empty)'}\n"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: functions of (matplotlib figure, result, {label: records})
# ---------------------------------------------------------------------------------------------------------------------
def dots(figure, result, records):
    """A dot and its interval for each row, every seed behind it in grey."""
    cells = [cell for cell in result["cells"] if cell["mean"] is not None]
    figure.set_size_inches(7, 1.2 + 0.35 * len(cells))
    axes = figure.add_subplot()
    for y, cell in enumerate(cells):
        axes.plot(cell["values"], [y] * len(cell["values"]), "|", color="#999999")
        axes.errorbar(cell["mean"], y, xerr=cell["half"] or 0, fmt="o", color="black", capsize=3)
    axes.set_yticks(range(len(cells)), [cell["label"] for cell in cells])
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xlabel(f"{result['unit']}, 95 % interval over {result['seeds']} seed(s)")


def against(figure, result, records):
    """What each method gains or loses against its reference: a row a cell, a dot with its interval a method. Labels are "cell: method"."""
    cells = [cell for cell in result["cells"] if cell.get("difference") is not None]
    places = list(dict.fromkeys(cell["label"].split(": ")[0] for cell in cells))
    methods = list(dict.fromkeys(cell["label"].split(": ")[-1] for cell in cells))
    figure.set_size_inches(8, 1.2 + 0.7 * len(places))
    axes = figure.add_subplot()
    axes.axvline(0, color="#999999", linewidth=1)
    for number, name in enumerate(methods):
        mine = [cell for cell in cells if cell["label"].split(": ")[-1] == name]
        y = [places.index(cell["label"].split(": ")[0]) + 0.2 * (number - (len(methods) - 1) / 2) for cell in mine]
        axes.errorbar([cell["difference"] for cell in mine], y, xerr=[cell["difference_half"] or 0 for cell in mine],
                      fmt="osD^"[number % 4], color=STYLES[number % 4][0], capsize=3, label=name)  # fmt: skip
    axes.set_yticks(range(len(places)), places)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlabel(f"{result['unit']}: difference to DAPO, 95 % interval over {result['seeds']} seed(s)")
    axes.legend()


def by_rate(figure, result, records):
    """The score at each learning rate: a panel a cell, a line a method. Labels are "cell: method, lr RATE"."""
    parts = [re.fullmatch(r"(.+): (.+), lr (.+)", cell["label"]).groups() for cell in result["cells"]]
    places, methods = (list(dict.fromkeys(part[i] for part in parts)) for i in (0, 1))
    figure.set_size_inches(1 + 4 * len(places), 4)
    for place, axes in zip(places, np.atleast_1d(figure.subplots(1, len(places), sharey=True))):
        for number, name in enumerate(methods):
            points = [(float(rate), cell["mean"]) for (where, who, rate), cell in zip(parts, result["cells"]) if (where, who) == (place, name)]
            colour, line = STYLES[number % len(STYLES)]
            axes.plot(*zip(*points), line, marker="osD^"[number % 4], color=colour, label=name)
        rates = sorted({float(rate) for *_, rate in parts})
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        axes.set_xticks([], minor=True)
        axes.set(title=place, xlabel=f"learning rate, mean over {result['seeds']} seed(s)", ylabel=result["unit"] if place == places[0] else "")
    axes.legend()


def stacked(figure, result, records):
    """What becomes of 100 responses: a bar a method, cut into parts. Labels are "part: method"."""
    parts, methods = (list(dict.fromkeys(cell["label"].split(": ")[i] for cell in result["cells"])) for i in (0, -1))
    means = {cell["label"]: cell["mean"] for cell in result["cells"]}
    figure.set_size_inches(9, 1.4 + 0.4 * len(methods))
    axes, left = figure.add_subplot(), np.zeros(len(methods))
    for part, colour in zip(parts, ("#009e73", "#999999", "#cc79a7", "#56b4e9", "#d55e00")):
        width = np.array([means[f"{part}: {name}" if name != part else name] for name in methods])
        axes.barh(range(len(methods)), width, left=left, color=colour, edgecolor="white", label=part)
        for y, (start, size) in enumerate(zip(left, width)):
            if size >= 4:  # room for its number
                axes.text(start + size / 2, y, f"{size:.0f}", ha="center", va="center")
        left += width
    axes.set_yticks(range(len(methods)), methods)
    axes.set(xlim=(0, max(left)), ylim=(len(methods) - 0.5, -0.5))
    axes.set_xlabel(f"{result['unit']}, mean over {result['seeds']} seed(s)")
    figure.legend(loc="outside upper center", ncols=len(parts))


def band(axes, number, label, steps, runs):
    """The mean of several runs' curves with its interval at every step. runs: a list a seed, None where there is none."""
    points = [(step, *interval(column)) for step, *column in zip(steps, *runs, strict=True) if None not in column]
    colour, line = STYLES[number % len(STYLES)]
    x, mean, half = (np.array([point[i] or 0 for point in points], float) for i in range(3))
    axes.plot(x, mean, line, color=colour, label=label)
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def curves(figure, result, records):
    """Validation and training reward by step, a band per method."""
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    for number, (label, mine) in enumerate(records.items()):
        band(
            left, number, label, [step for step, _ in mine[0]["curve"]], [[100 * avg for _, avg in r["curve"]] for r in mine]
        )
        rewards = [[100 * value for value in r["metrics"]["reward"]] for r in mine]
        band(right, number, label, range(1, len(rewards[0]) + 1), rewards)
    left.set(xlabel="step", ylabel="validation avg@8, %")
    right.set(xlabel="step", ylabel="reward of sampled responses, %")
    left.legend(title=f"95 % over {result['seeds']} seed(s)")


def entropy(figure, result, records):
    """Entropy of a token by step, a band per row."""
    axes = figure.add_subplot()
    for number, (label, mine) in enumerate(records.items()):
        band(axes, number, label, range(1, len(mine[0]["metrics"]["entropy"]) + 1), [r["metrics"]["entropy"] for r in mine])
    axes.set(xlabel="step", ylabel="entropy of a token, nats")
    axes.legend(title=f"95 % over {result['seeds']} seed(s)")


def token_histogram(figure, result, records):
    """Figure 3: how many tokens have which S, counts on a logarithmic axis."""
    counts = np.sum([record["S"] for record in next(iter(records.values()))], axis=0)
    axes = figure.add_subplot()
    axes.bar(np.arange(len(counts)) * 0.25, counts, 0.24, align="edge", color="#333333")
    axes.set(yscale="log", xlabel="S of a token, nats (published: about 0 to 10)", ylabel="tokens")


def mean_histogram(figure, result, records):
    """Figure 4: how many responses have which mean S."""
    axes = figure.add_subplot()
    axes.hist(sum((record["mean_S"] for record in next(iter(records.values()))), []), 40, color="#333333")
    axes.axvline(0.09, color="#d55e00", linestyle="--", label="published mean, 0.09")
    axes.axvspan(0, 0.30, color="#d55e00", alpha=0.1, label="published range, about 0 to 0.30")
    axes.set(xlabel="mean S of a response, nats", ylabel="responses")
    axes.legend()


def tokens(figure, result, records):
    """Figure 7: responses to one prompt, tokens shaded by S, those that TGF keeps boxed."""
    record = next(iter(records.values()))[0]
    figure.set_size_inches(11, 4.5)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(
        f"{record['problem']}  shown: {record['digits']}\ndarker: larger S; boxed: kept by the filter", fontsize=9
    )
    y = 0
    for response in record["responses"]:
        x, y = 0, y - 1.5
        for word, S, kept in response:
            if x + len(word) > 120:
                x, y = 3, y - 1
            shade = min(1, np.log1p(20 * S) / np.log1p(40))  # 0 at S = 0, 1 from S = 2
            box = {"facecolor": str(1 - 0.75 * shade), "edgecolor": "black" if kept else "none", "pad": 1.5}
            axes.text(x, y, word.strip(), family="monospace", fontsize=8, bbox=box, parse_math=False,
                      color="white" if shade > 0.7 else "black")  # fmt: skip
            x += len(word.strip()) + 1.5
    axes.set(xlim=(0, 122), ylim=(y - 1, 0))


def draw(picture, result, records, file):
    """Write the picture, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {file}: pictures need pip install matplotlib")
        return
    figure = Figure(layout="constrained")
    picture(figure, result, records)
    figure.savefig(file, dpi=110)
