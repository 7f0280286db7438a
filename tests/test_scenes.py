"""The scenes task: pools, answers, pictures, wordings, and the vocabulary of its tiny model."""

from collections import Counter

import numpy as np
import pytest

import reward
from data import load_data
from laptop import scenes, tiny
from laptop.digits import POOLS, WORDS, Digits
from laptop.scenes import KIND_SHARE, KINDS, SHAPES, Scenes, write_drill, write_response
from prompts import Example


@pytest.fixture(scope="module")
def many():
    """1,500 training examples."""
    task = Scenes("train")
    return [task[i] for i in range(1500)]


def test_pools_are_the_digits_task_s():
    for split in POOLS:
        assert np.array_equal(Scenes(split).images, Digits(split).images)  # disjoint: tests/test_digits.py
        assert np.array_equal(Scenes(split).labels, Digits(split).labels)


def same(a, b):
    return (a.problem, a.answer, a.digits, a.kind, a.asked, a.name) == (b.problem, b.answer, b.digits, b.kind, b.asked, b.name) and (
        a.images[0].tobytes() == b.images[0].tobytes()
    )


def test_an_index_is_always_the_same_example():
    first, second = Scenes("train"), Scenes("train")
    for i in (0, 7, 2**30, 2**31 - 2):
        second[i + 1]  # what was asked before changes nothing
        assert same(first[i], second[i])
    assert len({Scenes(split)[i].images[0].tobytes() for split in POOLS for i in range(40)}) == 120
    assert Scenes("val")[5].name == "scenes val[5]"
    assert isinstance(load_data("scenes", "val"), Scenes) and len(load_data("scenes", "test")) == 512
    with pytest.raises(IndexError):
        Scenes("val", 5)[5]
    with pytest.raises(ValueError, match="scenes has no split 'dev'"):
        Scenes("dev")


def solved(problem, rows):
    """An independent solver: the answer from the problem's text and the digits alone."""
    if "how many" in problem or "count" in problem:
        return str(sum(digit in (6, 7, 8, 9) for row in rows for digit in row))
    (row,) = (row for name, row in zip(["top", "middle", "bottom"] if len(rows) == 3 else ["top", "bottom"], rows) if name in problem)
    if "add up" in problem:
        return str(sum(row))
    if "minus" in problem or "subtract" in problem:
        return str(row[0] - row[-1])
    return "yes" if row[0] > row[-1] else "no"


def test_answers(many):
    assert solved("add up the middle row . answer in \\boxed{}", [[1, 2, 9], [3, 4, 5], [5, 6, 0]]) == "12"
    assert solved("subtract the last digit of the bottom row from the first .", [[1, 2, 9], [3, 4, 5]]) == "-2"
    for example in many:
        assert example.answer == solved(example.problem, example.digits), example
        assert example.problem.endswith(" answer in \\boxed{}")


def test_shapes_kinds_and_wordings_occur_as_stated(many):
    assert {rows * columns for rows, columns in SHAPES} == {6, 8, 9}
    assert {(len(example.digits), len(example.digits[0])) for example in many} == set(SHAPES)
    counts = Counter(example.kind for example in many)
    for kind, share in zip(KINDS, KIND_SHARE):
        assert abs(counts[kind] / len(many) - share) < 4 * (share * (1 - share) / len(many)) ** 0.5  # standard errors
    assert len({example.problem for example in many}) == 3 * 6 + 2  # three rows, two wordings; counts name no row


