"""The tour of the README runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_tour_runs(tmp_path, monkeypatch):
    from hico.registry import COMPRESSORS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(COMPRESSORS, "_entries", dict(COMPRESSORS._entries))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["tokens"].shape == (2, 16, 64)
    assert names["ablation"].vision.num_video_tokens(num_frames=32) == 64
    assert len(names["session"].messages) == 4


def test_every_page_that_the_documentation_links_to_exists():
    root = README.parent
    for page in [README, *root.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
