"""Started by test_forecast.py with torchrun: the gradients of saved rollouts, dealt out to the ranks; rank 0 writes their tally.

    torchrun --nproc_per_node=2 tests/forecast_worker.py FOLDER [--shard]

FOLDER holds batch.pt (a vppo.Batch of rollouts and rewards) and an HF model folder `model`. The tally goes to tally-WORLD.pt or
tally-WORLD--shard.pt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from step_worker import share  # noqa: E402

import distributed  # noqa: E402
from lab import forecast  # noqa: E402
from lab.sketch import Tally  # noqa: E402
from model import Policy, load  # noqa: E402
from vppo import measure  # noqa: E402

LARGE = 2**20  # more numbers than weights


def main(folder, shard):
    """The tally of all groups, a block for each as far as it is counted alone."""
    distributed.start()
    forecast.AT_ONCE = 1
    cfg = forecast.Flags(groups=100, group_size=3, shard=bool(shard), tokens_per_batch=100)
    policy = Policy(*load(str(folder / "model"))).train()
    engine = distributed.engine(policy, True) if shard else policy
    batch, _ = share(torch.load(folder / "batch.pt", weights_only=False))
    with distributed.unsharded(policy):
        measure(policy, batch, cfg)
    tally = Tally(len(forecast.METHODS), LARGE, 5)
    done = forecast.add_batch(tally, engine, batch, forecast.weights_of(batch, cfg, policy), cfg, 0)
    tally.gathered()
    if distributed.rank() == 0:
        values = {"grams": tally.grams(), "products": tally.products, "counts": tally.counts, "done": done}
        torch.save(values, folder / f"tally-{distributed.world()}{shard}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "".join(sys.argv[2:]))
    distributed.leave()
