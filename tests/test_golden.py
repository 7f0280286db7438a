"""The golden numbers: what training computes today, so that a refactoring can be seen to move nothing.

tests/golden.json holds, for every method and for each setting that changes the arithmetic, the metrics of two steps on the tiny model
with random weights, and checksums of the weights after them. It also holds the defaults of Config, and the checksum of a
warm-up of some steps. Every number is compared to a relative 1e-5. A processor with other instructions rounds otherwise, and a few numbers
amplify rounding beyond that, for Adam's first steps divide a gradient by its own size. Such a number may differ by what rounding alone does
to it: the same case is run again, three times, from weights that differ in their last digit.

Who changes these numbers on purpose raises NUMERICS and writes the file anew: `python tests/test_golden.py`, which refuses to write other
numbers under the same NUMERICS. The records in results/runs carry the number they were made under. Older ones no longer count.
"""

import copy
import json
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402

import reward  # noqa: E402
from config import METHODS, NUMERICS, Config  # noqa: E402
from laptop import (
    digits,  # noqa: E402
    scenes,  # noqa: E402
    tiny,  # noqa: E402
)
from model import Policy  # noqa: E402
from vppo import train_step  # noqa: E402

FILE = Path(__file__).with_name("golden.json")
NOT_GOLDEN = ("seconds", "gradient_signal", "gradient_noise", "noise_scale")  # clocks, and metrics younger than the file
SIZES = dict(prompts_per_step=4, group_size=4, max_new_tokens=8, steps=10)
CASES = {
    **{method: dict(method=method) for method in METHODS},
    "entropy tokens": dict(method="tgf", select="entropy"),
    "random tokens": dict(method="tgf", select="random"),
    "soft": dict(soft=True),
    "mask per rollout": dict(mask_per="rollout"),
    "exact penalty": dict(entropy_penalty=0.06, entropy_form="exact"),
    "sampled penalty": dict(entropy_penalty=0.06, entropy_form="sampled"),
    "1 update": dict(updates_per_rollout=1),
    "3 updates": dict(updates_per_rollout=3),
    "sequence average": dict(average="sequence"),
    "token average, no dynamic sampling": dict(method="vppo_grpo", average="token"),
    "shaped reward": dict(shape="reward"),
    "fixed beta": dict(beta_min=0.8, beta_max=1.2),
    "dual clip": dict(dual_clip=1.001, lr=3e-3, updates_per_rollout=3),
    "small pieces, plain path": dict(tokens_per_batch=100, share_prompt=False),
    "nucleus, temperature": dict(top_p=0.9, temperature=0.8),
    **{f"mask {mask}": dict(mask=mask) for mask in ("noise", "blur", "grey")},
    **{f"metric {metric}": dict(metric=metric) for metric in ("jsd", "drop", "k3")},
    "scenes": dict(data="scenes"),
}
DATA = {"digits": digits.Digits, "scenes": scenes.Scenes}
WARM_UPS = {
    "digits": tiny.RECIPE | dict(scenes=40, batch=8, drill_steps=3, clean_steps=3, noisy_steps=3),
    "scenes": tiny.SCENES | dict(scenes=40, batch=8, see_steps=2, drill_steps=3, clean_steps=3, noisy_steps=3),
}


def checksums(policy, start):
    """Numbers that change when any weight does: the growth of the norm, and how far each part of the model moved from `start`."""
    before, after, moved = 0.0, 0.0, {"visual": 0.0, "language_model": 0.0, "lm_head": 0.0}
    for name, p in policy.named_parameters():
        new, old = p.detach().double(), start[name].double()
        before, after = before + old.square().sum().item(), after + new.square().sum().item()
        moved[next(part for part in moved if part in name)] += (new - old).square().sum().item()
    return {"growth": after**0.5 - before**0.5, "moved": {part: square**0.5 for part, square in moved.items()}}


def tiny_policy(data, cfg):
    """The tiny model of a task with random weights."""
    task = {"digits": digits, "scenes": scenes}[data]
    processor = tiny.build_processor(task)
    model = tiny.build_model(processor, **WARM_UPS[data])
    return Policy(model, processor, cfg.temperature, cfg.share_prompt).train()


