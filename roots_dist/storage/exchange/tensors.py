"""Tensors in a folder of safetensors files, by name, one at a time; both import and export read them this way.

Files are memory-mapped, so only requested tensors are read. Only safetensors files are opened, since other formats may
run code.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from roots_dist.errors import ExchangeError, Problem, UserError
from roots_dist.files import reason, where
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.object_tensors import open_tensors

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.ckpt.index")
ORIGIN = "origin.json"
"""File of an import that says what it was."""
FLOATS = ("F32", "F16", "BF16")
"""Dtypes that float32 represents exactly, as safetensors names them."""

QUANTISED = (
    "take the weights it was made from, or turn them back in transformers and save them with save_pretrained: "
    "model.dequantize() for bitsandbytes, quantization_config=FineGrainedFP8Config(dequantize=True) for FP8"
)
"""The fix for weights that are no floats."""


OTHER_FORMATS = {
    "adapter_config.json": (
        "a LoRA adapter without its model",
        "merge it into its base model, with peft's merge_and_unload, and save that with save_pretrained",
    ),
    "*.gguf": (
        "a file of llama.cpp",
        "take the model's safetensors, or convert it: from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(NEW)",
    ),
    "consolidated*.safetensors": (
        "weights with other names than in transformers",
        f"take the model-*.safetensors that are published beside it, with {INDEX} and config.json",
    ),
    "model-*-of-*.safetensors": (f"a part of a model without {INDEX}", f"get {INDEX} as well: it says what lies where"),
    "consolidated*.pth": ("weights with other names than in transformers", "take the version of it for transformers"),
}
"""Files that a folder without a model in safetensors may hold -> what they are, and what to do. A pattern each."""


def exchange_error(key: object, found: object, expected: str, fix: str) -> ExchangeError:
    return ExchangeError(Problem(key=one_line(key), found=found, expected=expected, fix=fix))


def one_line(text: object) -> str:
    """The text with what would break its line escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def refuse_other_formats(folder: Path) -> None:
    """Raise ExchangeError for a folder that holds a model in another form, and none in this one."""
    if (folder / ONE_FILE).exists() or (folder / INDEX).exists():
        return
    for pattern, (what, fix) in OTHER_FORMATS.items():
        if found := min(folder.glob(pattern), default=None):
            raise exchange_error(folder, found.name, f"{ONE_FILE}, and this is {what}", fix)


class Tensors:
    """files: name of each tensor -> its file in the folder. make_error creates the error for a tensor that cannot be
    read."""

    def __init__(self, folder: Place, files: Mapping[str, str], make_error: Callable[[str], UserError]):
        self.folder, self.files, self._make_error = folder, dict(files), make_error
        self._open: dict[str, Any] = {}

    def get(self, name: str) -> Tensor:
        whole: Tensor = self._read(name)[:]
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._read(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype as safetensors names it."""
        return str(self._read(name).get_dtype())

    def _read(self, name: str) -> Any:
        """safetensors' slice of a tensor, for which it has no type."""
        file = self.files[name]
        try:
            if file not in self._open:
                self._open[file] = open_tensors(self.folder / file)
            return self._open[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise self._make_error(f"{self.folder / file}: {name}: {error}. Fix: get the file again.") from error


def open_folder(folder: Path) -> Tensors:
    """Tensors of a Hugging Face folder. Raises ExchangeError if there are none that can be read safely."""
    index, one = folder / INDEX, folder / ONE_FILE
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
            raise exchange_error(index, "weight_map", "a file of this folder for each tensor", "get the file again")
        missing = sorted({file for file in files.values() if not (folder / file).is_file()})
        if missing:
            raise exchange_error(index, missing[0], "a file that is here", "get the folder again, whole")
        return Tensors(folder, files, ExchangeError)
    if one.is_file():
        try:
            with safe_open(one, framework="pt") as file:
                return Tensors(folder, dict.fromkeys(file.keys(), ONE_FILE), ExchangeError)
        except (OSError, SafetensorError) as error:
            raise ExchangeError(f"{one}: {error}. Fix: get the file again.") from error
    pickled = next((name for name in PICKLED if (folder / name).exists()), None)
    if pickled is None:
        raise ExchangeError(
            f"{folder} holds no {ONE_FILE}: expected a folder that save_pretrained wrote. Fix: name one."
        )
    raise ExchangeError(
        f"{folder} holds {pickled} and no {ONE_FILE}: expected safetensors, because reading the other may run "
        "code. Fix: convert "
        "it where you trust it: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW), with the class that "
        "config.json names."
    )


LOCAL = ("downloads", "models", "runs", "data", "checkpoints", "weights", "cache", "tmp", "exports", "out", "hf")
"""First parts of paths that are folders here, and no owners on the Hub."""


def _where_from(folder: Path) -> str:
    """The fix for a folder without a model's config.json, which may have been named as it is called on the Hub."""
    if folder.exists():
        return "name a folder that save_pretrained wrote"
    named = re.fullmatch(r"([\w-][\w.-]*)/([\w-][\w.-]*)", str(folder))
    if named and named[1].lower() not in LOCAL and not Path(named[1]).exists():
        return f"download it first, hf download {folder} --local-dir {folder.name}, and name {folder.name}"
    beside = [found.parent.name for found in folder.parent.glob("*/config.json")] if folder.parent.is_dir() else []
    if close := difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.75):
        return f"did you mean {folder.parent / close[0]}"
    return (
        f"name a folder that is there, or get one from the Hub: hf download OWNER/NAME --local-dir {quote(str(folder))}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises ExchangeError if the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if not path.parent.exists():
            raise ExchangeError(f"there is no folder {where(path.parent)}. Fix: {_where_from(path.parent)}.") from error
        fix = _where_from(path.parent) if isinstance(error, OSError) else "correct it there, or get the file again"
        raise ExchangeError(f"{path}: cannot be read ({reason(error, path)}). Fix: {fix}.") from error
    if not isinstance(value, dict):
        raise ExchangeError(f"{path}: expected an object, found {type(value).__name__}. Fix: get the file again.")
    return value
