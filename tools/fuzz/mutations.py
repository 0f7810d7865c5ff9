"""Adapter directories damaged in every way a file can be: bytes, JSON, safetensors' header, values, and files swapped.

A directory is a dictionary of file contents here. A mutation takes one and a random generator and changes it in place;
equal seeds make equal directories.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]
Pairs = list[tuple[str, Any]]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

TEXTS = [
    "", " ", ".", "..", "../../../etc/passwd", "/etc/passwd", "\\\\host\\share", "file:///etc/passwd", "~root", "a/b\0c",
    "\x1b[31mred\x1b[0m", "line\nbreak", "\r\n", "\u202eright to left", "\ufeff", "\u00e9\u4e2d\U0001f600", "\x7f",
    "__proto__", "__class__", "${HOME}", "{0.__class__}", "%s%n", "a" * 20_000, "oft_R." * 20_000, "(a+)+$", "(", "[",
    "os.system", "default", "body", "None", "base_model.model.", "0.18.0", "9" * 400,
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 4, 31, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**400, -(10**400), 0.5, -0.0, 1e308,
    5e-324, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
    "F8_E4M3",
    "C64",
    "f32",
    "",
    "F4",
]
FIELDS = [
    "peft_type",
    "r",
    "oft_block_size",
    "peft_version",
    "use_cayley_neumann",
    "coft",
    "eps",
    "target_modules",
    "lightning_oft",
]


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind."""
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind in (2, 3):
        return rng.choice(TEXTS)
    if kind == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(TEXTS)[:50]: value(rng, depth + 1) for _ in range(rng.randrange(4))}
    nested: Any = rng.choice(TEXTS)[:10]
    for _ in range(rng.choice([10, 100, 300])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


# ---- any file --------------------------------------------------------------------------------------------------------


def _some_file(files: Files, rng: random.Random) -> str:
    return rng.choice(sorted(files))


def _position(content: bytes, rng: random.Random) -> int:
    """Half of the damage hits the first bytes, where the structure is."""
    return rng.randrange(max(1, min(len(content), 400) if rng.random() < 0.5 else len(content)))


def flip_bytes(files: Files, rng: random.Random) -> None:
    name = _some_file(files, rng)
    content = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if content:
            content[_position(content, rng)] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)


def truncate(files: Files, rng: random.Random) -> None:
    name = _some_file(files, rng)
    files[name] = files[name][: _position(files[name], rng)]


def insert_bytes(files: Files, rng: random.Random) -> None:
    name = _some_file(files, rng)
    at, count = _position(files[name], rng), rng.choice([1, 1, 7, 8, 1000])
    files[name] = files[name][:at] + rng.randbytes(count) + files[name][at:]


def delete_bytes(files: Files, rng: random.Random) -> None:
    name = _some_file(files, rng)
    at = _position(files[name], rng)
    files[name] = files[name][:at] + files[name][at + rng.choice([1, 1, 4, 100]) :]


def repeat_bytes(files: Files, rng: random.Random) -> None:
    name = _some_file(files, rng)
    at = _position(files[name], rng)
    piece = files[name][at : at + rng.choice([1, 16, 200])]
    files[name] = files[name][:at] + piece * rng.choice([2, 10]) + files[name][at:]


def swap_files(files: Files, rng: random.Random) -> None:
    names = sorted(files)
    rng.shuffle(names)
    if len(names) > 1:
        files[names[0]], files[names[1]] = files[names[1]], files[names[0]]


def replace_file(files: Files, rng: random.Random) -> None:
    files[_some_file(files, rng)] = rng.choice(
        [
            b"",
            b"\0" * 64,
            b"\xff" * 64,
            b"[]",
            b"{}",
            b"null",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\x80\x04K\x01.",
            b"PK\x03\x04",
        ]
        + [struct.pack("<Q", n) for n in (0, 2, 2**32, 2**63, 2**64 - 1)]
        + [rng.randbytes(rng.choice([1, 8, 9, 500])), b"version https://git-lfs.github.com/spec/v1\n"]
    )


