"""Scoring by teacher forcing, results that survive, and the picture."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hico.eval.heatmap import draw_heatmap
from hico.eval.results import ResultsFile
from hico.eval.scoring import answer_logits, knows_answer, mean_loss

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}
CAPPED = {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0}


def make_llm(kind, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **settings)).double().eval()


@pytest.fixture(scope="module")
def llm():
    return make_llm("qwen2", intermediate_size=16, num_key_value_heads=1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("qwen2", {"intermediate_size": 16, "num_key_value_heads": 1}), ("gpt2", {}), ("gemma2", CAPPED)],
)
def test_logits_are_those_of_the_answers_positions_in_a_whole_forward(kind, settings):
    llm = make_llm(kind, **settings)
    prompt, answer = torch.arange(10) % 7, torch.tensor([4, 9, 2])
    logits = answer_logits(llm, prompt, answer)
    whole = llm(input_ids=torch.cat([prompt, answer])[None]).logits[0]
    torch.testing.assert_close(logits, whole[9:12].float())
    loss = torch.nn.functional.cross_entropy(whole[9:12], answer).item()
    assert mean_loss(llm, prompt, answer) == pytest.approx(loss, rel=1e-5)


def test_only_the_logits_of_the_answer_are_ever_made(llm, monkeypatch):
    made = []
    monkeypatch.setattr(
        llm.lm_head, "forward", lambda hidden: made.append(hidden.shape) or hidden @ llm.lm_head.weight.T
    )
    knows_answer(llm, torch.zeros(50, dtype=torch.long), torch.tensor([1, 2]))
    assert made == [(1, 2, 16)]


def test_an_answer_is_known_if_every_token_is_the_likeliest(llm):
    prompt = torch.arange(8)
    first = answer_logits(llm, prompt, torch.tensor([0]))[0].argmax().item()
    second = answer_logits(llm, prompt, torch.tensor([first, 0]))[1].argmax().item()
    assert knows_answer(llm, prompt, torch.tensor([first, second]))
    assert not knows_answer(llm, prompt, torch.tensor([first, (second + 1) % 32]))
    # The second token is judged after the right first one, whatever the model would have said.
    other = (first + 1) % 32
    after_other = answer_logits(llm, prompt, torch.tensor([other, 0]))[1].argmax().item()
    assert not knows_answer(llm, prompt, torch.tensor([other, after_other]))


def test_an_answer_without_tokens_is_refused(llm):
    with pytest.raises(ValueError, match="the answer has no tokens"):
        knows_answer(llm, torch.arange(4), torch.tensor([], dtype=torch.long))


def test_a_model_that_makes_all_logits_is_refused():
    class Wasteful(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            raise AssertionError("must not be asked")

    with pytest.raises(ValueError, match="Wasteful takes no logits_to_keep"):
        knows_answer(Wasteful(), torch.arange(4), torch.tensor([1]))


def test_results_outlive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "runs" / "results.jsonl"
    results = ResultsFile(path, {"seed": 1, "depths": (0, 0.5)}, key=("length", "depth"), notes={"model": "here"})
    results.add({"length": 10, "depth": 0.5, "score": 1.0})
    results.add({"length": 20, "depth": 0.5, "score": 0.5})
    path.write_bytes(path.read_bytes()[:-9])
    again = ResultsFile(path, {"seed": 1, "depths": [0, 0.5]}, key=("length", "depth"), notes={"model": "moved"})
    assert (10, 0.5) in again
    assert (20, 0.5) not in again
    again.add({"length": 20, "depth": 0.5, "score": 0.25})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("score") for line in lines] == [None, 1.0, 0.25]
    assert lines[0]["notes"] == {"model": "here"}


def test_results_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "results.jsonl"
    ResultsFile(path, {"seed": 1, "model": "a"}, key=("length",)).add({"length": 1})
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match="other settings \\(seed was 1 and is 2; new was None and is 3\\); name another"
    ):
        ResultsFile(path, {"seed": 2, "model": "a", "new": 3}, key=("length",))
    assert path.read_bytes() == before


def test_what_is_no_file_of_results_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("my notes\n", "[1]\n", '{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no file of results"):
            ResultsFile(path, {}, key=("length",))
        assert path.read_text() == text


def test_a_file_cut_in_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"settings": {"se')
    ResultsFile(path, {"seed": 1}, key=("length",)).add({"length": 1})
    assert (1,) in ResultsFile(path, {"seed": 1}, key=("length",))


@pytest.mark.parametrize("below", [None, {1000: 9.5, 9000: 8.1}])
def test_a_heatmap_is_drawn_without_touching_pyplot(tmp_path, below):
    scores = {(length, depth): depth for length in (1000, 5000, 9000) for depth in (0.0, 0.5, 1.0)}
    del scores[9000, 1.0]
    draw_heatmap(tmp_path / "map.png", scores, trained=4000, title="a model", below=below, across="frames")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
