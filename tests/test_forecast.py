"""lab/forecast.py and lab/sketch.py: sketches without bias, numbers by hand and against whole gradients, limits, words, the command."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from forecast_worker import LARGE
from processes import ONE_THREAD, ROOT, python

import model
from lab import forecast, runs, validate
from lab.experiments import CELLS, method, settings_of
from lab.experiments import Flags as ExperimentFlags
from lab.forecast import (
    KINDS,
    METHODS,
    UNTOLD,
    Flags,
    add_batch,
    estimates,
    intervals,
    main,
    measure,
    needed,
    report,
    weights_of,
)
from lab.runs import token_kinds
from lab.sketch import SIZE, Tally, moments, sketch
from laptop import digits, scenes, tiny
from model import Policy
from prompts import encode
from rollout import generate
from vppo import Batch
from vppo import measure as measure_batch

NAMES = list(METHODS)


def sketched(vector, *sizes, **words):
    """The sketch of a gradient that is cut into weights of these numbers of entries."""
    parameters = [torch.nn.Parameter(torch.zeros_like(piece)) for piece in vector.split(sizes or len(vector))]
    for parameter, piece in zip(parameters, vector.split(sizes or len(vector))):
        parameter.grad = piece
    return sketch(parameters, **words)


def small_policy():
    """A tiny model of random weights with one layer in either tower: fewer weights than LARGE."""
    processor = tiny.build_processor()
    return Policy(tiny.build_model(processor, **tiny.RECIPE | {"layers": 1, "vision_layers": 1}), processor).train()


def answered(policy, groups=5, group_size=3):
    """A measured batch of random responses, with made-up rewards that differ in each group."""
    examples = [digits.Digits("val")[i] for i in range(groups)]
    torch.manual_seed(0)
    rollout = generate(policy, [encode(policy.processor, example) for example in examples], group_size, 6)
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0])
    return Batch(rollout, examples, list(range(groups)), rewards)


def lottery(response, example, cfg):
    """A reward of 0 or 1 for anything: a policy of random weights is never right, and a forecast needs groups that differ."""
    return float(sum(map(ord, response)) % 2)


# ---------------------------------------------------------------------------------------------------------------------
# Sketches
# ---------------------------------------------------------------------------------------------------------------------
def test_products_of_sketches_have_no_bias_and_the_spread_that_is_said():
    """Vectors without negative entries are the hard case: folded without random signs their product would be 10 times too large."""
    x, y = torch.rand(2, 1010, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = torch.stack([sketched(x, 1000, 10, size=101, seed=seed) @ sketched(y, 1000, 10, size=101, seed=seed) for seed in range(300)])
    errors = (products - x @ y) / (x.norm() * y.norm())
    assert abs(errors.mean()) < 3 * errors.std() / 300**0.5 and 0.05 < errors.std() < 1.1 * (2 / 101) ** 0.5


def test_a_large_sketch_is_exact_and_every_sketch_is_linear():
    x, y = torch.randn(2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sketched(x, 200, 300, size=500) @ sketched(y, 200, 300, size=500) == pytest.approx(x @ y)
    assert torch.allclose(sketched(2 * x + y, size=7), 2 * sketched(x, size=7) + sketched(y, size=7))
    assert not torch.allclose(sketched(x, size=7), sketched(x, size=7, seed=1))


def test_a_column_of_a_weight_does_not_fold_onto_itself():
    """One heavy input of a layer: entries 4,096 apart. Modulo 65,536 they would meet in 16 numbers."""
    x = torch.zeros(512, 4096)
    x[:, 5] = 1
    errors = {size: [sketched(x.flatten(), size=size, seed=seed).square().sum() / 512 - 1 for seed in range(4)] for size in (SIZE, 2**16)}
    assert max(map(abs, errors[SIZE])) < 0.02 < 0.1 < torch.tensor(errors[2**16]).square().mean() ** 0.5


def test_weights_without_gradient_keep_their_place():
    used, unused = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))
    used.grad = torch.tensor([1.0, 2, 3])
    folded = sketch([unused, used], size=10)
    assert folded.abs().tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Estimates
# ---------------------------------------------------------------------------------------------------------------------
def test_moments_by_hand():
    """Two blocks: in one the sum of two groups' gradients, in the other a single one. Row 1 has the first coordinate only."""
    tally = Tally(2, 2, 3, torch.float64)
    tally.add(0, torch.tensor([[3.0, 1], [3, 0]]), groups=2)
    tally.add(2, torch.tensor([[1.0, 0], [1, 0]]))
    tally.gathered()
    assert tally.counts.tolist() == [[2, 1], [2, 0]]  # the block between stayed empty
    signal, align, trace, cov = moments(tally, tally.grams(), torch.ones(1, 2).double())
    # |mu|^2 = 2 <(3,1), (1,0)> / (9 - 4 - 1) = 1.5; E|g|^2 = (10 + 1 - 2 * 1.5) / 3 = 8/3
    assert signal.flatten().tolist() == [1.5, 1.5] and align.flatten().tolist() == [1.5, 1.5]
    # row 1: (9 + 1 - 2 * 1.5) / 3 = 7/3, and <(3,0), (3,1)> + <(1,0), (1,0)> = 10 as well
    assert trace.flatten().tolist() == pytest.approx([8 / 3 - 1.5, 7 / 3 - 1.5]) and cov[1].item() == pytest.approx(7 / 3 - 1.5)


