"""Several processes that share rows must do what one does: the same losses, gradients and weights."""

import pytest
import torch
from parallel_worker import Case, answers, run, start, videos

LONG = {"text": (9, 14, 6), "clips": (2, 3)}
CASES = {
    2: {
        "ring": Case(heads=(7, 1)),
        "ulysses": Case(checkpointing=True),
        "ring_of_equal_heads": Case(ulysses=1, settings=LONG),
        "packed": Case(batch="text", ulysses=1, settings={"lengths": (9, 1, 17, 5)}),
        "packed_ulysses": Case(batch="text", settings={"lengths": (9, 1, 17, 5)}),
        "uniform": Case(heads=(7, 1), drop="uniform@1:0.6,uniform@2:0.2", settings=LONG),
        "attention": Case(ulysses=1, drop="attention@1:0.6,attention@2:0.2", settings=LONG),
        "layer_before": Case(heads=(4, 2), drop="fastv@1:0.6,attention@2:0.2:previous", settings=LONG),
        "video": Case(heads=(7, 1), video={"name": "visionzip", "keep_ratio": 0.5}, settings={"per_clip": 4, **LONG}),
        "video_by_content": Case(
            video={"name": "dtd", "threshold": 0.26}, drop="attention@1:0.6", settings={"side": "left", **LONG}
        ),
    },
    4: {
        "ring": Case(heads=(7, 1), checkpointing=True),
        "ulysses": Case(settings=LONG),
        "mixed": Case(heads=(4, 2), settings=LONG),
        "mixed_as_asked": Case(ulysses=2, batch="text"),
        "ring_of_equal_heads": Case(ulysses=1, batch="text", settings={"lengths": (64,)}),
        "packed": Case(heads=(7, 1), batch="text", settings={"lengths": (11, 2, 1, 30, 9)}),
        "packed_mixed": Case(heads=(4, 2), batch="text", settings={"lengths": (30, 2, 1, 11, 9)}),
        "tiny": Case(batch="text", ulysses=1, settings={"lengths": (5,)}),
        "padded_right": Case(heads=(4, 2), settings={"side": "right"}),
        "padded_left": Case(heads=(7, 1), settings={"side": "left"}),
        "random": Case(heads=(7, 1), drop="random@1:0.5", settings={"side": "right"}),
        "attention": Case(heads=(4, 2), drop="uniform@1:0.6,attention@2:0.2", settings=LONG, checkpointing=True),
        "attention_keeps_positions": Case(
            ulysses=1,
            drop="attention@1:0.5,attention@2:0.3",
            drop_options={"positions": "keep", "queries": "all_text", "scope": "row"},
            settings={"side": "left", **LONG},
        ),
        "ddp": Case(heads=(7, 1), size=2, wrap="ddp"),
        "fsdp2": Case(heads=(4, 4), size=2, wrap="fsdp2"),
    },
}


@pytest.fixture(scope="module", params=CASES, ids="{}_processes".format)
def found(request, tmp_path_factory):
    processes = request.param
    jobs = {name: (run, {"case": case}) for name, case in CASES[processes].items()}
    jobs["answers"] = answers, {}
    return processes, start(processes, tmp_path_factory.mktemp("parallel"), jobs)


def test_several_processes_train_as_one_does(found):
    processes, results = found
    for name, case in CASES[processes].items():
        expected, seen = run(case, processes=1), results[name]
        assert (seen["kept"] is None) == (case.drop is None)
        assert seen["trimmed"] == expected["trimmed"] == (name == "video_by_content")
        if case.drop:
            assert torch.equal(seen["kept"], expected["kept"])
            assert seen["kept"].shape[1] < videos(0, **case.settings)["input_ids"].shape[1]
        for what in ("losses", "gradients", "weights"):
            torch.testing.assert_close(
                seen[what],
                expected[what],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text, at=f"{name}, {what}": f"{at}: {text}",
            )
        assert sum(bool(gradient.abs().max() > 1e-3) for gradient in seen["gradients"].values()) > 20


def test_logits_of_a_few_positions_are_those_of_one_process(found):
    processes, seen, expected = found[0], found[1]["answers"], answers(processes=1)
    clips = [part.pop("encoded").item() / 3 for part in (seen, expected)]
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert clips == [6 + -6 % processes, 6]  # each by one process, and blank ones by those that are left over
