"""The report of eval.py: majority@k by hand, a page that shows real numbers and trusts no text, and the curves of a run."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import dependency
import eval as evaluation
import loss
import model
import prompts
import report
import reward
from laptop import tiny
from laptop.digits import Digits
from prompts import Example
from rollout import cut

EVIL = '<script>alert("1")</script>'


def boxes(*answers):
    return [r"so \boxed{" + answer + "}" if answer is not None else "no idea" for answer in answers]


@pytest.mark.parametrize(
    "answers, right, expected",
    [
        (["3", "3", "4"], "3", 1.0),
        (["3", "4", "4"], "3", 0.0),
        (["3", "4"], "3", 1 / 2),  # a tie
        (["1", "2", "3"], "3", 1 / 3),
        (["1", "1", "2", "2", "3"], "2", 1 / 2),  # 3 lost, the tie is between the others
        (["1", "2"], "3", 0.0),
        ([None, None, "3"], "3", 1.0),  # silence has no vote
        ([None, "", "3"], "3", 1.0),
        ([None, None], "3", 0.0),
        ([r"\frac{1}{2}", "0.5", "7"], "1/2", 1.0),  # one answer in two spellings
        (["x" * 400, "x" * 400, "3"], "3", 0.0),  # too long to be normalised
    ],
)
def test_majority_by_hand(answers, right, expected):
    rewards = [reward.grade(text, right) for text in boxes(*answers)]
    assert evaluation.majority(boxes(*answers), rewards) == pytest.approx(expected)


class Page(HTMLParser):
    """The tags of a page; the tokens of each response, as (text, S, kept); all text outside of <style>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tokens, self.text, self.open, self.span = [], [], "", [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "img", "br", "rect", "path"):
            self.open.append(tag)
        if attributes.get("class") == "tokens":
            self.tokens.append([])
        self.span = attributes if tag == "span" and "title" in attributes else None

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every tag that opens closes, in order
        self.span = None

    def handle_data(self, text):
        self.text += text if "style" not in self.open else ""
        if self.span:
            self.tokens[-1].append((text, float(self.span["title"].split()[1]), "kept" in self.span["class"].split()))


@pytest.fixture(scope="module")
def policy():
    """A tiny model with random weights that can write a script tag."""
    processor = tiny.build_processor()
    processor.tokenizer.add_tokens([EVIL])
    return model.Policy(tiny.build_model(processor, **tiny.RECIPE | {"layers": 1, "vision_layers": 1}), processor)


def record(policy, number, texts, rewards):
    """What evaluate would keep of a prompt whose responses are these texts."""
    end = policy.processor.tokenizer.eos_token
    ids = [policy.processor.tokenizer(text + end)["input_ids"] for text in texts]
    words = {"number": number, "name": EVIL, "problem": EVIL, "answer": EVIL}
    return words | {"rewards": rewards, "responses": texts, "response_ids": ids}


@pytest.fixture(scope="module")
def made(policy):
    """(dataset, records, page): two prompts x two responses, one of them with the script tag."""
    texts = ["okay , we see three then four .", f" so{EVIL} the answer is", "now we guess it", r" we find two . \boxed{7}"]
    records = [record(policy, q, texts[2 * q : 2 * q + 2], [0.0, 1.0]) for q in (0, 1)]
    dataset = Digits("test")
    return dataset, records, report.page(policy, dataset, records, evaluation.EvalConfig(seed=3), f"model {EVIL}")


def test_the_page_holds_every_response_as_text(policy, made):
    _, records, text = made
    page = Page(text)
    assert page.open == [] and "<script" not in text.lower()
    assert page.text.count(EVIL) == 3 * len(records) + 2  # name, problem and answer of each; a response; the heading
    for response in [response for record in records for response in record["responses"]]:
        assert response + policy.processor.tokenizer.eos_token in page.text
    for row, ids in zip(page.tokens, [ids for record in records for ids in record["response_ids"]], strict=True):
        assert len(row) == len(ids)


