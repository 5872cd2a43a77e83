"""The text needle test's prompts: a sentence with a number, hidden in a long text, and the question for it.

Source: Zhang et al., "LongVA", arXiv:2406.16852, and its text needle test.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

CITIES = ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")
"""Whose numbers may distract; the needle is Singapore's."""
NEEDLE = "\nThe special magic {} number is: {}.\n"
PREFIX = "This is a very long story book: <book>"
QUESTION = (
    "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
    "Answer: The special magic Singapore number is: "
)
LLAMA2_ENDS = frozenset({29889, 869})
"""Llama-2's tokens for a period, with and without a space before it: the published test takes them for every model."""
NUM_DIGITS = 7
_ENDS = re.compile(r"[.!?\u3002\uff01\uff1f][\"')\]\u2019\u201d]*\s*$")


def sentence_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Find the tokens that a sentence ends with: a period, question or exclamation mark, and what may follow it.

    Args:
        tokenizer: of the model.

    Raises:
        ValueError: if there are none, since then no needle could be put between sentences.
    """
    special = set(tokenizer.all_special_ids)
    ids = [number for number in tokenizer.get_vocab().values() if number not in special]
    texts = tokenizer.batch_decode([[number] for number in ids], clean_up_tokenization_spaces=False)
    ends = frozenset(number for number, text in zip(ids, texts, strict=True) if _ENDS.search(text))
    if not ends:
        raise ValueError(
            "the tokenizer has no token that ends a sentence, so that needles would stand anywhere; "
            "name the tokens to put them behind: --sentence-ends 13,14"
        )
    return ends


def plant(tokens: Sequence[int], needle: Sequence[int], place: int, *, ends: Container[int]) -> list[int]:
    """Put a needle into a text, behind the next sentence end.

    Args:
        tokens: the text.
        needle: to be put in.
        place: index where the search begins; the needle stands exactly there if no sentence ends from there on.
        ends: tokens that end a sentence.
    """
    behind = next((index + 1 for index in range(place, len(tokens)) if tokens[index] in ends), place)
    return [*tokens[:behind], *needle, *tokens[behind:]]


@dataclass(frozen=True)
class Pieces:
    """The tokens that a prompt is put together of.

    Args:
        prefix: what stands before the text.
        question: what stands behind it.
        ends: tokens that end a sentence.
    """

    prefix: Sequence[int]
    question: Sequence[int]
    ends: Container[int]

    def prompt(
        self,
        haystack: Sequence[int],
        needle: Sequence[int],
        *,
        depth: float,
        distractors: Sequence[Sequence[int]] = (),
        chance: np.random.RandomState,
    ) -> list[int]:
        """Hide a needle.

        The prompt is longer than the text by all that is added. Depth 0 is the very beginning.

        Args:
            haystack: the text, of the length that is tested.
            needle: what is asked for.
            depth: where it is looked for a sentence end, as a share of the text with its distractors, in [0, 1].
            distractors: put at random places before the needle is.
            chance: draws these.
        """
        tokens = list(haystack)
        for distractor in distractors:
            tokens = plant(tokens, distractor, chance.randint(len(tokens)), ends=self.ends)
        # Rounded first, since 0.29 * 100 is 28.999999999999996.
        place = int(round(depth * len(tokens), 6))
        tokens = [*needle, *tokens] if depth == 0 else plant(tokens, needle, place, ends=self.ends)
        return [*self.prefix, *tokens, *self.question]


@dataclass(frozen=True)
class TextNeedles:
    """Writes the test's prompts for one tokenizer.

    Args:
        tokenizer: of the model.
        ends: tokens that end a sentence, see `sentence_ends`.
        num_distractors: sentences about other cities, at most six.
        seed: of numbers and places; they follow from it, the length, the depth and the sample alone.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: Container[int]
    num_distractors: int = 0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.num_distractors <= len(CITIES):
            raise ValueError(f"there are {self.num_distractors} distractors; use 0 to {len(CITIES)}")
        digits = self._encode("0123456789")
        if not digits or self.tokenizer.unk_token_id in digits:
            raise ValueError("the tokenizer knows no digits, so that numbers mean nothing; this test needs another")

    def write(self, haystack: Sequence[int], *, depth: float, sample: int = 0) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and of its answer.

        Args:
            haystack: tokens of the text.
            depth: of the needle, in [0, 1].
            sample: which of several tests of this length and depth.
        """
        chance = np.random.RandomState([self.seed, len(haystack), round(depth * 1e6), sample])
        number, *others = (int(chance.randint(10**NUM_DIGITS)) for _ in range(1 + self.num_distractors))
        distractors = [
            self._encode(NEEDLE.format(*facts)) for facts in zip(CITIES[: len(others)], others, strict=True)
        ]
        needle = self._encode(NEEDLE.format("Singapore", number))
        pieces = Pieces([*self.begin, *self._encode(PREFIX)], self._encode(QUESTION), self.ends)
        prompt = pieces.prompt(haystack, needle, depth=depth, distractors=distractors, chance=chance)
        return prompt, self._encode(str(number))

    @cached_property
    def begin(self) -> list[int]:
        """What the tokenizer begins every text with, such as ``<s>``; most often nothing."""
        begin = self.tokenizer.bos_token_id
        return [begin] if begin is not None and self.tokenizer.encode("a")[:1] == [begin] else []

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
