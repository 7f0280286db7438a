"""README and docs: every link leads somewhere, every function named exists, every recipe works, the limits of size hold.

Numbers are checked where their source is: those of docs/results.md and of the README here against results/*.json, the memory
table in test_memory.py, the configs' sources in test_configs.py.
"""

import ast
import inspect
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

import train
import vppo
from config import Config
from data import Example
from lab import benchmark, experiments, figures, runs

ROOT = Path(vppo.__file__).parent
TRACKED = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
PAGES = sorted(name for name in subprocess.run(TRACKED, cwd=ROOT, capture_output=True, text=True).stdout.split() if (ROOT / name).exists())
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\](?:\([^()]*\))?)*)\]\(([^()\s]+)\)|(?:href|src|srcset)=\"([^\" ]+)")
NAMED = re.compile(r"`([\w/.-]+\.py): ([^`]+)`")  # `loss.py: token_filter, kept_count`
# What belongs to torchrun and pytest, or turns a flag of ours off.
FOREIGN = {"tb", "nproc_per_node", "nnodes", "max-restarts", "rdzv_backend", "rdzv_endpoint", "no_share_prompt"}


def prose(page):
    """A page without its code blocks, which are fenced or indented by four spaces after an empty line."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return re.sub(r"(?<=\n\n)((?: {4}.*\n)+)", "", text)


def fenced(page):
    """The fenced code blocks of a page: (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


def anchor(heading):
    """GitHub's anchor of a heading: links become their text, letters lower case, punctuation goes, each space is a hyphen."""
    text = re.sub(r"!?\[([^\[\]]*)\]\([^()]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@cache
def anchors(page):
    """All anchors of a page; a heading that comes again gets a number."""
    found = []
    for heading in re.findall(r"^#{1,6} (.*)$", prose(page), flags=re.M):
        again = sum(re.fullmatch(re.escape(anchor(heading)) + r"(-\d+)?", old) is not None for old in found)
        found.append(anchor(heading) + (f"-{again}" if again else ""))
    return found


def links(page):
    """(text, target) of every link and picture of a page, also of a picture that is a link."""
    for text, target, attribute in LINK.findall(prose(page)):
        yield text, target or attribute
        if text.startswith("!["):
            yield "", LINK.match(text[1:])[2]


@cache
def names_in(file):
    """Everything a Python file defines: functions, classes and methods, and what is assigned at the top or in a class."""
    tree = ast.parse((ROOT / file).read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        for line in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else []:
            targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Links, names, commands
# ---------------------------------------------------------------------------------------------------------------------
def test_the_rule_for_anchors():
    assert anchor("Is 0.5 right? (Eq. 5) & `loss.py`") == "is-05-right-eq-5--losspy"
    assert anchor("[table4](../results/table4.md): which tokens, TGF_only") == "table4-which-tokens-tgf_only"
    assert "README.md" in PAGES and "docs/results.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    lost = []
    for _, target in links(page):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, mark = unquote(target).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        inside = file.resolve().is_relative_to(ROOT)
        if not inside or not file.exists():
            lost.append(target)
        elif mark and (file.suffix != ".md" or mark not in anchors(file.resolve().relative_to(ROOT).as_posix())):
            lost.append(target)  # only our own pages have anchors that can be checked
    assert not lost


@pytest.mark.parametrize("page", PAGES)
def test_every_function_named_exists(page):
    missing = []
    for file, names in NAMED.findall((ROOT / page).read_text()):
        known = names_in(file) if (ROOT / file).exists() else set()
        missing += [f"{file}: {name}" for name in re.split(r",\s*", names) if name not in known]
    for text, target in links(page):  # a link with a function's name leads to its file
        for file, _ in NAMED.findall(text):
            missing += [] if ((ROOT / page).parent / target).resolve() == ROOT / file else [f"{text} -> {target}"]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("results/")])
def test_every_command_and_flag_exists(page):
    text = (ROOT / page).read_text()
    for script in re.findall(r"python ([\w/]+\.py)\b", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ((?:lab|exercises|examples)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for test in re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / test).exists(), test
    sources = [file.read_text() for folder in (".", "lab") for file in (ROOT / folder).glob("*.py")]
    known = {name for source in sources for name in re.findall(r"^    (\w+): .*= (?:option|field)\(", source, flags=re.M)}
    known |= {name for source in sources for name in re.findall(r'"--([a-z_]+)"', source)} | {"help"}
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    assert flags <= known | FOREIGN, flags - known - FOREIGN


# ---------------------------------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------------------------------
def test_the_readme_is_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1600
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


def test_the_readme_lists_every_page():
    listed = {target for _, target in links("README.md")}
    assert {page for page in PAGES if page.startswith("docs/")} <= listed


def test_the_readmes_commands_can_be_copied():
    for language, block in fenced("README.md"):
        if language != "math":
            assert not re.search(r"\S[ \t]+#", block), block


@pytest.mark.parametrize("page", PAGES)
def test_no_table_row_is_too_wide(page):
    assert [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|") and len(line) > 160] == []


# ---------------------------------------------------------------------------------------------------------------------
# The recipes of "Plug it into your trainer"
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recipes():
    """The functions that the README hands to train.main, and the command line."""
    handed = {}
    recipe = "\n".join(block for language, block in fenced("README.md") if language == "python")
    original, train.main = train.main, lambda argv, **words: handed.update(words, argv=argv)
    try:
        exec(compile(recipe, "README.md", "exec"), {})
    finally:
        train.main = original
    return handed


def test_recipes_are_handed_to_the_training_step(recipes):
    assert list(recipes)[:-1] == ["reward", "mask_image", "metric", "credit"]
    assert set(recipes) - {"argv"} <= set(inspect.signature(vppo.train_step).parameters)
    train.parse(recipes["argv"])


def test_the_reward_mask_and_metric(recipes):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 84, 3), dtype=np.uint8))
    example = Example([image], "what is 3 + 4 ?", "7")
    assert recipes["reward"]("so \\boxed{7}", example, Config()) == 1.0
    assert recipes["reward"]("so \\boxed{8}", example, Config()) == recipes["reward"]("7" * 300 + "\\boxed{7}", example, Config()) == 0.0

    masked = recipes["mask_image"](image, np.random.default_rng(0))
    assert masked.size == image.size and masked.mode == image.mode and np.any(np.asarray(masked) != np.asarray(image))

    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])  # p = (1/2, 1/2, 0) and (1/3, 1/3, 1/3)
    S = recipes["metric"](logits, logits.flip(1), torch.zeros(2, dtype=torch.long))
    assert S.tolist() == pytest.approx([1 / 2, 0])


