"""The digits task (pools, answers, pictures, wordings) and data from files: what loads, and how each bad row is named."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
import reward
import tiny
from data import KIND_SHARE, KINDS, POOLS, WORDS, Digits, Folder, example_at, load_data, write_drill, write_response
from model import encode


@pytest.fixture(scope="module")
def processor():
    """The tiny model's processor: its vocabulary is the digits task's."""
    return tiny.build_processor()


@pytest.fixture(scope="module")
def many():
    """1,500 training examples."""
    task = Digits("train")
    return [task[i] for i in range(1500)]


# ---------------------------------------------------------------------------------------------------------------------
# The digits task: pools, sequence, answers, pictures
# ---------------------------------------------------------------------------------------------------------------------
def test_pools_are_disjoint():
    residues = sum(POOLS.values(), ())
    assert sorted(residues) == list(range(9))  # of the index modulo 9: no overlap, nothing left out
    with np.load(data.ASSET) as file:
        everything, labels = file["images"], file["labels"]
    assert sum(len(Digits(split).labels) for split in POOLS) == len(everything) == len(labels) == 1797
    for split in POOLS:
        mine = [i for i in range(1797) if i % 9 in POOLS[split]]
        assert np.array_equal(Digits(split).images, everything[mine]) and np.array_equal(Digits(split).labels, labels[mine])
        assert set(Digits(split).labels) == set(range(10))
    pixels = {split: {image.tobytes() for image in Digits(split).images} for split in POOLS}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not pixels[a] & pixels[b]


def same(a, b):
    return (a.problem, a.answer, a.digits, a.kind, a.name) == (b.problem, b.answer, b.digits, b.kind, b.name) and (
        a.images[0].tobytes() == b.images[0].tobytes()
    )


def test_an_index_is_always_the_same_example():
    first, second = Digits("train"), Digits("train")
    for i in (0, 7, 2**30, 2**31 - 1):
        second[i + 1 if i < 2**31 - 1 else 3]  # what was asked before changes nothing
        assert same(first[i], second[i])
    pictures = {Digits(split)[i].images[0].tobytes() for split in POOLS for i in range(40)}
    assert len(pictures) == 120  # other index or split, other picture
    assert Digits("val")[5].name == "digits val[5]"


def test_length_and_errors():
    assert (len(Digits("train")), len(Digits("val")), len(Digits("test")), len(Digits("val", 5))) == (2**31, 512, 512, 5)
    for i in (5, -1):
        with pytest.raises(IndexError):
            Digits("val", 5)[i]
    assert len(list(Digits("val", 5))) == 5  # IndexError also ends a for loop
    with pytest.raises(ValueError, match="no split 'dev'.*train, val, test"):
        Digits("dev")


def test_answers(many):
    for example in many:
        first, _, last = example.digits
        if "plus" in example.problem or "add" in example.problem:
            kind, answer = "sum", first + last
        elif "minus" in example.problem or "subtract" in example.problem:
            kind, answer = "difference", first - last
        else:
            kind, answer = "yesno", "yes" if first > last else "no"
        assert (example.kind, example.answer) == (kind, str(answer))
        assert example.problem.endswith("answer in \\boxed{}")
    assert data.solve("yesno", (4, 9, 4))[0] == "no" and data.solve("difference", (2, 0, 9))[0] == "-7"


def test_kinds_and_wordings_occur_as_stated(many):
    counts = Counter(example.kind for example in many)
    for kind, share in zip(KINDS, KIND_SHARE):
        assert abs(counts[kind] / len(many) - share) < 4 * (share * (1 - share) / len(many)) ** 0.5  # standard errors
    assert len({example.problem for example in many}) == sum(len(wordings) for wordings in data.QUESTIONS.values())


def test_pictures_show_the_digits_in_order(many):
    """The nearest mean of training cells reads most unseen cells, each at its own place: the label is what one sees."""
    for example in many[:50]:
        (image,) = example.images
        assert (image.mode, image.size) == ("RGB", (84, 28))
        assert np.asarray(image)[:, ::28].mean() > 200 > np.asarray(image).min()  # dark ink on light paper

    def cells(examples):
        grey = np.stack([np.asarray(example.images[0], np.float32)[:, :, 0] for example in examples])  # (N, 28, 84)
        return np.concatenate([grey[:, :, 28 * p : 28 * p + 28] for p in range(3)]).reshape(-1, 28 * 28)

    labels = np.array([example.digits[p] for p in range(3) for example in many])
    train = cells(many)
    means = np.stack([train[labels == digit].mean(axis=0) for digit in range(10)])
    unseen = [Digits("val")[i] for i in range(200)]
    truth = np.array([[example.digits[p] for example in unseen] for p in range(3)])
    read = ((cells(unseen)[:, None] - means) ** 2).sum(axis=2).argmin(axis=1).reshape(3, 200)
    assert ((read == truth).mean(axis=1) > 0.6).all()  # chance: 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The digits task: responses
# ---------------------------------------------------------------------------------------------------------------------
def read_digits(response):
    return [WORDS.index(word) for word in response.split() if word in WORDS]


def test_a_response_without_noise_is_right():
    rng = np.random.default_rng(0)
    for i in range(200):
        example = Digits("val")[i]
        response = write_response(example, rng)
        assert reward.grade(response, example.answer) == 1.0
        assert read_digits(response) == list(example.digits)
        assert reward.grade(write_drill(example, rng), example.answer) == 1.0


def test_a_response_has_many_wordings():
    rng = np.random.default_rng(0)
    for i in range(3):
        assert len({write_response(Digits("val")[i], rng) for _ in range(200)}) > 100


def test_a_guess_reads_nothing():
    rng = np.random.default_rng(0)
    lucky = []
    for i in range(300):
        example = Digits("val")[i]
        response = write_response(example, rng, guess=1.0)
        assert not any(data.is_reading(word) for word in response.split())
        answer = reward.extract_answer(response)
        assert answer in ("yes", "no") if example.kind == "yesno" else -9 <= int(answer) <= 18
        lucky.append((example.kind == "yesno", reward.grade(response, example.answer)))
    yesno, numbers = ([right for kind, right in lucky if kind is which] for which in (True, False))
    assert np.mean(yesno) > 0.35 and np.mean(numbers) < 0.2  # yes/no is easy to guess, numbers are not
    guesses = [not read_digits(write_response(Digits("val")[0], rng, guess=0.36)) for _ in range(500)]
    assert abs(np.mean(guesses) - 0.36) < 0.09  # 4 standard errors


def test_arithmetic_follows_what_was_read():
    rng = np.random.default_rng(0)
    wrong = 0
    for i in range(300):
        example = Digits("val")[i]
        response = write_response(example, rng, misread=1.0)
        digits = read_digits(response)
        first, _, last = digits
        answer = {"sum": str(first + last), "difference": str(first - last), "yesno": "yes" if first > last else "no"}[example.kind]
        assert reward.extract_answer(response) == answer
        words = response.split()
        if example.kind != "yesno":
            sign = words.index("+" if example.kind == "sum" else "-")
            assert (words[sign - 1], words[sign + 1], words[sign + 3]) == (str(first), str(last), answer)
        wrong += digits != list(example.digits)
    assert wrong > 280  # three random digits are right once in a thousand


def test_sorts_of_token(processor):
    for word in ("three", " three", "zero", " nine"):
        assert data.is_reading(word) and not data.is_computed(word)
    for word in ("3", " 3", "-4", " 17", "+", " -", "yes", " no", "larger", " smaller", "equal"):
        assert data.is_computed(word) and not data.is_reading(word)
    for word in ("so", " answer", "threes", ".", "\\boxed{", "}", "<|im_end|>", "", "\n", "--x"):
        assert not data.is_reading(word) and not data.is_computed(word)
    rng = np.random.default_rng(0)
    for i in range(50):
        tokens = processor.tokenizer.tokenize(write_response(Digits("val")[i], rng))
        assert sum(map(data.is_reading, tokens)) == 3 and sum(map(data.is_computed, tokens)) >= 4


def test_the_tiny_vocabulary_spells_everything(processor):
    tokenizer, rng = processor.tokenizer, np.random.default_rng(0)
    texts = [Digits("train")[i].problem for i in range(200)]
    for i in range(500):
        example = Digits("train")[i]
        texts += [write_response(example, rng, guess=0.3, misread=0.5), write_drill(example, rng)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id in tokenizer("unheard").input_ids  # the check above can fail


# ---------------------------------------------------------------------------------------------------------------------
# Positions in the data
# ---------------------------------------------------------------------------------------------------------------------
def test_endless_data_starts_at_a_place_of_the_seed():
    task = Digits("train")
    names = {seed: [example_at(task, position, seed).name for position in range(20)] for seed in (0, 1, 2)}
    assert names[0] == [f"digits train[{i}]" for i in range(20)]
    assert len(set(sum(names.values(), []))) == 60
    far = example_at(task, 2**30 - 1, seed=2**12).name  # stays below 2**30, where the warm-up's scenes begin
    assert int(far.split("[")[1][:-1]) < 2**30


def test_finite_data_is_shuffled_anew_each_epoch():
    task = Digits("val", 30)

    def epoch(number, seed):
        return [example_at(task, number * 30 + i, seed).name for i in range(30)]

    orders = [epoch(0, 0), epoch(1, 0), epoch(2, 0), epoch(0, 1), epoch(1, 1)]
    assert all(sorted(order) == sorted(example.name for example in task) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert epoch(1, 0) == orders[1]


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
