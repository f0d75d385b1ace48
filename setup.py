"""Install Brainloom: `pip install -e .[dev] -c constraints.txt` (the Makefile does it)."""

from setuptools import setup

PREP = [
    "numpy",
    "h5py",
    "isal",
    "pynwb",
    "zarr>=3",
    "numcodecs",
    "google-crc32c",
    "dask[distributed]",
    "pyyaml",
    "rich",
    "scipy",
    "av",
    "pillow",
    "jinja2",
    "matplotlib",
    "botocore",
]
TRAIN = [
    "botocore",
    "numpy",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "pyyaml",
    "rich",
    "tensorboard",
    "matplotlib",
    "jinja2",
    "google-crc32c",
    "numcodecs",
]
CLUSTER = ["dask-jobqueue", "bokeh"]  # make prep CLUSTER=…, and charts on the dashboard
DEV = [
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "mypy",
    "types-PyYAML",
    "moto",
    "flask",
    "flask-cors",
    "dask-jobqueue",
    "tensorstore",
    "zarrs",
]

setup(
    name="brainloom",
    version="0.1.0",
    description="A foundation model of the brain: NWB recordings in, hub folder out",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["prep", "prep.nwb", "train", "train.model"],
    package_data={
        "prep": ["FORMAT.md", "report.html", "recipes/*.yaml", "clusters/*.yaml"],
        "train": ["report.html", "configs/*.yaml"],
    },
    install_requires=sorted(set(PREP + TRAIN)),
    extras_require={"prep": PREP, "train": TRAIN, "cluster": CLUSTER, "dev": DEV},
    classifiers=["Private :: Do Not Upload"],
)