def synthetic(g, groups, tally):
    """A tally of gradients g (M, groups, size), added four at a time, in turn to all blocks."""
    for i in range(0, groups, 4):
        tally.add(i // 4 % tally.sums.shape[1], g[:, i : i + 4].sum(1), 4)
    return tally.gathered()


def test_estimates_are_right_and_intervals_cover():
    """Gaussian gradients of known mean and covariance: TAS doubles, TGF and 80/20 keep some weights, "random" is half noise."""
    generator, size, N, b, scale, runs = torch.Generator().manual_seed(0), 30, 320, 16, 60, 60
    spread = torch.linspace(2, 0.2, size).double()
    mu = torch.ones(size).double() * spread.norm() / (scale * size) ** 0.5
    keep, few, whole = (torch.arange(size) >= 8).double(), (torch.arange(size) < 10).double(), torch.ones(size).double()

    def progress(part, trace):
        return (part * mu @ mu / ((part * mu).square().sum() + trace / b).sqrt()).item()

    trace = lambda part: (part * spread).square().sum()  # noqa: E731
    truth = {"TGF": progress(keep, trace(keep)), "80/20": progress(few, trace(few)), "random": progress(whole / 2, trace(whole) / 2)}
    truth = {name: value / progress(whole, trace(whole)) for name, value in truth.items()} | {"TAS": 1.0}
    hits, told, signals, dropped, cosine = dict.fromkeys(truth, 0), 0, [], [], []
    for _ in range(runs):
        z, other = torch.randn(2, N, size, generator=generator, dtype=torch.float64) * spread
        g = z + mu
        rows = torch.stack([g, 2 * g, keep * g, 3 * keep * g, few * g, (g + other) / 2])
        e = intervals(synthetic(rows, N, Tally(6, size, dtype=torch.float64)), b, 300)
        for name, value in truth.items():
            hits[name] += e[name]["progress"][1] - 1e-9 <= value <= e[name]["progress"][2] + 1e-9
        told += e["random"]["progress"][2] < 1
        signals.append(scale * e["DAPO"]["signal / noise"][0])
        dropped.append(e["VPPO"]["dropped"][0])
        cosine.append(e["80/20"]["cosine"][0])
        assert e["VPPO"]["progress"] == pytest.approx(e["TGF"]["progress"]) and e["TAS"]["dropped"][0] == pytest.approx(0)
    assert min(hits.values()) >= 0.85 * runs and hits["TAS"] == runs, hits
    assert told > 0.8 * runs  # and they are narrow enough to tell half signal, half noise from DAPO
    signals = torch.tensor(signals)  # with a block's products with itself the mean would be (1 + scale / N) times as large
    assert abs(signals.mean() - 1) < 3 * signals.std() / runs**0.5 < 0.1
    assert sum(dropped) / runs == pytest.approx(1 - (trace(keep) / trace(whole)).item(), abs=0.01)
    assert sum(cosine) / runs == pytest.approx(3**-0.5, abs=0.05)


def test_against_whole_gradients(monkeypatch):
    """Each group's gradient by itself, in full, and the definitions of the numbers, with a block counted twice and one not at all."""
    monkeypatch.setattr(forecast, "AT_ONCE", 1)
    policy = small_policy().double()
    batch, cfg = answered(policy), Flags(groups=100, group_size=3, tokens_per_batch=100)  # pieces smaller than a group
    measure_batch(policy, batch, cfg)
    weights, parameters = weights_of(batch, cfg, policy), list(policy.parameters())
    assert sum(p.numel() for p in parameters) < LARGE
    tally, approximate = Tally(6, LARGE, 5, torch.float64), Tally(6, SIZE, 5, torch.float64)
    assert add_batch(tally, policy, batch, weights, cfg, 0) == add_batch(approximate, policy, batch, weights, cfg, 0) == 5
    full = []
    for token_mask, advantages in weights:
        for q in range(5):
            rows = slice(3 * q, 3 * q + 3)
            logprobs, _ = policy([batch.rollout.prompts[q]], batch.rollout.response_ids[rows], *[batch.rollout.response_mask[rows]] * 2)
            value = -(logprobs * token_mask[rows] * advantages[rows, None]).sum()  # the gradient of -m A r at r = 1
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
            full.append(torch.cat([torch.zeros_like(p).flatten() if x is None else x.flatten() for x, p in zip(grads, parameters)]))
    full = torch.stack(full).reshape(6, 5, -1)
    G = torch.einsum("mqp,nrp->mnqr", full, full)  # products of any two
    counts = torch.tensor([[1.0] * 5, [2, 0, 1, 1, 1]]).double()
    result = estimates(tally, NAMES, 16, tally.grams(), counts)
    for r, c in enumerate(counts.long().tolist()):
        drawn = [q for q in range(5) for _ in range(c[q])]
        pairs = [(a, b) for a in drawn for b in drawn if a != b]
        mean = lambda m, n: (sum(G[m, n, a, b] for a, b in pairs) / len(pairs)).item()  # noqa: E731
        own = lambda m, n: G[m, n].diagonal()[drawn].mean().item()  # noqa: E731
        for m, name in enumerate(NAMES):
            q = {key: value[r].item() for key, value in result[name].items()}
            trace, plain = own(m, m) - mean(m, m), own(0, 0) - mean(0, 0)
            assert q["signal / noise"] == pytest.approx(mean(m, m) / trace, rel=1e-5)
            assert q["variance / DAPO's"] == pytest.approx(trace / plain, rel=1e-5)
            ratio = (mean(0, 0) + plain / 16) / (mean(m, m) + trace / 16)
            if ratio > 0:
                assert q["progress"] == pytest.approx(mean(m, 0) / mean(0, 0) * ratio**0.5, rel=1e-4)
            same = NAMES.index({"TAS": "DAPO", "VPPO": "TGF"}.get(name, name))
            assert q["dropped"] == pytest.approx(1 - (own(same, 0) - mean(same, 0)) / plain, rel=1e-5, abs=1e-6)
    assert result["80/20"]["dropped"][0] > 0.3  # and the numbers are not all the same
    grams, folded = tally.grams(), approximate.grams()
    size = grams[0].diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert ((grams - folded)[0].abs() < 4 * (2 / SIZE) ** 0.5 * size).all()


def test_without_a_filter_and_with_alpha_1_all_are_dapo():
    policy = small_policy()
    batch, cfg = answered(policy), Flags(groups=100, group_size=3, k=1.0, beta_min=1.0)
    measure_batch(policy, batch, cfg)
    tally = Tally(6, 1009, 5)
    add_batch(tally, policy, batch, weights_of(batch, cfg, policy), cfg, 0)
    assert tally.counts[0].tolist() == [4, 1, 0, 0, 0]  # AT_ONCE groups together
    for m in (NAMES.index("TAS"), NAMES.index("TGF"), NAMES.index("VPPO"), NAMES.index("random")):
        assert torch.equal(tally.sums[m], tally.sums[0]) and torch.equal(tally.products[:, m], tally.products[:, 0])
    assert not torch.equal(tally.sums[NAMES.index("80/20")], tally.sums[0])
    e = intervals(tally.gathered(), 16, 50)
    for name in ("TAS", "TGF", "VPPO", "random"):
        assert e[name]["progress"][0] == pytest.approx(1) and e[name]["dropped"][0] == pytest.approx(0)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of token
# ---------------------------------------------------------------------------------------------------------------------
def test_kinds_of_a_response():
    words = " okay| :| top| three| five| ,| bottom| so| 3| +| 5| =| 8| yes| \\boxed{|8|}".split("|")
    kinds = ["first words"] * 3 + ["digits read"] * 2 + ["fillers", "positions", "fillers", "numbers", "operators", "numbers", "operators"]
    assert token_kinds(scenes, words) == kinds + ["numbers", "relations", "fillers", "numbers", "fillers"]
    assert token_kinds(scenes, " i| guess| :| -3| }".split("|")) == ["first words"] * 3 + ["numbers", "fillers"]  # it reads nothing
    assert token_kinds(scenes, [" well", " well"]) == ["first words"] * 2 and token_kinds(scenes, []) == []
    assert set(kinds) | {"relations"} == set(KINDS)


def test_kinds_add_up():
    """Shares of variance and alignment add up to 1, in every replicate, and "without it" is the method that drops the kind."""
    policy = small_policy()
    batch, cfg = answered(policy), Flags(groups=100, group_size=3, kinds=True)
    batch.rollout.response_ids[:, 2] = policy.processor.tokenizer.convert_tokens_to_ids(" seven")  # so that some of each stand there
    batch.rollout.response_ids[:, 3] = policy.processor.tokenizer.convert_tokens_to_ids(" 7")
    batch.rollout.response_mask[:] = True
    measure_batch(policy, batch, cfg)
    weights = weights_of(batch, cfg, policy)
    parts = dict(zip(KINDS, weights[len(METHODS) :]))
    assert torch.equal(sum(mask.long() for mask, _ in parts.values()), batch.rollout.response_mask.long())
    assert parts["digits read"][0][:, 2].all() and parts["numbers"][0][:, 3].all() and not parts["numbers"][0][:, 2].any()
    rest = ~parts["first words"][0] & batch.rollout.response_mask, weights[0][1]
    tally = Tally(len(weights), 1009, 5, torch.float64)
    add_batch(tally, policy, batch, weights, cfg, 0)
    other = Tally(len(weights), 1009, 5, torch.float64)
    add_batch(other, policy, batch, [weights[0], weights[1], rest, *weights[3:]], cfg, 0)  # in the place of TGF
    counts = torch.ones(1, 2).double()
    e, direct = (estimates(t, [*METHODS, *KINDS], 16, t.grams(), counts) for t in (tally.gathered(), other.gathered()))
    for share in ("variance", "alignment"):
        assert sum(e[kind][share].item() for kind in KINDS) == pytest.approx(1, abs=1e-4)
    expected = direct["TGF"]["progress"].item()
    assert e["first words"]["progress without it"].item() == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------
def test_several_processes_count_the_same(tmp_path):
    """Five groups, 3 and 2 on two ranks. With --shard the i-th groups of the ranks are one vector."""
    policy = small_policy()
    model.save(policy, tmp_path / "model")
    torch.save(answered(policy), tmp_path / "batch.pt")
    for processes, shard in ((1, []), (2, []), (2, ["--shard"])):
        command = [*python(processes), Path(__file__).with_name("forecast_worker.py"), tmp_path, *shard]
        done = subprocess.run(list(map(str, command)), env=ONE_THREAD, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two, sharded = (torch.load(tmp_path / f"tally-{name}.pt") for name in ("1", "2", "2--shard"))
    same = [m for m, name in enumerate(NAMES) if name != "random"]  # whose tokens a rank draws for itself
    assert one["done"] == two["done"] == sharded["done"] == 5
    assert torch.equal(one["counts"], two["counts"]) and one["counts"][0].tolist() == [1] * 5
    for key in ("products", "grams"):
        x, y = one[key][:, same], two[key][:, same]
        assert (x - y).abs().max() < 1e-5 * x.abs().max() and x.abs().max() > 1e-3
    assert sharded["counts"].tolist() == [[2, 2, 1], [2, 2, 0]]
    G = one["grams"][:, same]  # the units are 0 + 3, 1 + 4 and 2
    together = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]).double()
    expected, found = together @ G @ together.T, sharded["grams"][:, same]
    assert (expected - found).abs().max() < 4 * (2 / LARGE) ** 0.5 * expected.abs().max()
    assert torch.allclose(found.diagonal(dim1=2, dim2=3).sum(-1), sharded["products"][:, same].sum(-1), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Words, and the command
# ---------------------------------------------------------------------------------------------------------------------
def test_words():
    signal = [0.01, 0.002, 0.02]
    assert forecast.verdict([1.2, 1.1, 1.3], signal) == "faster" and forecast.verdict([0.8, 0.7, 0.99], signal) == "slower"
    assert forecast.verdict([1.2, 0.9, 1.5], signal) == forecast.verdict([1.2, 1.1, 1.3], [0.01, -0.001, 0.02]) == UNTOLD
    assert forecast.verdict([0.9, 0.8, 0.996], signal) == UNTOLD  # printed, it reaches 1.00
    assert needed(100, [0.9, 0.8, 0.996], 1, 0.005) == "about 100"  # a few more
    assert forecast.noise_scale([0.01, 0.005, 0.02]) == "100 [50, 200]" and forecast.noise_scale([0.01, -0.005, 0.02]) == "above 50"
    assert forecast.noise_scale([-0.01, -0.02, -0.005]) == UNTOLD
    assert needed(100, [1.2, 0.8, 1.5], 1) == "about 400" and needed(100, [0.9, 0.7, 1.2], 1) == "about 900"
    assert needed(100, [1.0, 0.9, 1.1], 1) == "more than 10,000" and forecast.cell([-1e-9, 0, 1]) == "0.00 [0.00, 1.00]"


def of_known_signal(scale, kinds=False):
    """Intervals and facts of Gaussian gradients with this noise scale; TGF drops most of the noise."""
    generator, size = torch.Generator().manual_seed(0), 20
    noise = torch.randn(400, size, generator=generator, dtype=torch.float64)
    mu = torch.zeros(size).double()
    mu[:5] = (size / scale / 5) ** 0.5
    g, keep = noise + mu, (torch.arange(size) < 5).double()
    rows = torch.stack([g, g, keep * g, keep * g, g, g] + [keep * g, (1 - keep) * g, *[0 * g] * 5] * kinds)
    e = intervals(synthetic(rows, 400, Tally(len(rows), size, dtype=torch.float64)), 16, 300)
    return e, {"groups": 400, "prompts": 800, "reward": 0.25, "kept": [1.0] * len(rows), "kept by TGF": dict.fromkeys(KINDS, 0.5)}


def test_a_report_tells_what_it_can():
    text = report(*of_known_signal(20, kinds=True), 16)
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in text.splitlines() if row.startswith("|")}
    assert list(cells) == ["method", "---", *METHODS, "kind", *KINDS] and all(len(row) == 6 for row in cells.values())
    assert cells["DAPO"][-1] == "the measure" and cells["TGF"][-1] == "faster" and cells["TAS"][-1] == UNTOLD
    assert cells["TGF"][2].startswith("0.7") and cells["first words"][-1] == "slower" and cells["digits read"][-1] == "faster"
    assert "VPPO is predicted to progress faster than DAPO: 1." in text and "Whether TAS progresses faster or slower than DAPO" in text
    assert "400 groups with different rewards, from 800 prompts of mean reward 0.25" in text


