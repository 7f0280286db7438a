"""Sums of many gradients in little memory, and from them their mean and spread: what lab/forecast.py counts with.

A gradient is folded into SIZE numbers (`sketch`) and added to one of BLOCKS sums (`Tally`), so memory does not grow with the number of
gradients. `moments` makes squared means, products of means and variances of these sums, for any way to count the blocks, as the bootstrap
needs it.
"""

import functools

import torch

import distributed

SIZE = 65_521  # numbers of a sketch. A prime: entries of a column of a weight, often a power of 2 apart, fold onto different ones
BLOCKS = 40  # how many parts the groups are split into; the bootstrap draws among them


@functools.lru_cache(maxsize=1)
def signs(start, length, seed, device):
    """+1 or -1 for the weights start .. start + length - 1: a bit of a hash of their number and the seed, so that none need be stored.

    It is the finalizer of MurmurHash3, which is the same on every device. Returns int8; the last ones are kept, all those of a small model.
    """
    signed = lambda constant: (constant + 2**63) % 2**64 - 2**63  # noqa: E731  (torch has no unsigned integers to multiply)
    h = torch.arange(start, start + length, device=device) + signed(seed * 0x9E3779B97F4A7C15)
    for constant in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h ^= (h >> 33) & (2**31 - 1)
        h *= signed(constant)
    return (2 * ((h >> 33) & 1) - 1).to(torch.int8)


def chunks(tensors, length):
    """Flat tensors of at least so many numbers (the last may have fewer), from tensors one after the other."""
    pending = []
    for tensor in tensors:
        for piece in tensor.flatten().split(length):
            pending.append(piece)
            if sum(map(len, pending)) >= length:
                yield torch.cat(pending)
                pending = []
    if pending:
        yield torch.cat(pending)


def sketch(parameters, size=SIZE, seed=0):
    """The gradient of the trained weights folded into `size` numbers: number j is the sum of sign_i * g_i over weights i = j modulo size.

    The signs are random, by the seed, and the same for every gradient. Products keep their mean, E<sketch(x), sketch(y)> = <x, y>, with a
    standard deviation of about |x| |y| sqrt(2 / size) at most, because the products of different weights that meet in one number have
    random signs (feature hashing, arXiv 0902.2206). With at least as many numbers as weights nothing is lost. Of a sharded gradient
    (--shard) each rank folds its shard, with signs of its own, and the sum over ranks is the sketch. Returns it on the CPU.

    Example, size 2: g = (1, 2, 3), signs (+, -, -): (1 - 3, -2) = (-2, -2).
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters if p.requires_grad]
    shard = hasattr(gradients[0], "to_local")
    seed = 1_009 * seed + (distributed.rank() if shard else 0)
    folded, start = 0, 0
    # Some weights at a time: beside the gradient of a large model there is no room for a copy of it.
    for piece in chunks((g.to_local() if shard else g for g in gradients), 2**24):
        first = start % size
        signed = piece * signs(start, len(piece), seed, piece.device)
        folded = folded + torch.nn.functional.pad(signed, (first, -(first + len(piece)) % size)).reshape(-1, size).sum(0)
        start += len(piece)
    return folded.cpu()


class Tally:
    """What is kept of the gradients of M methods, or kinds of token: sums over the groups of each block. Row 0 is the plain gradient."""

    def __init__(self, rows, size=SIZE, blocks=BLOCKS, dtype=torch.float32):
        self.sums = torch.zeros(rows, blocks, size, dtype=dtype)  # of sketched gradients
        self.products = torch.zeros(2, rows, blocks).double()  # of |g_m|^2 and of <g_m, g>
        self.counts = torch.zeros(2, blocks).double()  # groups, and ordered pairs of groups whose gradients were added before squaring

    def add(self, block, vectors, groups=1):
        """Count sketched gradients, (M, size), each the sum of those of `groups` groups."""
        self.sums[:, block] += vectors
        vectors = vectors.double()
        # No matrix product: on some processors it adds up equal rows in another order, and equal methods would differ in the last bit.
        self.products[:, :, block] += torch.stack([vectors.square().sum(1), (vectors * vectors[0]).sum(1)])
        self.counts[:, block] += torch.tensor([groups, groups * (groups - 1)])

    def gathered(self):
        """The tally of all ranks together, without blocks that stayed empty."""
        for values in (self.sums, self.products, self.counts) if distributed.world() > 1 else ():
            torch.distributed.all_reduce(values)
        filled = self.counts[0] > 0
        self.sums, self.products, self.counts = self.sums[:, filled], self.products[:, :, filled], self.counts[:, filled]
        return self

    def grams(self):
        """(2, M, blocks, blocks): products of blocks' sums, <s_m, s_m> and <s_m, s_0>, in float64: mu is small beside the noise."""
        result = torch.zeros(2, *self.sums.shape[:2], self.sums.shape[1]).double()
        for piece in self.sums.split(2**12, dim=2):
            piece = piece.double()
            result += torch.stack([piece @ piece.transpose(1, 2), piece @ piece[0].T])
        return result


def moments(tally, grams, counts):
    """|mu_m|^2, <mu_m, mu>, tr_m and cov(g_m, g) of the rows m of a tally, each (M, R), for R ways to count its blocks: counts (R, blocks).

    Only products of different blocks make the first two. A block drawn twice is none, so its products with itself are left out:
        <mu_m, mu> = sum_{b != c} <s_b, s_c> / sum_{b != c} n_b n_c,   s_b the sum of the n_b gradients of block b
    A vector that is the sum of u groups' gradients has a mean square of u E|g|^2 + u (u - 1) |mu|^2, which gives E|g|^2 for any u.

    Resampled blocks make intervals that are right where the signal is strong, and up to 1.7 times too wide where it is weak: a mean of
    pairs that is all noise, of variance D, has 3 D in the bootstrap, whose part linear in the blocks comes from noisy pairs, too.
    """
    n, pairs = (counts @ x for x in tally.counts)  # (R,) groups, and pairs that were added before squaring
    different = n**2 - counts**2 @ tally.counts[0] ** 2
    mean = (((counts @ grams) * counts).sum(-1) - grams.diagonal(dim1=2, dim2=3) @ (counts**2).T) / different  # (2, M, R)
    second = (tally.products @ counts.T - mean * pairs) / n
    return *mean, *(second - mean)
