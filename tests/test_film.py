"""The pictures of the README: a film that changes nothing in the run it shows, and two drawings whose numbers are the method's own."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

# What this file needs of the project, in one place.
import loss
import report
from config import Config
from lab import film
from laptop.digits import Digits
from vppo import train_step

ASSETS = Path(__file__).parent.parent / "assets"
EVIL = '<script>alert("1")</script>&\x00\u202e'
SMALL = {"steps": 2, "prompts_per_step": 4, "group_size": 4, "max_rounds": 1}


def texts(svg):
    """All texts of an SVG file; it must be well-formed and hold nothing that a page would run or load."""
    root = ElementTree.fromstring(svg)
    tags = {element.tag.split("}")[1] for element in root.iter()}
    assert tags <= {"svg", "title", "desc", "style", "defs", "g", "rect", "path", "text", "tspan", "image", "use"}
    links = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]


def response(scene, reward, named, words, **numbers):
    """What `answers` would give for it."""
    numbers = {"mean": 0.1, "alpha": 1.0, "advantages": 0.5} | numbers
    return {"scene": scene, "reward": reward, "looked": bool(named), "named": named, "words": words} | numbers


@pytest.mark.parametrize("output", ["film.webp", "new/film.webp"])
def test_quick_film(tiny_folder, tmp_path, capsys, output):
    film.main(["--quick", "--output", str(tmp_path / output)])
    with Image.open(tmp_path / output) as image:
        assert image.n_frames in (1, 2, 3)  # frames that are equal become one
        assert max(image.size) < 200
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["step   0", "step   1", "step   2"]


def test_the_film_changes_nothing_and_repeats(policy, tiny_folder):
    cfg = Config(**SMALL)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    frames = film.film(policy.train(), cfg, 1, 3)
    after = {name: value.clone() for name, value in policy.state_dict().items()}
    assert any((after[name] != before[name]).any() for name in before)
    policy.load_state_dict(before)
    assert film.film(policy, cfg, 1, 3) == frames
    policy.load_state_dict(before)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    position = 0
    for step in range(cfg.steps):
        _, position, _ = train_step(policy, optimizer, Digits("train"), cfg, step, position)
    assert all((policy.state_dict()[name] == after[name]).all() for name in after)


def test_numbers_are_those_of_the_loss(policy):
    cfg = Config(**SMALL)
    responses = film.answers(policy, Digits("test"), cfg, 3)
    assert [found["scene"] for found in responses] == [0] * 4 + [1] * 4 + [2] * 4
    advantages = loss.group_advantages(torch.tensor([found["reward"] for found in responses]), 4)
    means = torch.tensor([sum(word.S for word in found["words"]) / len(found["words"]) for found in responses])
    assert [found["mean"] for found in responses] == pytest.approx(means.tolist(), rel=1e-4)
    assert [found["alpha"] for found in responses] == pytest.approx(loss.shaping_factors(means).tolist(), rel=1e-4)
    for found, advantage in zip(responses, advantages.tolist()):
        assert found["advantages"] == pytest.approx(advantage)
        S = torch.tensor([[word.S for word in found["words"]]])
        assert [word.kept for word in found["words"]] == loss.token_filter(S, torch.ones_like(S).bool())[0].tolist()
        assert found["looked"] == (max(word.level for word in found["words"]) == 3)


def test_shades_are_those_of_the_report():
    assert film.RANGES == [f"{low:g} to {high:g}" for low, high in zip(report.LEVELS, report.LEVELS[1:])] + [f"above {report.LEVELS[-1]:g}"]
    assert [film.Word("a", S, True).level for S in (0.0, 0.01, 0.099, 0.1, 1.0, 9.0)] == [0, 1, 1, 2, 3, 3]


def test_choices_by_hand():
    words = [film.Word(" a", 0.0, True)]
    data = Digits("test")
    digits = [film.WORDS[digit] for digit in data[1].digits]
    reader, guesser = response(1, 1.0, digits, words), response(1, 1.0, [], words)
    rest = [response(0, 1.0, [], words), response(0, 0.0, digits, words), response(1, 0.0, [], words), response(1, 1.0, ["one"], words)]
    assert film.choose_pair([*rest, guesser, reader], data) == [reader, guesser]
    with pytest.raises(ValueError, match="no question has both"):
        film.choose_pair([*rest, guesser], data)

    def frame(*rewards):
        return {"responses": [response(i // 2, reward, [], words) for i, reward in enumerate(rewards)]}

    # Scene 0 is right from the start, scene 1 stays half right, scene 2 becomes right.
    assert film.choose_scene([frame(1.0, 0.0, 0.0, 1.0, 0.0, 0.0), frame(1.0, 1.0, 1.0, 0.0, 1.0, 1.0)], 2) == 2
    assert film.choose_scene([frame(1.0, 0.0), frame(1.0, 1.0)], 2) == 0


def test_responses_are_text_and_nothing_else():
    words = [film.Word(film.printable(text), S, True) for text, S in ((" we", 0.0), (f" {EVIL}", 2.0), ("}", 0.2))]
    pair = [response(0, 1.0, [], words, alpha=1.2), response(0, 1.0, [], words, alpha=0.8)]
    found = texts(film.spotlight(pair, Digits("test")[0], Config()))
    assert found.count('<script>alert("1")</script>&\ufffd\ufffd') == 2
    assert "The reader has more S, so α lets it count 1.50 times as much." in found
    assert film.draw([{"step": 0, "responses": pair}], 0, 0, Config(group_size=2)).width == 720


def test_lines_are_not_too_wide():
    words = [film.Word(f" {'a' * n}", 0.0, True) for n in (3, 30, 8, 1, 1, 12, 29, 31)]
    placed = film.flow(words, lambda text: 10 * len(text), 320, 5)
    assert [line for *_, line, _ in placed] == [0, 1, 2, 2, 2, 2, 3, 4]
    assert all(x + own <= 320 for _, _, x, _, own in placed)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--every 0", "--every must be"),
        ("--output film.png", "end with .webp"),
        ("--spotlight --output film.webp", "end with .svg"),
        ("--method sft", "--method 'sft' is unknown"),
        ("--steps -1", "--steps must be from 0"),
        ("--frames 3", "--help lists all flags"),
    ],
)
def test_bad_flags(flags, word):
    with pytest.raises(ValueError, match=word):
        film.main(flags.split())


def test_a_bad_flag_is_one_sentence():
    command = [sys.executable, "-m", "lab.film", "--every", "0"]
    done = subprocess.run(command, check=False, cwd=ASSETS.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("lab.film: --every must be at least 1")


def test_the_files_of_the_readme():
    assert (ASSETS / "film.webp").stat().st_size < 1_500_000
    with Image.open(ASSETS / "film.webp") as image:
        assert image.n_frames == 11 and image.size[0] == 720
    for name in ("spotlight.svg", "pipeline.svg"):
        text = (ASSETS / name).read_text(encoding="utf-8")
        assert len(text) < 20_000 and "prefers-color-scheme: dark" in text and texts(text)


def test_the_numbers_of_the_pipeline():
    """The example that the picture computes through, from rewards to weights."""
    found = texts((ASSETS / "pipeline.svg").read_text(encoding="utf-8"))
    A = loss.group_advantages(torch.tensor([1.0, 0.0, 1.0]), 3)
    alpha = loss.shaping_factors(torch.tensor([0.62, 0.56, 0.01]))
    for a, factor in zip(A.tolist(), alpha.tolist()):
        signed = f"{a:+.2f}".replace("-", "−")
        assert signed in found and f"{factor:.2f}" in found
        assert f"1 × {factor:.2f} × {signed.removeprefix('+')} =" in found
        assert f"{factor * a:+.2f}".replace("-", "−") in found
    m = [text for text in found if text in ("0", "1")]
    assert m.count("1") == loss.kept_count(0.4, torch.tensor([12])).item() + 2  # two rewards are 1, too
    assert m.count("0") == 12 - 5 + 1
