import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "linvideo" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]
KERNELS = find_packages("kernels")
TRAIN = [
    "diffusers>=0.38",
    "transformers>=5.0",
    "accelerate",
    "safetensors",
    "ftfy",
    "jsonargparse[signatures]",
    "PyYAML",
    "peft",
    "tqdm",
    "pillow",
    "imageio",
    "imageio-ffmpeg",
    "matplotlib",
    "tensorboard",
    "torchmetrics",
]
BENCH = ["flash-linear-attention; sys_platform == 'linux'", "matplotlib", "pytest-benchmark"]
EIGHT_BIT = ["torchao"]
TEST = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff"]

setup(
    name="linvideo",
    version=VERSION,
    description="Linear attention for video diffusion transformers: fused Triton kernels, selective transfer, ADM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["linvideo", "linvideo.*"]) + KERNELS,
    package_dir={"linvideo_kernels": "kernels/linvideo_kernels"},
    package_data={"linvideo": ["data/*", "recipes/*.yaml", "demo/teacher/**/*", "demo/teacher/*"]},
    install_requires=["torch>=2.11", "numpy", 'triton>=3.6; sys_platform == "linux"'],
    extras_require={"train": TRAIN, "bench": BENCH, "8bit": EIGHT_BIT, "test": TEST},
    entry_points={"console_scripts": ["linvideo=linvideo.commands.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
