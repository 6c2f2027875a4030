"""Packaging of awp_optim. The core needs torch alone; everything else is an extra."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+?)"', (ROOT / "awp_optim" / "__init__.py").read_text(encoding="utf-8")
)[1]

LAB = [
    "torchvision",
    "numpy",
    "scikit-learn",
    "pillow",
    "matplotlib",
    "jinja2",
    "rich",
    "safetensors",
    "scipy",
    "tyro>=0.9",
]
EVAL = ["numpy", "pyautoattack"]
DOCS = (ROOT / "docs" / "requirements.txt").read_text(encoding="utf-8").split()
DEV = ["ruff", "mypy", "pre-commit", "build"]
BENCH = [
    *LAB,
    "pytest",
    "pytest-benchmark",
    "torchattacks",
    "adversarial-robustness-toolbox",
    "pytorch_optimizer",
]
FRAMEWORKS = [
    "lightning",
    "accelerate",
    "transformers>=4.49",
    "timm",
    "schedulefree",
    "pytorch_optimizer",
    "skorch",
]
TEST = [
    *LAB,
    *EVAL,
    *FRAMEWORKS,
    "pytest",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "dask",
    "distributed",
    "tensorboard",
    "torchattacks",
]

setup(
    name="awp_optim",
    version=VERSION,
    description="Adversarial weight perturbation (AWP) as a drop-in PyTorch optimizer wrapper",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The awp_optim developers",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=[
        "adversarial training",
        "adversarial weight perturbation",
        "robustness",
        "sharpness-aware minimization",
        "optimizer",
        "pytorch",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["awp_optim", "awp_optim.*"]),
    package_data={
        "awp_optim": [
            "py.typed",
            "lab/reports/*/*.html",
            "lab/reports/*/*.mplstyle",
            "lab/networks/*",
        ]
    },
    install_requires=["torch>=2.6"],
    entry_points={"console_scripts": ["awp = awp_optim.cli:main"]},
    extras_require={
        "lab": LAB,
        "examples": LAB,  # the name of "lab" in earlier instructions
        "eval": EVAL,
        "bench": BENCH,
        "frameworks": FRAMEWORKS,
        "test": TEST,
        "docs": DOCS,
        "dev": DEV,
        "all": sorted({*LAB, *EVAL, *BENCH, *TEST}),
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