def test_the_credit_rule(recipes):
    batch = SimpleNamespace(dependency=torch.tensor([[0.1, 0.01, 0.0], [2.0, 0.06, 0.0]]), rewards=torch.tensor([1.0, 0.0]))
    recipes["credit"](batch, SimpleNamespace(group_size=2))
    assert batch.token_mask.tolist() == [[True, False, False], [True, True, False]]
    assert batch.alpha.tolist() == [1, 1] and batch.advantages.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------
def result(name):
    """{label: cell} of a page of results, from its JSON file."""
    return {cell["label"]: cell for cell in json.loads((ROOT / "results" / f"{name}.json").read_text())["cells"]}


def test_docs_results_has_the_results_numbers():
    """Each section whose heading links a page of results/ has that page's rows: scores, published scores, paired differences."""
    seen = {}
    for part in re.split(r"^### ", (ROOT / "docs" / "results.md").read_text(), flags=re.M)[1:]:
        name = re.match(r"\[(\w+)\]\(\.\./results/\1\.md\): ", part)[1]
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        header, _, *rows = lines
        cells = result(name)
        assert [row[0] for row in rows] == list(cells), name
        for row in rows:
            cell, shown = cells[row[0]], dict(zip(header, row, strict=True))
            assert shown["here, %"] == f"{cell['mean']:.1f} +- {cell['half']:.1f}"
            published = isinstance(cell["published"], (int, float))
            assert shown.get("paper, %", "") == (f"{cell['published']:.1f}" if published else "")
            expected = ""
            if "reference" in cell:
                mean, half = cell["difference"], cell["difference_half"]
                bold = "**" * (abs(mean) > half)
                expected = f"to {cell['reference']}: {bold}{mean:+.1f} +- {half:.1f}{bold}"
            assert shown.get("paired difference here", "") == expected
            pairs = min(len(cells[label]["values"]) for label in (row[0], cell["reference"])) if "reference" in cell else ""
            assert shown.get("seeds", str(pairs)) == str(pairs)
            gap = cell.get("published_difference")
            assert shown.get("paper's difference", "") == ("" if gap is None else f"{gap:+.1f}")
        page = json.loads((ROOT / "results" / f"{name}.json").read_text())
        grows = experiments.TABLES[name].most and "--seeds" not in page["command"]
        asks_why = name in ("first_words", "dilution")
        seen[name] = "three to twelve seeds" if grows else "six or ten seeds" if asks_why else {10: "ten seeds", 3: "three seeds"}[page["seeds"]]
        assert ("seeds" in header) == bool(grows), name
    everything = [json.loads(file.read_text()) for file in (ROOT / "results").glob("*.json")]
    scores = {page["name"] for page in everything if "held-out avg@8" in page.get("unit", "")}
    assert {name for name in scores if name not in ("figure5", "map") and not name.startswith("own_")} == set(seen)  # a picture; a test each
    text = (ROOT / "docs" / "results.md").read_text()
    parts = {part.splitlines()[0].split(", ")[-1]: part for part in re.split(r"^## ", text, flags=re.M) if "### [" in part}
    assert all(f"### [{name}]" in parts[seeds] for name, seeds in seen.items())


