"""``hico niah``: can a model find one fact in a context of any length, wherever it stands?"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hico.eval.needles import TextNeedles

PERPLEXITY_TOKENS = 256
"""Tokens whose likelihood is measured behind a context of every length."""
RESULTS, HEATMAP = "results.jsonl", "heatmap.png"
KEY = ("test", "length", "depth")
"""Fields that tell the lines of a results file apart."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the needle tests as subcommands of ``hico niah``."""
    tests = parser.add_subparsers(dest="test", required=True, metavar="test")
    text = tests.add_parser(
        "text",
        help="a number in a long text",
        description=(
            "Hide a sentence with a number in a long text, and ask for it. A needle is found if every token of the "
            "answer is the likeliest one, given the right ones before it. A run that was stopped goes on where it was."
        ),
    )
    text.add_argument("--model", required=True, metavar="DIR", help="folder of a causal LM, or of a hico checkpoint")
    text.add_argument(
        "--lengths",
        default="1000:31000:5000",
        metavar="FROM:TO:STEP",
        help="tokens of text, or a list such as 1000,8000 (%(default)s)",
    )
    text.add_argument("--depths", default="0:1:0.1", metavar="FROM:TO:STEP", help="0 is the beginning (%(default)s)")
    text.add_argument("--distractors", type=int, default=0, help="numbers of other cities: 0, 3, 5 (%(default)s)")
    text.add_argument("--samples", type=int, default=5, help="tests of every length and depth (%(default)s)")
    text.add_argument("--seed", type=int, default=0, help="of numbers, places and bundled text (%(default)s)")
    text.add_argument("--haystack", metavar="DIR", help="folder of .txt and .md files; bundled prose if omitted")
    text.add_argument(
        "--repeat-haystack", action="store_true", help="take a text that is too short several times over"
    )
    text.add_argument(
        "--sentence-ends",
        default="tokenizer",
        metavar="ENDS",
        help="what needles stand behind: 'tokenizer' looks for the model's own tokens, 'published' takes Llama-2's as "
        "LongVA's code does for every model; or token ids, separated by commas (%(default)s)",
    )
    text.add_argument("--trained-length", type=int, metavar="N", help="marked; the configuration's if omitted")
    text.add_argument("--beyond", action="store_true", help="go beyond the positions that the configuration names")
    text.add_argument("--output", default="niah", metavar="DIR", help=f"for {RESULTS} and {HEATMAP} (%(default)s)")
    text.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is if omitted")
    text.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on CPU, else bfloat16")
    text.add_argument("--attention", metavar="NAME", help="as transformers names it, such as flash_attention_2")
    text.add_argument(
        "--sequence-parallel",
        type=int,
        default=1,
        metavar="N",
        help="processes that share every row, started by torchrun --nproc_per_node N -m hico.cli niah text ...",
    )
    text.set_defaults(run=run_text)