def two_steps(settings, blur=None):
    """{"steps": the metrics of two steps, "weights": checksums after them} of a case; a reward of 0 or 1 by the text alone.

    blur: the seed of a random change of all weights by at most a unit in the last place.
    """
    cfg = Config(**SIZES | settings)
    policy = tiny_policy(cfg.data, cfg)
    if blur is not None:
        generator = torch.Generator().manual_seed(blur)
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1 + (torch.rand(p.shape, generator=generator) - 0.5) * 2 * torch.finfo(p.dtype).eps)
    start = copy.deepcopy(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    data, position, steps = DATA[cfg.data]("train"), 0, []
    for step in range(2):
        metrics, position, _ = train_step(policy, optimizer, data, cfg, step, position)
        steps.append({key: value for key, value in metrics.items() if not key.startswith(NOT_GOLDEN)})
    return {"position": position, "steps": steps, "weights": checksums(policy, start)}


def short_warm_up(data):
    """Checksums of a tiny model's weights after a warm-up of a few steps."""
    policy = tiny_policy(data, Config())
    start = copy.deepcopy(policy.state_dict())
    tiny.warm_up(policy, WARM_UPS[data], {"digits": digits, "scenes": scenes}[data], progress=False)
    return checksums(policy, start)


def differences(golden, now, where="", blurred=()):
    """Sentences naming each number that is not the golden one to a relative 1e-5.

    Sums of terms that cancel, such as the loss, may differ by 1e-6: their rounding errors do not shrink with their size.
    blurred: the same as `now` after other rounding. A number may be off by five times the farthest of them.
    """
    if isinstance(golden, dict):
        now = now or {}
        if golden.keys() != now.keys():
            return [f"{where}: {sorted(golden.keys() ^ now.keys())} on one side only"]
        pairs = [(golden[key], now[key], f"{where} {key}", [b[key] for b in blurred]) for key in golden]
    elif isinstance(golden, list):
        pairs = [(a, b, f"{where}[{i}]", others) for i, (a, b, *others) in enumerate(zip(golden, now, *blurred, strict=True))]
    else:
        rounding = 5 * max((abs(b - now) for b in blurred), default=0)
        near = now == pytest.approx(golden, rel=1e-5, abs=max(1e-6, rounding))
        return [] if near else [f"{where}: {golden} became {now}"]
    return [line for pair in pairs for line in differences(*pair)]


def real_differences(golden, settings):
    """The differences of a case from the golden numbers that rounding does not explain."""
    now = two_steps(settings)
    if not differences(golden, now):
        return []
    return differences(golden, now, blurred=[two_steps(settings, blur) for blur in range(3)])


@pytest.fixture(autouse=True)
def one_thread():
    """Sums have the same order, whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reward_by_text(monkeypatch):
    """Half of all texts are right, so that nearly every group of a random model has a signal."""
    monkeypatch.setattr(reward, "grade", lambda text, *_: float(zlib.crc32(text.encode()) % 2))


@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_golden_ones(name, reward_by_text):
    golden = json.loads(FILE.read_text())["cases"][name]
    assert golden["steps"][0]["skipped"] == 0 and golden["weights"]["moved"]["lm_head"] > 0
    assert real_differences(golden, CASES[name]) == []


@pytest.mark.parametrize("data", WARM_UPS)
def test_warm_up_is_the_golden_one(data):
    assert differences(json.loads(FILE.read_text())["warm_up"][data], short_warm_up(data)) == []


def test_defaults_are_the_golden_ones():
    golden = json.loads(FILE.read_text())
    now = asdict(Config())
    assert {name: now.get(name) for name in golden["defaults"]} == golden["defaults"] and golden["numerics"] == NUMERICS


def test_the_comparison_notices_a_changed_number():
    golden = json.loads(FILE.read_text())["cases"]["vppo"]
    changed = copy.deepcopy(golden)
    changed["steps"][1]["grad_norm"] *= 1 + 3e-5
    changed["weights"]["moved"]["visual"] *= 1 - 3e-5
    assert len(differences(golden, changed)) == 2


def test_rounding_excuses_no_change_of_the_arithmetic(reward_by_text):
    """The case that amplifies rounding most, with one clip bound moved by a thousandth."""
    golden = json.loads(FILE.read_text())["cases"]["dual clip"]
    assert real_differences(golden, CASES["dual clip"] | {"clip_low": 0.2002}) != []


if __name__ == "__main__":
    torch.set_num_threads(1)
    reward.grade = lambda text, *_: float(zlib.crc32(text.encode()) % 2)
    now = {
        "numerics": NUMERICS,
        "defaults": asdict(Config()),
        "cases": {name: two_steps(settings) for name, settings in CASES.items()},
        "warm_up": {data: short_warm_up(data) for data in WARM_UPS},
    }
    golden = json.loads(FILE.read_text()) if FILE.exists() else now
    changed = [line for name in golden["cases"] for line in real_differences(golden["cases"][name], CASES[name])]
    if changed and NUMERICS <= golden["numerics"]:
        sys.exit(f"{len(changed)} golden numbers changed ({changed[0]}): raise NUMERICS, which orphans the records in results/runs")
    FILE.write_text(json.dumps(now, indent=1) + "\n")
    print(f"{len(now['cases'])} cases written to {FILE.name}")
