"""Shared set-up of the test suite."""

import os
import tempfile

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HICO_CACHE"] = tempfile.mkdtemp(prefix="hico-cache-")


@pytest.fixture(autouse=True)
def _same_seed_everywhere():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def training_corpus(tmp_path_factory):
    """Videos, images, rows and an untrained model, see `train_corpus`."""
    from train_corpus import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def folder(training_corpus, tmp_path):
    """The training corpus, in a folder of the test's own."""
    for path in training_corpus.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def flash(tmp_path):
    """A VideoChat-Flash checkpoint in two pickled shards, with a tokenizer."""
    from published import tiny_llm, videochat_flash, write_checkpoint, write_tokenizer

    folder = write_checkpoint(tmp_path / "flash", *videochat_flash(tiny_llm()), num_shards=2, suffix="bin")
    write_tokenizer(folder)
    return folder