def run_text(args: argparse.Namespace) -> None:
    """Run ``hico niah text``."""
    lengths = parse_grid(args.lengths, name="--lengths", low=1)
    depths = parse_grid(args.depths, name="--depths", low=0, high=1)
    if fractions := [length for length in lengths if length != int(length)]:
        raise ValueError(f"--lengths {args.lengths} has {fractions[0]}; lengths are whole numbers of tokens")
    if args.samples < 1:
        raise ValueError(f"--samples is {args.samples}; give at least 1")
    from hico.eval.haystack import haystack_digest, read_haystack
    from hico.eval.models import device_and_dtype, load_language_model, load_tokenizer, model_digest, num_positions
    from hico.eval.needles import TextNeedles
    from hico.eval.processes import Processes
    from hico.eval.results import ResultsFile

    lengths = [int(length) for length in lengths]
    processes = Processes(args.sequence_parallel)
    device, dtype = device_and_dtype(processes.device or args.device, args.dtype)
    tokenizer, known = load_tokenizer(args.model), num_positions(args.model)
    ends = _sentence_ends(args.sentence_ends, tokenizer)
    needles = TextNeedles(tokenizer, ends, num_distractors=args.distractors, seed=args.seed)
    haystack = read_haystack(
        tokenizer,
        max(lengths) + PERPLEXITY_TOKENS,
        folder=args.haystack,
        repeat=args.repeat_haystack,
        seed=args.seed,
    )
    longest = max(len(haystack), sum(map(len, needles.write(haystack[: max(lengths)], depth=0))))
    if known is not None and longest > known and not args.beyond:
        raise ValueError(
            f"a text of {max(lengths):,} tokens makes a prompt of {longest:,}, but the model's configuration names "
            f"{known:,} positions; test shorter lengths, or go beyond on purpose: --beyond"
        )
    model = load_language_model(args.model, device=device, dtype=dtype, attention=args.attention)
    settings = {
        "test": "text",
        "model": model_digest(args.model),
        "haystack": haystack_digest(haystack),
        **{"lengths": lengths, "depths": depths, "distractors": args.distractors, "samples": args.samples},
        **{"seed": args.seed, "sentence_ends": sorted(ends)},
        **{"dtype": str(model.dtype), "attention": args.attention},
    }
    output = Path(args.output)
    results = (
        ResultsFile(output / RESULTS, settings, key=KEY, notes=_notes(args, model)) if processes.is_first else None
    )
    cells = processes.agree([cell for cell in text_cells(lengths, depths) if not results or cell not in results])
    with processes.sharing_rows(model):
        measure_text(model, needles, haystack, cells, samples=args.samples, add=results.add if results else _forget)
    if not results:
        return
    trained = args.trained_length or known
    scores, perplexities = scores_of(results)
    from hico.eval.heatmap import draw_heatmap

    title = f"{Path(args.model).resolve().name}, {args.distractors} distractors"
    draw_heatmap(output / HEATMAP, scores, trained=trained, title=title, below=perplexities)
    print(format_table(scores, perplexities, trained=trained))
    print(f"{output / RESULTS}, {output / HEATMAP}")


def text_cells(lengths: Sequence[int], depths: Sequence[float]) -> list[tuple[str, int, float | None]]:
    """List what is measured, by `KEY`: for every length the perplexity, and a needle at every depth."""
    return [
        (test, length, depth)
        for length in sorted(lengths)
        for test, depth in [("perplexity", None), *(("needle", depth) for depth in depths)]
    ]


def measure_text(
    model: PreTrainedModel,
    needles: TextNeedles,
    haystack: Sequence[int],
    cells: Sequence[tuple[str, int, float | None]],
    *,
    samples: int,
    add: Callable[[dict[str, Any]], None],
) -> None:
    """Measure cell by cell.

    Beside the needles, the perplexity of the same tokens is measured behind as much of the text before them as every
    length says, so that nothing but the context differs.

    Args:
        model: a causal LM.
        needles: writes the prompts.
        haystack: tokens, `PERPLEXITY_TOKENS` more than the longest length.
        cells: see `text_cells`.
        samples: tests of every length and depth.
        add: takes every result, as `hico.eval.results.ResultsFile` does.
    """
    import torch

    from hico.eval.scoring import knows_answer, mean_loss

    longest = len(haystack) - PERPLEXITY_TOKENS
    for number, (test, length, depth) in enumerate(cells, 1):
        _show_progress(f"{number}/{len(cells)}: {length:,} tokens")
        if test == "perplexity":
            context = torch.tensor([*needles.begin, *haystack[longest - length : longest]])
            loss = mean_loss(model, context, torch.tensor(haystack[longest:]))
            add({"test": test, "length": length, "perplexity": math.exp(min(loss, 700.0))})
            continue
        found = []
        for sample in range(samples):
            prompt, answer = needles.write(haystack[:length], depth=depth, sample=sample)
            found.append(knows_answer(model, torch.tensor(prompt), torch.tensor(answer)))
        add({"test": test, "length": length, "depth": depth, "score": sum(found) / samples, "found": found})
    _show_progress("")


