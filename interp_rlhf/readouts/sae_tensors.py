"""Files of numbers written by strangers: JSON, safetensors and ``torch.save``, checked before they get memory."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_rlhf.errors import FormatError

#: Dimensions by letter: the first tensor that has a letter settles its size for all others of the file.
Shape = tuple[str, ...]

#: A configuration longer than this is none.
_LONGEST_JSON = 2**24
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_WHOLE = {"I32": "int32", "I64": "int64"}
#: Tensors that hold whole numbers.
_COUNTS = ("k", "group_sizes")


def shown(value: object) -> str:
    """A value as one short line, whatever it holds."""
    text = " ".join(ascii(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def wrong_value(path: Path, field: str, expected: str, found: object) -> FormatError:
    """The error for a field of a JSON file."""
    return FormatError(f"{path}: {field}: expected {expected}, found {shown(found)}")


def whole_number(about: Mapping[str, Any], name: str, path: Path, *, least: int = 1, most: int = 2**31) -> int:
    """The field ``name``, or :class:`~interp_rlhf.errors.FormatError` unless it is a whole number in this range."""
    value = about.get(name)
    if type(value) is not int or not least <= value <= most:
        raise wrong_value(path, name, f"a whole number from {least} to {most}", value)
    return value


def true_or_false(about: Mapping[str, Any], name: str, path: Path, *, default: bool = False) -> bool:
    """The field ``name``, or :class:`~interp_rlhf.errors.FormatError` unless it is true or false."""
    value = about.get(name, default)
    if not isinstance(value, bool):
        raise wrong_value(path, name, "true or false", value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: missing, not a regular file, longer than 16 MiB, not JSON, or no object.
    """
    size = _size(path)
    if size > _LONGEST_JSON:
        raise FormatError(f"{path}: expected a configuration of at most {_LONGEST_JSON} bytes, found {size}")
    try:
        about = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON, or a damaged one ({shown(str(error))[1:-1]})") from None
    if not isinstance(about, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(about).__name__}")
    return about


def read_safetensors(
    path: Path,
    expected: Mapping[str, Shape],
    sizes: Mapping[str, int],
    *,
    optional: Sequence[str] = (),
    instead: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by their names there. Names, types and shapes are checked before one is loaded.

    Args:
        expected: every name the file may hold, with its shape in letters (``("d", "F")``).
        sizes: letters whose size is known.
        optional: names that may be missing.
        instead: a name that may stand in the place of another of ``expected``.

    Raises:
        FormatError: missing, damaged, cut short, or not exactly these tensors; names file and tensor.
    """
    from safetensors import SafetensorError, safe_open

    _size(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            expected = _with_alternatives(expected, headers, instead or {})
            found = {
                name: ((_FLOATS | _WHOLE).get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))
                for name, header in headers.items()
            }
            _check(path, found, expected, sizes, optional)
            return {name: _finite(path, name, file.get_tensor(name)) for name in found}
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or shown(str(error))})") from None
    except SafetensorError as error:
        raise FormatError(f"{path}: not a safetensors file, or a damaged one ({shown(str(error))[1:-1]})") from None


def read_torch(
    path: Path, expected: Mapping[str, Shape], sizes: Mapping[str, int], *, optional: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Tensors of a mapping written by ``torch.save``, as :func:`read_safetensors` reads them.

    The file is read with ``weights_only=True``: torch's own reader builds tensors and containers and refuses all else,
    so that no code in it runs. Only the zip format is read, and only when its entries, unpacked, and its tensors are
    not larger than the file.

    Raises:
        FormatError: missing, damaged, holding more than tensors, or not exactly these tensors; names file and tensor.
    """
    size = _size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FormatError(f"{path}: not a file of torch.save, or a damaged one ({shown(str(error))[1:-1]})") from None
    if unpacked > size:
        raise FormatError(f"{path}: expected at most the {size} bytes of the file, found entries of {unpacked} bytes")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # whatever a forged file makes torch's reader raise; its message advises to trust the file
        raise FormatError(
            f"{path}: expected nothing but tensors; torch.load(weights_only=True) refused it ({type(error).__name__})"
        ) from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: expected a mapping of names to tensors, found {type(loaded).__name__}")
    tensors = dict(_plain_tensors(path, loaded, size))
    found = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    _check(path, found, expected, sizes, optional)
    return {name: _finite(path, name, tensor) for name, tensor in tensors.items()}


def _plain_tensors(path: Path, loaded: Mapping[Any, Any], size: int) -> Iterator[tuple[str, Tensor]]:
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FormatError(
                f"{path}: {shown(name)}: expected names and tensors, found {type(name).__name__} and "
                f"{type(value).__name__}"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise FormatError(f"{path}: {shown(name)}: expected a dense tensor, found {value.layout} on {value.device}")
        if value.numel() * value.element_size() > size:
            raise FormatError(
                f"{path}: {shown(name)}: expected at most the {size} bytes of the file, found shape "
                f"{shown(list(value.shape))}"
            )
        yield name, value.detach()


def _with_alternatives(
    expected: Mapping[str, Shape], headers: Mapping[str, Any], instead: Mapping[str, str]
) -> Mapping[str, Shape]:
    swapped = {usual: other for other, usual in instead.items() if other in headers and usual not in headers}
    return {swapped.get(name, name): shape for name, shape in expected.items()}


def _check(
    path: Path,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    expected: Mapping[str, Shape],
    sizes: Mapping[str, int],
    optional: Sequence[str],
) -> None:
    missing = [name for name in expected if name not in found and name not in optional]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        needed = ", ".join(name for name in expected if name not in optional)
        raise FormatError(
            f"{path}: expected the tensors {needed}; found {shown(missing)[1:-1] or 'none'} missing and "
            f"{shown(extra)[1:-1] or 'none'} besides"
        )
    known = dict(sizes)
    for name, letters in expected.items():
        if name not in found:
            continue
        dtype, shape = found[name]
        kinds = _WHOLE if name in _COUNTS else _FLOATS
        if dtype not in kinds.values():
            raise FormatError(f"{path}: {name}: expected one of {', '.join(kinds.values())}, found {dtype}")
        if len(shape) == len(letters):
            known = dict(zip(letters, shape, strict=True)) | known
        if shape != tuple(known.get(letter, 0) for letter in letters) or 0 in shape:
            told = ", ".join(f"{letter}={known[letter]}" if letter in known else letter for letter in letters)
            raise FormatError(f"{path}: {name}: expected shape [{told}], found {shown(list(shape))}")


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{path}: {name}: expected finite numbers (in float32), found NaN or infinity")
    return tensor


def _size(path: Path) -> int:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: expected a regular file, found another kind")
    return found.st_size
