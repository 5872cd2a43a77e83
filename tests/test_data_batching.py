import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hico.data.batching import BatchRule, BatchSampler, compose_batches

ROWS = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 50), min_size=n, max_size=n), st.lists(st.integers(0, 2), min_size=n, max_size=n)
    )
)
RULES = st.builds(
    BatchRule, st.integers(1, 7), st.sampled_from([None, 64, 200]), packed=st.booleans(), group=st.booleans()
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, rule=RULES, seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_row_is_in_one_batch_and_epochs_have_equally_many(rows, rule, seed, epoch):
    lengths, modality = map(np.array, rows)
    batches = compose_batches(rule, lengths=lengths, modality=modality, seed=seed, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(compose_batches(rule, lengths=lengths, modality=modality, seed=seed, epoch=0))
    for batch in batches:
        cost = lengths[batch].sum() if rule.packed else lengths[batch].max() * len(batch)
        assert len(batch) <= rule.batch_size if rule.max_tokens is None else cost <= rule.max_tokens
        assert not rule.group or len(set(modality[batch])) == 1


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, rule=RULES, world_size=st.integers(1, 4))
def test_devices_share_the_rows_and_have_equally_many_batches(rows, rule, world_size):
    lengths, modality = map(np.array, rows)
    kwargs = {"lengths": lengths, "modality": modality, "seed": 0, "world_size": world_size}
    numbers = np.arange(len(lengths)) + 100
    shares = [list(BatchSampler(rule, numbers, rank=rank, **kwargs)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(share) == len(BatchSampler(rule, numbers, **kwargs)) for share in shares)
    assert sorted(row for share in shares for batch in share for _, row in batch) == numbers.tolist()


def sampler(batch_size, *, rank=0, world_size=1, epoch=0, seed=5):
    rows = np.arange(48)
    kwargs = {"lengths": rows + 1, "modality": rows % 3, "seed": seed}
    made = BatchSampler(BatchRule(batch_size), rows, rank=rank, world_size=world_size, **kwargs)
    made.set_epoch(epoch)
    return made


def test_a_step_sees_the_same_rows_on_any_number_of_devices():
    alone = list(sampler(8))
    shared = [list(sampler(2, rank=rank, world_size=4)) for rank in range(4)]
    for step, batch in enumerate(alone):
        together = [key for share in shared for key in share[step]]
        assert sorted(together) == sorted(batch)


def test_epochs_and_seeds_change_the_order_and_nothing_else_does():
    assert list(sampler(4)) == list(sampler(4))
    assert list(sampler(4, epoch=1)) != list(sampler(4))
    assert list(sampler(4, seed=6)) != list(sampler(4))
    assert [key[0] for batch in sampler(4, epoch=1) for key in batch] == [1] * 48


def test_without_a_seed_rows_stay_in_order():
    assert [row for batch in sampler(5, seed=None) for _, row in batch] == list(range(48))


def test_grouping_puts_similar_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 1000, 400)
    kwargs = {"lengths": lengths, "modality": np.zeros(400), "seed": 0, "epoch": 0}

    def waste(rule):
        batches = compose_batches(rule, **kwargs)
        return sum(lengths[batch].max() * len(batch) for batch in batches) / lengths.sum()

    assert waste(BatchRule(8, group=True)) < 1.1 < 1.5 < waste(BatchRule(8))


@pytest.mark.parametrize("group", [False, True])
def test_an_empty_share_is_an_empty_batch(group):
    rows = np.arange(3)
    made = BatchSampler(
        BatchRule(1, group=group), rows, lengths=rows + 1, modality=rows * 0, seed=0, rank=3, world_size=4
    )
    assert list(made) == [[]]
