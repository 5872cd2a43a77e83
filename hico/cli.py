"""The ``hico`` command."""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import hico
from hico.registry import import_plugins


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. Bad input is one line on standard error, never a traceback."""
    parser = argparse.ArgumentParser(prog="hico", description="Hierarchical compression of long video.")
    parser.add_argument("--version", action="version", version=f"hico {hico.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (
        _add_chat,
        _add_demo,
        _add_convert,
        _add_inspect,
        _add_list,
        _add_niah,
        _add_ablate,
        _add_plan,
        _add_bench,
        _add_view,
        _add_merge_lora,
    ):
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="import yours first")
    args = parser.parse_args(argv)
    try:
        import_plugins(args.plugin)
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"hico {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_chat(commands) -> None:
    parser = commands.add_parser("chat", help="ask about a video", description="Ask about a video.")
    parser.add_argument("video", help="a video file, a gif, or a folder of images")
    parser.add_argument("question", nargs="?", help="without one, questions are read from the terminal")
    _add_model_arguments(parser)
    _add_video_arguments(parser)
    _add_generation_arguments(parser)
    parser.add_argument("--no-progress", action="store_true", help="no bar while the video is encoded")
    parser.set_defaults(run=_chat)


def _add_demo(commands) -> None:
    about = (
        "Train a tiny model on a small corpus of real files, examine it after every stage, and ask it about a new "
        "video: some minutes on two CPU cores. With VIDEO or --untrained, show every step from a file to an answer "
        "instead, with random weights: a second."
    )
    parser = commands.add_parser("demo", help="watch a tiny model learn", description=about)
    parser.add_argument("video", nargs="?", help="show the steps with this file")
    parser.add_argument("--untrained", action="store_true", help="show the steps with a small file made for it")
    parser.add_argument("--question", default="What happens?", help="asked in the steps (%(default)s)")
    parser.add_argument("--folder", default="demo", help="where corpus, models and pictures go (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, weights and training (%(default)s)")
    _add_video_arguments(parser)
    parser.set_defaults(run=_demo)


def _add_convert(commands) -> None:
    about = "Convert a checkpoint of VideoChat-Flash or LongVA, or back, or make a model of an LLM and an encoder."
    parser = commands.add_parser("convert", help="published checkpoints to hico and back", description=about)
    parser.add_argument("source", help="folder of a checkpoint, or of an LLM")
    parser.add_argument("target", help="folder to write; must not exist")
    parser.add_argument("--to", choices=("hico", "published"), default="hico", help="layout to write (%(default)s)")
    parser.add_argument("--encoder", help="for an LLM: a file of UMT or InternVideo2, or a CLIP or SigLIP folder")
    parser.add_argument("--projector", help="for an LLM: mm_projector.bin of stage 1; random if omitted")
    parser.add_argument("--preset", help="for an LLM: the preset that says the rest")
    parser.set_defaults(run=_convert)


def _add_inspect(commands) -> None:
    about = "Say what a checkpoint, or a part of one, is, without loading its weights."
    parser = commands.add_parser("inspect", help="say what a checkpoint is", description=about)
    parser.add_argument("checkpoint", help="a folder, or a file of weights")
    parser.set_defaults(run=_inspect)


def _add_list(commands) -> None:
    parser = commands.add_parser(
        "list", help="what is registered", description="List the parts that a config can name."
    )
    parser.set_defaults(run=_list)


def _add_plan(commands) -> None:
    from hico import plan

    about = "Print operations, KV cache and memory of a model at so many frames, by arithmetic: nothing is run."
    plan.add_arguments(commands.add_parser("plan", help="what a model costs at so many frames", description=about))


def _add_niah(commands) -> None:
    from hico.eval import niah

    parser = commands.add_parser("niah", help="find a needle in a long context, by length and depth")
    niah.add_arguments(parser)


def _add_ablate(commands) -> None:
    from hico.eval import ablate

    about = (
        "Measure what ways to spend fewer visual tokens cost and how many questions they answer, on one checkpoint, "
        "or with --recipe on one trained for each. What was measured is not run again."
    )
    ablate.add_arguments(commands.add_parser("ablate", help="compare ways to reduce tokens", description=about))


def _add_bench(commands) -> None:
    from hico import bench

    parser = commands.add_parser("bench", help="measure what a setting costs and saves")
    bench.add_arguments(parser)


def _add_view(commands) -> None:
    about = (
        "Write a page that shows which patches of a video became which tokens, and which tokens were removed where."
    )
    parser = commands.add_parser("view", help="see which tokens of a video are merged and removed", description=about)
    parser.add_argument("video", help="a video file, a gif, or a folder of images")
    parser.add_argument("--question", default="What happens?", help="asked about it (%(default)s)")
    parser.add_argument("--output", default="view.html", metavar="FILE", help="page to write (%(default)s)")
    parser.add_argument("--schedule", help="drop schedule, such as uniform@4:0.5, or none; the model's if omitted")
    parser.add_argument("--video-compressor", metavar="NAME", help="for whole videos; the model's if omitted")
    _add_model_arguments(parser)
    _add_video_arguments(parser)
    _add_generation_arguments(parser)
    parser.set_defaults(run=_view)


def _add_merge_lora(commands) -> None:
    about = "Merge the adapters that a training stage with lora made into the model that it started from."
    parser = commands.add_parser("merge-lora", help="merge trained adapters into the model", description=about)
    parser.add_argument("source", help="folder of the adapters, such as runs/stage3/final")
    parser.add_argument("target", help="folder to write; must not exist")
    parser.set_defaults(run=_merge_lora)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="tiny", help="a saved model, or 'tiny': untrained, to try things out (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is if omitted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on CPU, else bfloat16")


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, help="length of an answer at most (1024)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token, as if nothing is said")
    parser.add_argument("--temperature", type=float, help="draw tokens instead, at this temperature")
    parser.add_argument("--top-p", type=float, help="draw tokens instead, from those that make up this probability")


def generation_settings(args: argparse.Namespace, own) -> dict:
    """Translate the options of `_add_generation_arguments` to settings of ``generate``.

    Args:
        args: the options.
        own: the model's `transformers.GenerationConfig`, which says the rest where tokens are drawn.

    Raises:
        ValueError: if options exclude each other or are out of range.
    """
    from hico.session import ANSWER_TOKENS

    draws = args.temperature is not None or args.top_p is not None
    if args.greedy and draws:
        raise ValueError("--greedy draws no tokens, so it excludes --temperature and --top-p; leave one of them out")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature is {args.temperature:g}; give a positive number, or --greedy instead of 0")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p:g}; give a number above 0, at most 1")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; give at least 1")
    settings = {"max_new_tokens": args.max_new_tokens or ANSWER_TOKENS, "do_sample": draws}
    if not draws:  # the values that change nothing, lest transformers warns at others in the model's own settings
        return {**settings, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    settings["temperature"] = args.temperature or own.temperature or 1.0
    settings["top_p"] = args.top_p or own.top_p or 1.0
    return {**settings, "top_k": 50 if own.top_k is None else own.top_k}


def _describe(settings: dict, own) -> str:
    """Say in words how tokens are chosen."""
    words = ["greedy"]
    if settings["do_sample"]:
        words = [f"drawn at temperature {settings['temperature']:g}", f"top-p {settings['top_p']:g}"]
        words += [f"top-k {settings['top_k']}"] if settings["top_k"] else []
    penalty = own.repetition_penalty or 1.0
    words += [f"repetition penalty {penalty:g} on the answer"] if penalty != 1 else []
    return ", ".join([*words, f"at most {settings['max_new_tokens']} tokens"])


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, help="how many frames to look at")
    parser.add_argument("--fps", type=float, help="frames per second to look at, instead of a number")
    parser.add_argument("--start", type=float, help="seconds; where to begin")
    parser.add_argument("--end", type=float, help="seconds; where to stop")


def video_settings(args: argparse.Namespace) -> dict:
    """Translate the options of `_add_video_arguments` to settings of `hico.video_io.read_video`."""
    if args.frames is not None and args.fps is not None:
        raise ValueError("--frames and --fps exclude each other; give one of them")
    settings = {"start": args.start, "end": args.end}
    if args.frames is not None:
        settings["num_frames"] = args.frames
    if args.fps is not None:
        if not 0 < args.fps < float("inf"):
            raise ValueError(f"--fps is {args.fps:g}; give a positive number of frames per second")
        settings["fps"] = args.fps
    return {key: value for key, value in settings.items() if value is not None}


def load(model: str, *, device: str | None = None, dtype: str | None = None):
    """Load a model and its processor.

    Args:
        model: a directory or hub name, or ``tiny`` for the untrained preset.
        device: as torch names it; the best there is if omitted.
        dtype: as torch names it; float32 on CPU and bfloat16 elsewhere if omitted.

    Raises:
        ValueError: if there is no such model or device.
    """
    import torch

    from hico.eval.models import device_and_dtype
    from hico.tokenizer import byte_tokenizer

    device, dtype = device_and_dtype(device, dtype)
    if model == "tiny":
        config = hico.HicoConfig.preset("tiny")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = hico.HicoForConditionalGeneration(config)
        processor = hico.HicoProcessor.from_config(config, byte_tokenizer(), video={"max_frames": 64})
    elif not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ValueError(f"there is no model {model!r}; give a directory, a hub name like 'owner/model', or 'tiny'")
    else:
        config = hico.HicoConfig.from_pretrained(model)
        stored = getattr(config, "quantization_config", None)  # such weights stay as they are, where they are put
        place = {"device_map": {"": device}} if stored else {}
        network = hico.HicoForConditionalGeneration.from_pretrained(model, dtype=dtype, **place)
        processor = hico.HicoProcessor.from_pretrained(model)
        if stored:
            return network.eval(), processor
    return network.to(device, dtype).eval(), processor


def _chat(args: argparse.Namespace) -> None:
    from transformers import TextStreamer

    model, processor = load(args.model, device=args.device, dtype=args.dtype)
    settings = generation_settings(args, model.generation_config)
    session = hico.Session(model, processor, args.video, progress=not args.no_progress, **video_settings(args))
    print(f"hico chat: {_describe(settings, model.generation_config)}", file=sys.stderr)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def ask(question: str) -> None:
        # The terminal hands on bytes that are no UTF-8 as lone surrogates, which no tokenizer takes.
        question = question.encode(errors="surrogateescape").decode(errors="replace")
        session.ask(question, streamer=streamer, **settings)

    if args.question is not None:
        ask(args.question)
        return
    print("Ask about the video; an empty line ends.")
    while question := _read_line("> "):
        try:
            ask(question)
        except ValueError as error:
            print(f"hico chat: {error}", file=sys.stderr)


def _read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, RuntimeError):  # the latter if standard input is closed from the start
        return ""


def _demo(args: argparse.Namespace) -> int:
    if args.video is None and not args.untrained:
        return _learn(Path(args.folder), args.seed)
    from hico.demo import run

    model, processor = load("tiny", device="cpu")
    run(model, processor, args.video, args.question, **video_settings(args))
    return 0


def _learn(folder: Path, seed: int) -> int:
    """Run the tiny course, then ask about a video that is in no corpus; 1 if the model learned too little."""
    import torch
    from transformers.utils import logging

    from hico.tiny.course import new_video, run_course

    # Tensors this small gain nothing from more threads, and the data workers want the other core.
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    final, has_learned = run_course(folder, seed=seed)
    video, num_right = str(folder / "new.mp4"), 0
    story = new_video(video)
    print(f"\na new video: {story.caption}")
    for question, truth in story.questions:
        with redirect_stdout(StringIO()) as printed:
            main(["chat", video, question, "--model", str(final), "--no-progress"])
        answer = printed.getvalue().strip()
        num_right += answer == truth
        print(f'$ hico chat {video} "{question}" --model {final}\n{answer}', flush=True)
    print(f"{num_right} of {len(story.questions)} answers are right")
    return 0 if has_learned and num_right > len(story.questions) / 2 else 1


def _view(args: argparse.Namespace) -> None:
    from hico.view import check_output, collect, render

    output, chosen = check_output(args.output), video_settings(args)
    model, processor = load(args.model, device=args.device, dtype=args.dtype)
    if args.schedule is not None:
        model.set_drop_schedule(args.schedule, **(model.config.drop_options or {}))
    if args.video_compressor is not None:
        model.set_video_compressor(args.video_compressor)
        processor.vision = model.config.vision
    settings = generation_settings(args, model.generation_config)
    facts = collect(model, processor, args.video, args.question, video_settings=chosen, **settings)
    output.write_text(render(facts), encoding="utf-8")
    for step in facts.steps:
        print(f"{step.name:24} {len(step.kept_K):,} tokens")
    print(f"{facts.answer}\n{output}")


def _convert(args: argparse.Namespace) -> None:
    from hico.convert import convert

    names = ("to", "encoder", "projector", "preset")
    print(convert(args.source, args.target, **{name: getattr(args, name) for name in names}).table())


def _merge_lora(args: argparse.Namespace) -> None:
    from hico.train.lora import merge_lora

    merge_lora(args.source, args.target)


def _list(args: argparse.Namespace) -> None:
    from hico import registry

    for parts in (registry.ENCODERS, registry.COMPRESSORS, registry.VIDEO_COMPRESSORS, registry.DROP_POLICIES):
        print(f"{parts.kind}:")
        width = max(map(len, parts.names()))
        for name in parts.names():
            print(f"  {name:{width}}  {(parts.get(name).__doc__ or '').partition(chr(10))[0]}".rstrip())


def _inspect(args: argparse.Namespace) -> None:
    from hico.convert import inspect_checkpoint

    print(inspect_checkpoint(args.checkpoint).report())


if __name__ == "__main__":
    sys.exit(main())
