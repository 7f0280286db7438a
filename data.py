"""Examples: images, a problem, the true answer; and the data sets they come from.

    digits, scenes              the laptop's tasks (laptop/)
    FOLDER, FILE.jsonl          Hugging Face's ImageFolder: metadata.jsonl with file_name (or file_names), problem, answer
    FOLDER, FILE.parquet, ...   parquet, arrow, or what `save_to_disk` wrote, read by the `datasets` package
    OWNER/NAME                  a data set of the hub, read by `datasets`

A row is made into an Example when it is needed; until then its images stay files, or bytes in a memory-mapped table. Nothing
that comes with a data set is executed: `datasets` has no scripts and no pickle, FORMATS are what Pillow decodes by itself.
"""

import contextlib
import io
import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from laptop.digits import Digits
from laptop.scenes import REGIMES, Scenes
from prompts import Example

# What the paper appends to every question (Section 4): think first, then a boxed answer that a program can find.
INSTRUCTION = (
    "Think about the question first and write your reasoning inside <think> </think>. "
    "Then give the final answer in \\boxed{}."
)
FORMATS = "BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP AVIF".split()  # Pillow hands some others (EPS) to outside programs
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # file ending -> its reader in `datasets`
LINE = 16_000_000  # bytes: a longer line of a metadata.jsonl is some other file's
SHUFFLE_BUFFER = 1000  # rows of a stream that wait in memory to be drawn at random


# ---------------------------------------------------------------------------------------------------------------------
# From row to Example
# ---------------------------------------------------------------------------------------------------------------------
class Rows:
    """Rows of any data set as Examples. A row that cannot be used is a ValueError: its place, its column, what is wrong.

    read:    i -> row i, a dict
    where:   i -> its place, for messages
    cfg:     a Config or EvalConfig
    columns: where to look for images, in this order
    folder:  what file names are relative to; None where no files belong to the data
    """

    def __init__(self, read, length, where, cfg, columns, folder=None):
        self.read, self.length, self.where, self.cfg, self.columns, self.folder = read, length, where, cfg, columns, folder

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.example(i)

    def example(self, i, pixels=True):
        """Row i as an Example. pixels=False finds its images without opening them."""
        row, where = self.read(i), self.where(i)
        problem, answer = (text(row, column, where) for column in (self.cfg.problem_column, self.cfg.answer_column))
        column = next((column for column in self.columns if row.get(column)), None)
        sources, images = row.get(column, []), []
        for number, source in enumerate(sources if isinstance(sources, list) else [sources], 1):
            try:
                source = locate(source, where, self.folder)
                images.append(resize(open_image(source, where), self.cfg.min_pixels, self.cfg.max_pixels) if pixels else source)
            except ValueError as error:
                raise ValueError(f"{error} (column {column}, number {number})") from error
        if not images and self.cfg.text_only == "refuse":
            names = " or ".join(self.columns)
            raise ValueError(f"{where}: no image in column {names} (found {', '.join(row)}): --text_only train keeps it")
        return Example(images, join_prompt(problem, self.cfg.instruction), answer, where)


def text(row, column, where):
    """A row's problem or answer."""
    value = row.get(column)
    if not isinstance(value, (str, int, float)) or value != value or not str(value).strip():
        raise ValueError(f"{where}: no {column}, which must be a text or a number (found {', '.join(row)})")
    return str(value)


def join_prompt(problem, instruction):
    """The question, a blank line, the instruction (paper, Section 4)."""
    return f"{problem}\n\n{instruction}" if instruction else problem


def locate(source, where, folder=None):
    """An entry of an image column (file name, bytes, {"bytes", "path"}, PIL image) -> existing path, bytes or PIL image."""
    if isinstance(source, dict):  # as `datasets` stores an image; one kept as a file has a path and no bytes
        source = source.get("bytes") or Path(source.get("path") or "")
    elif isinstance(source, str) and folder is None:
        raise ValueError(f"{where}: text where an image should be: {source[:80]!r}")
    if isinstance(source, (str, Path)):
        path = Path(folder or "", source)
        if not os.path.isfile(path):
            raise ValueError(f"{where}: image {str(source)[:80]!r} does not exist{f' in {folder}' if folder else ''}")
        return path
    if not isinstance(source, (bytes, Image.Image)):
        raise ValueError(f"{where}: {type(source).__name__} where an image should be")
    return source