def scores_of(results: Iterable[dict[str, Any]]) -> tuple[dict[tuple[int, float], float], dict[int, float]]:
    """Return the share of needles found by length and depth, and the perplexity by length."""
    scores = {(line["length"], line["depth"]): line["score"] for line in results if line["test"] == "needle"}
    return scores, {line["length"]: line["perplexity"] for line in results if line["test"] == "perplexity"}


def format_table(
    scores: dict[tuple[int, float], float],
    perplexities: dict[int, float] | None = None,
    *,
    trained: int | None = None,
    across: str = "tokens",
) -> str:
    """Lay the scores out as text: a row per length, and the means up to the trained length and beyond it."""
    rows = [(across, "found", "worst depth", *(["perplexity"] if perplexities else []))]
    lengths = sorted({length for length, _ in scores})
    for length in lengths:
        own = {depth: score for (of, depth), score in scores.items() if of == length}
        worst = min(own, key=own.get)
        row = [f"{length:,}", f"{sum(own.values()) / len(own):.1%}", f"{own[worst]:.0%} at {worst:.0%}"]
        if perplexities:
            row.append(f"{perplexities[length]:.3g}" if length in perplexities else "")
        rows.append(tuple(row))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if trained is not None:
        for words, is_in in (("up to", lambda length: length <= trained), ("beyond", lambda length: length > trained)):
            some = [score for (length, _), score in scores.items() if is_in(length)]
            lines += [f"{words} the trained {trained:,} {across}: {sum(some) / len(some):.1%}"] if some else []
    return "\n".join(lines)


def parse_grid(text: str, *, name: str, low: float, high: float = math.inf) -> list[float]:
    """Read ``FROM:TO:STEP``, both ends included where the steps meet them, or numbers separated by commas.

    Args:
        text: as the user wrote it.
        name: of the option.
        low: least value allowed.
        high: greatest value allowed.

    Raises:
        ValueError: if it is neither, or a value is out of range.
    """
    try:
        numbers = [Decimal(part) for part in text.replace(":", ",").split(",")]
    except InvalidOperation:
        numbers = []
    is_range = ":" in text
    if not numbers or not all(number.is_finite() for number in numbers) or (is_range and len(numbers) != 3):
        raise ValueError(f"{name} is {text!r}; give FROM:TO:STEP, such as 0:1:0.1, or numbers with commas between")
    if is_range:
        first, last, step = numbers
        if step <= 0 or last < first:
            raise ValueError(
                f"{name} {text} is empty; the step must be positive, and the end not before the beginning"
            )
        numbers = [first + step * count for count in range(int((last - first) / step) + 1)]
    for number in numbers:
        if not low <= number <= high:
            allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} has {number}; it must be {allowed}")
    return sorted({float(number) for number in numbers})


def _sentence_ends(words: str, tokenizer) -> frozenset[int]:
    from hico.eval.needles import LLAMA2_ENDS, sentence_ends

    if words in ("tokenizer", "published"):
        return sentence_ends(tokenizer) if words == "tokenizer" else LLAMA2_ENDS
    ends = [int(word) for word in words.split(",") if word.strip().isdecimal()]
    if len(ends) != len(words.split(",")) or max(ends) >= len(tokenizer):
        raise ValueError(
            f"--sentence-ends is {words!r}; give 'tokenizer', 'published', or ids below {len(tokenizer)} with commas"
        )
    return frozenset(ends)


def _notes(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """Say what decides nothing, but is worth knowing later."""
    import torch
    import transformers

    import hico

    paths = {"model": str(args.model), "haystack": args.haystack or "bundled prose", "device": str(model.device)}
    versions = {module.__name__: module.__version__ for module in (hico, torch, transformers)}
    return {**paths, "versions": versions}


def _forget(result: dict[str, Any]) -> None:
    """Leave a result to the first process."""


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:70}", end="" if text else "\r", file=sys.stderr, flush=True)
