"""Everything that knows there may be several processes. A reader may skip it: with one process each function is the identity.

The training step is written once, for one process; where a number must be that of the whole batch (TAS statistics, the loss
divisor, logged means) it asks here, so the step does not depend on how the batch was cut over ranks.
"""

import torch
import torch.distributed as dist


def rank():
    """This process's number, 0 .. world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(value):
    """The sum of a number or tensor over all ranks."""
    if world() == 1:
        return value
    tensor = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, (int, float)) else None).clone()
    dist.all_reduce(tensor)
    return type(value)(tensor.item()) if isinstance(value, (int, float)) else tensor


def gather(objects):
    """The lists of all ranks joined in rank order."""
    if world() == 1:
        return objects
    parts = [None] * world()
    dist.all_gather_object(parts, objects)
    return [item for part in parts for item in part]
