"""Documents as token ids: written once, in parallel, into files that are mapped into memory."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hico.data.cache import cache_folder, pack_texts, taking_turns, unpack_texts
from hico.data.texts import Document, Documents, TextCorpus

logger = logging.getLogger(__name__)

_FORMAT = "tokens 1"
"""To be changed with what a shard holds, or how texts become tokens."""
MAX_DOCUMENTS = 4096
"""Documents of a shard at most."""
_BATCH_BYTES = 1 << 22
"""Characters that a tokenizer gets at once."""


class TokenStore:
    """Documents as token ids, each with the separator at its end.

    Args:
        shards: paths of files as `tokenize` writes them, without their endings.
    """

    def __init__(self, shards: Sequence[Path]):
        self._paths = [Path(path) for path in shards]
        lengths, domains, names, self.max_id = [], [], {}, 0
        for path in self._paths:
            with np.load(_index(path)) as index:
                self.max_id = max(self.max_id, int(index["max_id"]))
                known = unpack_texts(index["names"], int(index["num_names"]))
                numbers = np.array([names.setdefault(name, len(names)) for name in known], dtype=np.int64)
                lengths.append(index["lengths"])
                domains.append(numbers[index["domains"]] if len(known) else index["domains"])
        self._first = np.cumsum([0, *map(len, lengths)])
        self.lengths: np.ndarray = np.concatenate([*lengths, np.zeros(0, dtype=np.int64)])
        """``(n,)`` tokens of every document, separator included."""
        self.domains: np.ndarray = np.concatenate([*domains, np.zeros(0, dtype=np.int64)])
        """``(n,)`` numbers of their domains."""
        self.names = list(names)
        """Names of the domains."""
        self._starts = np.concatenate([np.cumsum([0, *some])[:-1] for some in [*lengths, []]]).astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return the tokens ``start`` to ``stop`` of a document."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        begin = int(self._starts[document])
        return self._map(shard)[begin + start : begin + stop].astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            if len(self._maps) >= 256:  # each holds a file open
                self._maps.pop(next(iter(self._maps)))
            self._maps[shard] = np.load(_tokens(self._paths[shard]), mmap_mode="r")
        return self._maps[shard]


def tokenize(
    corpus: TextCorpus, tokenizer: PreTrainedTokenizerBase, *, num_workers: int = 0, on_bad_sample: str = "raise"
) -> TokenStore:
    """Turn documents into tokens, or find what was made of them before.

    Shards lie in the folder ``tokens`` of the cache, named by the content of the files, the tokenizer and the settings
    that they were made with, so that no other run makes them again, and a killed one goes on. Text is text: what reads
    like a special token is none.

    Args:
        corpus: the documents.
        tokenizer: its ``eos_token`` is the separator.
        num_workers: processes; 0 is this one.
        on_bad_sample: ``skip`` leaves documents without text out, with one warning.

    Raises:
        ValueError: if the tokenizer has no ``eos_token``, or a document cannot be read or has no text.
        OSError: if the shards cannot be written.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, which separates packed documents; set it: tokenizer.eos_token = ..., "
            "tokenizer.save_pretrained(FOLDER)"
        )
    folder = cache_folder() / "tokens"
    tasks = _Tasks(corpus.datasets, tokenizer, folder, skips=on_bad_sample == "skip")
    folder.mkdir(parents=True, exist_ok=True)
    with taking_turns(folder / "all.lock"):
        missing = [number for number, path in enumerate(tasks.paths) if not _index(path).is_file()]
        _make(tasks, missing, num_workers)
    left_out = [reason for path in tasks.paths for reason in _left_out(path)]
    if left_out:
        some = "; ".join(left_out[:3]) + ("; ..." if len(left_out) > 3 else "")
        if on_bad_sample != "skip":
            raise ValueError(f"{len(left_out)} documents: {some}" if len(left_out) > 1 else some)
        logger.warning("left out %d document(s): %s", len(left_out), some)
    return TokenStore(tasks.paths)


