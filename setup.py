"""Package metadata. Tool settings live in pyproject.toml, tested versions in constraints-cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hico" / "__init__.py").read_text(), re.MULTILINE).group(1)

# Upper bounds, of what changes under us: the first releases that no test has passed with, see docs/versions.md.
CORE = [
    "torch>=2.6,<2.15",
    "transformers>=5.17,<5.25",
    "accelerate>=1.0",
    "einops>=0.7",
    "safetensors>=0.4.3",
    "numpy>=1.26",
    "pillow>=10.0",
    "av>=17.0,<19",
    "tokenizers>=0.21",
    "tqdm>=4.60",
    "matplotlib>=3.7",
    "pyyaml>=6.0",
]
EXTRAS = {
    "decord": ["decord>=0.6.0"],
    "torchcodec": ["torchcodec>=0.12"],
    "deepspeed": ["deepspeed>=0.16", "ninja"],
    "flash": ["flash-attn>=2.6"],
    "timm": ["timm>=1.0"],
    "peft": ["peft>=0.15"],
    "tensorboard": ["tensorboard>=2.14"],
    "submitit": ["submitit>=1.5"],
    "liger": ["liger-kernel>=0.5"],
    "dev": [
        *("peft>=0.15", "trl>=1.0", "pyarrow>=15"),
        *("pytest>=8.0", "hypothesis>=6.100", "ruff>=0.9", "import-linter>=2.1"),
    ],
}
# flash-attn compiles from source against an installed torch, so it is asked for by name only.
EXTRAS["all"] = sorted(
    {package for name, group in EXTRAS.items() if name not in {"flash", "dev"} for package in group}
)

setup(
    name="hico",
    version=VERSION,
    description="Hierarchical compression of long video for multimodal LLMs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["hico", "hico.*"]),
    package_data={"hico.train": ["stages.yaml"], "hico.view": ["page.html"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hico=hico.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