def number(name, label, scale=1, form=".1f"):
    """A row's number as text."""
    return f"{scale * result(name)[label]['mean']:{form}}"


def difference(name, label):
    """A row's difference to the one it is compared with, and half of its interval, as text."""
    cell = result(name)[label]
    return f"{cell['difference']:+.1f} +- {cell['difference_half']:.1f}"


def table_after(heading):
    """The cells of the rows of the first table of docs/results.md behind these words, without its head."""
    part = (ROOT / "docs" / "results.md").read_text().split(heading, 1)[1].split("\n| --- ", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[1:]]


@pytest.mark.parametrize("heading, name", [("# The paper's tables at laptop size", "map"), ("**Ten seeds on held-out data", "own_scenes")])
def test_the_map_is_that_of_results(heading, name):
    """A row for each cell: DAPO's score, and the differences of TAS, TGF and VPPO to it, bold where an interval leaves 0 out."""
    cells, rows = result(name), table_after(heading)
    assert [cell for cell, *_ in rows] == list(dict.fromkeys(label.split(": ")[0] for label in cells))
    for cell, dapo, *others in rows:
        assert dapo == f"{cells[f'{cell}: DAPO']['mean']:.1f} +- {cells[f'{cell}: DAPO']['half']:.1f}"
        for method, shown in zip(("TAS", "TGF", "VPPO"), others, strict=True):
            mean, half = (cells[f"{cell}: {method}"][key] for key in ("difference", "difference_half"))
            bold = "**" * (abs(mean) > half)
            assert shown == f"{bold}{mean:+.1f} +- {half:.1f}{bold}"


def test_the_learning_rates_are_those_of_results():
    """A row for each method in each cell that has been asked: validation at the three rates, the best one bold."""
    made = [name for name in experiments.TABLES if name.startswith("rates_") and (ROOT / "results" / f"{name}.json").exists()]
    means = {label: cell["mean"] for name in made for label, cell in result(name).items()}
    rows = table_after("## Is it the learning rate?")
    assert [label for label, *_ in rows] == list(dict.fromkeys(label.split(", lr")[0] for label in means))
    for label, *shown in rows:
        here = [means[f"{label}, lr {rate:g}"] for rate in experiments.RATES]
        assert shown == [f"**{mean:.1f}**" if mean == max(here) else f"{mean:.1f}" for mean in here], label
        assert "VPPO" not in label or max(here) == here[1]  # "VPPO's own best rate is the shared one"


def test_signal_by_regime_is_that_of_the_forecasts():
    part = (ROOT / "docs" / "results.md").read_text().split("## Where the signal lies")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| scenes")]
    assert [name for name, *_ in rows] == ["scenes", "scenes-verbose", "scenes-honest", "scenes-verbose-honest"]
    for name, *cells in rows:
        measured = json.loads((ROOT / "results" / f"forecast-{name}" / "forecast.json").read_text())["rows"]
        triples = [measured[kind][key] for kind, key in
                   (("first words", "alignment"), ("fillers", "alignment"), ("fillers", "variance"), ("TGF", "progress"))]  # fmt: skip
        assert cells == [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in triples]


