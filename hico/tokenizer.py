"""Tokenizers with placeholders: one that needs no file, for tiny models and tests, and those of LLMs."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from hico.prompt import CHAT_TEMPLATE, IMAGE_TOKEN, VIDEO_TOKEN

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN, VIDEO_TOKEN)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes (ids 0 to 255) and the special tokens of ChatML (from 256)."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _chatml(tokenizer)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, in lower case; digits, punctuation marks and newlines stand alone.

    Args:
        words: to be known, once or more often, in any order; all others become ``<unk>``.
    """
    vocabulary = dict.fromkeys((*SPECIAL_TOKENS, "<unk>", *sorted(set(words))))
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"[\n\d.,:;?!]"), "isolated")]
    )
    return _chatml(tokenizer, unk_token="<unk>")


def _chatml(tokenizer: Tokenizer, **settings: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        **settings,
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", IMAGE_TOKEN, VIDEO_TOKEN],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def add_placeholders(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Give a tokenizer the placeholders that it lacks, on the next free ids.

    Returns:
        ``video_token_id`` and ``image_token_id``, as `HicoConfig` takes them.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in (VIDEO_TOKEN, IMAGE_TOKEN) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    video_id, image_id = tokenizer.convert_tokens_to_ids([VIDEO_TOKEN, IMAGE_TOKEN])
    return {"video_token_id": video_id, "image_token_id": image_id}


def load_llm_tokenizer(path: str, *, known: bool = True, **hub_kwargs) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that lies beside an LLM, or None if there is none. Runs no code that lies there too.

    Args:
        path: a folder or the name of a repository.
        known: whether transformers knows the model; if not, its configuration is not asked for the tokenizer's class.
        hub_kwargs: for ``AutoTokenizer.from_pretrained``, such as ``revision``.

    Raises:
        ValueError: if it is damaged, or cannot do without its own code.
    """
    files = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
    if not any(cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs) for name in files):
        return None
    if not known:
        hub_kwargs["config"] = PreTrainedConfig()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **hub_kwargs)
    except (OSError, ImportError):
        raise
    except Exception as error:  # damaged files make transformers fail in any way
        raise ValueError(f"{path}: its tokenizer cannot be read ({error})") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # otherwise it is saved again, and asks for that code
    return tokenizer


def _byte_characters() -> dict[str, int]:
    """Map the character that byte-level tokenizers write for a byte to the byte; unprintable ones move past 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return {chr(byte if byte in printable else next(moved)): byte for byte in range(256)}
