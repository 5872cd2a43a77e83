"""Documents become tokens once, and sequences in which every domain keeps its share."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hico.data import tokens
from hico.data.packing import PackedText, PackRule, compose_stream, num_sequences
from hico.data.texts import TextCorpus
from hico.data.tokens import tokenize
from hico.tokenizer import byte_tokenizer

EOS = 258


def corpus_of(folder, **datasets):
    entries = []
    for name, rows in datasets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"json_path": str(folder / f"{name}.jsonl")})
    return TextCorpus(entries)


def texts_of(store):
    tokenizer = byte_tokenizer()
    rows = [store.read(number, 0, int(length)) for number, length in enumerate(store.lengths)]
    assert all(row[-1] == EOS for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


# Documents -------------------------------------------------------------------------------------------------------


def test_documents_come_from_every_kind_of_file(tmp_path):
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("first essay\n")
    (tmp_path / "essays" / "b.md").write_text("# second")
    (tmp_path / "rows.jsonl").write_text('{"meta": {"set": "web"}, "body": {"raw": "a row"}}\n')
    (tmp_path / "rows.json").write_text('[{"text": "one of an array"}]')
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n  - {json_path: essays/*, name: essays}\n"
        "  - {json_path: rows.jsonl, text_key: body.raw, domain_key: meta.set}\n  - {json_path: rows.json}\n"
    )
    store = tokenize(TextCorpus(str(tmp_path / "mix.yaml")), byte_tokenizer())
    assert texts_of(store) == ["first essay\n", "# second", "a row", "one of an array"]
    assert [store.names[domain] for domain in store.domains] == ["essays", "essays", "web", "rows"]


def test_documents_come_from_tables(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table({"text": ["one", "two"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    folder = tmp_path / "saved"
    folder.mkdir()
    with arrow.OSFile(str(folder / "data-0.arrow"), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    paths = [tmp_path / "rows.parquet", folder]
    store = tokenize(TextCorpus([{"json_path": str(path)} for path in paths]), byte_tokenizer())
    assert texts_of(store) == ["one", "two"] * 2


def test_text_that_reads_like_a_special_token_is_text(tmp_path):
    store = tokenize(corpus_of(tmp_path, rows=[{"text": "a<|im_end|><|video_pad|>b"}]), byte_tokenizer())
    assert texts_of(store) == ["a<|im_end|><|video_pad|>b"]
    assert store.max_id == EOS
    assert (store.read(0, 0, 100) == EOS).sum() == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"body": "x"}, r"the document at .*a.jsonl:2 has no text \(keys \['body'\]\); name the key .* text_key"),
        ({"text": " \n"}, r"a.jsonl:2 has no text \('text' is empty\)"),
        ({"text": None}, r"a.jsonl:2 has no text"),
        ({"text": "x", "meta": 3}, r"a.jsonl:2 has no domain under 'meta.set'"),
    ],
)
def test_a_document_without_text_or_domain_names_its_place(tmp_path, row, said):
    rows = [{"text": "fine", "meta": {"set": "a"}}, row]
    corpus_of(tmp_path, a=rows)
    entry = {"json_path": str(tmp_path / "a.jsonl"), "domain_key": "meta.set"}
    with pytest.raises(ValueError, match=said):
        tokenize(TextCorpus([entry]), byte_tokenizer())
    store = tokenize(TextCorpus([entry]), byte_tokenizer(), on_bad_sample="skip")
    assert texts_of(store) == ["fine"]
    with pytest.raises(ValueError, match=said):  # what was left out is not forgotten
        tokenize(TextCorpus([entry]), byte_tokenizer())


def test_datasets_that_would_be_one_domain_unsaid_are_refused(tmp_path):
    entries = []
    for folder in ("books", "web"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"of the {folder}")
        entries.append({"json_path": str(tmp_path / folder / "*.txt")})
    with pytest.raises(ValueError, match=r"several datasets .* would be the domain .* give each a name"):
        TextCorpus(entries)
    named = TextCorpus([{**entry, "name": "all"} for entry in entries])
    assert tokenize(named, byte_tokenizer()).names == ["all"]
    apart = TextCorpus([{**entries[0], "name": "books"}, entries[1]])
    assert len(tokenize(apart, byte_tokenizer()).names) == 2


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text"):
        tokenize(TextCorpus([{"json_path": str(tmp_path / "a.txt")}]), byte_tokenizer())


# Shards ----------------------------------------------------------------------------------------------------------


def test_shards_are_made_once_for_content_tokenizer_and_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HICO_CACHE", str(tmp_path / "cache"))
    made, real = [], tokens._Tasks._make
    monkeypatch.setattr(tokens._Tasks, "_make", lambda self, *args: (made.append(args), real(self, *args)))
    rows = [{"text": f"document {number}", "other": "words"} for number in range(130)]
    first = tokenize(corpus_of(tmp_path, a=rows), byte_tokenizer())
    assert len(made) == 3
    (tmp_path / "moved").mkdir()
    corpus_of(tmp_path / "moved", a=rows)
    again = tokenize(TextCorpus([{"json_path": str(tmp_path / "moved/a.jsonl")}]), byte_tokenizer())
    assert len(made) == 3
    assert texts_of(again) == texts_of(first) == [row["text"] for row in rows]
    tokenize(TextCorpus([{"json_path": str(tmp_path / "a.jsonl"), "text_key": "other"}]), byte_tokenizer())
    assert len(made) == 6
    other = byte_tokenizer()
    other.eos_token = "<|endoftext|>"
    tokenize(corpus_of(tmp_path, a=rows), other)
    assert len(made) == 9
    tokenize(corpus_of(tmp_path, a=[{"text": "changed"}, *rows[1:]]), byte_tokenizer())
    assert len(made) == 12


def test_processes_make_the_shards_of_one(tmp_path, monkeypatch):
    rows = [{"text": f"document {number} " * (number % 7 + 1)} for number in range(200)]
    found = []
    for workers in (0, 2):
        monkeypatch.setenv("HICO_CACHE", str(tmp_path / f"cache{workers}"))
        found.append(tokenize(corpus_of(tmp_path, a=rows), byte_tokenizer(), num_workers=workers))
    assert texts_of(found[0]) == texts_of(found[1]) == [row["text"] for row in rows]


def test_a_killed_tokenization_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HICO_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"document {number}"} for number in range(200)]
    real, made = tokens._Tasks._make, []

    def make(self, documents, part, path):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(part)
        real(self, documents, part, path)

    with monkeypatch.context() as patch:
        patch.setattr(tokens._Tasks, "_make", make)
        with pytest.raises(KeyboardInterrupt):
            tokenize(corpus_of(tmp_path, a=rows), byte_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(tokens._Tasks, "_make", lambda self, *args: (made.append(args[1]), real(self, *args)))
        store = tokenize(corpus_of(tmp_path, a=rows), byte_tokenizer())
    assert [part.start for part in made] == [0, 64, 128, 192]
    assert texts_of(store) == [row["text"] for row in rows]


# Packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=3, max_size=50),
    seed=st.integers(0, 9),
    long_share=st.none() | st.floats(0, 0.95),
    length=st.integers(1, 40),
)
def test_an_epoch_keeps_every_domains_share_and_gives_long_documents_theirs(lengths, seed, long_share, length):
    lengths = np.array(lengths)
    domains = np.random.default_rng(seed).integers(0, 3, len(lengths))
    rule = PackRule(length, long_documents=20, long_share=long_share)
    if lengths.sum() < length:
        return
    stream = compose_stream(lengths, domains, rule=rule, seed=seed, epoch=0)
    total = num_sequences(lengths, rule) * length
    sizes = np.diff(stream.ends, prepend=0)
    assert stream.ends[-1] == total
    assert (sizes > 0).all()
    assert (sizes <= lengths[stream.documents]).all()
    drawn = np.bincount(domains[stream.documents], weights=sizes, minlength=3)
    own = np.bincount(domains, weights=lengths, minlength=3)
    np.testing.assert_allclose(drawn, own / own.sum() * total, atol=1)
    for domain in range(3):
        natural = lengths[(domains == domain) & (lengths >= 20)].sum() / max(1, own[domain])
        wanted = natural if long_share is None or natural in (0, 1) else max(natural, long_share)
        long = sizes[(domains[stream.documents] == domain) & (lengths[stream.documents] >= 20)].sum()
        assert abs(long - wanted * drawn[domain]) <= 1


def test_long_documents_are_drawn_more_often():
    lengths, domains = np.array([10] * 90 + [100] * 3), np.zeros(93, dtype=int)
    rule = PackRule(50, long_documents=100, long_share=0.75)
    seen = np.zeros(93, dtype=int)
    for epoch in range(8):
        drawn = compose_stream(lengths, domains, rule=rule, seed=0, epoch=epoch)
        seen += np.bincount(drawn.documents, minlength=93)
    assert seen[90:].tolist() == [24, 24, 24]
    assert 8 * 90 * 0.3 < seen[:90].sum() < 8 * 90 * 0.4


def test_an_epoch_without_upsampling_has_every_document_once():
    lengths, domains = np.full(12, 10), np.repeat([0, 1], 6)
    stream = compose_stream(lengths, domains, rule=PackRule(40), seed=0, epoch=3)
    assert sorted(stream.documents) == list(range(12))


@pytest.mark.parametrize("across", [True, False])
def test_sequences_are_the_documents_one_after_the_other(tmp_path, across):
    rows = [{"text": f"{number} " + "x" * (7 * number % 50)} for number in range(40)]
    store = tokenize(corpus_of(tmp_path, a=rows), byte_tokenizer())
    packed = PackedText(store, PackRule(100, across=across), separator=EOS, seed=5)
    whole = [packed[1, number] for number in range(len(packed))]
    ids = torch.cat([sequence["input_ids"] for sequence in whole])
    assert len(ids) == len(packed) * 100
    assert ids[-1] == EOS
    texts = byte_tokenizer().decode(ids).split("<|im_end|>")[:-1]
    known = {row["text"] for row in rows}
    assert sum(text not in known for text in texts) <= 1  # the one that is cut
    assert len(set(texts)) >= 39
    for sequence in whole:
        labels, positions = sequence["labels"], sequence.get("position_ids")
        if across:
            assert positions is None
            assert labels.tolist() == [-100, *sequence["input_ids"][1:].tolist()]
        else:
            starts = [0, *((sequence["input_ids"][:-1] == EOS).nonzero()[:, 0] + 1).tolist()]
            assert (positions == 0).nonzero()[:, 0].tolist() == starts
            assert (labels == -100).nonzero()[:, 0].tolist() == starts
            assert (positions.diff() == 1).sum() == 99 - (len(starts) - 1)
    other = PackedText(store, PackRule(100, across=across), separator=EOS, seed=5)
    assert torch.equal(other[1, 3]["input_ids"], whole[3]["input_ids"])
    assert not torch.equal(other[2, 3]["input_ids"], whole[3]["input_ids"])


def test_too_few_tokens_for_a_sequence_are_an_error(tmp_path):
    store = tokenize(corpus_of(tmp_path, a=[{"text": "short"}]), byte_tokenizer())
    with pytest.raises(ValueError, match="the documents have 6 tokens, and one sequence has 100; lower max_length"):
        PackedText(store, PackRule(100), separator=EOS, seed=0)