def remove_file(files: Files, rng: random.Random) -> None:
    del files[_some_file(files, rng)]


# ---- the configuration -----------------------------------------------------------------------------------------------


def _config(files: Files) -> dict[str, Any] | None:
    try:
        found = json.loads(files[CONFIG])
    except (KeyError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _encoded(config: dict[str, Any]) -> bytes:
    return json.dumps(config).encode()


def change_field(files: Files, rng: random.Random) -> None:
    """Another value for a field, ours or PEFT's; perhaps one that the file lacks."""
    config = _config(files)
    if config:
        key = rng.choice([*sorted(config), *FIELDS, rng.choice(TEXTS)])
        config[key] = value(rng)
        files[CONFIG] = _encoded(config)


def change_own_field(files: Files, rng: random.Random) -> None:
    config = _config(files)
    own = config.get("lightning_oft") if config else None
    if config and isinstance(own, dict) and own:
        inside = own.get("config")
        if rng.random() < 0.5 and isinstance(inside, dict) and inside:
            inside[rng.choice([*sorted(inside), "r"])] = value(rng)
        else:
            own[rng.choice([*sorted(own), "version"])] = value(rng)
        files[CONFIG] = _encoded(config)


def remove_field(files: Files, rng: random.Random) -> None:
    config = _config(files)
    if config:
        del config[rng.choice(sorted(config))]
        files[CONFIG] = _encoded(config)


def repeat_field(files: Files, rng: random.Random) -> None:
    """The same key twice, with another value."""
    config = _config(files)
    if config:
        key = rng.choice(sorted(config))
        files[CONFIG] = _encoded(config)[:-1] + f", {json.dumps(key)}: {json.dumps(value(rng))}}}".encode()


def encode_otherwise(files: Files, rng: random.Random) -> None:
    if CONFIG in files:
        text = files[CONFIG].decode("utf-8", "replace")
        encoding = rng.choice(["utf-8-sig", "utf-16", "utf-32", "utf-7", "utf-8"])
        files[CONFIG] = text.encode(encoding, "replace") + rng.choice([b"", b"\0", b"}", b"\n\n", b"\xed\xa0\x80"])


# ---- the tensors -----------------------------------------------------------------------------------------------------


def header_of(content: bytes) -> tuple[Pairs, bytes] | None:
    """(entries of a safetensors header, the bytes after it)."""
    try:
        (size,) = struct.unpack_from("<Q", content)
        pairs = json.loads(content[8 : 8 + size], object_pairs_hook=list)
    except (struct.error, ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        return None
    return pairs, content[8 + size :]


def _text(node: Any) -> str:
    """JSON in which objects are lists of pairs, so that keys can repeat."""
    if isinstance(node, list) and node and all(isinstance(item, tuple) for item in node):
        return "{" + ",".join(f"{json.dumps(key)}:{_text(item)}" for key, item in node) + "}"
    return "[" + ",".join(map(_text, node)) + "]" if isinstance(node, list) else json.dumps(node)


def tensor_file(pairs: Pairs, data: bytes) -> bytes:
    """A safetensors file with this header, right or wrong."""
    header = _text(pairs).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def _entry(rng: random.Random, entry: Any) -> Any:
    """One tensor's entry of the header, changed."""
    fields = dict(entry) if isinstance(entry, list) and all(isinstance(item, tuple) for item in entry) else {}
    what = rng.randrange(8)
    if what == 0:
        fields["dtype"] = rng.choice(DTYPES)
    elif what == 1:
        fields["shape"] = [rng.choice([*NUMBERS[:12], 10**9]) for _ in range(rng.randrange(5))]
    elif what == 2:
        fields["shape"] = [rng.choice([2**20, 2**40, 2**62, 0]), rng.choice([0, 1, 6, 2**31])]
    elif what == 3:
        fields["data_offsets"] = [rng.choice(NUMBERS[:16]) for _ in range(rng.choice([2, 2, 1, 3]))]
    elif what == 4:
        size = rng.choice([2**20, 2**33, 2**40, 2**50])
        fields.update(shape=[size, 6], data_offsets=[0, 24 * size])
    elif what == 5:
        fields[rng.choice(["dtype", "shape", "data_offsets"])] = value(rng)
    elif what == 6:
        fields.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
    else:
        fields[rng.choice(TEXTS)] = value(rng)
    return list(fields.items())


def change_header(files: Files, rng: random.Random) -> None:
    """Wrong types, shapes, offsets, names; names twice; no names; something else altogether."""
    found = header_of(files.get(TENSORS, b""))
    if not found or not found[0]:
        return
    pairs, data = found
    at = rng.randrange(len(pairs))
    key, entry = pairs[at]
    what = rng.randrange(7)
    if what <= 2:
        pairs[at] = (key, _entry(rng, entry))
    elif what == 3:
        pairs.insert(rng.randrange(len(pairs) + 1), (key, _entry(rng, entry) if rng.random() < 0.5 else entry))
    elif what == 4:
        text = rng.choice(TEXTS)
        pairs[at] = (rng.choice([text, key + text, text + key, f"base_model.model.{text}.oft_R.weight"]), entry)
    elif what == 5:
        del pairs[at]
    else:
        pairs.append((rng.choice(["__metadata__", rng.choice(TEXTS)]), value(rng)))
    files[TENSORS] = tensor_file(pairs, data)


def change_header_size(files: Files, rng: random.Random) -> None:
    content = files.get(TENSORS, b"")
    if len(content) >= 8:
        (size,) = struct.unpack_from("<Q", content)
        sizes = [0, 1, size - 1, size + 1, size + 8, len(content), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1]
        files[TENSORS] = struct.pack("<Q", max(0, rng.choice(sizes))) + content[8:]


def change_values(files: Files, rng: random.Random) -> None:
    """Numbers that are none, or enormous, in a file that is whole."""
    found = header_of(files.get(TENSORS, b""))
    if found:
        pairs, data = found
        numbers = bytearray(data)
        worst = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e5, 1e-45])
        for _ in range(rng.choice([1, 4, 1000])):
            if len(numbers) >= 4:
                struct.pack_into("<f", numbers, 4 * rng.randrange(len(numbers) // 4), worst)
        files[TENSORS] = tensor_file(pairs, bytes(numbers))


MUTATIONS: list[Callable[[Files, random.Random], None]] = [
    flip_bytes, truncate, insert_bytes, delete_bytes, repeat_bytes, swap_files, replace_file, remove_file, change_field,
    change_field, change_own_field, change_own_field, remove_field, repeat_field, encode_otherwise, change_header,
    change_header, change_header, change_header_size, change_values, change_values,
]  # fmt: skip


def _renew_digest(files: Files, rng: random.Random) -> None:
    """Most of the time the digest fits the damaged tensors, or is not there: the damage itself is to be read."""
    config = _config(files)
    own = config.get("lightning_oft") if config else None
    if config and isinstance(own, dict) and "sha256" in own and rng.random() < 0.85:
        own["sha256"] = hashlib.sha256(files.get(TENSORS, b"")).hexdigest()
        files[CONFIG] = _encoded(config)


def mutated(files: Files, rng: random.Random) -> tuple[Files, list[str]]:
    """A damaged copy of a directory, and what was done to it."""
    damaged = dict(files)
    chosen = rng.choices(MUTATIONS, k=rng.choice([1, 1, 2, 3]))
    for change in chosen:
        if damaged:
            change(damaged, rng)
    _renew_digest(damaged, rng)
    return damaged, [change.__name__ for change in chosen]
