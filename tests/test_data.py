"""Data sets: every format gives the same examples, each bad row is named or skipped, and a run's place in its data is one number."""

import io
import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import hub
from PIL import Image
from processes import ONE_THREAD, ROOT, python

import benchmarks
import data
import eval as evaluation
import train
from config import Config, check
from data import load_data, open_image, resize
from laptop import tiny
from laptop.digits import Digits
from prompts import Example, encode, example_at, fetch, first_prompt, row_at, usable
from vppo import train_step


@pytest.fixture(scope="module")
def processor():
    """The tiny model's processor."""
    return tiny.build_processor()


@pytest.fixture(scope="module")
def reader(processor):
    """What making prompts needs of a policy."""
    return SimpleNamespace(processor=processor)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The `datasets` package, with a cache of its own."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(package.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2)  # of 5 seconds, at each end of a stream
    package.disable_progress_bars()
    return package


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------
RED = (255, 0, 0)


def write_folder(folder, rows):
    """metadata.jsonl of dicts or raw lines, and one good picture a.png."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), RED).save(folder / "a.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def row(**changes):
    """A good row with some fields changed; None removes one."""
    fields = {"file_name": "a.png", "problem": "what is it ?", "answer": "3"} | changes
    return {key: value for key, value in fields.items() if value is not None}


def load(folder, split="train", **fields):
    """load_data with some fields of the config."""
    return load_data(str(folder), split, Config(**fields))


def test_folder_rows(tmp_path):
    rows = [row(), "", row(answer=7, problem="Größe ?"), row(file_name=None, file_names=["a.png", "sub/b.png"], answer=0)]
    folder = write_folder(tmp_path / "set", rows)
    (folder / "sub").mkdir()
    Image.new("RGB", (20, 50)).save(folder / "sub" / "b.png")
    dataset = load(folder)
    assert len(dataset) == 3  # empty lines do not count
    assert dataset[0].problem == "what is it ?\n\n" + data.INSTRUCTION
    assert dataset[1].problem.startswith("Größe ?\n\n") and dataset[1].answer == "7"
    assert [image.size for image in dataset[2].images] == [(40, 30), (20, 50)] and dataset[2].answer == "0"
    assert dataset[1].name.endswith("metadata.jsonl, line 3")  # as an editor counts
    assert load(folder, instruction="think")[0].problem == "what is it ?\n\nthink"
    assert load(folder, instruction="")[0].problem == "what is it ?"
    # The file itself, under any name; columns of other names, one image or a list.
    rows = [{"pic": "a.png", "q": "why ?", "a": 1.5}, {"pic": ["sub/b.png", {"path": "a.png"}], "q": "how ?", "a": "x"}]
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = load(folder / "other.jsonl", problem_column="q", answer_column="a", images_column="pic", instruction="")
    assert [(example.problem, example.answer) for example in other] == [("why ?", "1.5"), ("how ?", "x")]
    assert [[image.size for image in example.images] for example in other] == [[(40, 30)], [(20, 50), (40, 30)]]


def test_text_only_rows(tmp_path, processor):
    folder = write_folder(tmp_path, [row(), row(file_name=None), row(file_name=None, images=[])])
    with pytest.raises(ValueError, match="line 2: no image .*--text_only train"):
        load(folder)
    dataset = load(folder, text_only="train")
    assert [len(example.images) for example in dataset] == [1, 0, 0]
    assert "pixel_values" not in encode(processor, dataset[1])
    with pytest.raises(ValueError, match="--text_only 'keep' is unknown"):
        check(Config(text_only="keep"))


def test_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="no metadata.jsonl"):
        load(tmp_path)
    (tmp_path / "set.py").write_text("raise SystemExit('executed')")  # a script is no data
    with pytest.raises(ValueError, match="no metadata.jsonl"):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no rows"):
        load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def test_every_kind_of_picture_becomes_upright_rgb(tmp_path):
    plain = Image.new("RGB", (40, 30), RED)
    turned = plain.copy()
    turned.paste((0, 0, 255), (20, 0, 40, 30))  # stored: red on the left, blue on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # shown: a quarter turn clockwise, so that the left edge becomes the top
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    deep = np.full((30, 40), 100 * 257, np.uint16)  # 100 of 255 in 16 bits
    grey = (100, 100, 100)
    kinds = {"rgba.png": (plain.convert("RGBA"), RED), "clear.png": (clear, (255, 255, 255)), "palette.png": (plain.convert("P"), RED),
             "palette.gif": (plain.convert("P"), RED), "grey.png": (Image.new("L", (40, 30), 100), grey),
             "la.png": (Image.new("LA", (40, 30), (0, 51)), (204, 204, 204)),  # a fifth of black on white
             "bits.png": (Image.new("1", (40, 30), 1), (255, 255, 255)), "cmyk.tif": (Image.new("CMYK", (40, 30), (0, 255, 255, 0)), RED),
             "cmyk.jpg": (Image.new("CMYK", (40, 30), (0, 255, 255, 0)), RED), "16.png": (Image.fromarray(deep), grey),
             "16.tif": (Image.fromarray(deep), grey), "float.tif": (Image.fromarray(np.full((30, 40), 100 / 255, np.float32)), grey),
             "webp.webp": (plain, RED), "bmp.bmp": (plain, RED)}  # fmt: skip
    folder = write_folder(tmp_path, [row(file_name=name) for name in [*kinds, "turned.jpg", "turned.png", "dot.png"]])
    for name, (image, _) in kinds.items():
        image.save(folder / name)
    plain.convert("P").save(folder / "palette.png", transparency=plain.convert("P").getpixel((0, 0)))
    kinds["palette.png"] = (None, (255, 255, 255))  # its one colour is transparent
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    turned.save(folder / "turned.png", exif=exif)
    Image.new("RGB", (1, 1), RED).save(folder / "dot.png")
    dataset = load(folder)
    for i, (name, (_, colour)) in enumerate(kinds.items()):
        (image,) = dataset[i].images
        assert image.mode == "RGB" and image.size == (40, 30), name
        assert np.abs(np.subtract(image.getpixel((20, 15)), colour)).max() <= 2, name
    for i in (len(kinds), len(kinds) + 1):
        (image,) = dataset[i].images
        assert image.mode == "RGB" and image.size == (30, 40)
        assert np.abs(np.subtract(image.getpixel((15, 5)), RED)).max() < 10
        assert np.abs(np.subtract(image.getpixel((15, 35)), (0, 0, 255))).max() < 10
    assert dataset[len(kinds) + 2].images[0].getpixel((0, 0)) == RED


def test_a_picture_from_any_source(tmp_path):
    picture = Image.new("RGB", (4, 3), RED)
    picture.save(tmp_path / "a.png")
    stored = (tmp_path / "a.png").read_bytes()
    sources = ["a.png", {"path": "a.png"}, {"bytes": stored, "path": "else.png"}, stored, picture, {"path": str(tmp_path / "a.png"), "bytes": None}]
    assert all(open_image(data.locate(source, "here", tmp_path), "here") == picture for source in sources)


def test_whatever_bytes_a_picture_is_cut_to_its_error_is_one_sentence():
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        for length in [*range(0, 90, 3), *range(100, file.tell() // 2, 500)]:
            with pytest.raises(ValueError, match="^row 1: image does not open") as error:
                open_image(file.getvalue()[:length], "row 1")
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(1, 1), (28, 84), (640, 480), (3000, 2000), (1, 5000), (7, 90000), (300000, 1)])
@pytest.mark.parametrize("limits", [(0, 0), (200_704, 1_003_520), (5000, 0), (0, 5000), (5000, 5000), (2, 3)])
def test_resizing(size, limits):
    image = Image.new("RGB", size, RED)
    resized = resize(image, *limits)
    area, before = resized.width * resized.height, size[0] * size[1]
    low, high = limits[0], limits[1] or np.inf
    assert area <= high
    if low <= before <= high:
        assert resized is image  # not one pixel is touched
    elif before < low and high > 2 * low:
        assert low <= area <= low + resized.width + resized.height  # no more than whole pixels need
    if min(resized.size) > 100:
        assert resized.width / resized.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert resized.getpixel((0, 0)) == RED


def test_resizing_is_bicubic_and_comes_before_the_masks(tmp_path):
    ramp = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    assert resize(ramp, 64, 0) == ramp.resize((8, 8), Image.Resampling.BICUBIC)
    assert resize(ramp, 0, 4) == ramp.resize((2, 2), Image.Resampling.BICUBIC)
    folder = write_folder(tmp_path, [row()])
    assert load(folder, min_pixels=120_000)[0].images[0].size == (400, 300)
    assert load(folder, max_pixels=300)[0].images[0].size == (20, 15)
    stored = [{"images": [Image.new("RGB", (40, 30))], "problem": "p", "answer": "1"}]
    assert benchmarks.Rows("geo3k", stored, "", (120_000, 0))[0].images[0].size == (400, 300)
    for limits in ({"min_pixels": -1}, {"max_pixels": -1}, {"min_pixels": 2, "max_pixels": 1}):
        with pytest.raises(ValueError, match="--m.._pixels .*(must be from 0|are no range)"):
            check(Config(**limits))


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows: named, or skipped and counted
# ---------------------------------------------------------------------------------------------------------------------
def write_bad_files(folder):
    """Files that are no pictures, each in its way."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + whole[24:29]
    bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    files = {"text.png": b"this is no picture", "empty.png": b"", "cut.png": whole[: len(whole) // 2], "bomb.png": bomb,
             "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"}  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    Image.new("RGB", (1, 300)).save(folder / "line.png")


BAD_ROWS = [
    ('{"file_name": "a.png", ', "not JSON"),
    ("no json at all", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    (row(file_name=None), "no image.*found problem, answer"),
    (row(file_name=""), "no image"),
    (row(file_name=None, file_names=[]), "no image"),
    (row(file_name=7), r"int where an image should be \(column file_name, number 1\)"),
    (row(file_name=None, file_names=["a.png", ""]), r"image '' does not exist .*\(column file_names, number 2\)"),
    (row(images={"bytes": None}), r"image '.' does not exist .*\(column images"),
    (row(answer=None), "no answer.*found file_name, problem"),
    (row(answer=" "), "no answer"),
    (row(answer=["3"]), "no answer"),
    ('{"file_name": "a.png", "problem": "p", "answer": null}', "no answer"),
    ('{"file_name": "a.png", "problem": "p", "answer": NaN}', "no answer"),
    (row(problem=None), "no problem"),
    (row(problem=""), "no problem"),
    (row(file_name="missing.png"), "image 'missing.png' does not exist"),
    (row(file_name="folder.png"), "image 'folder.png' does not exist"),
    (row(file_name="n" * 5000), "image 'nnn.*does not exist"),
    (row(file_name=None, file_names=["a.png", "missing.png"]), r"'missing.png' does not exist .*\(column file_names, number 2\)"),
]
BAD_PICTURES = [
    (row(file_name="text.png"), r"image 'text.png' does not open \(cannot identify.*\) \(column file_name, number 1\)"),
    (row(file_name="empty.png"), "image 'empty.png' does not open"),
    (row(file_name="cut.png"), "image 'cut.png' does not open"),
    (row(file_name="bomb.png"), r"image 'bomb.png' does not open \(.*decompression bomb"),
    (row(file_name="eps.png"), r"image 'eps.png' does not open \(cannot identify"),  # no program is started to draw it
    (row(file_name="line.png"), "aspect ratio"),  # 1 x 300: the model's processor refuses it
    (row(problem="is <image> larger than <image> ?"), "2 <image> markers but 1 images"),
    (row(problem="an unpaired surrogate \ud800"), "TextEncodeInput"),
]


@pytest.mark.parametrize("bad, message", BAD_ROWS + BAD_PICTURES)
def test_a_bad_row_is_named_or_skipped(tmp_path, bad, message, reader):
    folder = write_folder(tmp_path, [row(), bad, row()])
    write_bad_files(folder)
    if (bad, message) in BAD_ROWS:
        with pytest.raises(ValueError, match=rf"metadata\.jsonl, line 2: .*{message}"):
            load(folder)  # before any model is loaded
    left_out = {"prompts_too_long": [], "bad_rows": []}
    cfg = Config(skip_bad_rows=True)
    found = usable(reader, load_data(str(folder), "train", cfg), range(3), cfg, left_out)
    assert [i for i, _, _ in found] == [0, 2] and not left_out["prompts_too_long"]
    (sentence,) = left_out["bad_rows"]
    assert "\n" not in sentence and sentence.startswith(f"{folder}/metadata.jsonl, line 2: ")
    if (bad, message) in BAD_PICTURES:
        dataset = load(folder)  # pixels are not read yet
        with pytest.raises(ValueError, match=rf"metadata\.jsonl, line 2: .*{message}") as error:
            usable(reader, dataset, range(3), Config(), left_out)
        assert str(error.value) == sentence


# ---------------------------------------------------------------------------------------------------------------------
# Names and splits
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["digit", "./missing", "/missing/folder", "a/b/c", "text.txt", "missing.parquet"])
def test_unknown_data(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("{}")
    with pytest.raises(ValueError, match="unknown"):
        load(name)


def test_the_hub_needs_a_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load("owner/name")


def test_splits(tmp_path):
    assert isinstance(load("digits", "val"), Digits) and len(load("digits", "test")) == 512
    flat = write_folder(tmp_path / "flat", [row()])
    assert len(load(flat, "train")) == 1
    assert load(flat, "val") is None and load(flat, "test") is None
    assert len(load_data(str(flat), "test", Config(), own=True)) == 1  # named for it: taken whole
    split = tmp_path / "split"
    write_folder(split / "train", [row(), row()])
    write_folder(split / "test", [row(answer="5")])
    assert len(load(split, "train")) == 2
    assert load(split, "test")[0].answer == "5"
    assert load(split, "val") is None
    with pytest.raises(ValueError, match=r"split' has no split 'val' \(found test, train\)"):
        load_data(str(split), "val", Config(), own=True)
    write_folder(split / "validation", [row(answer="6")])
    assert load(split, "val")[0].answer == "6"
    only = tmp_path / "only"
    write_folder(only / "test", [row()])
    with pytest.raises(ValueError, match=r"no split 'train' \(found test\)"):  # nobody trains on a test split by mistake
        load(only)


# ---------------------------------------------------------------------------------------------------------------------
# From row to prompt
# ---------------------------------------------------------------------------------------------------------------------
def test_images_and_markers(tmp_path, processor):
    two = ["a.png", "b.png"]
    rows = [row(), row(file_name=None, file_names=two), row(problem="<image> is it larger than <image> ?", file_name=None, file_names=two),
            row(problem="is <image> larger than <image> ?"), row(problem="is <image> larger ?", file_name=None, file_names=two)]  # fmt: skip
    folder = write_folder(tmp_path, rows)
    Image.new("RGB", (84, 56)).save(folder / "b.png")
    dataset = load(folder)
    start, pad = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|vision_start|>", "<|image_pad|>"))
    for i, images in enumerate([1, 2, 2]):
        prompt = encode(processor, dataset[i])
        ids = prompt["input_ids"][0]
        assert len(prompt["image_grid_thw"]) == (ids == start).sum() == images
        assert (ids == pad).sum() == prompt["image_grid_thw"].prod(dim=1).sum() // 4  # 2 x 2 patches a token
    grids = encode(processor, dataset[1])["image_grid_thw"]
    assert grids[1].tolist() == [1, 4, 6]  # b.png, the second: 56 / 14 and 84 / 14 patches
    ids = encode(processor, dataset[2])["input_ids"][0].tolist()
    between = processor.tokenizer.decode(ids[ids.index(pad) : len(ids) - ids[::-1].index(start)])
    assert "is it larger than" in between  # the second picture stands where its marker was
    for i, markers, images in ((3, 2, 1), (4, 1, 2)):
        with pytest.raises(ValueError, match=rf"line {i + 1}: {markers} <image> markers but {images} images"):
            encode(processor, dataset[i])


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that are too long: left out, counted, replaced by the next in line
# ---------------------------------------------------------------------------------------------------------------------
LONG = {1, 2, 5, 9}  # of 12 examples
LIMIT = Config(prompts_per_step=5, max_prompt_tokens=40)
WORKER = """
import sys
from types import SimpleNamespace
sys.path[:0] = [{root!r}, {tests!r}]
import distributed
from laptop import tiny
from test_data import collected
distributed.start()
found = distributed.gather(collected(SimpleNamespace(processor=tiny.build_processor())))
if distributed.rank() == 0:
    print("found", sorted(found))
distributed.leave()
"""


def collected(reader):
    """(step, position, answer) of this rank's prompts over four steps, of which some are longer than the limit."""
    import distributed

    image = Image.new("RGB", (28, 28))
    examples = [Example([image], "what is it ? " * (20 if i in LONG else 1), str(i), f"row {i}") for i in range(12)]
    position, everything = 0, []
    quota = len(range(distributed.rank(), LIMIT.prompts_per_step, distributed.world()))
    for step in range(4):
        left_out = {"prompts_too_long": [], "bad_rows": []}
        found, position = fetch(reader, examples, LIMIT, position, quota, left_out)
        assert len(found) == quota and len(distributed.gather(left_out["bad_rows"])) == 0
        everything += [(step, p, example.answer) for p, example, _ in found]
    return everything


def test_long_prompts_are_replaced_by_the_next_in_line(reader):
    found = collected(reader)
    line = [(p, int(example_at(range(12), p, LIMIT.seed))) for p in range(40)]
    expected = [(p, str(i)) for p, i in line if i not in LONG][:20]
    assert [(p, answer) for _, p, answer in found] == expected and [step for step, _, _ in found] == [s for s in range(4) for _ in range(5)]
    assert {int(answer) for _, answer in expected} == set(range(12)) - LONG


def test_the_first_prompt_that_can_be_used(reader, tmp_path):
    rows = [row(problem="what is it ? " * 20), row(file_name="gone.png"), row(problem="what ?"), row()]
    cfg = Config(max_prompt_tokens=40, instruction="", skip_bad_rows=True)
    dataset = load_data(str(write_folder(tmp_path, rows)), "train", cfg)
    prompt = first_prompt(reader, dataset, range(4), cfg)
    assert prompt["input_ids"].tolist() == encode(reader.processor, dataset[2], cfg.system_prompt)["input_ids"].tolist()
    with pytest.raises(ValueError, match="none of the first 2 prompts can be used, among them .*line 1"):
        first_prompt(reader, dataset, range(2), cfg)


def test_ranks_share_the_same_prompts(reader, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = subprocess.run([*python(2), worker], env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"found {sorted(collected(reader))}" in done.stdout


def test_prompts_that_are_all_too_long_end_the_run(reader):
    cfg, left_out = Config(max_prompt_tokens=5, prompts_per_step=4), {"prompts_too_long": [], "bad_rows": []}
    with pytest.raises(ValueError, match=r"not one in ten can be used, among them digits train\[\d+\]: prompt of \d+ tokens"):
        fetch(reader, Digits("train"), cfg, 0, 4, left_out)


def test_evaluation_leaves_out_and_says_so(policy, tmp_path):
    folder = write_folder(tmp_path, [row(), row(problem="what is it ? " * 20), row()])
    cfg = Config(max_new_tokens=2, max_prompt_tokens=60, instruction="")
    dataset = load_data(str(folder), "train", cfg)
    scores, records = evaluation.evaluate(policy, dataset, cfg, 0, 2, with_ids=2)
    assert [record["number"] for record in records] == [0, 2] and scores["left_out"] == 1
    assert all("response_ids" in record for record in records)  # the first two there are
    assert "1 prompts left out" in evaluation.describe(scores, 2)
    cfg.max_prompt_tokens = 3
    with pytest.raises(ValueError, match="no prompt to evaluate is left: .*line 1: prompt of"):
        evaluation.evaluate(policy, dataset, cfg, 0, 2)


def test_bad_rows_are_named_once_and_all_of_them_end_the_run_at_once(tmp_path, reader, capsys):
    folder = write_folder(tmp_path, [row(), row(file_name="no.png"), row(answer="")])
    cfg = Config(skip_bad_rows=True, instruction="", prompts_per_step=4)
    dataset, left_out = load_data(str(folder), "train", cfg), {"prompts_too_long": [], "bad_rows": []}
    found, position = fetch(reader, dataset, cfg, 0, 4, left_out)
    assert len(found) == 4 and 10 <= position <= 12 and len(left_out["bad_rows"]) == position - 4  # counted each time
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and {line.split(",")[1][:7] for line in lines} == {" line 2", " line 3"}
    (folder / "a.png").write_bytes(b"no picture")
    dataset = load_data(str(folder), "train", cfg)
    rows = (row_at(dataset, p, 0) for p in range(1000))
    with pytest.raises(ValueError, match="none of the first 3 prompts can be used, among them .*, line") as error:
        first_prompt(reader, dataset, rows, cfg)
    assert len(capsys.readouterr().err.splitlines()) == 3 and "\n" not in str(error.value)


def test_a_row_is_read_no_more_when_it_has_been_found_too_long(tmp_path, reader, monkeypatch):
    folder = write_folder(tmp_path, [row(), row(problem="what is it ? " * 200)])
    limit = replace(LIMIT, instruction="")
    dataset, opened = load_data(str(folder), "train", limit), []
    original = data.open_image
    monkeypatch.setattr(data, "open_image", lambda *words: opened.append(words) or original(*words))
    left_out = {"prompts_too_long": [], "bad_rows": []}
    fetch(reader, dataset, limit, 0, 5, left_out)
    assert len(opened) == 6 and len(left_out["prompts_too_long"]) > 1


def test_a_text_of_megabytes_is_not_cut_into_tokens(reader, monkeypatch):
    monkeypatch.setattr("prompts.encode", None)
    example = Example([Image.new("RGB", (28, 28))], "word " * 200_000, "1", "set, line 7")
    left_out = {"prompts_too_long": [], "bad_rows": []}
    assert usable(reader, [example], [0], Config(), left_out) == []
    assert left_out["prompts_too_long"] == ["set, line 7: problem of 1,000,000 letters exceeds --max_prompt_tokens 4096"]


def test_a_line_of_a_hundred_megabytes(tmp_path):
    folder = write_folder(tmp_path, [row(), row(problem="x" * 20_000_000)])
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: longer than 16,000,000 bytes"):
        load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Tables: parquet, arrow, save_to_disk
# ---------------------------------------------------------------------------------------------------------------------
def pictures(number):
    """Lists of one or two small pictures of noise."""
    rng = np.random.default_rng(0)
    return [[Image.fromarray(rng.integers(0, 256, (28, 56, 3), dtype=np.uint8)) for _ in range(1 + i % 2)] for i in range(number)]


def make_table(datasets, number, **columns):
    """A Dataset with the paper's columns; row i has 1 + i % 2 images."""
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = {"images": pictures(number), "problem": [f"p{i} ?" for i in range(number)], "answer": [str(i) for i in range(number)]}
    return datasets.Dataset.from_dict(rows | columns, features=features)


def write_table(table, folder, kind):
    """A table in one of the formats a user may have; returns what to give as --data."""
    if kind == "save_to_disk":
        table.save_to_disk(folder)
    elif kind == "splits on disk":
        import datasets

        datasets.DatasetDict({"train": table, "validation": table.select([1])}).save_to_disk(folder)
    elif kind == "arrow file":
        table.save_to_disk(folder)
        return next(folder.glob("*.arrow"))
    else:
        (folder / "data").mkdir(parents=True)
        table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        if kind == "parquet file":
            return folder / "data" / "train-00000-of-00001.parquet"
        table.select([1]).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet folder", "parquet file", "arrow file", "save_to_disk", "splits on disk"])
def test_tables_give_back_what_was_written(kind, streaming, datasets, tmp_path):
    name = write_table(make_table(datasets, 6), tmp_path / "set", kind)
    cfg = Config(streaming=streaming, instruction="")
    dataset = load_data(str(name), "train", cfg, 0)
    assert len(dataset) == 6 and dataset[4].name == f"{name} train[4]"
    for i, images in enumerate(pictures(6)):
        assert dataset[i].images == images and (dataset[i].problem, dataset[i].answer) == (f"p{i} ?", str(i))
    val = load_data(str(name), "val", cfg, 0)
    if kind in ("parquet folder", "splits on disk"):
        assert [example.answer for example in (val[0],)] == ["1"] and len(val) == 1
    else:
        assert val is None
    assert load_data(str(name), "test", cfg, 0) is None


def test_columns_of_any_name_and_kind(datasets, tmp_path):
    images = pictures(2)
    stored = io.BytesIO()
    images[0][0].save(stored, "PNG")
    images[0][0].save(tmp_path / "a.png")
    columns = {"image": [images[0][0]] * 2, "raw": [stored.getvalue()] * 2, "name": ["a.png"] * 2,
               "struct": [{"bytes": stored.getvalue(), "path": None}] * 2, "structs": [[{"bytes": stored.getvalue(), "path": "x"}]] * 2}  # fmt: skip
    table = datasets.Dataset.from_dict(columns | {"question": ["q"] * 2, "label": [3, 4]}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "t.parquet")
    for column in columns:
        dataset = load(tmp_path / "t.parquet", problem_column="question", answer_column="label", images_column=column, instruction="")
        assert dataset[1].images == [images[0][0]] and (dataset[1].problem, dataset[1].answer) == ("q", "4"), column
    with pytest.raises(ValueError, match="no column problem .found image, raw, name.*--problem_column"):
        load(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no column images .found image, raw.*--images_column"):
        load(tmp_path / "t.parquet", problem_column="question", answer_column="label")
    dataset = load(tmp_path / "t.parquet", problem_column="question", answer_column="label", text_only="train")
    assert dataset[0].images == []


CUT = b"\x89PNG\r\n\x1a\n\x00\x00"


@pytest.mark.parametrize(
    "images, answer, message",
    [
        ([], "1", "no image in column images"),
        (None, "1", "no image in column images"),
        ([{"bytes": CUT, "path": None}], "1", r"image does not open .*\(column images, number 1\)"),
        ([{"bytes": b"", "path": None}], "1", "does not exist"),
        ([{"bytes": None, "path": "gone.png"}], "1", "image 'gone.png' does not exist"),
        ([{"bytes": None, "path": "hf://datasets/o/n/a.png"}], "1", "does not exist"),
        ([None], "1", r"NoneType where an image should be \(column images, number 1\)"),
        ([{"bytes": CUT, "path": None}], None, "no answer"),
        ([{"bytes": CUT, "path": None}], "", "no answer"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_a_table_is_named_or_skipped(images, answer, message, streaming, datasets, tmp_path, reader):
    import pyarrow
    import pyarrow.parquet

    stored = io.BytesIO()
    pictures(1)[0][0].save(stored, "PNG")
    good = [{"bytes": stored.getvalue(), "path": None}]
    kind = pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    columns = {"images": pyarrow.array([good, images, good], kind), "problem": ["p"] * 3, "answer": ["0", answer, "2"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    left_out = {"prompts_too_long": [], "bad_rows": []}
    with pytest.raises(ValueError, match=rf"t\.parquet train\[1\]: .*{message}") as error:
        dataset = load_data(str(tmp_path / "t.parquet"), "train", Config(streaming=streaming), 0)
        usable(reader, dataset, range(3), Config(), left_out)
    cfg = Config(skip_bad_rows=True, streaming=streaming)
    found = usable(reader, load_data(str(tmp_path / "t.parquet"), "train", cfg, 0), range(3), cfg, left_out)
    assert [example.answer for _, example, _ in found] == ["0", "2"] and left_out["bad_rows"] == [str(error.value)]


def test_text_in_the_image_column(datasets, tmp_path):
    table = datasets.Dataset.from_dict({"images": ["a cat"], "problem": ["p"], "answer": ["1"]})
    table.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"train\[0\]: image 'a cat' does not exist in .*\(column images, number 1\)"):
        load(tmp_path / "t.parquet")[0]
    with pytest.raises(ValueError, match="text where an image should be: 'a cat'"):  # no files belong to a hub data set
        data.locate("a cat", "row 1")


@pytest.mark.parametrize("kind", ["damaged", "empty file", "no rows", "script"])
def test_tables_that_cannot_be_read(kind, datasets, tmp_path):
    folder = write_table(make_table(datasets, 6), tmp_path / "set", "parquet folder")
    file = folder / "data" / "train-00000-of-00001.parquet"
    if kind == "script":  # as old data sets on the hub have one
        (folder / "set.py").write_text("raise SystemExit('executed')")
    elif kind == "no rows":
        make_table(datasets, 6).select([]).to_parquet(file)
    else:
        file.write_bytes(file.read_bytes()[:1000] if kind == "damaged" else b"")
    messages = {"script": "scripts are no longer supported, but found set.py", "no rows": "(no rows|no data)"}
    for streaming in (False, True):
        with pytest.raises((OSError, ValueError), match=f"data '{folder}' .*{messages.get(kind, 'cannot be read: ')}") as error:
            load(folder, streaming=streaming)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------
def answers(dataset, positions, seed):
    return [int(example_at(dataset, position, seed).answer) for position in positions]


def test_a_streams_order_depends_on_seed_and_position_alone(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 8)
    name = write_table(make_table(datasets, 20), tmp_path / "set", "parquet folder")
    whole = {seed: answers(load(name, streaming=True, seed=seed), range(60), seed) for seed in (0, 1)}
    for order in whole.values():
        assert all(sorted(order[epoch : epoch + 20]) == list(range(20)) for epoch in (0, 20, 40))  # each epoch has each row once
        assert order[:20] != order[20:40] and order[:20] != list(range(20))
    assert whole[0] != whole[1]
    late = load(name, streaming=True, seed=1)  # a resumed run
    assert answers(late, range(33, 50), 1) == whole[1][33:50]
    ranks = [load(name, streaming=True, seed=1) for _ in range(2)]  # each keeps its own positions
    parts = [answers(ranks[0], [0, 1, 2, 6, 7, 25], 1), answers(ranks[1], [3, 4, 5, 8, 26], 1)]
    assert parts == [[whole[1][p] for p in (0, 1, 2, 6, 7, 25)], [whole[1][p] for p in (3, 4, 5, 8, 26)]]
    assert answers(late, [2], 1) == whole[1][2:3]  # going back


def test_a_stream_for_evaluation_is_the_first_rows(datasets, tmp_path):
    name = write_table(make_table(datasets, 20), tmp_path / "set", "parquet folder")
    held = load_data(str(name), "train", Config(streaming=True), 7)
    assert [example.answer for example in (held[i] for i in range(len(held)))] == [str(i) for i in range(7)]


def test_a_stream_that_breaks_off_is_no_bad_row(datasets, tmp_path, reader):
    name = write_table(make_table(datasets, 20), tmp_path / "set", "parquet file")
    cfg = Config(streaming=True, skip_bad_rows=True)
    dataset = load_data(str(name), "train", cfg)
    assert dataset.where(4) == f"{name} train, row 4 of the shuffled stream"
    name.unlink()
    with pytest.raises(OSError, match=f"data '{name}' cannot be read"):
        usable(reader, dataset, [0], cfg, {"prompts_too_long": [], "bad_rows": []})


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------
CLIENT = """
import sys, zlib
sys.path.insert(0, {root!r})
import data
from types import SimpleNamespace
for streaming in (False, True):
    cfg = SimpleNamespace(text_only="refuse", min_pixels=0, max_pixels=0, streaming=streaming, skip_bad_rows=False, instruction="", seed=0,
                          problem_column="problem", answer_column="answer", images_column="images")
    try:
        for split in ("test", "val", "train"):
            dataset = data.load_data("owner/name", split, cfg, 0)
            print(split, None if dataset is None else len(dataset))
            for example in dataset or []:
                print(example.name, example.answer, [zlib.crc32(image.tobytes()) for image in example.images])
    except (ValueError, OSError) as error:
        print(error)
"""


def ask(environment):
    done = subprocess.run([sys.executable, "-c", CLIENT.format(root=str(ROOT))], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_hub_data_set(datasets, tmp_path):
    """`datasets` decodes what it streams from the hub in threads of its own; here a damaged picture must stay a bad row."""
    images = [*pictures(2), [{"bytes": CUT, "path": "x.png"}]]
    folder = write_table(make_table(datasets, 3, images=images), tmp_path / "set", "parquet folder")
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.parquet")}
    with hub(tmp_path / "home", files) as environment:
        lines = ask(environment)
    hashes = [[zlib.crc32(image.tobytes()) for image in images] for images in pictures(2)]
    found = [f"owner/name train[{i}] {i} {hashes[i]}" for i in range(2)]
    bad = "owner/name train[2]: image does not open (cannot identify image file) (column images, number 1)"
    assert lines == ["test None", "val 1", f"owner/name validation[0] 1 {hashes[1]}", "train 3", *found, bad] * 2
    # Without a way to the hub, what was downloaded is used; a data set that was not is named.
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert ask(offline)[:7] == lines[:7]
    fresh = ask(offline | {"HF_HOME": str(tmp_path / "other")})
    assert len(fresh) == 2 and all("'owner/name' cannot be read" in line and "Couldn't reach" in line for line in fresh)


@pytest.mark.parametrize("files, refusal, message", [({}, "GatedRepo", "gated data"), ({"name.py": b"raise SystemExit(7)"}, None, "scripts are no longer")])
def test_a_hub_data_set_that_is_refused(files, refusal, message, datasets, tmp_path):
    with hub(tmp_path / "home", files, refusal) as environment:
        lines = ask(environment)
    assert len(lines) == 2 and all(line.startswith("data 'owner/name' cannot be read") and message in line for line in lines)


def test_a_gated_model(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport model\nmodel.load('owner/name')"
    with hub(tmp_path / "home", {}, "GatedRepo") as environment:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert "ValueError: model 'owner/name' is neither" in done.stderr and "gated" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# One task, three formats, the same training
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["folder", "parquet file", "save_to_disk"])
def test_digits_from_files_train_alike(kind, tmp_path, policy, request):
    built_in = [Digits("train")[i] for i in range(24)]
    rows = [{"problem": example.problem, "answer": example.answer} for example in built_in]
    if kind == "folder":
        name = tmp_path
        for i, example in enumerate(built_in):
            example.images[0].save(tmp_path / f"{i}.png")
            rows[i]["file_name"] = f"{i}.png"
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets = request.getfixturevalue("datasets")
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        table = make_table(datasets, 24, images=[example.images for example in built_in], **columns)
        name = write_table(table, tmp_path / "set", kind)
    cfg = Config(prompts_per_step=8, max_new_tokens=32, instruction="", steps=1, seed=3, max_rounds=2)
    dataset = load_data(str(name), "train", cfg)
    for example, twin in zip(built_in, dataset, strict=True):
        assert np.array_equal(example.images[0], twin.images[0]) and len(twin.images) == 1
        assert (example.problem, example.answer) == (twin.problem, twin.answer)
    results, start = [], {key: value.clone() for key, value in policy.state_dict().items()}
    for source in (built_in, dataset):  # a list is shuffled as any finite data set is: by example_at
        policy.load_state_dict(start)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr)
        metrics, position, _ = train_step(policy, optimizer, source, cfg, 0, 0)
        results.append(({key: value for key, value in metrics.items() if not key.startswith("seconds")}, position))
    assert results[0] == results[1]
    assert 0 < results[0][0]["reward"] < 1 and results[0][0]["grad_norm"] > 0


def test_a_run_on_files_of_its_own(tmp_path, tiny_folder, capsys):
    """Training, validation and test from three data sets; a bad row and an over-long one are left out, counted and reported."""
    for part, number in (("train", 9), ("val", 2), ("test", 3)):
        folder = tmp_path / part
        rows = []
        folder.mkdir()
        for i in range(number):
            example = Digits("train")[i]
            example.images[0].save(folder / f"{i}.png")
            rows.append(row(file_name=f"{i}.png", problem=example.problem, answer=example.answer))
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()
    lines += [json.dumps(row(file_name="gone.png")), json.dumps(row(file_name="0.png", problem="sum " * 200))]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    flags = f"--model {tiny_folder} --data {tmp_path}/train --val_data {tmp_path}/val --test_data {tmp_path}/test --output {tmp_path}/out"
    more = "--steps 3 --prompts_per_step 4 --max_rounds 1 --max_new_tokens 16 --eval_samples 2 --eval_every 3 --save_every 0 --max_prompt_tokens 99"
    with pytest.raises(ValueError, match="line 10: image 'gone.png' does not exist"):
        train.main([*flags.split(), *more.split(), "--instruction", ""])
    train.main([*flags.split(), *more.split(), "--instruction", "", "--skip_bad_rows"])
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    met = {key: sum(record[key] for record in metrics) for key in ("bad_rows", "prompts_too_long")}
    assert met["bad_rows"] >= 1 and met["prompts_too_long"] >= 1  # 12 prompts are more than the 9 that can be used: all 11 rows came up
    assert all(record["prompts_sampled"] == 4 for record in metrics) and "val_avg" in metrics[-1]
    out, err = capsys.readouterr()
    assert f"prompts too long {met['prompts_too_long']}, bad rows {met['bad_rows']}" in out and "held out, 3 prompts" in out
    assert f"left out: {tmp_path}/train/metadata.jsonl, line 10: image 'gone.png' does not exist" in err