def test_the_page_needs_nothing_else(made):
    _, _, text = made
    assert "://" not in text
    tags = Page(text).tags
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    sources = [attributes[name] for _, attributes in tags for name in ("src", "href", "srcset", "data") if name in attributes]
    assert len(sources) == 4  # true and masked, twice
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_shades_and_boxes_are_the_methods_own(policy, made):
    """S by the long way: one response at a time, its masked image drawn here; boxes as TGF chooses them from that."""
    dataset, records, text = made
    rows = Page(text).tokens
    facts = re.findall(r"<b>reward (\S+)</b><br>A (\S+), alpha (\S+)<br>mean S ([^<]+)<", text)
    means = []
    for q, kept_record in enumerate(records):
        example = dataset[q]
        prompt = prompts.encode(policy.processor, example)
        masked = prompts.with_images(policy.processor, prompt, dependency.mask_images(example.images, "blacken", [3, q, 0]))
        for g, ids in enumerate(kept_record["response_ids"]):
            rollout = cut(policy, [prompt], torch.tensor([ids]))
            S = dependency.score(policy, rollout, [masked])["dependency"]
            assert S.max() > 1e-4
            row = rows[2 * q + g]
            assert [s for _, s, _ in row] == pytest.approx(S[0].tolist(), rel=1e-2, abs=1e-6)
            assert [kept for _, _, kept in row] == loss.token_filter(S, rollout.response_mask)[0].tolist()
            means.append(S.mean())
    alpha = loss.shaping_factors(torch.stack(means))  # over all responses of the page
    for i, (shown, advantage, factor, mean) in enumerate(facts):
        assert float(shown) == i % 2 and float(advantage) == pytest.approx(0.7071 * (2 * (i % 2) - 1), abs=0.006)
        assert float(factor) == pytest.approx(alpha[i].item(), abs=0.006)
        assert float(mean) == pytest.approx(means[i].item(), rel=0.02)
    assert len(facts) == 4


def test_large_images_are_shrunk_and_one_response_has_no_advantage(policy):
    big = Image.effect_noise((3000, 1500), 80).convert("RGB")
    dataset = [Example([big, big], "what is it ?", "1")]
    records = [record(policy, 0, ["now we guess it"], [1.0])]
    text = report.page(policy, dataset, records, evaluation.EvalConfig(), "one")
    assert len(text) < 600_000 and "A +0.00, alpha 1.00" in text
    assert sum(tag == "img" for tag, _ in Page(text).tags) == 4


@pytest.mark.parametrize("text", ["a b\n\nc", " \U0001f600 é 漢字", "x\ufffd", ""])
def test_pieces_join_to_the_text(text):
    """With a tokenizer of single bytes, where a character is up to four tokens, and with a leading space."""

    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list(text.encode())
    found = report.pieces(Bytes(), ids)
    assert len(found) == len(ids)
    whole = [piece for piece in found if piece != "\ufffd"]
    assert "".join(whole) == text.replace("\ufffd", "")


def test_eval_writes_page_and_records(policy, tmp_path, capsys):
    model.save(policy, tmp_path / "model")
    file = tmp_path / "new" / "report.html"
    flags = "--prompts 3 --samples 2 --max_new_tokens 6".split()
    evaluation.main(["--model", f"{tmp_path / 'model'}", *flags, "--output", f"{tmp_path / 'out'}", "--report", str(file)])
    page = Page(file.read_text(encoding="utf-8"))
    records = [json.loads(line) for line in Path(tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert [len(row) for row in page.tokens] == [len(ids) for kept in records for ids in kept["response_ids"]]
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    votes = [evaluation.majority(kept["responses"], kept["rewards"]) for kept in records]
    assert result["majority"] == pytest.approx(sum(votes) / 3)
    out = capsys.readouterr().out
    assert "majority@2" in out and str(file) in out


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    step = {"reward": 0.5, "entropy": 1.0, "gradient_tokens": 0.41, "dependency_mean": 0.1, "dependency_std": None}
    lines = [{"step": 1, **step}, {"step": 2, "reward": 0.6}, {"step": 3, **step, "val_avg": 0.4, "val_avg_ci": 0.1}]
    sizes = []
    for some in (lines, lines[:2], lines[1:2]):  # five panels; without validation four; one
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
        report.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as image:
            sizes.append(image.size)
    assert sizes == [(1200, 600), (1200, 600), (400, 300)]
