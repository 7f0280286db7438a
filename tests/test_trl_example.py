"""examples/trl_vppo.py: VPPO inside trl's GRPOTrainer takes the same step as ours, number by number."""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from transformers import TrainerCallback

import reward
from config import Config
from examples import trl_vppo
from model import Policy, load
from prompts import Example, encode
from rollout import Rollout
from vppo import Batch, measure, modulate, update

Q, G, SEED = 6, 4, 3


def record(monkeypatch, owner, name):
    """From now on the list returned collects (arguments, result) of every call; what is called stays what it was."""
    calls, original = [], getattr(owner, name)

    def recorded(*words, **named):
        calls.append((words, original(*words, **named)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, recorded)
    return calls


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Snapshots(TrainerCallback):
    """Weights and gradient, each a dict by name, just before every optimizer step (nothing is clipped in these tests)."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.weights.append(weights(model))
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_three_steps(tiny_folder, tmp_path, monkeypatch):
    trainer = trl_vppo.digits_trainer(tiny_folder, Q, G, max_steps=3, learning_rate=3e-4, output_dir=str(tmp_path))
    before = weights(trainer.model)
    losses = record(monkeypatch, trainer, "compute_loss")
    batches = record(monkeypatch, trainer, "_generate_and_score_completions")
    trainer.train()
    assert len(losses) == 6 and all(torch.isfinite(loss) for _, loss in losses)
    assert len(batches) == 3 and all(batch["advantages"].shape == batch["completion_mask"].shape for _, batch in batches)
    after = weights(trainer.model)
    assert all(torch.isfinite(after[name]).all() for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("loss_type, average", [("dapo", "token"), ("grpo", "sequence")])
def test_same_step_as_ours(tiny_folder, tmp_path, monkeypatch, loss_type, average):
    """Two updates from one rollout batch, in two micro-batches each: the first at ratio 1, the second with clipping."""
    trainer = trl_vppo.digits_trainer(
        tiny_folder, Q, G, max_steps=2, num_iterations=2, learning_rate=3e-3, lr_scheduler_type="constant",
        max_grad_norm=0.0, loss_type=loss_type, seed=SEED, output_dir=str(tmp_path),
    )  # fmt: skip
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    names = ("_generate_and_score_completions", "dependency", "compute_loss")
    generated, dependency, losses = (record(monkeypatch, trainer, name) for name in names)
    alphas, masks = (record(monkeypatch, trl_vppo, name) for name in ("shaping_factors", "token_filter"))
    trainer.train()
    (rows,), theirs = generated[0]
    assert len(generated) == 1 and len(losses) == 4

    # The same responses as one of our batches. trl scores image placeholders, so they stay in our distribution here, too.
    policy = Policy(*load(tiny_folder)).train()
    policy.forbidden = []
    examples = [Example(row["images"], row["prompt"][0]["content"], row["answer"]) for row in rows[::G]]
    prompts = [encode(policy.processor, example) for example in examples]
    ids, mask = theirs["completion_ids"], theirs["completion_mask"].bool()
    texts = [policy.processor.tokenizer.decode(row[real], skip_special_tokens=True) for row, real in zip(ids, mask)]
    rewards = torch.tensor([reward.grade(text, examples[i // G].answer) for i, text in enumerate(texts)])
    rollout = Rollout(prompts, ids, mask, texts, torch.zeros(Q * G, dtype=torch.bool), policy.pad_id)
    batch = Batch(rollout, examples, list(range(Q)), rewards)
    cfg = Config(prompts_per_step=Q, group_size=G, seed=SEED, max_grad_norm=1e9, average=average)
    measure(policy, batch, cfg)
    modulate(batch, cfg)

    assert torch.equal(rollout.input_ids, torch.cat([theirs["prompt_ids"], ids], dim=1))
    assert list(trainer._logs["rewards"]["correct"]) == rewards.tolist() and 0 < rewards.mean() < 1
    assert torch.allclose(dependency[0][1], batch.dependency, rtol=1e-4, atol=1e-6) and batch.dependency.max() > 0.1
    assert torch.equal(masks[0][1], batch.token_mask) and batch.token_mask.sum() < mask.sum() / 2
    assert torch.allclose(alphas[0][1], batch.alpha, rtol=1e-5) and batch.alpha.max() > 1.1
    assert torch.allclose(theirs["advantages"], batch.advantages[:, None] * batch.token_mask, rtol=1e-5)

    for step in (0, 1):
        policy.model.load_state_dict(snapshots.weights[step])
        sums = update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), batch, range(Q), cfg)
        ours = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
        assert ours.keys() == snapshots.gradients[step].keys()
        for name, gradient in ours.items():
            assert (gradient - snapshots.gradients[step][name]).norm() < 2e-5 * gradient.norm(), name
        assert sums["loss"] == pytest.approx(sum(loss.item() for _, loss in losses[2 * step : 2 * step + 2]), rel=1e-5)
        assert (sums["clip_fraction"] > 0) == (step == 1)
