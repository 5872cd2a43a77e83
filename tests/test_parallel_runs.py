"""Several processes that share rows must do what one does: the same losses, gradients and weights."""

import pytest
import torch
from parallel_worker import Case, run, start

LONG = {"text": (9, 14, 6), "clips": (2, 3)}
CASES = {
    2: {
        "ring": Case(heads=(7, 1)),
        "ulysses": Case(checkpointing=True),
        "ring_of_equal_heads": Case(ulysses=1, settings=LONG),
        "packed": Case(batch="text", ulysses=1, settings={"lengths": (9, 1, 17, 5)}),
        "packed_ulysses": Case(batch="text", settings={"lengths": (9, 1, 17, 5)}),
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
        "ddp": Case(heads=(7, 1), size=2, wrap="ddp"),
        "fsdp2": Case(heads=(4, 4), size=2, wrap="fsdp2"),
    },
}


@pytest.fixture(scope="module", params=CASES, ids="{}_processes".format)
def found(request, tmp_path_factory):
    processes = request.param
    jobs = {name: (run, {"case": case}) for name, case in CASES[processes].items()}
    return processes, start(processes, tmp_path_factory.mktemp("parallel"), jobs)


def test_several_processes_train_as_one_does(found):
    processes, results = found
    for name, case in CASES[processes].items():
        expected, seen = run(case, processes=1), results[name]
        for what in ("losses", "gradients", "weights"):
            torch.testing.assert_close(
                seen[what],
                expected[what],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text, at=f"{name}, {what}": f"{at}: {text}",
            )
        assert sum(bool(gradient.abs().max() > 1e-3) for gradient in seen["gradients"].values()) > 20
