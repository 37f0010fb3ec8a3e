"""Which rows go where: every row once, and a step the same rows however it is cut up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graftwerk.training.batch_sampler import epoch_order, micro_batches

rows = st.lists(st.integers(1, 100), min_size=1, max_size=80)


@given(lengths=rows, per_step=st.integers(1, 20), epoch=st.integers(0, 3), group=st.booleans())
def test_epoch_order_has_every_row_once(lengths: list[int], per_step: int, epoch: int, group: bool) -> None:
    order = epoch_order(lengths, per_step, seed=1, epoch=epoch, group=group)
    assert sorted(row for step in order for row in step) == list(range(len(lengths)))
    assert len(order) == -(-len(lengths) // per_step)
    assert order == epoch_order(lengths, per_step, seed=1, epoch=epoch, group=group)


def test_epoch_order_differs_by_epoch_and_seed() -> None:
    lengths = list(range(1, 101))
    for group in (True, False):
        orders = [epoch_order(lengths, 8, seed=s, epoch=e, group=group) for s, e in ((0, 0), (0, 1), (1, 0))]
        assert orders[0] != orders[1]
        assert orders[0] != orders[2]


@given(lengths=rows, micro=st.integers(1, 20), processes=st.integers(1, 4))
def test_micro_batches_partition_a_step(lengths: list[int], micro: int, processes: int) -> None:
    step = list(range(len(lengths)))
    shares = [micro_batches(step, lengths, micro, processes=processes, process=p) for p in range(processes)]
    assert sorted(row for share in shares for piece in share for row in piece) == step
    assert len({len(share) for share in shares}) == 1, "a process would wait for ever"
    sizes = [len(piece) for share in shares for piece in share]
    assert max(sizes) <= micro
    assert max(sizes) - min(sizes) <= 1
    if processes == 1:
        assert 0 not in sizes


def test_micro_batches_of_one_round_have_similar_lengths() -> None:
    lengths = [50, 1, 49, 2, 48, 3, 47, 4]
    shares = [micro_batches(range(8), lengths, 2, processes=2, process=p) for p in range(2)]
    assert [[lengths[row] for row in piece] for piece in shares[0]] == [[1, 2], [47, 48]]
    assert [[lengths[row] for row in piece] for piece in shares[1]] == [[3, 4], [49, 50]]


@given(
    lengths=rows,
    micro=st.integers(1, 20),
    tokens=st.integers(1, 300),
    processes=st.integers(1, 4),
)
def test_micro_batches_by_tokens_respect_limits(lengths: list[int], micro: int, tokens: int, processes: int) -> None:
    step = list(range(len(lengths)))
    shares = [
        micro_batches(step, lengths, micro, tokens=tokens, processes=processes, process=p) for p in range(processes)
    ]
    pieces = [piece for share in shares for piece in share]
    assert sorted(row for piece in pieces for row in piece) == step
    assert len({len(share) for share in shares}) == 1, "a process would wait for ever"
    assert all(shares[0]), "the first process has rows in every round"
    for piece in filter(None, pieces):
        assert len(piece) <= micro
        assert len(piece) == 1 or max(lengths[row] for row in piece) * len(piece) <= tokens


def test_micro_batches_by_tokens_cut_where_lengths_rise() -> None:
    lengths = [10, 11, 10, 50, 52, 12, 51, 100]
    cut = micro_batches(range(8), lengths, 8, tokens=160)
    assert [[lengths[row] for row in piece] for piece in cut] == [[10, 10, 11, 12], [50, 51, 52], [100]]
