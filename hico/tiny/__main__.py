"""``python -m hico.tiny FOLDER``: write the corpus of moving shapes and an untrained model to learn it."""

import argparse
from pathlib import Path

from hico.tiny.corpus import CorpusSize, write_corpus
from hico.tiny.model import write_untrained

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hico.tiny", description=__doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of all chance (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the corpus (%(default)s)")
    args = parser.parse_args()
    write_corpus(args.folder, CorpusSize().scaled(args.scale), seed=args.seed)
    write_untrained(args.folder / "model", seed=args.seed)
    print(f"written; train on it with\n  TINY={args.folder} python -m hico.train --config train/tiny/all.yaml")