def open_image(source, where):
    """A path, bytes or PIL image -> upright RGB image, transparency on white; ValueError if it does not open."""
    try:
        image = source
        if not isinstance(source, Image.Image):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 bits, or 32 and floats of unknown range: to 8, where convert would clip
            pixels = np.nan_to_num(np.asarray(image, np.float32))
            top = 65535 if image.mode.startswith("I;16") else max(pixels.max(), 1)
            image = Image.fromarray((pixels * (255 / top)).round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow answers damaged files with a dozen kinds of error
        file = f" {source.name!r}" if isinstance(source, Path) else ""
        raise ValueError(f"{where}: image{file} does not open ({reason(error).split(' <')[0]})") from error


def resize(image, min_pixels=0, max_pixels=0):
    """Enlarge or shrink to an area of min_pixels .. max_pixels (0: no limit), bicubic; the aspect as near as whole pixels allow.

    The paper's range is 200,704 .. 1,003,520 (Section 4). It comes before masking: patches are cut from what the model sees.
    """
    area = image.width * image.height
    wanted = min(max(area, min_pixels), max_pixels or math.inf)
    if wanted == area:
        return image
    scale, whole = math.sqrt(wanted / area), math.ceil if wanted > area else math.floor
    width, height = (max(1, whole(round(side * scale, 6))) for side in image.size)
    if max_pixels and width * height > max_pixels:  # of a line one pixel wide the aspect cannot be kept
        width, height = (max_pixels // height, height) if width > height else (width, max_pixels // width)
    return image.resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------
def reason(error):
    """The first line of an error's text, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_jsonl(file, cfg):
    """A metadata.jsonl: one JSON object a line. All but pixels is checked at once, unless bad rows are skipped anyway."""
    lines = [(number, line) for number, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()]
    long = next((number for number, line in lines if len(line) > LINE), None)
    if long:
        raise ValueError(f"{file}, line {long}: longer than {LINE:,} bytes, which no row of texts and file names is")
    if not lines:
        raise ValueError(f"{file} has no rows")

    def where(i):
        return f"{file}, line {lines[i][0]}"

    def read(i):
        try:
            row = json.loads(lines[i][1].decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where(i)}: not JSON in UTF-8 ({reason(error)})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where(i)}: not a JSON object with file_name, {cfg.problem_column}, {cfg.answer_column}")
        return row

    rows = Rows(read, len(lines), where, cfg, [cfg.images_column, "file_names", "file_name"], file.parent)
    for i in range(0 if cfg.skip_bad_rows else len(rows)):
        rows.example(i, pixels=False)
    return rows


@contextlib.contextmanager
def readable(name):
    """Whatever `datasets` raises inside, of a dozen kinds, as an OSError of one sentence.

    No ValueError: a data set out of reach is no bad row, which --skip_bad_rows would pass over.
    """
    try:
        yield
    except Exception as error:
        other = "" if Path(name).exists() else " as a hub data set, and there is no such folder or file"
        raise OSError(f"data '{name}' cannot be read{other}: {reason(error.__cause__ or error)}") from error


class Stream:
    """Position -> row of a data set that is not downloaded but read along, epoch after epoch; going back starts it anew.

    `datasets` shuffles the files, and the rows within a buffer, anew in each epoch, keyed by the seed. Every rank reads the
    whole stream and keeps its own positions; a resumed run reads again what it has had.
    """

    def __init__(self, rows, name):
        self.rows, self.name, self.rest, self.next = rows, name, None, 0

    def endless(self):
        """The rows of all epochs, one after the other."""
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            yield from self.rows

    def __getitem__(self, position):
        if self.rest is None or position < self.next:
            self.rest, self.next = self.endless(), 0
        with readable(self.name):
            row = next(itertools.islice(self.rest, position - self.next, None))
        self.next = position + 1
        return row


def read_tables(name, split, cfg, limit, own):
    """A hub id, or a local file or folder of parquet or arrow, through `datasets`. Arguments as in load_data."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data '{name}' is no folder with metadata.jsonl; all else needs: pip install datasets") from error
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    path, folder = Path(name), None
    if path.exists():
        folder = path if path.is_dir() else path.parent
    with readable(name):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            splits = datasets.load_from_disk(name)
        elif path.is_file():
            splits = datasets.load_dataset(TABLES[path.suffix], data_files=name, streaming=cfg.streaming)
        else:
            splits = datasets.load_dataset(name, streaming=cfg.streaming)
    splits = splits if isinstance(splits, dict) else {"train": splits}
    found = choose(list(splits), split, name, own)
    if found is None:
        return None
    rows, where = splits[found], f"{name} {found}[{{}}]".format
    streaming = isinstance(rows, datasets.IterableDataset)
    if streaming:
        stream = rows.decode(False) if rows.features else rows  # images as the bytes that are stored
        with readable(name):
            head = list(itertools.islice(stream, 1 if limit is None else limit or None))
        read, length = head.__getitem__, len(head)
    else:
        tables = rows.with_format("arrow")  # row i as a table of one row, images as the bytes that are stored
        read, length = (lambda i: tables[i].to_pylist()[0]), len(rows)
    if not length:
        raise ValueError(f"data '{name}' has no rows in its split '{found}'")
    columns = list(read(0))
    flags = {"problem": cfg.problem_column, "answer": cfg.answer_column, "images": cfg.images_column}
    for flag, column in flags.items():
        if column not in columns and (flag != "images" or cfg.text_only == "refuse"):
            raise ValueError(f"data '{name}' has no column {column} (found {', '.join(columns)}): give --{flag}_column")
    if streaming and limit is None:
        read, length = Stream(stream.shuffle(seed=cfg.seed, buffer_size=SHUFFLE_BUFFER), name).__getitem__, None
        where = f"{name} {found}, row {{}} of the shuffled stream".format
    elif not streaming and not cfg.skip_bad_rows:  # texts are cheap to check; images wait for their turn
        for i, row in enumerate(rows.select_columns([cfg.problem_column, cfg.answer_column])):
            for column in (cfg.problem_column, cfg.answer_column):
                text(dict.fromkeys(columns) | row, column, where(i))
    return Rows(read, length, where, cfg, [cfg.images_column], folder)


# ---------------------------------------------------------------------------------------------------------------------
# Which data set, which split, which row
# ---------------------------------------------------------------------------------------------------------------------
def choose(splits, split, name, own):
    """The one of a data set's `splits` that is asked for; None if there is none and nothing depends on it."""
    found = [s for s in splits if s in ((split, "validation") if split == "val" else (split,))]
    if not found and own and len(splits) == 1:
        found = splits
    if not found and (own or split == "train"):
        raise ValueError(f"data '{name}' has no split '{split}' (found {', '.join(splits)})")
    return found[0] if found else None


def load_data(name, split, cfg=None, limit=None, own=False):
    """A sequence of Examples; None where the data set has no such split, for there is nothing to evaluate on.

    cfg:   a Config or EvalConfig; the laptop's tasks need none
    limit: with --streaming, how many rows to keep for evaluation (0: all); None streams without end, for training
    own:   the data set was named for this purpose: if it has a single split, that one, and if it has no such split, an error

    Raises ValueError, ImportError or OSError of one sentence for what cannot be read.
    """
    if name == "digits":
        return Digits(split)
    if name in REGIMES:  # the same scenes for all four; the regimes differ in the policy that they start from (laptop/scenes.py)
        return Scenes(split)
    path = Path(name)
    if path.is_dir():
        files = {file.parent.name: file for file in sorted(path.glob("*/metadata.jsonl"))}
        if (path / "metadata.jsonl").exists():
            files = {"train": path / "metadata.jsonl"} | files
        if not files and not any(file.suffix in TABLES for file in path.rglob("*")):
            raise ValueError(f"data folder '{name}' has no metadata.jsonl, and no parquet or arrow file")
    else:
        files = {"train": path} if path.suffix == ".jsonl" and path.is_file() else {}
    if files:
        found = choose(list(files), split, name, own)
        return read_jsonl(files[found], cfg) if found else None
    hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not (path.is_dir() or path.is_file() and path.suffix in TABLES or hub):
        known = f"digits, {', '.join(REGIMES)}, an existing folder, a .jsonl, .parquet or .arrow file, or a hub id OWNER/NAME"
        raise ValueError(f"data '{name}' is unknown: give {known}")
    return read_tables(name, split, cfg, limit, own)


def sources(cfg):
    """What a run reads for training, validation and test: load_data's (name, split, limit, own); None for what it does not use."""
    val = (cfg.val_data or cfg.data, "val", cfg.eval_prompts, bool(cfg.val_data)) if cfg.eval_every else None
    test = (cfg.test_data or cfg.data, "test", cfg.test_prompts, bool(cfg.test_data)) if cfg.test_prompts else None
    return [(cfg.data, "train", None, False), val, test]


def load_source(source, cfg):
    """The data set of one of the `sources`. The images that evaluation will need are opened, so that a broken one is found in time.

    On several GPUs each process opens its share. With --skip_bad_rows broken ones are left out when their turn comes.
    """
    dataset = load_data(*source[:2], cfg, *source[2:]) if source else None
    if isinstance(dataset, Rows) and source[2] is not None and not cfg.skip_bad_rows:
        rank, ranks = (int(os.environ.get(name, number)) for name, number in (("RANK", 0), ("WORLD_SIZE", 1)))
        for i in range(rank, min(source[2] or len(dataset), len(dataset)), ranks):
            dataset.example(i)
    return dataset


if __name__ == "__main__":
    sys.exit("data.py is no program: python train.py --data DATA --dry_run checks a data set")