def test_the_benchmarks_table_is_what_its_command_writes(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "benchmark.md").read_text()
    page = tmp_path / "benchmark.md"
    page.write_text(re.sub("(?s)(<!-- table -->).*(<!-- end of table -->)", r"\1\2", text))
    monkeypatch.setattr(benchmark, "TABLE", page)
    benchmark.write_table(ROOT / "results" / "runs")
    assert page.read_text() == text


def test_the_benchmarks_sentences_have_its_numbers():
    text = (ROOT / "docs" / "benchmark.md").read_text()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    cells = {(re.sub(r"\[(.*)\].*", r"\1", name), to[3:], regime): cell
             for name, to, *row in rows for regime, cell in zip(head[2:], row)}  # fmt: skip
    pages = [re.sub(r"\s+", " ", page) for page in (text, (ROOT / "docs" / "results.md").read_text())]
    winners = {rule for (rule, to, _), cell in cells.items() if to == "DAPO" and cell.startswith("**+")}
    losers = {rule: sum(cells[rule, "DAPO", regime].startswith("**-") for regime in head[2:]) for rule, *_ in cells if rule != "DAPO"}
    assert winners == {"papo"} and losers["pgpo"] == 3 and losers["entropy_80_20"] == losers["random_tokens"] == 4
    assert losers["blame_looks"] == losers["vppo_soft"] == losers["vppo_first_words"] == 0
    for place, sentence, *of in [
        (0, "beat DAPO**, by {} points on scenes and {} on scenes-verbose-honest", "papo", "DAPO", "scenes", "scenes-verbose-honest"),
        (1, "The gains are {} and {} points", "papo", "DAPO", "scenes", "scenes-verbose-honest"),
        (0, "It ends {} and {} points from DAPO in the verbose regimes", "entropy_80_20", "DAPO", "scenes-verbose", "scenes-verbose-honest"),
        (0, "(random_tokens), by {}, {}, {} and {} points to DAPO", "random_tokens", "DAPO", *head[2:]),
        (0, "than VPPO on scenes**, by {} points (vppo_soft)", "vppo_soft", "VPPO", "scenes"),
        (0, "guess**, by {} and {} points to VPPO (vppo_first_words)", "vppo_first_words", "VPPO", "scenes", "scenes-verbose"),
    ]:
        rule, to, *regimes = of
        assert sentence.format(*(cells[rule, to, regime].strip("*") for regime in regimes)) in pages[place], sentence


def test_the_dilution_rules_keep_the_share_that_results_says():
    flags = experiments.Flags(output=str(ROOT / "results"))
    records = {name: [runs.find(one, ROOT / "results" / "runs") for one in row] for name, row in experiments.runs_of("dilution", flags).items()}
    shares = {name: 100 * np.mean([record["metrics"]["gradient_tokens"] for record in row]) for name, row in records.items()}
    threshold, mass, noise, tgf = (f"{shares[f'TGF{rule}']:.0f} %" for rule in (" by threshold", " by mass", " without noise", ""))
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "results.md").read_text())
    assert f"({threshold} of all, where TGF keeps {tgf})" in text and f"a response's S ({mass})" in text and f"fillers ({noise} are kept)" in text


