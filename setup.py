"""Packaging of parallel_clip; the settings of the development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "parallel_clip/__init__.py").read_text())[1]
README = HERE / "README.md"

setup(
    name="parallel_clip",
    version=VERSION,
    description="Model-parallel training of CLIP-like dual encoders on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["parallel_clip", "parallel_clip.*"]),
    package_data={
        "parallel_clip": ["**/*.txt", "**/*.txt.gz", "**/*.json", "**/*.yaml", "**/LICENSE*"]
    },
    entry_points={"console_scripts": ["parallel-clip = parallel_clip.cli:main"]},
    install_requires=[
        "torch>=2.8",
        "torchvision",
        "megatron-core>=0.16.1,<0.20",  # 0.16 on Python 3.11; 0.17 and later need Python 3.12
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "tensorboard",
        "webdataset",
        "tokenizers",
        "ftfy",
        "regex",
        "braceexpand",
        "pillow",
        "xxhash",
        "psutil",  # megatron-core imports it without declaring it
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "open_clip_torch",
            "transformers",  # conversions are compared with it; open_clip takes tokenizers of it
            "sentencepiece",
            "protobuf",
            "ruff",
            "aiohttp",
            "s3fs>=2023.1",
            "moto[server]",  # a server of S3
            "pyarrow",  # img2dataset's tables
            "matplotlib",  # the tests of benchmarks/
        ],  # fmt: skip
        "remote": ["fsspec", "aiohttp"],  # https://; gs:// needs gcsfs as well
        # Without a bound pip may take s3fs 0.4, of 2020, which fits the newest boto of others.
        "s3": ["fsspec", "aiohttp", "s3fs>=2023.1"],
        # Tokenizers of SigLIP, SigLIP 2 and T5; it describes its files in protobuf.
        "sentencepiece": ["sentencepiece", "protobuf"],
        "demo": ["open_clip_torch", "matplotlib"],
        "plot": ["matplotlib"],
        "benchmark": ["open_clip_torch", "matplotlib", "pandas"],  # pandas: OpenCLIP's loader
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