def test_pictures_show_the_digits_in_order(many):
    """The nearest mean of training cells reads most unseen cells, each at its own place: the label is what one sees."""

    def cells(examples):
        images = [np.asarray(example.images[0], np.float32)[:, :, 0] for example in examples]
        for image, example in zip(images, examples):
            assert image.shape == (28 * len(example.digits), 28 * len(example.digits[0]))
        cut = [image[y : y + 28, x : x + 28] for image in images for y in range(0, len(image), 28) for x in range(0, image.shape[1], 28)]
        return np.stack(cut).reshape(len(cut), -1), np.array([digit for example in examples for row in example.digits for digit in row])

    train, labels = cells(many[:500])
    means = np.stack([train[labels == digit].mean(axis=0) for digit in range(10)])
    unseen, truth = cells([Scenes("val")[i] for i in range(100)])
    read = ((unseen[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (read == truth).mean() > 0.6  # chance: 0.1


def readings(response, columns):
    """The digits that a response states, as rows."""
    read = [WORDS.index(word) for word in response.split() if word in WORDS]
    return [read[i : i + columns] for i in range(0, len(read), columns)]


def test_answers_follow_what_was_read():
    rng, wrong = np.random.default_rng(0), 0
    for i in range(300):
        example = Scenes("val")[i]
        columns = len(example.digits[0])
        right = write_response(example, rng)
        assert reward.grade(right, example.answer) == 1.0
        assert readings(right, columns) == [list(row) for row in example.digits]
        noisy = write_response(example, rng, misread=1.0)
        assert reward.grade(noisy, solved(example.problem, readings(noisy, columns))) == 1.0
        wrong += readings(noisy, columns) != readings(right, columns)
    assert wrong == 300  # six random digits are right once in a million
    assert len({write_response(example, rng) for _ in range(200)}) > 100


def test_computations_add_up():
    rows = [[3, 5, 2], [0, 7, 9]]
    words = {kind: " ".join(scenes.solve(kind, rows, "top")[1]) for kind in KINDS}
    assert words["sum"] == "top 3 + 5 EQ 8 + 2 EQ 10" and words["count"] == "top 0 + bottom 2 EQ 2"
    assert words["difference"] == "top 3 - 2 EQ 1" and words["yesno"] == "top 3 VERSUS 2 BE larger"
    assert [scenes.solve(kind, rows, "bottom")[0] for kind in KINDS] == ["16", "-9", "2", "no"]


def test_a_guess_reads_nothing_and_is_lucky_where_answers_are_few():
    rng, lucky = np.random.default_rng(0), {kind: [] for kind in KINDS}
    for i in range(400):
        example = Scenes("val")[i]
        response = write_response(example, rng, guess=1.0)
        assert not any(scenes.is_reading(word) for word in response.split())
        lucky[example.kind].append(reward.grade(response, example.answer))
    assert np.mean(lucky["yesno"]) > 0.3 and max(np.mean(lucky["sum"]), np.mean(lucky["difference"])) < 0.2


def test_why_a_wrong_response_is_wrong():
    rng = np.random.default_rng(0)
    for i in range(200):  # what the warm-up teaches is never broken and never miscomputed
        example = Scenes("val")[i]
        for fillers in (0, 6):
            assert scenes.failure(write_response(example, rng, misread=0.4, fillers=fillers), example) == "misread"
            assert scenes.failure(write_response(example, rng, guess=1.0, fillers=fillers), example) == "reads nothing"
    example = Example([], "?", "3", kind="difference", digits=((5, 1, 2), (4, 0, 6)), asked="top")
    cases = {
        "we see : top five one three , bottom four zero six . so top 5 - 3 is 2 . so \\boxed{2}": "misread",
        "okay , i see top five one two , bottom four zero six . so \\boxed{2}": "miscomputed",
        "we see : top five one two , bottom four zero six . top 5 - 2 is 3": "broken form",  # no answer
        "we see : top five one , bottom four zero six . so \\boxed{4}": "broken form",
        "we see : top five one two , middle four zero six . so \\boxed{4}": "broken form",
        "we see : top five one two bottom four zero six . so \\boxed{4}": "broken form",
        "we see : five one two , bottom four zero six . so \\boxed{4}": "broken form",
        "we see : top five one two , bottom four zero page . so \\boxed{4}": "broken form",
        "we guess \\boxed{4}": "reads nothing",
        "": "reads nothing",
    }
    assert {text: scenes.failure(text, example) for text in cases} == cases


def test_a_drill_repeats_itself_with_made_up_digits():
    rng = np.random.default_rng(0)
    for i in range(50):
        example = Scenes("val")[i]
        columns = len(example.digits[0])
        real, *made_up = write_drill(example, rng).split(" ? ")
        assert reward.grade(real, example.answer) == 1.0 and readings(real, columns) == [list(row) for row in example.digits]
        assert len(made_up) == 2 and len({real, *made_up}) == 3
        for text in made_up:
            assert reward.grade(text, solved(example.problem, readings(text, columns))) == 1.0
    assert scenes.knowable(" top", " 7") and not scenes.knowable(" top", " seven")


def test_the_tiny_vocabulary_spells_everything():
    tokenizer, rng = tiny.build_processor(scenes).tokenizer, np.random.default_rng(0)
    for i in range(500):
        example = Scenes("train")[i]
        response = write_response(example, rng)
        for text in (example.problem, response, write_response(example, rng, guess=1.0), write_drill(example, rng)):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        tokens = tokenizer.tokenize(response)
        assert sum(map(scenes.is_reading, tokens)) == sum(map(len, example.digits)) and sum(map(scenes.is_computed, tokens)) >= 4
        assert len(tokens) < 48  # Config's max_new_tokens, of which the end token takes one
    assert tokenizer.unk_token_id in tokenizer("unheard").input_ids  # the check above can fail


def test_each_task_has_a_model_of_its_own():
    assert len({tiny.folder_name(model, task) for model, task in tiny.RECIPES}) == len(tiny.RECIPES)
    assert tiny.folder_name("tiny", "some/folder") == tiny.folder_name("tiny", "digits")
    with pytest.raises(ValueError, match="--model tiny-large has no recipe for --data digits"):
        tiny.folder_name("tiny-large", "digits")
