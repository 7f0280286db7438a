r"""The paper's eight benchmarks by name: where each lies, and how one of its rows becomes a problem, an answer and images.

    python eval.py --model M --benchmark all --grader math-verify --prompts 0 --max_new_tokens 2048
    python eval.py --model M --benchmark mathvision --data FOLDER     # a local copy, see `load`

As in the paper (Section 4): avg@8 at temperature 1 and top-p 1, the instruction after every problem, the last \boxed{}
counts, no model judges. Where there are options the answer is a letter, and options with a column of their own are put
under the question, a line each.

Data sets rename their columns without asking. The table says what each benchmark's were checked against; no row of the real
data was read for this file.
"""

import ast
import json
import re
from collections import namedtuple
from pathlib import Path

from PIL import Image

import reward
from data import INSTRUCTION, join_prompt, locate, open_image, resize
from prompts import Example

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
READ = "The question is in the image. Read it there and answer it."  # for rows whose question is pixels, not text


# ---------------------------------------------------------------------------------------------------------------------
# From row to (problem, answer, images): a function a benchmark, without what comes from elsewhere (instruction, checks)
# ---------------------------------------------------------------------------------------------------------------------
def with_options(question, options):
    """The question and a line "A. ..." per option; an option that is just its letter is one to look up in the image.

    >>> with_options("How many?", ["2", "3"]), with_options("Which?", ["A", "B"])
    ('How many?\\nA. 2\\nB. 3', 'Which?\\nA\\nB')
    """
    lines = [letter if option == letter else f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    return "\n".join([question, *lines])


def as_letter(answer, options):
    """The true answer as the letter of its option, be it given as letter or as text; ValueError if it is neither.

    >>> as_letter("b", ["2", "3"]), as_letter("3.0", ["2", "3"]), as_letter("7", [])
    ('B', 'B', '7')
    """
    answer = str(answer).strip()
    letters = LETTERS[: len(options)]
    if not options or answer.upper() in [*letters]:
        return answer.upper() if options else answer
    same = [letter for letter, option in zip(letters, options) if reward.exact_equal(answer, option)]
    if len(same) != 1:
        raise ValueError(f"the answer {answer!r} is neither a letter from A to {letters[-1]} nor the text of one option")
    return same[0]


def geo3k(row):
    """`<image>` already marks the places of the images."""
    return row["problem"], row["answer"], row["images"] or []


def question_and_image(row):
    """MMK12, MathVerse, LogicVista: options, if any, are in question or image; the answer is a letter or a value."""
    return row["question"] or READ, row["answer"], [row["image"]]


def dynamath(row):
    """As above under other names: `image` is the path the picture once had."""
    return row["question"], row["ground_truth"], [row["decoded_image"]]


def wemath(row):
    """The options are one text: "A. 4 cm; B. 5 cm; C. no correct answer"."""
    options = re.findall(r"(?:^|;)\s*[A-H][.:]\s*(.*?)\s*(?=;\s*[A-H][.:]|;?\s*$)", row["option"], re.DOTALL)
    if not options:
        raise ValueError(f"no options in {row['option']!r}")
    return with_options(row["question"], options), as_letter(row["answer"], options), [row["image_path"]]


def mathvision(row):
    """`<image1>`, ... in question and options name parts of the one picture. Without options the answer is a value."""
    question, *options = (re.sub(r"<image ?\d+>", "", text).strip() for text in [row["question"], *(row["options"] or [])])
    return with_options(question, options), as_letter(row["answer"], options), [row["decoded_image"]]


def mmmu_pro(row):
    """The vision setting, where question and options are pixels; or a row of the standard one, with up to seven images.

    There `<image 2>` in question or options stands for column image_2, and the options are a Python list written as text.
    """
    if "question" not in row:
        return READ, row["answer"], [row["image"]]
    options = ast.literal_eval(row["options"])  # reads literals, runs nothing
    problem = with_options(row["question"], options)
    numbers = re.findall(r"<image (\d)>", problem) or [n for n in "1234567" if row.get(f"image_{n}")]
    images = [row[f"image_{n}"] for n in numbers]
    return re.sub(r"<image \d>", "<image>", problem), as_letter(row["answer"], options), images


# ---------------------------------------------------------------------------------------------------------------------
# The table, in the column order of the paper's Table 1
# ---------------------------------------------------------------------------------------------------------------------
# config: of the hub's data set, "" if it has but one; split: "all" joins the ten variants of DynaMath
# rows: how many there are; columns: those that must be there; options: where they stand, "lines" if we put them there
# checked: columns found in the data set's own card, or in "programs", several public ones that read it
# only: (column, value) of the rows that count; paper: how many rows the paper used, where it used fewer
FIELDS = "title id config split rows columns options checked read only paper"
Benchmark = namedtuple("Benchmark", FIELDS, defaults=(None, None))
BENCHMARKS = {
    "mathverse": Benchmark(
        "MathVerse", "AI4Math/MathVerse", "testmini", "testmini", 2180, "question image answer question_type",
        "in the question", "programs", question_and_image, only=("question_type", "multi-choice"),
    ),
    "dynamath": Benchmark(
        "DynaMath", "DynaMath/DynaMath_Sample", "", "all", 5010, "question decoded_image ground_truth", "in the question",
        "card", dynamath, paper=3666,
    ),
    "mmk12": Benchmark(
        "MMK12", "FanqingM/MMK12", "", "test", 2000, "question image answer", "in the question",
        "programs", question_and_image,
    ),
    "geo3k": Benchmark(
        "Geo3k", "hiyouga/geometry3k", "", "test", 601, "problem images answer", "none", "programs", geo3k,
    ),
    "mathvision": Benchmark(
        "MathVision", "MathLLMs/MathVision", "", "test", 3040, "question options decoded_image answer", "lines",
        "card", mathvision, paper=2907,
    ),
    "wemath": Benchmark(
        "We-Math", "We-Math/We-Math", "", "testmini", 1740, "question option image_path answer", "lines", "programs", wemath,
    ),
    "logicvista": Benchmark(
        "LogicVista", "lscpku/LogicVista", "", "test", 448, "question image answer", "in question or image",
        "programs", question_and_image,
    ),
    "mmmu_pro": Benchmark(
        "MMMU-Pro", "MMMU/MMMU_Pro", "vision", "test", 1730, "answer", "in the image", "programs", mmmu_pro,
    ),
}  # fmt: skip
# Averages of the eight, avg@8 in %, as published (paper, Table 1); single benchmarks are not repeated here.
PUBLISHED = {"Qwen2.5-VL-7B": 38.3, "GRPO 7B": 53.1, "DAPO 7B": 55.0, "VPPO 7B": 57.5,
             "Qwen2.5-VL-32B": 57.0, "GRPO 32B": 62.6, "DAPO 32B": 63.5, "VPPO 32B": 64.6}  # fmt: skip


def named(text):
    """The benchmarks in "geo3k,wemath" or "all", in the order of the table; none in ""."""
    names = list(BENCHMARKS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := set(names) - set(BENCHMARKS):
        known = ",".join(BENCHMARKS)
        raise ValueError(f"unknown benchmark {', '.join(sorted(unknown))}: --benchmark takes all, or some of {known}")
    return [name for name in BENCHMARKS if name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
class Rows:
    """A benchmark's rows as Examples. One that cannot be used is a ValueError naming benchmark and row.

    rows: dicts, or a data set in "arrow" format. Its images are {"bytes", "path"}, which we open ourselves: `datasets` would hand
    some formats (EPS) to outside programs, and fetch paths that are addresses.
    """

    def __init__(self, name, rows, instruction=INSTRUCTION, pixels=(0, 0)):
        self.name, self.rows, self.instruction, self.pixels = name, rows, instruction, pixels

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        where = f"{self.name}[{i}]"
        try:
            row = self.rows[i]
            row = row if isinstance(row, dict) else row.to_pylist()[0]  # a table of one row
            problem, answer, images = BENCHMARKS[self.name].read(row)
        except KeyError as error:
            raise ValueError(f"{where}: no column {error} (found {', '.join(row)})") from error
        except Exception as error:  # rows of other programs hold anything
            raise ValueError(f"{where}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error
        if not images or not all(isinstance(image, (dict, Image.Image)) for image in images):
            raise ValueError(f"{where}: no image")
        for key, value in (("question", problem), ("answer", answer)):
            if not str("" if value is None else value).strip():
                raise ValueError(f"{where}: no {key}")
        images = [resize(open_image(locate(image, where), where), *self.pixels) for image in images]
        return Example(images, join_prompt(str(problem), self.instruction), str(answer), where)


def load(name, folder="", instruction=INSTRUCTION, pixels=(0, 0)):
    """One benchmark, from the hub or from a local copy: a folder with a clone of the hub's repository, or with parquet files
    or an ImageFolder that have the same columns; or one that has such folders under the benchmarks' names. pixels: the range of an
    image's area (data.resize).
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("--benchmark needs: pip install datasets") from error
    benchmark = BENCHMARKS[name]
    config, split = benchmark.config or None, benchmark.split
    path = benchmark.id if not folder else str(Path(folder, name)) if Path(folder, name).is_dir() else folder
    try:
        if folder:  # a clone has the hub's names, other folders have what `datasets` makes of their files' names
            config = config if config in datasets.get_dataset_config_names(path) else None
            split = split if split in datasets.get_dataset_split_names(path, config) else "all"
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # a dozen kinds of error; the user needs the first sentence of any
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"benchmark {name}: '{path}' cannot be read, --data FOLDER takes a local copy ({reason})"
        raise ValueError(message) from error
    if missing := [column for column in benchmark.columns.split() if column not in rows.column_names]:
        found = ", ".join(rows.column_names)
        raise ValueError(f"benchmark {name}: no column {', '.join(missing)} in '{path}' (found {found})")
    if benchmark.only:
        column, value = benchmark.only
        rows = rows.select([i for i, found in enumerate(rows[column]) if found == value])
    if not len(rows):
        raise ValueError(f"benchmark {name}: no rows in '{path}'")
    return Rows(name, rows.with_format("arrow"), instruction, pixels)


# ---------------------------------------------------------------------------------------------------------------------
# The table of results
# ---------------------------------------------------------------------------------------------------------------------
def write(results, output):
    """Write results.json and results.md, a table in the paper's column order; returns the table.

    results: {name: the content of its eval.json}. The average is that of the paper, every benchmark with the same weight.
    """
    shown = [name for name in BENCHMARKS if name in results]
    used = [results[name] for name in shown]
    table = [BENCHMARKS[name] for name in shown]
    average = sum(result["avg"] for result in used) / len(used) if len(used) == len(BENCHMARKS) else None
    whole = all(result["prompts"] >= benchmark.rows for result, benchmark in zip(used, table))

    def line(*cells):
        return f"| {' | '.join(cells)} |"

    def percent(value, spread=None):
        return "-" if value is None else f"{100 * value:.1f}" + ("" if spread is None else f" +- {100 * spread:.1f}")

    lines = [
        line(f"avg@{used[0]['samples']}, %", *(benchmark.title for benchmark in table), "average of eight"),
        line(*["---"] * (len(shown) + 2)),
        line(used[0]["model"], *(percent(result["avg"], result["avg_ci"]) for result in used), percent(average)),
        line("rows", *(f"{r['prompts']} of {b.rows}" for r, b in zip(used, table)), "all" if whole else "not all"),
        *(line(f"published: {title}", *["-"] * len(shown), str(value)) for title, value in PUBLISHED.items()),
    ]
    fewer = [f"{benchmark.paper} of {benchmark.title}'s {benchmark.rows}" for benchmark in table if benchmark.paper]
    if fewer:
        lines += ["", f"The paper used {' and '.join(fewer)} rows, by a rule it does not state: here none is left out."]
    text = "\n".join(lines)
    content = {"average": average, "all_rows": whole, "benchmarks": dict(zip(shown, used)), "published": PUBLISHED}
    Path(output, "results.json").write_text(json.dumps(content, indent=2) + "\n")
    Path(output, "results.md").write_text(text + "\n")
    return text
