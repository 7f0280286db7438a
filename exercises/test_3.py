"""Check of exercise 3, the token filter."""

import torch

from exercises import expect, load

exercise = load(3)


def filtered(rows, lengths, k):
    """Your mask for rows of S with the given lengths; it must be bool."""
    rows = torch.as_tensor(rows)
    kept = exercise.token_filter(rows, torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None], k)
    assert isinstance(kept, torch.Tensor) and kept.dtype == torch.bool, f"Return a bool tensor, yours is {kept!r}."
    return kept


def test_the_example():
    yours = filtered([[0.1, 2.0, 0.3]], [3], 0.4)
    expect(yours, [[0, 1, 1]], "S = (0.1, 2.0, 0.3), k = 0.4.", [("Round up: ceil(1.2) is 2.", [[0, 1, 0]])])


def test_each_response_has_its_own_ranking():
    yours = filtered([[9.0, 8, 7, 6], [1, 2, 3, 4]], [4, 4], 0.5)
    whole_batch = ("You ranked the batch. Rank within each response.", [[1, 1, 1, 1], [0, 0, 0, 0]])
    expect(yours, [[1, 1, 0, 0], [0, 0, 1, 1]], "S = (9, 8, 7, 6) and (1, 2, 3, 4), k = 0.5.", [whole_batch])


def test_padding_is_never_kept():
    counted = ("You counted padding as part of the response: |o| is 2, not 4.", [[1, 1, 0, 0]])
    for pad in (9.0, torch.inf, -9.0, 0.0):
        why = f"S = (0.1, 0.2), then padding of {pad}. Padding may hold anything: do not even multiply with it."
        expect(filtered([[0.1, 0.2, pad, pad]], [2], 0.4), [[0, 1, 0, 0]], why, [counted])
    yours = filtered([[-3.0, -1, -2, 0, 0]], [3], 0.4)
    expect(yours, [[0, 1, 1, 0, 0]], "S can be negative with some metrics. Padding of 0 must not win against it.")
    expect(filtered([[1.0, 2.0]], [0], 0.4), [[0, 0]], "A response without tokens keeps none.")


def test_equal_tokens_go_in_order():
    expect(
        filtered([[1.0, 1, 1, 1, 1]], [5], 0.4),
        [[1, 1, 0, 0, 0]],
        "Five equal S, k = 0.4.",
        [("A threshold keeps every token that equals it. Keep exactly ceil(k |o|) tokens.", [[1, 1, 1, 1, 1]]),
         ("Of equal tokens the earlier goes first, not the later.", [[0, 0, 0, 1, 1]])],
    )  # fmt: skip
    n = 200  # long rows: some sorts keep the order of equal values only in short ones
    s = torch.arange(n) % 2  # 100 tokens with S = 1, of which the first 50 are kept at k = 0.25
    yours = filtered(s[None].float(), [n], 0.25)
    right = (s == 1) & (torch.arange(n) < 100)
    assert yours[0].tolist() == right.tolist(), (
        "S alternates between 0 and 1 over 200 tokens, k = 0.25. The first fifty tokens with S = 1 must be kept.\n"
        "torch.topk and a plain sort do not promise an order for equal values. Ask for a stable sort."
    )


def test_the_count_is_exact():
    lengths = list(range(1, 101))
    s = torch.rand(100, 100, generator=torch.Generator().manual_seed(0))
    for hundredths in range(1, 101):  # k in hundredths, so that the check needs whole numbers only
        counts = filtered(s, lengths, hundredths / 100).sum(1).tolist()
        for length, count in zip(lengths, counts):
            right = -(-hundredths * length // 100)
            assert count == right, (
                f"k = {hundredths / 100} of {length} tokens is {hundredths * length / 100:g}. That makes {right} tokens, "
                f"but you keep {count}.\nIn 64 bits k * |o| is computed as {hundredths / 100 * length!r}, "
                f"and in 32 bits as {(torch.tensor(hundredths / 100) * length).item():.9g}."
            )


def test_the_largest_are_kept():
    lengths = [1, 2, 9, 30, 17, 30]
    s = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    yours = filtered(s, lengths, 0.4)
    for row, length, kept in zip(s.tolist(), lengths, yours.tolist()):
        best = sorted(sorted(range(length), key=lambda t: -row[t])[: -(-40 * length // 100)])
        yours_here = [t for t in range(30) if kept[t]]
        assert yours_here == best, f"Of {length} tokens and {30 - length} of padding keep {best}, yours are {yours_here}."
    expect(filtered(s, lengths, 1.0).sum(1), lengths, "k = 1 keeps every token and no padding.")
