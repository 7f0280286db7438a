"""Data from files: what loads, and how each bad row is named."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import data
import tiny
from data import Folder, load_data
from digits import Digits
from model import encode


@pytest.fixture(scope="module")
def processor():
    """The tiny model's processor."""
    return tiny.build_processor()


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


def test_folder_rows(tmp_path):
    rows = [row(), "", row(answer=7, problem="Größe ?"), row(file_name=None, file_names=["a.png", "sub/b.png"], answer=0)]
    folder = write_folder(tmp_path / "set", rows)
    (folder / "sub").mkdir()
    Image.new("RGB", (20, 50)).save(folder / "sub" / "b.png")
    dataset = Folder(folder)
    assert len(dataset) == 3  # empty lines do not count
    assert dataset[0].problem == "what is it ?\n\n" + data.INSTRUCTION
    assert dataset[1].problem.startswith("Größe ?\n\n") and dataset[1].answer == "7"
    assert [image.size for image in dataset[2].images] == [(40, 30), (20, 50)] and dataset[2].answer == "0"
    assert dataset[1].name.endswith("metadata.jsonl, line 3")  # as an editor counts
    assert Folder(folder, "think")[0].problem == "what is it ?\n\nthink"
    assert Folder(folder, "")[0].problem == "what is it ?"


def test_every_kind_of_picture_becomes_upright_rgb(tmp_path):
    plain = Image.new("RGB", (40, 30), RED)
    turned = plain.copy()
    turned.paste((0, 0, 255), (20, 0, 40, 30))  # stored: red on the left, blue on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # shown: a quarter turn clockwise, so that the left edge becomes the top
    files = {"rgba.png": plain.convert("RGBA"), "palette.png": plain.convert("P"), "palette.gif": plain.convert("P"),
             "grey.png": Image.new("L", (40, 30), 100), "bits.png": Image.new("1", (40, 30), 1),
             "cmyk.tif": Image.new("CMYK", (40, 30), (0, 255, 255, 0))}  # fmt: skip
    folder = write_folder(tmp_path, [row(file_name=name) for name in [*files, "turned.jpg", "turned.png"]])
    for name, image in files.items():
        image.save(folder / name)
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    turned.save(folder / "turned.png", exif=exif)
    colours = [RED, RED, RED, (100, 100, 100), (255, 255, 255), RED]
    dataset = Folder(folder)
    for i, colour in enumerate(colours):
        (image,) = dataset[i].images
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.abs(np.subtract(image.getpixel((20, 15)), colour)).max() <= 2
    for i in (len(colours), len(colours) + 1):
        (image,) = dataset[i].images
        assert image.mode == "RGB" and image.size == (30, 40)
        assert np.abs(np.subtract(image.getpixel((15, 5)), RED)).max() < 10
        assert np.abs(np.subtract(image.getpixel((15, 35)), (0, 0, 255))).max() < 10


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"file_name": "a.png", ', "not JSON"),
        ("no json at all", "not JSON"),
        (row(file_name=None), "no image.*found problem, answer"),
        (row(file_name=""), "no image"),
        (row(file_name=None, file_names=[]), "no image"),
        (row(answer=None), "no answer.*found file_name, problem"),
        (row(answer=" "), "no answer"),
        ('{"file_name": "a.png", "problem": "p", "answer": null}', "no answer"),
        (row(problem=None), "no problem"),
        (row(problem=""), "no problem"),
        (row(file_name="missing.png"), "'missing.png' does not exist"),
        (row(file_name=None, file_names=["a.png", "missing.png"]), "'missing.png' does not exist"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    folder = write_folder(tmp_path, [row(), row(), bad, row()])
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, line 3: .*{message}") as error:
        Folder(folder)
    assert "\n" not in str(error.value)


def test_a_picture_that_does_not_open_is_named_when_it_is_needed(tmp_path):
    folder = write_folder(tmp_path, [row(), row(file_name="text.png"), row(file_name="cut.png"), row(file_name="empty.png")])
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (folder / "text.png").write_bytes(b"this is no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    dataset = Folder(folder)  # pixels are not read yet
    assert dataset[0].images[0].size == (40, 30)
    for i, name in ((1, "text.png"), (2, "cut.png"), (3, "empty.png")):
        with pytest.raises(ValueError, match=rf"metadata\.jsonl, line {i + 1}: .*{name}.* does not open") as error:
            dataset[i]
        assert "\n" not in str(error.value)
    for length in [*range(1, 80, 3), len(whole) - 100]:
        (folder / "cut.png").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="line 3"):
            dataset[2]


def test_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="no metadata.jsonl"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="no metadata.jsonl"):
        load_data(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no rows"):
        Folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Names and splits
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["digit", "./missing", "/missing/folder", "a/b/c"])
def test_unknown_data(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown"):
        load_data(name)


def test_the_hub_needs_a_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_data("owner/name")


def test_splits(tmp_path):
    assert isinstance(load_data("digits", "val"), Digits) and len(load_data("digits", "test")) == 512
    flat = write_folder(tmp_path / "flat", [row()])
    assert len(load_data(str(flat), "train")) == 1
    assert load_data(str(flat), "val") is None and load_data(str(flat), "test") is None
    split = tmp_path / "split"
    write_folder(split / "train", [row(), row()])
    write_folder(split / "test", [row(answer="5")])
    assert len(load_data(str(split), "train")) == 2
    assert load_data(str(split), "test", "")[0].problem == "what is it ?"
    assert load_data(str(split), "test")[0].answer == "5"
    assert load_data(str(split), "val") is None


# ---------------------------------------------------------------------------------------------------------------------
# From row to prompt
# ---------------------------------------------------------------------------------------------------------------------
def test_images_and_markers(tmp_path, processor):
    two = ["a.png", "b.png"]
    rows = [row(), row(file_name=None, file_names=two), row(problem="<image> is it larger than <image> ?", file_name=None, file_names=two),
            row(problem="is <image> larger than <image> ?"), row(problem="is <image> larger ?", file_name=None, file_names=two)]  # fmt: skip
    folder = write_folder(tmp_path, rows)
    Image.new("RGB", (84, 56)).save(folder / "b.png")
    dataset = Folder(folder)
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