class _Tasks(Dataset):
    """Shards to be made; item ``n`` makes the n-th one and returns what is wrong with it."""

    def __init__(
        self, datasets: Sequence[Documents], tokenizer: PreTrainedTokenizerBase, folder: Path, *, skips: bool
    ):
        self.datasets, self.tokenizer, self.skips = datasets, tokenizer, skips
        # Every core gets a share of a small dataset; the cut depends on the documents alone.
        self.parts = [
            (which, range(start, min(start + size, len(dataset))))
            for which, dataset in enumerate(datasets)
            for size in [min(MAX_DOCUMENTS, max(64, -(-len(dataset) // 64)))]
            for start in range(0, len(dataset), size)
        ]
        how = [_FORMAT, tokenizer_identity(tokenizer)]
        self.paths = []
        for which, part in self.parts:
            key = hashlib.sha256("\n".join([*how, *datasets[which].key(part)]).encode()).hexdigest()
            self.paths.append(folder / key[:2] / key)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> str | None:
        which, part = self.parts[number]
        try:
            self._make(self.datasets[which], part, self.paths[number])
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def _make(self, documents: Documents, part: range, path: Path) -> None:
        pieces, lengths, domains, names, left_out = [], [], [], {}, []
        for batch in _batches(documents, part, left_out):
            texts = [document.text for document in batch]
            rows = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                split_special_tokens=True,
                verbose=False,
            )["input_ids"]
            for document, ids in zip(batch, rows, strict=True):
                pieces += [ids, [self.tokenizer.eos_token_id]]
                lengths.append(len(ids) + 1)
                domains.append(names.setdefault(document.domain, len(names)))
        if left_out and not self.skips:
            raise ValueError(left_out[0] if len(left_out) == 1 else f"{len(left_out)} documents: {left_out[0]}; ...")
        dtype = np.uint16 if len(self.tokenizer) <= 1 << 16 else np.uint32
        tokens = np.concatenate([np.asarray(ids, dtype=dtype) for ids in pieces] or [np.zeros(0, dtype=dtype)])
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(_tokens(path), lambda file: np.save(file, tokens))
        index = {
            "lengths": np.array(lengths, dtype=np.int64),
            "domains": np.array(domains, dtype=np.int64),
            "names": pack_texts(list(names)),
            "num_names": np.array(len(names)),
            "max_id": tokens.max(initial=0),
            "left_out": pack_texts(left_out),
            "num_left_out": np.array(len(left_out)),
        }
        _replace(_index(path), lambda file: np.savez(file, **index))  # last: a shard with an index is whole


def _batches(documents: Documents, part: range, left_out: list[str]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for index in part:
        try:
            document = documents[index]
        except ValueError as error:
            left_out.append(str(error))
            continue
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _make(tasks: _Tasks, missing: Sequence[int], num_workers: int) -> None:
    if not missing:
        return
    with _one_thread_per_tokenizer():
        workers = min(num_workers, len(missing)) if len(missing) > 1 else 0
        loader = DataLoader(tasks, sampler=missing, batch_size=None, num_workers=workers)
        # Bars are for those who watch.
        for fault in tqdm(loader, total=len(missing), desc="tokenizing", unit="shard", disable=None):
            if fault is not None:
                raise ValueError(fault)


@contextmanager
def _one_thread_per_tokenizer() -> Iterator[None]:
    """Keep tokenizers from starting threads, which a process that forks later must not have."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    what = json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer)]) if backend is None else backend.to_str()
    return hashlib.sha256(f"{type(tokenizer).__name__}:{tokenizer.eos_token_id}:{what}".encode()).hexdigest()


def _left_out(path: Path) -> list[str]:
    with np.load(_index(path)) as index:
        return unpack_texts(index["left_out"], int(index["num_left_out"]))


def _tokens(path: Path) -> Path:
    return path.with_suffix(".npy")


def _index(path: Path) -> Path:
    return path.with_suffix(".npz")


def _replace(path: Path, write: Any) -> None:
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    with open(whole, "wb") as file:
        write(file)
    os.replace(whole, path)
