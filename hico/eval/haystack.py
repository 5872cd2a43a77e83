"""Text to hide needles in: a folder of the user's own, or prose that a seeded grammar writes without end."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".md")
_PARAGRAPHS_AT_ONCE = 64

_PEOPLE = (
    "the miller|the old ferryman|my aunt|the schoolmaster|a young carpenter|the baker's daughter|the lamplighter|"
    "the widow next door|a travelling clockmaker|the gardener|our postman|the beekeeper|a retired sailor|"
    "the librarian|the weaver|two brothers from the hills|the stationmaster|a fiddler|the doctor|the shepherd"
)
_PLACES = (
    "by the river|at the end of the lane|in the market square|behind the chapel|on the high pasture|near the quarry|"
    "under the great oak|at the harbour|in the upper village|beside the mill pond|along the old wall|"
    "across the bridge|in the walled garden|at the foot of the hill|on the road to the coast"
)
_TIMES = (
    "in the spring|one evening|before sunrise|after the harvest|all through the winter|on market days|late in autumn|"
    "when the fog had lifted|on the first warm day|at dusk|during the long rains|for many years|that same week"
)
_THINGS = (
    "a copper kettle|three jars of honey|an unfinished letter|a box of seeds|the broken cart|a bundle of reeds|"
    "an old map|a blue lantern|a basket of pears|the church bell|a wooden flute|a coil of rope|the brass telescope|"
    "a loaf of rye bread|the ledger|a painted door|a pair of boots|the stone bench|a sack of flour|a silver thimble"
)
_DEEDS = (
    "repaired|carried home|forgot|painted|sold|hid|found|borrowed|gave away|looked after|measured|spoke about|"
    "waited beside|drew a picture of|argued over|polished|lost|remembered"
)
_SKIES = (
    "the wind turned to the north|snow lay on the roofs|swallows gathered on the wires|the river stood high|"
    "the air smelled of hay|mist covered the fields|the moon was nearly full|thunder rolled beyond the hills|"
    "the apples were ripe|dust hung over the road|frost whitened the grass|a fine rain was falling"
)
_FEELINGS = (
    "nobody was in a hurry|everyone agreed that it was a good sign|few people took notice|there was much laughter|"
    "the dogs slept through it all|it was soon the talk of the village|no one could say why|"
    "the children were delighted|it made the evenings shorter|there was bread enough for all|"
    "the old quarrel was forgotten|they began again at once"
)
_WORDS = {
    name: words.split("|")
    for name, words in {
        "person": _PEOPLE,
        "other": _PEOPLE,
        "place": _PLACES,
        "time": _TIMES,
        "thing": _THINGS,
        "deed": _DEEDS,
        "sky": _SKIES,
        "feeling": _FEELINGS,
    }.items()
}
_SENTENCES = (
    "{time}, {person} {deed} {thing} {place}",
    "{person} {deed} {thing}, and {feeling}",
    "{sky} when {person} came back from the house {place}",
    "it is said that {person} once {deed} {thing} {place}",
    "{sky}, and {feeling}",
    "{place}, {person} and {other} talked about {thing} {time}",
    "because {sky}, {person} stayed indoors and {deed} {thing}",
    "{person} never {deed} {thing} without telling {other}",
    "{time} {sky}, but {person} {deed} {thing} all the same",
    "{other} asked whether {person} had {deed} {thing} {place}",
)


def prose(seed: int = 0) -> Iterator[str]:
    """Write paragraphs without end: village tales that mean nothing, by a grammar of some hundred phrases.

    The phrases were written for this purpose and are given to the public domain (CC0 1.0), and so is all that they are
    put together to.

    Args:
        seed: of the text; the same one gives the same text everywhere.
    """
    chance = np.random.RandomState(seed)  # whose numbers never change, unlike those of numpy's generators

    def draw(words: Sequence[str]) -> str:
        return words[chance.randint(len(words))]

    while True:
        sentences = []
        for _ in range(chance.randint(3, 8)):
            sentence = draw(_SENTENCES).format(**{name: draw(words) for name, words in _WORDS.items()})
            sentences.append(sentence[0].upper() + sentence[1:] + ".")
        yield " ".join(sentences) + "\n\n"


def folder_texts(folder: str | Path) -> Iterator[str]:
    """Read the ``.txt`` and ``.md`` files of a folder and of those in it, in the order of their paths.

    Raises:
        ValueError: if there are none.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no {' or '.join(SUFFIXES)} files; put the text of the haystack there")
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace") + "\n\n"


def read_haystack(
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    *,
    folder: str | Path | None = None,
    repeat: bool = False,
    seed: int = 0,
) -> list[int]:
    """Return the tokens of a text, without special ones.

    Args:
        tokenizer: of the model.
        num_tokens: how many are wanted.
        folder: see `folder_texts`; `prose` if omitted.
        repeat: start again where the text of the folder ends.
        seed: of the prose.

    Raises:
        ValueError: if the text of the folder is too short, and is not to be repeated.
    """
    texts = prose(seed) if folder is None else folder_texts(folder)
    tokens: list[int] = []
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _PARAGRAPHS_AT_ONCE or folder is not None:
            tokens += _encode(tokenizer, batch)
            batch = []
            if len(tokens) >= num_tokens:
                return tokens[:num_tokens]
    if not tokens:
        raise ValueError(f"the files in {folder} hold no text; put the text of the haystack there")
    if not repeat:
        raise ValueError(
            f"the text in {folder} has {len(tokens):,} tokens, but {num_tokens:,} are needed; add text, "
            "test shorter lengths, or take it several times over: --repeat-haystack"
        )
    return (tokens * -(-num_tokens // len(tokens)))[:num_tokens]


def haystack_digest(tokens: Sequence[int]) -> str:
    """Digest a haystack, which tells text and tokenizer apart."""
    return hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    return [token for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for token in ids]
