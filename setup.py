"""The package: its metadata, what it needs, and the recipes and DeepSpeed JSONs that it ships.

In a clone `recipes/` and `ds_configs/` stand at the top, where people look for them; a built wheel carries the same
files inside the package, as `toolkit/_recipes` and `toolkit/_ds_configs`. `launch/` and `tests/` are run from a clone
and never installed.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Later releases refuse numpy 2, and the latest no longer bring Holistic. It brings OpenCV with it.
VIDEO = ["mediapipe>=0.10.14,<0.10.15"]
RAY = ["ray>=2.40"]
HDF5 = ["h5py>=3.10,<4"]
DEMO_APP = ["gradio>=6,<7"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.13",
    "import-linter>=2.1",
    "types-PyYAML",
    "selenium>=4.30,<5",
    *DEMO_APP,
    *RAY,
    *HDF5,
]


def version() -> str:
    """The one version number, read from the package without importing it."""
    text = (HERE / "toolkit" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found, "toolkit/__init__.py names no __version__"
    return found.group(1)


setup(
    name="sign-language-translation-toolkit",
    version=version(),
    description="Train sign language translators: pose sequences in, text out, on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["toolkit", "toolkit.*"]),
        "toolkit._recipes",
        "toolkit._recipes.models",
        "toolkit._ds_configs",
    ],
    package_dir={
        "toolkit._recipes": "recipes",
        "toolkit._recipes.models": "recipes/models",
        "toolkit._ds_configs": "ds_configs",
    },
    package_data={
        "toolkit": ["py.typed"],
        "toolkit.poses": ["landmark_sets/*.yaml"],
        "toolkit.corpus": ["*.txt", "*.csv"],
        "toolkit.corpus.published": ["*.yaml"],
        "toolkit.reporting": ["assets/*"],
        "toolkit._recipes": ["*.yaml", "*.md"],
        "toolkit._recipes.models": ["*.yaml", "*.md"],
        "toolkit._ds_configs": ["*.json", "*.md"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.9,<3",
        # 0.19.3 fixed gradients lost under ZeRO-1/2 offload with accumulation. ZeRO++ in bf16 needs 0.19.6, which the
        # resolver asks for where a DeepSpeed JSON wants that.
        "deepspeed>=0.19.3,<0.20",
        "ninja>=1.11",
        "setuptools>=77",
        "numpy>=2,<3",
        "transformers>=5.20,<6",
        "peft>=0.20,<1",
        "bitsandbytes>=0.49,<1",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "safetensors>=0.6",
        "huggingface_hub>=1.31,<3",
        "pose-format>=0.15,<0.16",
        "datasets>=4,<6",
        "pyarrow>=20",
        "filelock>=3.15",
        "xxhash>=3.4",
        "tqdm>=4.66",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "sacrebleu>=2.5,<3",
        "jiwer>=4,<5",
        "rapidfuzz>=3.10",
        "regex>=2024.11",
        "wandb>=0.20,<1",
        "tensorboard>=2.18,<3",
        "rich>=13.7",
        "matplotlib>=3.9",
        "psutil>=6",
    ],
    extras_require={
        "video": VIDEO,
        "ray": RAY,
        "hdf5": HDF5,
        "demo_app": DEMO_APP,
        "dev": DEV,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