def test_a_report_without_signal_says_so():
    text = report(*of_known_signal(10**6), 16)
    assert "DAPO's own signal cannot be told from 0 with 400 groups" in text and "faster" not in text and "slower" not in text
    assert "above" in text.split("| DAPO |")[1].split("\n")[0] or UNTOLD in text.split("| DAPO |")[1].split("\n")[0]


@pytest.fixture
def raw_folder(tmp_path):
    """A model folder with random weights."""
    model.save(small_policy(), tmp_path / "model")
    return str(tmp_path / "model")


QUICK = ["--data", "digits", "--groups", "16", "--max_new_tokens", "6", "--prompts_per_step", "8"]


def test_the_command(raw_folder, tmp_path, capsys):
    words = ["--model", raw_folder, *QUICK, "--kinds", "--output", str(tmp_path / "out")]
    e = main(words, reward=lottery)
    text, result = (tmp_path / "out" / "forecast.md").read_text(), json.loads((tmp_path / "out" / "forecast.json").read_text())
    assert list(e) == list(result["rows"]) == [*METHODS, *KINDS] and f"    python -m lab.forecast --model {raw_folder}" in text
    facts = result["facts"]
    assert facts["groups"] == 16 and facts["prompts"] >= 16 and 0.3 < facts["reward"] < 0.7 and facts["prompts_per_step"] == 8
    kept = dict(zip(e, facts["kept"]))
    assert kept["DAPO"] == kept["TAS"] == 1 and 0.4 < kept["TGF"] == kept["VPPO"] == kept["random"] < 0.6 and 0.2 < kept["80/20"] < 0.4
    assert sum(kept[kind] for kind in KINDS) == pytest.approx(1)
    assert sum(kept[kind] * facts["kept by TGF"][kind] for kind in KINDS) == pytest.approx(kept["TGF"])
    assert "| first words |" in capsys.readouterr().out
    assert json.dumps(main(words, reward=lottery)) == json.dumps(e)  # a seed gives the same numbers again


