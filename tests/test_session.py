"""Conversations: settings of generate are honoured, and what comes back is documented."""

import pytest
import torch
from transformers import GenerationConfig

import hico
from hico.cli import load
from hico.demo import write_moving_square
from hico.session import ANSWER_TOKENS, Session, _bounded


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("videos") / "square.mp4")
    write_moving_square(path, num_frames=30)
    model, processor = load("tiny", device="cpu")
    model.generation_config.eos_token_id = None
    return model, processor, path


@pytest.fixture
def session(parts):
    return Session(*parts, num_frames=4, mode="middle")


def num_new_tokens(session, **settings):
    """Return how many tokens an answer may take."""
    seen = []

    def sample(self, input_ids, generation_config, **kwargs):
        seen.append(generation_config.max_length - input_ids.shape[1])
        return input_ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session.model), "_sample", sample)
        session.ask("What?", **settings)
    return seen[0]


def test_a_length_is_taken_from_whoever_names_it(session):
    assert num_new_tokens(session) == ANSWER_TOKENS
    assert num_new_tokens(session, max_new_tokens=7) == 7
    given = GenerationConfig(max_new_tokens=5)
    assert num_new_tokens(session, generation_config=given) == 5
    assert num_new_tokens(session, generation_config=GenerationConfig(do_sample=False)) == ANSWER_TOKENS
    assert num_new_tokens(session, generation_config=given, max_new_tokens=6) == 6
    assert given.max_new_tokens == 5
    own = GenerationConfig(max_new_tokens=9)
    assert "max_new_tokens" not in _bounded({"max_new_tokens": None}, own)
    assert _bounded({"max_new_tokens": None, "max_length": 99}, GenerationConfig()) == {"max_length": 99}


def test_an_answer_comes_with_the_output_of_generate_if_that_is_asked_for(parts, session):
    plain = Session(*parts, num_frames=4, mode="middle").ask("What?", max_new_tokens=5, do_sample=False)
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    output = session.ask("What?", **settings)
    assert output.answer == plain
    assert len(output.scores) == 5
    assert output.sequences.shape[0] == 1
    assert session.messages[-1]["content"] == plain
    assert isinstance(session.ask("And?", max_new_tokens=2), str)
    assert len(session.messages) == 4
    whole = {"generation_config": GenerationConfig(**settings)}
    again = hico.answer(*parts, "What?", num_frames=4, mode="middle", generate_kwargs=whole)
    assert torch.equal(again.sequences, output.sequences)
