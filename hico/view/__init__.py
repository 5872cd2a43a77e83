"""``hico view``: one page that shows which patches of a video became which tokens, and which of them were removed."""

from hico.view.facts import Facts, Step, collect
from hico.view.page import check_output, render

__all__ = ["Facts", "Step", "check_output", "collect", "render"]
