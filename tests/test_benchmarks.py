"""The eight benchmarks: rows in their columns become examples, from parquet and folders; bad rows; the table of results."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import benchmarks
import data
import eval as evaluation
import reward
from benchmarks import BENCHMARKS, PUBLISHED, Rows, as_letter, load, named, with_options, write
from config import Config
from laptop import tiny
from laptop.digits import Digits
from model import Policy, save
from model import load as load_model
from prompts import encode

RED, BLUE = Image.new("RGB", (28, 28), "red"), Image.new("RGB", (56, 28), "blue")

# Two rows a benchmark in its own columns, and what they become: (problem, answer, pictures).
FIXTURES = {
    "mathverse": [
        ({"question": "Find x.\nChoices:\nA:1\nB:2", "image": RED, "answer": "B", "question_type": "multi-choice",
          "problem_version": "Text Lite"}, ("Find x.\nChoices:\nA:1\nB:2", "B", [RED])),
        ({"question": "", "image": BLUE, "answer": "A", "question_type": "multi-choice",
          "problem_version": "Vision Only"}, (benchmarks.READ, "A", [BLUE])),
    ],
    "dynamath": [
        ({"id": "1", "question": "How long is it?", "image": "a/1.png", "decoded_image": RED, "ground_truth": "2.5",
          "answer_type": "float"}, ("How long is it?", "2.5", [RED])),
        ({"id": "2", "question": "Even? choices: (A) yes (B) no", "image": "a/2.png", "decoded_image": BLUE,
          "ground_truth": "A", "answer_type": "multiple choice"}, ("Even? choices: (A) yes (B) no", "A", [BLUE])),
    ],
    "mmk12": [
        ({"id": "a", "question": "Which?\nA. 3\nB. 4", "answer": "B", "subject": "math", "image": RED},
         ("Which?\nA. 3\nB. 4", "B", [RED])),
        ({"id": "b", "question": "Who?\nA. Ann\nB. Bo", "answer": "A", "subject": "physics", "image": BLUE},
         ("Who?\nA. Ann\nB. Bo", "A", [BLUE])),
    ],
    "geo3k": [
        ({"images": [RED], "problem": "<image>Find x.", "answer": "6 \\sqrt { 3 }"},
         ("<image>Find x.", "6 \\sqrt { 3 }", [RED])),
        ({"images": [RED, BLUE], "problem": "<image> and <image>?", "answer": "2"},
         ("<image> and <image>?", "2", [RED, BLUE])),
    ],
    "mathvision": [
        ({"id": "1", "question": "Which piece?\n<image1>", "options": ["A", "B", "C"], "image": "images/1.jpg",
          "decoded_image": RED, "answer": "C", "level": 2}, ("Which piece?\nA\nB\nC", "C", [RED])),
        ({"id": "2", "question": "How many <image1> are there?", "options": [], "image": "images/2.jpg",
          "decoded_image": BLUE, "answer": "12", "level": 5}, ("How many  are there?", "12", [BLUE])),
    ],
    "wemath": [
        ({"ID": "1", "question": "How wide?", "option": "A. 4 cm; B. 5; 6 cm; C. no correct answer", "answer": "B",
          "image_path": RED, "key": "2steps_1"}, ("How wide?\nA. 4 cm\nB. 5; 6 cm\nC. no correct answer", "B", [RED])),
        ({"ID": "2", "question": "How high?", "option": "A. 3 : 4; B. 1.5;", "answer": "A",
          "image_path": BLUE, "key": "2steps_2"}, ("How high?\nA. 3 : 4\nB. 1.5", "A", [BLUE])),
    ],
    "logicvista": [
        ({"id": "1", "question": "Which follows? (A, B, C)", "answer": "A, C", "reasoning": "r", "image": RED},
         ("Which follows? (A, B, C)", "A, C", [RED])),
        ({"id": "2", "question": "Next?", "answer": "D", "reasoning": "r", "image": BLUE}, ("Next?", "D", [BLUE])),
    ],
    "mmmu_pro": [
        ({"id": "1", "image": RED, "options": "['1', '2']", "answer": "B"}, (benchmarks.READ, "B", [RED])),
        ({"id": "2", "image": BLUE, "options": "['x', 'y']", "answer": "A"}, (benchmarks.READ, "A", [BLUE])),
    ],
}  # fmt: skip
STANDARD = [  # the other setting of MMMU-Pro
    ({"id": "1", "question": "Compare <image 2> with <image 1>.", "options": "['<image 1>', 'it\\'s <b>']", "image_1": RED,
      "image_2": BLUE, "image_3": None, "answer": "B"},
     ("Compare <image> with <image>.\nA. <image>\nB. it's <b>", "B", [BLUE, RED, RED])),
    ({"id": "2", "question": "Which?", "options": "['3', '4']", "image_1": RED, "image_2": BLUE, "image_3": None,
      "answer": "4"}, ("Which?\nA. 3\nB. 4", "B", [RED, BLUE])),
]  # fmt: skip


def same(images, expected):
    return [image.size for image in images] == [image.size for image in expected] and all(
        image.tobytes() == other.tobytes() for image, other in zip(images, expected)
    )


def rows_of(name):
    return [row for row, _ in FIXTURES[name]]


# ---------------------------------------------------------------------------------------------------------------------
# Row functions: without the datasets package
# ---------------------------------------------------------------------------------------------------------------------
def test_every_benchmark_has_a_fixture():
    assert list(FIXTURES) == list(BENCHMARKS)
    for name in BENCHMARKS:
        assert set(BENCHMARKS[name].columns.split()) <= set(rows_of(name)[0])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows(name):
    for row, expected in FIXTURES[name] + (STANDARD if name == "mmmu_pro" else []):
        assert BENCHMARKS[name].read(row) == expected


def test_the_true_answer_is_a_letter_where_there_are_options():
    row = rows_of("mathvision")[0] | {"options": ["1/2", "3"], "answer": "0.5"}
    assert BENCHMARKS["mathvision"].read(row)[:2] == ("Which piece?\nA. 1/2\nB. 3", "A")
    assert as_letter(" c ", ["1", "2", "3"]) == "C"
    assert as_letter("A", ["B", "A"]) == "A"  # a letter is a letter first
    for answer, options in (("D", ["1", "2", "3"]), ("1", ["1", "1.0"]), ("4", ["1", "2"]), ("", ["1"])):
        with pytest.raises(ValueError, match="neither a letter from A to"):
            as_letter(answer, options)
    assert with_options("?", [str(i) for i in range(10)]).endswith("\nJ. 9")


def test_what_the_policy_sees(raw_policy):
    """The instruction is added, and the markers of every fixture fit its images, which encode checks."""
    for name, fixture in FIXTURES.items():
        for row, (problem, answer, images) in fixture:
            example = Rows(name, [row])[0]
            assert (example.problem, example.answer) == (f"{problem}\n\n{data.INSTRUCTION}", answer)
            assert example.name == f"{name}[0]" and same(example.images, images)
            assert len(encode(raw_policy.processor, example)["image_grid_thw"]) == len(images)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("geo3k", {"images": []}, "geo3k[0]: no image"),
        ("geo3k", {"images": None}, "geo3k[0]: no image"),
        ("geo3k", {"problem": " "}, "geo3k[0]: no question"),
        ("mmk12", {"answer": None}, "mmk12[0]: no answer"),
        ("mmk12", {"image": None}, "mmk12[0]: no image"),
        ("mmk12", {"image": "a/b.png"}, "mmk12[0]: no image"),
        ("mmk12", {"image": {"bytes": b"no picture"}}, "mmk12[0]: image does not open (cannot identify image file)"),
        ("wemath", {"option": "4 or 5"}, "wemath[0]: no options in '4 or 5'"),
        ("wemath", {"answer": "E"}, "wemath[0]: the answer 'E' is neither a letter from A to C"),
    ],
)
def test_a_bad_row_names_benchmark_and_row(name, change, message):
    with pytest.raises(ValueError) as error:
        Rows(name, [rows_of(name)[0] | change])[0]
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_names():
    assert named("") == [] and named("all") == list(BENCHMARKS)
    assert named("geo3k, wemath,mathverse,geo3k") == ["mathverse", "geo3k", "wemath"]  # the paper's columns
    with pytest.raises(ValueError, match="unknown benchmark geo: --benchmark takes all, or some of mathverse,dynamath,"):
        named("geo3k,geo")


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load("geo3k")


# ---------------------------------------------------------------------------------------------------------------------
# Reading, with the datasets package
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def datasets(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def write_parquet(datasets, rows, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(file))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_parquet_in_a_folder(name, datasets, tmp_path):
    write_parquet(datasets, rows_of(name), tmp_path / "copy" / "part-0.parquet")
    dataset = load(name, str(tmp_path / "copy"), "Box it.")
    assert len(dataset) == 2
    for i, (row, (problem, answer, images)) in enumerate(FIXTURES[name]):
        example = dataset[i]
        assert (example.problem, example.answer, example.name) == (f"{problem}\n\nBox it.", answer, f"{name}[{i}]")
        assert same(example.images, images)


def test_the_standard_setting_of_mmmu_pro(datasets, tmp_path):
    rows = [row | {"image_3": None} for row, _ in STANDARD]
    write_parquet(datasets, rows, tmp_path / "copy" / "test.parquet")
    dataset = load("mmmu_pro", str(tmp_path / "copy"), "")
    for i, (_, (problem, answer, images)) in enumerate(STANDARD):
        assert (dataset[i].problem, dataset[i].answer) == (problem, answer) and same(dataset[i].images, images)


def test_a_clone_of_the_hub_repository(datasets, tmp_path):
    """Two configurations and, in another, two splits: those of the table are taken."""
    multiple, free = (rows_of("mathverse")[0] | {"question_type": kind} for kind in ("multi-choice", "free-form"))
    write_parquet(datasets, [free, multiple, free], tmp_path / "mathverse" / "testmini.parquet")
    write_parquet(datasets, [multiple] * 5, tmp_path / "mathverse" / "text_only.parquet")
    (tmp_path / "mathverse" / "README.md").write_text(
        "---\nconfigs:\n- config_name: testmini\n  data_files:\n  - split: testmini\n    path: testmini.parquet\n"
        "- config_name: text_only\n  data_files:\n  - split: text_only\n    path: text_only.parquet\n---\n"
    )
    assert len(load("mathverse", str(tmp_path))) == 1  # one multiple-choice row in its configuration
    for split, count in (("test", 3), ("testmini", 1)):
        rows = rows_of("mathvision")[:1] * count
        write_parquet(datasets, rows, tmp_path / "mathvision" / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "mathvision" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n"
        "  - split: testmini\n    path: data/testmini-*\n---\n"
    )
    assert len(load("mathvision", str(tmp_path))) == 3
    for variant in (1, 2):
        write_parquet(datasets, rows_of("dynamath"), tmp_path / "dynamath" / "data" / f"sample{variant}-0.parquet")
    (tmp_path / "dynamath" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: sample_variant1\n    path: data/sample1-*\n"
        "  - split: sample_variant2\n    path: data/sample2-*\n---\n"
    )
    assert len(load("dynamath", str(tmp_path))) == 4


def test_an_image_folder(datasets, tmp_path):
    (tmp_path / "copy").mkdir()
    lines = []
    for i, row in enumerate(rows_of("logicvista")):
        row["image"].save(tmp_path / "copy" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png"} | {key: row[key] for key in ("question", "answer")}))
    (tmp_path / "copy" / "metadata.jsonl").write_text("\n".join(lines))
    dataset = load("logicvista", str(tmp_path / "copy"), "")
    found = [(dataset[i].problem, dataset[i].answer) for i in range(len(dataset))]
    assert found == [("Which follows? (A, B, C)", "A, C"), ("Next?", "D")] and same(dataset[1].images, [BLUE])


def test_bytes_of_a_table_from_elsewhere(datasets, tmp_path):
    """A parquet file of other programs has its images as {"bytes", "path"} and no word that they are images."""
    import pyarrow
    from pyarrow import parquet

    RED.save(tmp_path / "red.png")
    row = rows_of("mmk12")[0] | {"image": {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}}
    (tmp_path / "copy").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "copy" / "a.parquet")
    assert same(load("mmk12", str(tmp_path / "copy"))[0].images, [RED])


def test_bad_folders(datasets, tmp_path):
    write_parquet(datasets, [{"problem": "p", "answer": "1"}], tmp_path / "copy" / "a.parquet")
    with pytest.raises(ValueError, match="benchmark geo3k: no column images in '.*copy' .found problem, answer"):
        load("geo3k", str(tmp_path / "copy"))
    with pytest.raises(ValueError, match="geo3k: '.*nowhere' cannot be read, --data FOLDER takes a local copy") as error:
        load("geo3k", str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
    write_parquet(datasets, [rows_of("mathverse")[0] | {"question_type": "free-form"}], tmp_path / "free" / "a.parquet")
    with pytest.raises(ValueError, match="benchmark mathverse: no rows"):
        load("mathverse", str(tmp_path / "free"))


def test_damaged_pixels_name_the_row(datasets, tmp_path):
    rows = [row | {"image": {"bytes": b"no picture", "path": None}} for row in rows_of("mmk12")]
    features = datasets.Features({key: datasets.Value("string") for key in rows[0]} | {"image": datasets.Image()})
    (tmp_path / "copy").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "copy" / "a.parquet"))
    with pytest.raises(ValueError, match=r"^mmk12\[1\]: image does not open \(cannot identify image file\)"):
        load("mmk12", str(tmp_path / "copy"))[1]


@pytest.mark.parametrize("kind", ["bytes", "image feature", "path", "address", "folder"])
def test_no_image_reaches_an_external_program(kind, datasets, tmp_path, monkeypatch):
    """Pillow gives EPS files to Ghostscript, and `datasets` opens whatever Pillow does, from wherever a path points."""
    import pyarrow
    from pyarrow import parquet

    def refuse(event, arguments):
        if watching and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            started.append((event, arguments))

    watching, started = [], []
    sys.addaudithook(refuse)
    folder = tmp_path / "copy"
    folder.mkdir()
    drawing = folder / "0.eps"
    RED.save(drawing, "EPS")
    row = rows_of("logicvista")[0]
    entry = {"bytes": drawing.read_bytes(), "path": "0.png"}
    if kind in ("path", "address"):
        entry = {"bytes": None, "path": str(drawing) if kind == "path" else "http://localhost:9/0.eps"}
    if kind == "folder":
        line = {"file_name": "0.eps"} | {key: row[key] for key in ("question", "answer")}
        (folder / "metadata.jsonl").write_text(json.dumps(line))
    elif kind == "bytes":
        parquet.write_table(pyarrow.Table.from_pylist([row | {"image": entry}]), folder / "a.parquet")
    else:
        features = {key: datasets.Value("string") for key in row} | {"image": datasets.Image()}
        table = datasets.Dataset.from_list([row | {"image": entry}], features=datasets.Features(features))
        parquet.write_table(table.with_format("arrow")[:], folder / "a.parquet")  # to_parquet would follow the path
    if kind not in ("folder", "path"):
        drawing.unlink()
    program = tmp_path / "bin" / "gs"  # what Pillow looks for
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho started > {tmp_path / 'started'}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    watching.append(True)
    reason = "image .* does not exist" if kind == "address" else r"image.* does not open \(cannot identify image file"
    with pytest.raises(ValueError, match=r"^logicvista\[0\]: " + reason):
        load("logicvista", str(folder))[0]
    watching.clear()
    assert not started and not (tmp_path / "started").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------
def result(average, prompts, **more):
    return {"model": "m", "samples": 8, "prompts": prompts, "avg": average, "avg_ci": 0.012, "pass": 1.0} | more


def test_the_average_gives_every_benchmark_the_same_weight(tmp_path):
    results = {name: result(i / 10, BENCHMARKS[name].rows) for i, name in enumerate(reversed(BENCHMARKS))}
    lines = write(results, tmp_path).splitlines()
    titles = "MathVerse | DynaMath | MMK12 | Geo3k | MathVision | We-Math | LogicVista | MMMU-Pro"
    assert lines[0] == f"| avg@8, % | {titles} | average of eight |"
    shown = " | ".join(f"{i}0.0 +- 1.2" if i else "0.0 +- 1.2" for i in range(7, -1, -1))
    assert lines[2] == f"| m | {shown} | 35.0 |"  # (0 + 0.1 + ... + 0.7) / 8
    assert lines[3].startswith("| rows | 2180 of 2180 | 5010 of 5010 |") and lines[3].endswith("| all |")
    assert lines[7] == "| published: VPPO 7B | - | - | - | - | - | - | - | - | 57.5 |"
    assert "2907 of MathVision's 3040" in lines[-1] and "3666 of DynaMath's 5010" in lines[-1]
    assert (tmp_path / "results.md").read_text().splitlines() == lines
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["average"] == pytest.approx(0.35) and content["all_rows"] and content["published"] == PUBLISHED
    assert list(content["benchmarks"]) == list(BENCHMARKS) and content["benchmarks"]["geo3k"] == results["geo3k"]


def test_some_benchmarks_have_no_average(tmp_path):
    results = {"wemath": result(0.5, 512), "geo3k": result(0.25, 1, avg_ci=None)}
    lines = write(results, tmp_path).splitlines()
    assert lines[0] == "| avg@8, % | Geo3k | We-Math | average of eight |"
    assert lines[2] == "| m | 25.0 | 50.0 +- 1.2 | - |"
    assert lines[3] == "| rows | 1 of 601 | 512 of 1740 | not all |" and lines[-1].startswith("| published")
    assert json.loads((tmp_path / "results.json").read_text())["average"] is None


@pytest.fixture
def start(tmp_path):
    """The folder of a tiny model with random weights."""
    processor = tiny.build_processor()
    model = tiny.build_model(processor, **tiny.RECIPE | {"layers": 1, "vision_layers": 1})
    save(Policy(model, processor), tmp_path / "start")
    return str(tmp_path / "start")


def test_the_command(datasets, tmp_path, start, monkeypatch, capsys):
    """Three benchmarks in one run: a random model answers, the grader is told which texts are right."""
    torch.set_num_threads(1)
    for name in ("geo3k", "wemath", "mmmu_pro"):
        write_parquet(datasets, rows_of(name), tmp_path / "sets" / name / "a.parquet")
    truths = {"6 \\sqrt { 3 }": 1.0, "2": 0.0, "B": 1.0, "A": 1.0}
    monkeypatch.setattr(reward, "grade", lambda text, truth, grader: truths[truth])
    flags = f"--model {start} --benchmark mmmu_pro,geo3k,wemath --data {tmp_path / 'sets'} --output {tmp_path / 'out'}"
    report = ["--report", str(tmp_path / "page.html")]
    evaluation.main([*flags.split(), "--samples", "2", "--max_new_tokens", "3", "--prompts", "0", *report])
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    averages = {name: scores["avg"] for name, scores in content["benchmarks"].items()}
    assert averages == {"geo3k": 0.5, "wemath": 1.0, "mmmu_pro": 1.0}
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in capsys.readouterr().out + "\n" and "| 50.0 +- 98.0 | 100.0 +- 0.0 | 100.0 +- 0.0 | - |" in table
    for name in ("geo3k", "wemath", "mmmu_pro"):
        records = [json.loads(line) for line in (tmp_path / "out" / name / "responses.jsonl").read_text().splitlines()]
        assert [record["name"] for record in records] == [f"{name}[0]", f"{name}[1]"]
        assert json.loads((tmp_path / "out" / name / "eval.json").read_text()) == content["benchmarks"][name]
        assert f"{name}[1]" in (tmp_path / f"page-{name}.html").read_text()


def test_more_rows_than_are_held_in_memory_at_once(start):
    """Rows go by 512: number 513 changes nothing before it and comes in its place."""
    torch.set_num_threads(1)
    policy, cfg = Policy(*load_model(start)), Config(max_new_tokens=1)
    answers = [evaluation.evaluate(policy, Digits("val", 600), cfg, prompts, 1)[1] for prompts in (512, 513)]
    assert [record["number"] for record in answers[1]] == list(range(513)) and answers[1][:512] == answers[0]


@pytest.mark.parametrize(
    "flags, message",
    [("--benchmark geo", "unknown benchmark geo"), ("--benchmark geo3k --data nowhere", "geo3k: 'nowhere' cannot be read")],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch):
    if "data" in flags:
        pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        evaluation.main(["--model", "x", *flags.split()])
    assert "\n" not in str(error.value) and not list(Path().iterdir())
