"""Where the tokens of a row lie, and which of them attend to which."""

import pytest
import torch
from helpers import golden_cases

from hico.parallel import Layout, SequenceMesh, data_parts, split_size
from hico.parallel.blocks import blocks_between, find_documents

(ZIGZAG,) = (case for case in golden_cases("G") if case.name.startswith("G2"))


def layouts(length, *, ring, ulysses=1, documents=None):
    meshes = [SequenceMesh(rank, ring, ulysses) for rank in range(ring * ulysses)]
    return [Layout(mesh, length, documents) for mesh in meshes]


@pytest.mark.golden
@pytest.mark.parametrize("row", ZIGZAG.facts["rows"], ids=lambda row: f"{row['seq_len']}_over_{row['world']}")
def test_processes_have_the_published_zigzag_pieces(row):
    length, world = row["seq_len"], row["world"]
    parts = [layout.shard(torch.arange(length)[None], fill=-1)[0] for layout in layouts(length, ring=world)]
    if length % (2 * world) == 0:
        assert [part.tolist() for part in parts] == row["ranks"]
    # Other lengths fail as published, or give pieces of several lengths: here the end is padded.
    assert len({len(part) for part in parts}) == 1
    assert torch.cat(parts)[torch.cat(parts) >= 0].sort().values.tolist() == list(range(length))
    assert sum(map(len, parts)) - length == -length % (2 * world)


@pytest.mark.parametrize(("length", "ring", "ulysses"), [(24, 3, 1), (13, 2, 2), (40, 1, 4), (3, 2, 2), (50, 4, 2)])
@pytest.mark.parametrize("documents", [None, [[(0, 4), (4, 5), (5, 50)]], [[(2, 50)], [(0, 50)]]])
def test_blocks_are_causal_attention_within_documents(length, ring, ulysses, documents):
    """Every query meets every key that it may see, in exactly one block."""
    if documents is not None:
        documents = [[(min(a, length), min(b, length)) for a, b in row if a < length] for row in documents]
    rows = 2
    expected = torch.zeros(rows, length, length)
    for row in range(rows):
        for begin, end in [(0, length)] if documents is None else documents[row % len(documents)]:
            expected[row, begin:end, begin:end] = 1
    expected = expected.tril()
    members = layouts(length, ring=ring, ulysses=ulysses, documents=documents)
    met = torch.zeros(rows, length, length)
    work = []
    for place in range(ring):
        neighbours = members[place * ulysses : (place + 1) * ulysses]
        held = [sorted_by_place(members, other, ulysses, length) for other in range(ring)]
        work.append(0)
        for source in range(ring):
            for block in neighbours[0].blocks(source):
                queries, keys = held[place][block.queries], held[source][block.keys]
                seen = torch.ones(len(queries), len(keys))
                seen = seen.tril() if block.causal else seen
                work[-1] += int(seen.sum())
                real_queries, real_keys = queries < length, keys < length
                part = seen[real_queries][:, real_keys]
                for row in range(rows)[block.rows]:
                    met[row, queries[real_queries, None], keys[real_keys]] += part
    assert torch.equal(met, expected)
    if documents is None:
        assert max(work) == min(work)  # zigzag balances


def sorted_by_place(members, place, ulysses, length):
    """The tokens that a place in the ring has in attention, in the order that it has them in."""
    layout = members[place * ulysses]
    padded = Layout(layout.mesh, layout.num_local * layout.mesh.size)
    all_tokens = torch.arange(padded.num_local * padded.mesh.size)[None]
    parts = [Layout(m.mesh, all_tokens.shape[1]).shard(all_tokens)[0] for m in members]
    return torch.cat(parts[place * ulysses : (place + 1) * ulysses]).sort().values


def test_documents_are_read_as_transformers_reads_them():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert find_documents(None, positions) == [[(0, 3), (3, 4), (4, 6)]]
    assert find_documents(torch.ones(1, 6), positions) is None
    assert find_documents(None, torch.arange(6)[None]) is None
    assert find_documents(None, None) is None
    assert find_documents(torch.tensor([[1, 1, 0], [1, 0, 0]]), None) is None  # nothing real comes after padding
    assert find_documents(torch.tensor([[1, 1, 1], [0, 1, 1]]), None) == [[(0, 3)], [(1, 3)]]


def test_pieces_that_lie_far_apart_make_few_blocks():
    (block,) = blocks_between([0, 12], [4, 8], 4, None)
    assert (block.queries, block.keys, block.causal) == (slice(4, 8), slice(0, 8), False)
    (block,) = blocks_between([4, 8], [0, 12], 4, None)
    assert (block.queries, block.keys, block.causal) == (slice(0, 8), slice(0, 4), False)
    (block,) = blocks_between([4, 8], [4, 8], 4, None)
    assert block.causal


@pytest.mark.parametrize(
    ("size", "heads", "asked", "expected"),
    [(8, 4, None, (2, 4)), (8, 4, 2, (4, 2)), (4, 1, None, (4, 1)), (2, 8, None, (1, 2)), (6, 4, None, (3, 2))],
)
def test_ulysses_takes_what_divides_the_heads_and_the_ring_the_rest(size, heads, asked, expected):
    assert split_size(size, heads, asked) == expected


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_work():
    with pytest.raises(ValueError, match=r"Ulysses over 8 of 8 processes cannot divide 4 key-value heads.* 1, 2, 4,"):
        split_size(8, 4, 8)


def test_a_group_that_does_not_divide_the_processes_is_refused():
    assert data_parts(2, 8) == 4
    with pytest.raises(ValueError, match="sequence_parallel 3 does not divide the 8 process"):
        data_parts(3, 8)