def test_sentences_have_the_results_numbers():
    readme, results = (re.sub(r"\s+", " ", (ROOT / page).read_text()) for page in ("README.md", "docs/results.md"))
    vppo_, dapo = number("figure5", "VPPO"), number("figure5", "DAPO")
    assert f"It loses on `scenes`, where the model may guess: {difference('map', 'scenes: VPPO')}" in readme
    assert f"{vppo_} % of held-out answers are right with VPPO and {dapo} % with DAPO" in results
    assert f"A VPPO that keeps them gains {difference('first_words', 'VPPO with first words')}" in readme
    validation = json.loads((ROOT / "results" / "forecast_validation.json").read_text())
    rho, low, high = validation["correlation"]
    forecast = re.sub(r"\s+", " ", (ROOT / "docs" / "forecast.md").read_text())
    assert f"measured difference is {rho:.2f}, with a 95 % interval from {low:.2f} to {high:.2f}" in forecast
    rho, low, high = validation["of all"]
    assert f"rank correlation is {rho:.2f}, with an interval from {low:.2f} to {high:.2f}, over {len(validation['points'])} points" in forecast
    few = [point for point in validation["points"] if point["method"] == "80/20"]
    words = [f"{point['forecast']:.2f}" for point in few], ["{:+.1f} +- {:.1f}".format(*figures.interval(point["differences"])) for point in few]
    made = json.loads((ROOT / "results" / "forecast-scenes-verbose-honest" / "forecast.json").read_text())["rows"]["80/20"]["progress"]
    assert "80/20 is predicted to progress {:.2f} times as far as DAPO, from {:.2f} to {:.2f}".format(*made) in forecast
    assert f"It ends {words[1][3]} points from DAPO" in forecast
    assert f"its forecasts are {words[0][0]}, {words[0][1]} and {words[0][2]}," in forecast
    assert f"Measured are {words[1][0]}, {words[1][1]} and {words[1][2]} points, in the same order" in forecast
    random = {point["cell"]: point for point in validation["points"] if point["method"] == "random"}
    gaps = {cell: "{:+.1f} +- {:.1f}".format(*figures.interval(point["differences"])) for cell, point in random.items()}
    told, untold = ("scenes", "scenes-verbose-honest"), ("scenes-honest", "scenes-verbose")
    assert "The forecasts are {:.2f} on scenes and {:.2f} on scenes-verbose-honest".format(*(random[cell]["forecast"] for cell in told)) in forecast
    assert "they are {:.2f} and {:.2f}, which cannot be told from 1".format(*(random[cell]["forecast"] for cell in untold)) in forecast
    assert "Measured are {}, {}, {} and {} points".format(*(gaps[cell] for cell in told + untold)) in forecast
    for cell in random:
        _, low, high = json.loads((ROOT / "results" / f"forecast-{cell}" / "forecast.json").read_text())["rows"]["random"]["progress"]
        assert (high < 1) == (cell in told) and low < 1
    tgf = {cell: result("map")[f"{cell}: TGF"] for cell in random}
    assert f"more than {-min(cell['difference'] for cell in tgf.values()):.1f} points below DAPO" in forecast
    rows = {point["method"]: f"{point['forecast']:.2f}" for point in validation["points"] if point["cell"] == "scenes"}
    failed = f"on scenes 80/20 has {rows['80/20']} and TGF {rows['TGF']}, and one ends {words[1][0]} points from DAPO"
    assert f"{failed} where the other ends {difference('map', 'scenes: TGF')}" in forecast
    means = sorted(figures.interval(point["differences"])[0] for point in random.values())
    assert f"ends {means[-1]:.1f} to {means[0]:.1f} points from DAPO in the four regimes" in results
    assert "TGF ends {}, {}, {} and {} from it".format(*(difference("map", f"{cell}: TGF") for cell in random)) in results
    cell = result("figure5")["VPPO"]
    ends = [cell["difference"] + sign * cell["difference_half"] for sign in (-1, 1)]
    assert f"{cell['difference']:.1f}, with a 95 % interval from {ends[0]:.1f} to {ends[1]:.1f}" in results
    for name, label, sentence in [
        ("table1_large", "VPPO", "With a larger model the difference is {}"),
        ("table1_penalty", "VPPO", "entropy penalty of 0.06 in both methods it is {}"),
        ("table2", "TGF only", "TGF without shaping is at {} to DAPO"),
        ("table2", "TAS only", "For shaping alone (TAS) nothing is decided: {}"),
        ("first_words", "DAPO without first words", "DAPO without their gradient ends {} points from DAPO"),
        ("first_words", "VPPO with first words", "VPPO gains {} points"),
        ("first_words", "TGF with first words", "For the filter alone the gain is {}."),
        ("first_words", "VPPO with first words", "better than VPPO in both regimes with guesses, by {} and "),
        ("first_words", "scenes-verbose: VPPO with first words", " and {} points. Without guesses it is not shown to be"),
        ("first_words", "scenes-verbose: VPPO with first words", "VPPO with first words gains {} points. Where the policy never"),
        ("first_words", "scenes-honest: VPPO with first words", "the gain is {} and, in verbose responses, "),
        ("first_words", "scenes-verbose-honest: VPPO with first words", " and, in verbose responses, {}, so none is shown"),
        ("failures", "right: DAPO without first words", "With 4 prompts a step it is the same: {} points"),
        ("map", "scenes-honest: VPPO", "Where it never guesses and is brief, nothing is decided: {}."),
        ("map", "scenes-verbose-honest: VPPO", "the two are equal within 2 points: {}."),
        ("map", "scenes: VPPO", "VPPO ends at {} points to DAPO on scenes, "),
        ("map", "scenes-verbose: VPPO", " {} in verbose responses, and"),
        ("map", "scenes, 4 prompts: VPPO", "in verbose responses, and {} with 4 prompts a step"),
        ("map", "scenes: TGF", "From the map's base policy TGF is at {}."),
        ("table3", "[0.9, 1.1]", "{} for [0.9, 1.1] and "),
        ("table3", "[0.8, dynamic]", "{} for [0.8, dynamic] to the default"),
        ("table3", "[0.8, 1.2]", "For [0.8, 1.2] it is undecided, {}."),
        ("table5", "VPPO on GRPO", "loses, too** ([table5](../results/table5.md)): {} points to GRPO"),
        ("table15", "DAPO, same time", "as much time as VPPO ends {} points above it"),
        ("dilution", "TGF by threshold", "{} points if only tokens with S > 0.05 are kept"),
        ("dilution", "TGF by mass", "{} if the fewest tokens are kept that hold 95 % of a response's S"),
        ("dilution", "TGF without noise", "{} if uncertain tokens of small S are left out"),
        ("failures", "reads nothing: VPPO", "These differ from DAPO's by {} and "),
        ("failures", "misread: VPPO", " and {}: VPPO looks less, and is not shown to read better"),
        ("failures", "right: VPPO", "In this cell VPPO ends at {} to DAPO"),
        ("failures", "right: TGF at half", "halves what it drops ([`lab/rules/tgf_half.py`](../lab/rules/tgf_half.py)): {}."),
        ("table10", "0.06, exact", "gives DAPO {} points at 0.06"),
        ("table10", "0.06, sampled", "does nothing** ([table10](../results/table10.md)): {} at 0.06"),
        ("table11", "noise", "cannot tell the other three from blackening, {} to "),
        ("table11", "blur", " to {} points (paper: -1.0 to -1.1)"),
        ("figure6", "k = 0.6", "With k = 0.6 instead of 0.4 VPPO ends {} points higher"),
        ("figure6", "k = 1 (TAS only)", "where only the shaping is left, {} ("),
        ("figure6", "k = 0.6", "k = 0.6 and k = 1 are better, by {} and "),
        ("figure6", "k = 1 (TAS only)", " and {} points."),
        ("figure6", "verbose-honest: k = 1 (TAS only)", "nothing is gained by more than 2 points: {} for k = 1"),
        ("table6", "verbose-honest: soft", ", and {} for the soft mask"),
        ("table6", "soft", "The soft mask, which gives every token some gradient, gains {} ("),
        ("table6", "soft", "but better ([table6](../results/table6.md)): {} points"),
        ("table4", "entropy 0.2", "the fifth of largest entropy ends {} points from TGF"),
        ("table4", "verbose-honest: entropy 0.2", "and among fillers {} ("),
        ("table4", "entropy 0.4", "At 40 % the difference to S is {} points"),
        ("table7", "reward", "does better on the one or the other, {}."),
        ("table12", "drop", "costs less than published** ([table12](../results/table12.md)): {} points to KL"),
        ("table1", "DAPO", "DAPO does not beat GRPO**: {}"),
        ("table1_large", "DAPO", "with the larger model {}"),
    ]:
        assert sentence.format(difference(name, label)) in results, sentence
    for label, cell in result("table10").items():
        if "reference" in cell:
            mean, half = cell["difference"], cell["difference_half"]
            assert mean > half if "exact" in label else abs(mean) + half < 2, label  # "for each of the four coefficients"
    cells = result("map")
    more = [cells[f"{name}: VPPO"] for name in ("scenes", "scenes-verbose", "scenes, 4 prompts", "scenes-verbose, 4 prompts")]
    more = ["{:+.1f} +- {:.1f}".format(cell["blind_difference"], cell["blind_difference_half"]) for cell in more]
    assert "more responses that read no digit than DAPO, by {}, {}, {} and {} points".format(*more) in results
    both = [figures.interval([x - y for x, y in zip(cells["scenes: VPPO"]["values"], cells[f"scenes: {part}"]["values"])]) for part in ("TGF", "TAS")]
    words = "VPPO ends {:+.1f} +- {:.1f} points from TGF, the filter alone, and {:+.1f} +- {:.1f} from TAS, the shaping alone"
    assert words.format(*both[0], *both[1]) in results
    honest = figures.interval([x - y for x, y in zip(cells["scenes-honest: VPPO"]["values"], cells["scenes-honest: TAS"]["values"])])
    assert "VPPO ends {:+.1f} +- {:.1f} from TAS".format(*honest) in results
    first = {label: np.array(cell["values"]) for label, cell in result("first_words").items()}
    shaping = [first["VPPO"] - first["TGF"], first["VPPO with first words"] - first["TGF with first words"]]
    costs = ["{:+.1f} +- {:.1f}".format(*figures.interval(list(gap))) for gap in (*shaping, shaping[1] - shaping[0])]
    assert "on top of the filter costs {} points, and {} if both keep the first words. The change, {}, is decided".format(*costs) in results
    later = [figures.interval(list((first[f"{cell}VPPO with first words"] - first[f"{cell}VPPO"])[6:])) for cell in ("", "scenes-verbose: ")]
    assert "{:+.1f} +- {:.1f} with guesses, and {:+.1f} +- {:.1f} in verbose".format(*later[0], *later[1]) in results
    decided = {label for label, cell in cells.items() if "reference" in cell and abs(cell["difference"]) > cell["difference_half"]}
    assert decided == {"scenes: VPPO", "scenes-verbose: VPPO", "scenes, 4 prompts: VPPO"}  # "Three of the 18 differences"
    alone = [cells[f"{regime}: TAS"] for regime in random]
    assert all(abs(cell["difference"]) + cell["difference_half"] < 2 for cell in alone)  # "shaping alone is within 2 points of it"
    blind = [result("table1")[label] for label in ("base", "GRPO", "DAPO", "VPPO")]
    shares = [f"{cell['blind']:.1f} +- {cell['blind_half']:.1f} %" for cell in blind]
    assert f"{blind[0]['blind']:.0f} % of the base's responses read no digit" in results
    assert f"that is {shares[1]} with GRPO, {shares[2]} with DAPO and {shares[3]} with VPPO" in results
    assert f"ROC curve is {number('dependency_quality', 'blacken, kl, prompt', form='.3f')} for KL" in results
    assert f"The area of k3 is {number('dependency_quality', 'blacken, k3, prompt', form='.3f')}" in results
    of = lambda label: number("failures", label, form=".0f")  # noqa: E731
    assert f"wrong responses that name no digit fall from {of('reads nothing: base')} % to {of('reads nothing: DAPO')} %" in results
    assert f"the misread ones from {of('misread: base')} % to {of('misread: DAPO')} %" in results
    assert f"With VPPO they fall to {of('reads nothing: VPPO')} % and {of('misread: VPPO')} %" in results
    wrong = [of(f"miscomputed: {name}") for name in ("DAPO", "VPPO", "base")]
    assert f"{wrong[0]} % of DAPO's responses are miscomputed, and of VPPO's {wrong[1]} %. In the base it is {wrong[2]} %" in results
    cells = result("failures")
    whole = {name: 100 - cells[f"right: {name}"]["blind"] - cells[f"broken form: {name}"]["mean"] for name in ("base", "DAPO")}
    parts = {name: f"{100 * cells[f'miscomputed: {name}']['mean'] / share:.0f} %" for name, share in whole.items()}
    assert f"it is {parts['base']} in the base and {parts['DAPO']} with DAPO, so it does not fall" in results
    without = [of(f"{why}: DAPO without first words") for why in ("misread", "reads nothing")]
    assert f"{without[0]} % are misread, and {without[1]} % name no digit" in results
    kept = [number("figure7", f"kept, {kind}", scale=100, form=".0f") for kind in ("digits read", "fillers")]
    assert f"{kept[0]} % of the digits that are read, {kept[1]} % of fillers" in results
    overview = (ROOT / "results" / "README.md").read_text()
    counts = re.search(r"^(\d+) comparisons .* holds: (\d+), does not hold: (\d+), equal within 2: (\d+), undecided: (\d+)", overview, flags=re.M).groups()
    words = "makes {} comparisons with the paper's directions. By their intervals {} hold, {} do not, {} are equal within 2 points, and {} are undecided"
    assert words.format(*counts) in results
    slower = result("table14")["VPPO over DAPO, %"]
    assert f"takes {slower['mean']:.1f} +- {slower['half']:.1f} % longer than DAPO's" in results
