"""Where a run computes and where it keeps what it does not need now: --offload_optimizer, --device, --attn_implementation.

No GPU is needed. `distributed.offload` moves the optimizer's states to another place and back. Here that place is float64: from float32
there and back changes no number either, and the type shows where a state is.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
from processes import ONE_THREAD, python  # noqa: E402

import distributed  # noqa: E402
import train  # noqa: E402
import vppo  # noqa: E402
from config import Config  # noqa: E402
from laptop import digits, tiny  # noqa: E402
from model import Policy, load, save  # noqa: E402

SIZES = dict(prompts_per_step=4, group_size=4, max_new_tokens=8, steps=10, method="vppo_grpo", entropy_penalty=0.1)


def small():
    """A Policy with random weights, always the same."""
    processor = tiny.build_processor()
    return Policy(tiny.build_model(processor, **tiny.RECIPE | {"layers": 1, "vision_layers": 1}), processor).train()


def types(optimizer):
    """The types of all moments, and what kind of tensors they are."""
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {moment.dtype for moment in moments}, {type(moment).__name__ for moment in moments}


def two_steps(away=None, shard=False):
    """Weights and moments after two training steps, and where the moments were: (in rollout, in updates, in the optimizer's steps)."""
    policy = small()
    engine = distributed.engine(policy, shard)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    seen = {"rollout": set(), "forward": set(), "step": set()}
    if away:
        distributed.offload(optimizer, away)
    optimizer.register_step_pre_hook(lambda *_: seen["step"].update(types(optimizer)[0]))
    policy.register_forward_pre_hook(lambda *_: seen["forward"].update(types(optimizer)[0]))
    generate, position = policy.model.generate, 0

    def watched(*arguments, **words):
        seen["rollout"].update(types(optimizer)[0])
        return generate(*arguments, **words)

    policy.model.generate = watched
    for step in range(2):
        _, position, _ = vppo.train_step(engine, optimizer, digits.Digits("train"), Config(**SIZES), step, position)
    whole = lambda tensor: getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()  # noqa: E731
    weights = {name: whole(weight) for name, weight in policy.named_parameters()}
    kinds = types(optimizer)
    moments = [whole(state[name]) for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return weights, moments, seen, kinds


def check(shard=False):
    """The comparison itself; run here on one process and by `python tests/test_offload.py` on several."""
    weights, moments, seen, kinds = two_steps(None, shard)
    again, their_moments, where, their_kinds = two_steps(torch.float64, shard)
    start = dict(small().named_parameters())
    assert sum(not torch.equal(weights[name], start[name]) for name in weights) > 20  # the steps moved something
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert len(moments) == len(their_moments) > 20
    assert all(torch.equal(a.double(), b) for a, b in zip(moments, their_moments))
    assert seen["rollout"] == seen["forward"] == seen["step"] == {torch.float32}
    assert where["step"] == {torch.float32} and where["rollout"] == where["forward"] == {torch.float64}
    kind = "DTensor" if shard else "Tensor"
    assert kinds == ({torch.float32}, {kind}) and their_kinds == ({torch.float64}, {kind})


def test_states_are_away_but_for_the_optimizers_steps_and_no_number_changes():
    check()


def test_sharded_states_too():
    done = subprocess.run([*python(2), __file__], env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# The flags
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    save(small(), tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used(implementation, folder):
    model, _ = load(folder, attention=implementation)
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == implementation
    assert model.model.language_model.config._attn_implementation == implementation


def test_attention_that_is_not_there_is_one_sentence(folder):
    with pytest.raises(ValueError, match="cannot be loaded: .*slow_attention") as error:
        load(folder, attention="slow_attention")
    assert "\n" not in str(error.value)


def test_the_device_asked_for(monkeypatch):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    assert distributed.start() == distributed.start("cpu") == torch.device("cpu")
    for device in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"--device {device}: torch .* finds no such GPU here"):
            distributed.start(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.start("mps") == torch.device("mps") and distributed.start() == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device mps runs on one process"):
        distributed.start("mps")


def test_flags_reach_the_model(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    original = train.load
    monkeypatch.setattr(train, "load", lambda *names, **words: found.append((names, words)) or original(*names, **words))
    flags = "--steps 0 --test_prompts 0 --device cpu --attn_implementation eager --output out"
    train.main([*flags.split(), "--model", folder])
    assert found == [((folder, torch.device("cpu")), {"attention": "eager", "lora_rank": 0, "dtype": "float32"})]


if __name__ == "__main__":
    distributed.start()
    check(shard=True)
    distributed.leave()
