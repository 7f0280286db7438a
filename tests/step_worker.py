"""Started by test_distributed.py with torchrun: one update from saved rollouts, cut in several ways; rank 0 writes the results.

    torchrun --nproc_per_node=2 tests/step_worker.py FOLDER

FOLDER holds batch.pt (a vppo.Batch of rollouts and rewards) and an HF model folder `model`. Each rank takes its share of
the groups, so the results should be those of one process: result-WORLD.pt, {cut: {"loss", "alpha", "token_mask", "gradient"}}.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

import distributed  # noqa: E402
import model  # noqa: E402
from config import Config  # noqa: E402
from model import Policy, load  # noqa: E402
from vppo import Batch, measure, modulate, update  # noqa: E402

# name -> (sharded, tokens in a micro-batch, settings of the method); one response, three responses, all at once
CUTS = {
    "all": (False, 10**6, {}),
    "three": (False, 60, {}),
    "one": (False, 1, {}),
    "penalty": (False, 60, {"entropy_penalty": 0.06}),
    "sequence": (False, 60, {"average": "sequence"}),
    "checkpointing": (False, 60, {"activation_checkpointing": True}),
    "sharded": (True, 10**6, {}),
    "sharded, one": (True, 1, {}),
    "sharded, checkpointing": (True, 60, {"activation_checkpointing": True}),
}


def share(batch):
    """This rank's groups of the batch; the last group with an empty mask where there are fewer groups than ranks (vppo.collect)."""
    per_rank = -(-len(batch.examples) // distributed.world())
    groups = range(len(batch.examples))[distributed.rank() * per_rank : (distributed.rank() + 1) * per_rank]
    mine = list(groups) or [len(batch.examples) - 1]
    rollout = batch.rollout.subset(mine)
    if not groups:
        rollout.response_mask = torch.zeros_like(rollout.response_mask)
    rewards = batch.rewards.reshape(len(batch.examples), -1)[mine].reshape(-1)
    return Batch(rollout, [batch.examples[q] for q in mine], [batch.positions[q] for q in mine], rewards), bool(groups)


def main(folder):
    """Every cut that makes sense for this number of ranks."""
    distributed.start()
    saved = torch.load(folder / "batch.pt", weights_only=False)
    results = {}
    for name, (shard, tokens, settings) in CUTS.items():
        if shard and distributed.world() == 4:
            continue
        cfg = Config(group_size=saved.rollout.group_size, tokens_per_batch=tokens, max_grad_norm=1e9, shard=shard, **settings)
        model.CHUNK = 2**26 if name == "all" else 2000  # logits of all tokens at once, or of seven
        policy = Policy(*load(str(folder / "model"))).train()
        if cfg.activation_checkpointing:
            policy.model.activation_checkpointing_enable()
        engine = distributed.engine(policy, shard)
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.0)  # leaves the gradients to look at
        batch, real = share(copy.deepcopy(saved))
        with distributed.unsharded(policy):
            measure(policy, batch, cfg)
        modulate(batch, cfg)
        sums = update(engine, optimizer, batch, range(len(batch.examples)), cfg)
        gradient = [parameter.grad for parameter in policy.parameters()]
        gradient = torch.cat([getattr(g, "full_tensor", lambda g=g: g)().flatten() for g in gradient])
        results[name] = {
            "loss": distributed.total(sums["loss"]),
            "alpha": torch.tensor(distributed.gather(batch.alpha.tolist() if real else [])),
            "token_mask": torch.tensor(distributed.gather(batch.token_mask.tolist() if real else [])),
            "gradient": gradient,
            "norm": sums["grad_norm"],
            "first": sums["first"],
        }
    if distributed.rank() == 0:
        torch.save(results, folder / f"result-{distributed.world()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.leave()
