import json
import re

import pytest
import torch

from hico.llm_dropout import DropSchedule, DropStage
from hico.registry import DROP_POLICIES

TABLE_7 = "uniform@4:0.75,attention@18:0.25"


def test_a_schedule_reads_from_text_lists_and_itself():
    schedule = DropSchedule.parse(TABLE_7)
    assert schedule.stages == (DropStage(4, "uniform", 0.75), DropStage(18, "attention", 0.25))
    assert DropSchedule.parse(schedule) is schedule
    assert DropSchedule.parse(json.loads(json.dumps(schedule.to_list()))) == schedule
    assert DropSchedule.parse(str(schedule)) == schedule
    assert DropSchedule.parse(" attention@2:64 ").stages == (DropStage(2, "attention", 64),)


@pytest.mark.parametrize("spec", [None, "", "none", [], ()])
def test_the_empty_schedule(spec):
    schedule = DropSchedule.parse(spec)
    assert not schedule
    assert str(schedule) == "none"
    assert DropSchedule.parse(schedule.to_list()) == schedule


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("uniform@0:0.5", "drops before layer 0"),
        ("uniform@-1:0.5", "layer '-1' of 'uniform@-1:0.5' is not a whole number"),
        ("uniform@x:0.5", "layer 'x'"),
        ("uniform@4", "cannot read 'uniform@4'; write policy@layer:keep"),
        ("uniform@4:half", "keep 'half'"),
        ("uniform@4:1.5", "keeps the ratio 1.5; give one above 0 and at most 1"),
        ("uniform@4:0.0", "keeps the ratio 0.0"),
        ("uniform@4:0", "keeps 0 tokens"),
        ("uniform@4:nan", "keeps the ratio nan"),
        ("unifrom@4:0.5", "unknown drop policy 'unifrom'; did you mean 'uniform'"),
        ("uniform@8:0.5,attention@4:0.25", "attention@4:0.25 follows uniform@8:0.5, but layers must ascend"),
        ("uniform@8:0.5,attention@8:0.25", "layers must ascend"),
        ("uniform@4:0.25,attention@8:0.5", "dropped tokens do not come back; keep at most 0.25"),
        ("uniform@4:16,attention@8:32", "keep at most 16"),
        ([{"layer": 4, "policy": "uniform"}], "give exactly layer, policy and keep"),
        ([{"layer": 4, "policy": "uniform", "keep": "0.5"}], "keep '0.5'"),
        ([{"layer": 4, "policy": "uniform", "keep": True}], "keep True"),
        ([{"layer": 4.5, "policy": "uniform", "keep": 0.5}], "layer 4.5"),
        (["uniform"], "cannot read 'uniform'"),
        ({"layer": 4, "policy": "uniform", "keep": 0.5}, "cannot read schedule {'layer': 4"),
        (4, "cannot read schedule 4; write it as 'uniform@4:0.75'"),
        ("uniform@\u00b2:0.5", "is not a whole number"),
        ("uniform@4:\u00b2", "is neither a ratio"),
    ],
)
def test_faults_are_named(spec, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DropSchedule.parse(spec)


def test_a_stage_beyond_the_decoder_is_named():
    schedule = DropSchedule.parse(TABLE_7)
    schedule.check_depth(19)
    with pytest.raises(ValueError, match=r"attention@18:0\.25 lies beyond the decoder, whose 18 layers are 0 to 17"):
        schedule.check_depth(18)


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (("uniform", [8, 16], [1.0, 0.5, 0.25]), "uniform@8:0.5,uniform@16:0.25"),
        (("attention", [8, 16, 24], [1.0, 0.5, 0.25, 0.125]), "attention@8:0.5,attention@16:0.25,attention@24:0.125"),
        (("uniform0_attention", [4, 18], [1.0, 0.75, 0.25]), TABLE_7),
        (("uniform1_attention", [2, 4, 6], [1, 0.8, 0.5, 0.2]), "uniform@2:0.8,uniform@4:0.5,attention@6:0.2"),
        (("attention", [8], [1, 1]), "attention@8:1.0"),
        (("attention", [], []), "none"),
        (("attention", [], [1.0]), "none"),
    ],
)
def test_published_settings_are_understood(published, expected):
    assert str(DropSchedule.from_published(*published)) == expected


@pytest.mark.parametrize(
    ("published", "words"),
    [
        (("atention", [8], [1.0, 0.5]), "unknown llm_compress_type 'atention'; did you mean 'attention'"),
        ((["uniform"], [8], [1.0, 0.5]), "unknown llm_compress_type ['uniform']"),
        (("uniform", 8, [1.0, 0.5]), "llm_compress_layer_list is 8; it must be a list of numbers"),
        (("uniform", "8", [1.0, 0.5]), "llm_compress_layer_list is '8'; it must be a list of numbers"),
        (("uniform", [8], None), "llm_image_token_ratio_list is None; it must be a list of numbers"),
        (("uniform", [8], [1.0, "half"]), "llm_image_token_ratio_list is [1.0, 'half']; it must be a list of numbers"),
        (("uniform", [True], [1.0, 0.5]), "llm_compress_layer_list is [True]"),
        (("uniform", [8.5], [1.0, 0.5]), "layer 8.5 of uniform@8.5:0.5 is not a layer index"),
        (("uniform", [8], [1.0, 1.5]), "keeps the ratio 1.5"),
        (("attention", [8], [1.0]), "has 1 entries for 1 layers; give 2"),
        (("attention", [8], [0.5, 0.25]), "starts with 0.5; it must start with 1.0"),
    ],
)
def test_published_faults_are_named(published, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DropSchedule.from_published(*published)


@pytest.mark.parametrize("name", DROP_POLICIES.names())
@pytest.mark.parametrize(("num_tokens", "num_asked"), [(1, 1), (10, 1), (10, 4), (10, 10), (10, 99), (7, 0)])
def test_every_policy_keeps_the_contract(name, num_tokens, num_asked):
    policy = DROP_POLICIES.get(name)()
    num_keep = policy.num_keep(num_tokens, num_asked)
    assert 0 <= num_keep <= num_tokens
    chosen = [
        policy.choose(
            num_tokens,
            num_keep,
            scores=torch.linspace(1, 0, num_tokens).sin() if policy.needs_scores else None,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    ]
    assert torch.equal(chosen[0], chosen[1])
    assert chosen[0].dtype == torch.int64
    assert chosen[0].shape == (num_keep,)
    assert (chosen[0].diff() > 0).all()
    if num_keep:
        assert chosen[0][0] >= 0
        assert chosen[0][-1] < num_tokens
    if num_keep == num_tokens:
        assert chosen[0].tolist() == list(range(num_tokens))
