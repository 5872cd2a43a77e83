"""The tour of the README and the examples of extending.md run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the Python of a page in an empty folder; what it registers is forgotten again."""
    from hico import registry

    monkeypatch.chdir(tmp_path)
    for parts in (registry.ENCODERS, registry.COMPRESSORS, registry.VIDEO_COMPRESSORS, registry.DROP_POLICIES):
        monkeypatch.setattr(parts, "_entries", dict(parts._entries))

    def run(page: Path) -> dict:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
        assert len(blocks) >= 5
        names = {"__name__": "__main__"}
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
        return names

    return run


def test_the_tour_runs(run):
    names = run(README)
    assert names["tokens"].shape == (2, 16, 64)
    assert names["ablation"].vision.num_video_tokens(num_frames=32) == 64
    assert len(names["session"].messages) == 4


def test_parts_of_your_own_run_are_saved_and_load_again(run, capsys):
    names = run(README.parent / "docs" / "extending.md")
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["torch.Size([2, 16, 64])", "128", "32"]
    assert type(names["model"].model.encoder) is names["Patches"]
    assert type(names["model"].model.video_compressor) is names["Loudest"]
    assert names["model"].config.drop_schedule == "newest@1:0.5"


def test_every_page_that_the_documentation_links_to_exists():
    root = README.parent
    for page in [README, *root.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