def test_data_that_end(raw_folder):
    """Twelve prompts, each seen once: no prompt is another one, and a forecast is made of the groups there are."""
    policy = small_policy()
    cfg = Flags(groups=100, group_size=4, prompts_per_step=8, max_new_tokens=4)
    tally, facts = measure(policy, digits.Digits("train", length=12), cfg, lottery, size=1009)
    assert facts["prompts"] == 12 and facts["groups"] == tally.counts[0].sum() <= 12


def test_data_without_signal(raw_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "PATIENCE", 8)
    sentence = "--data digits has too little signal for this model: of 8 prompts 0 had responses of different rewards"
    with pytest.raises(ValueError, match=sentence):
        main(["--model", raw_folder, *QUICK, "--output", str(tmp_path / "out")], reward=lambda *_: 0.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, word", [
    ("--groups 15", "--groups"), ("--data nowhere", "data 'nowhere' is unknown"), ("--model nowhere/x/y", "nowhere/x/y"),
    ("--model tiny-large", "has no recipe"), ("--kinds --data rows.jsonl", "--kinds knows the words"), ("--shard", "torchrun"),
    ("--config nowhere.json", "--config nowhere.json"), ("--group 20", "--group"), ("--k 0", "--k"),
])  # fmt: skip
def test_bad_flags(flags, word, tmp_path):
    with pytest.raises(ValueError, match=word) as error:
        main([*flags.split(), "--output", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_bad_flag_ends_the_command_with_one_sentence():
    words = [*python(0), "-m", "lab.forecast", "--groups", "3"]
    done = subprocess.run(words, env=ONE_THREAD, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.strip() == "lab.forecast: --groups must be from 16 to 1,000,000, got 3"


def test_the_docs_have_the_tables_of_the_records():
    text = (ROOT / "docs" / "forecast.md").read_text()
    records = "".join((ROOT / "results" / f"forecast-{data}" / "forecast.md").read_text() for data in ("digits", "scenes"))
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) == 4 + len(METHODS) + len(KINDS) and [row for row in rows if row not in records] == []


# --- lab.validate ----------------------------------------------------------------------------------------------------
def test_progress_from_a_forecasts_rows_is_its_own():
    for data in ("digits", "scenes"):
        record = json.loads((runs.ROOT / f"results/forecast-{data}/forecast.json").read_text())
        rows, b = record["rows"], record["facts"]["prompts_per_step"]
        for name in validate.METHODS:
            assert validate.progress(rows[name], rows["DAPO"], b) == pytest.approx(rows[name]["progress"][0], rel=1e-6)
    row = {"cosine": [0.9], "signal / noise": [0.1]}
    assert validate.progress(row, row, 7) == pytest.approx(0.9)


def planted(folder, gains):
    """Forecasts and records of two cells and three methods, in which a method gains gains[method] points at every seed, give or take one."""
    for data in ("scenes", "scenes-honest"):
        rows = {name: {"cosine": [c], "signal / noise": [0.1], "progress": [c, c - 0.01, c + 0.01]}
                for name, c in (("DAPO", 1.0), ("TAS", 0.7), ("TGF", 0.9), ("VPPO", 1.1), ("80/20", 0.2), ("random", 0.3))}  # fmt: skip
        (folder / f"forecast-{data}").mkdir()
        (folder / f"forecast-{data}" / "forecast.json").write_text(json.dumps({"rows": rows, "facts": {"prompts_per_step": 16}}))
        for name, gain in gains.items():
            for seed in range(3):
                settings = settings_of(method(name, **CELLS[data]), seed, ExperimentFlags()) | {"base": "planted"}
                test = 0.5 + gain / 100 + (seed % 2) * 0.01 * (name != "dapo")
                runs.file_of(settings, folder / "runs").write_text(json.dumps({"identity": runs.identity(settings), "test": test}))


@pytest.mark.parametrize("gains, expected", [((-3, 0, 3), 1), ((3, 0, -3), -1)])
def test_the_forecast_is_compared_with_the_runs(gains, expected, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    planted(tmp_path, dict(zip(("dapo", "tas", "tgf", "vppo"), (0, *gains))))
    validate.main(["--output", str(tmp_path), "--seeds", "4"])
    result = json.loads((tmp_path / "forecast_validation.json").read_text())
    rho, low, high = result["correlation"]
    assert len(result["points"]) == 6 and all(len(point["differences"]) == 3 for point in result["points"])
    assert rho == pytest.approx(expected) and low <= rho <= high and (low > 0) == (expected > 0)
    assert "TAS, TGF, VPPO: rank correlation over 6 points" in capsys.readouterr().out


def test_a_validation_without_runs_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="4 are the least"):
        validate.main(["--output", str(tmp_path)])
