"""The digits task: pools, answers, pictures, wordings; and where a run reads it."""

from collections import Counter

import numpy as np
import pytest

import reward
from laptop import digits, tiny
from laptop.digits import KIND_SHARE, KINDS, POOLS, WORDS, Digits, write_drill, write_response
from prompts import example_at


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
    with np.load(digits.ASSET) as file:
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
    assert digits.solve("yesno", (4, 9, 4))[0] == "no" and digits.solve("difference", (2, 0, 9))[0] == "-7"


def test_kinds_and_wordings_occur_as_stated(many):
    counts = Counter(example.kind for example in many)
    for kind, share in zip(KINDS, KIND_SHARE):
        assert abs(counts[kind] / len(many) - share) < 4 * (share * (1 - share) / len(many)) ** 0.5  # standard errors
    assert len({example.problem for example in many}) == sum(len(wordings) for wordings in digits.QUESTIONS.values())


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
        assert not any(digits.is_reading(word) for word in response.split())
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
        assert digits.is_reading(word) and not digits.is_computed(word)
    for word in ("3", " 3", "-4", " 17", "+", " -", "yes", " no", "larger", " smaller", "equal"):
        assert digits.is_computed(word) and not digits.is_reading(word)
    for word in ("so", " answer", "threes", ".", "\\boxed{", "}", "<|im_end|>", "", "\n", "--x"):
        assert not digits.is_reading(word) and not digits.is_computed(word)
    rng = np.random.default_rng(0)
    for i in range(50):
        tokens = processor.tokenizer.tokenize(write_response(Digits("val")[i], rng))
        assert sum(map(digits.is_reading, tokens)) == 3 and sum(map(digits.is_computed, tokens)) >= 4


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
