"""One tar, read in place: its headers, the images in it and the tars inside it.

    tar = (header of 512 bytes, content padded to 512 bytes) x members, at least one zero block
"""

import json
import os
import re
from array import array
from typing import NamedTuple

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ENDINGS = frozenset(os.fsencode(ending[1:]) for ending in EXTENSIONS)
TAR = re.compile(r"\.(tar|tar\.(gz|bz2?|xz|zst|lz4|Z)|tgz|tbz2?|txz)$", re.IGNORECASE)
PACKED = b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"  # gzip, bzip2, xz, zstandard
MOST_CLASSES = 1 << 20
NO_CLASS, UNTOLD = -1, -2  # labels of images with nothing beside them, and with a file without one


def stem(path: str) -> str:
    """The name of a tar without its ending: the folder of what lies flat in it."""
    return TAR.sub("", os.path.basename(path))


def walk(fd: int, path: str, start: int, end: int):
    """Yields (name, first byte, bytes; -1 for links and sparse files) of each file in the tar at
    start:end of an open file. Knows ustar, GNU's long names and sizes, pax's paths and sizes.
    Raises ValueError, which names `path`, for what is cut short, damaged, compressed or no tar."""
    at, told = start, {}
    while at < end:
        head = os.pread(fd, 512, at).ljust(512)  # of a part the checksum is wrong
        if not any(head):
            return
        try:
            size = _number(told.get(b"size", head[124:136]))
            checked = int(head[148:156].strip(b"\0 "), 8) == sum(head) - sum(head[148:156]) + 256
        except ValueError:
            checked = False
        if not checked or size < 0:
            if at == start and head.startswith(PACKED):
                raise ValueError(f"--data: {path} is compressed, and so cannot be read in place: "
                                 f"decompress it (gunzip, or what its ending says)")
            raise ValueError(f"--data: {path} is no tar" if at == start else
                             f"--data: {path} is damaged: no header at byte {at}")
        kind, body, at = head[156:157], at + 512, at + 512 - -size // 512 * 512
        if body + size > end:
            raise ValueError(f"--data: {path} is cut short: it ends inside the member "
                             f"{_name(head, told).decode(errors='replace')!r}")
        if kind == b"L":
            told[b"path"] = os.pread(fd, size, body).rstrip(b"\0")
        elif kind == b"x":
            try:
                told |= _pax(os.pread(fd, size, body))
            except ValueError as e:
                raise ValueError(f"--data: {path} is damaged: no pax records at byte {body}") from e
        elif kind != b"K":  # the name of a long link
            name, told = _name(head, told), {}
            if kind not in b"g5":  # facts of all members, a folder
                yield name, body, size if kind in b"07\0" else -1
    raise ValueError(f"--data: {path} is cut short: it has no end mark")


def _number(field: bytes) -> int:
    """A size: octal digits, or GNU's big-endian binary after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _pax(records: bytes) -> dict[bytes, bytes]:
    """{key: value} of pax's records 'LENGTH KEY=VALUE\\n'; the size as the header would have it."""
    told = {}
    while records[:1].isdigit():
        length = int(records.partition(b" ")[0])
        if not length:
            raise ValueError("a record of no bytes")
        key, _, value = records[:length - 1].partition(b" ")[2].partition(b"=")
        told[key] = b"%o" % int(value) if key == b"size" else value
        records = records[length:]
    return told


def _name(head: bytes, told: dict) -> bytes:
    name = told.get(b"path")
    if name is None:
        name = head[:100].partition(b"\0")[0]
        if head[257:263] == b"ustar\0" and head[345]:
            name = head[345:500].partition(b"\0")[0] + b"/" + name
    while name.startswith((b"./", b"/")):
        name = name.partition(b"/")[2]
    return name


def _class_number(content: bytes, ending: bytes) -> int:
    """The class that a WebDataset sample's .cls or .json tells, or UNTOLD."""
    try:
        number = json.loads(content) if ending == b"json" else int(content)
    except ValueError:
        return UNTOLD
    if isinstance(number, dict):
        number = number.get("label", number.get("cls"))
    return number if type(number) is int and 0 <= number < MOST_CLASSES else UNTOLD


class Span(NamedTuple):
    """A tar, or one inside it: bytes start:end of file number `tar`."""
    tar: int
    file: str
    path: str  # what to call it: FILE/INNER.tar
    start: int
    end: int
    folder: bytes = b""  # where it lies in the outermost one: FOLDER/, or nothing


def scan_tar(span: Span):
    """(paths, first bytes, sizes, labels) of the images in a tar, in its order, and the Spans of
    the tars in it. The labels are numbers that WebDataset's files tell, or NO_CLASS or UNTOLD."""
    names, inner, numbers = [], [], {}
    starts, sizes = array("q"), array("q")
    with open(span.file, "rb", buffering=0) as file:
        fd = file.fileno()
        if hasattr(os, "posix_fadvise"):  # or each header brings 128 KiB of images along
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for name, start, size in walk(fd, span.path, span.start, span.end):
            key, _, ending = name.rpartition(b".")
            ending = ending.lower()
            if b"/." in name or name[:1] == b".":
                continue  # hidden, as in folders
            if ending in ENDINGS:
                if size < 0:
                    raise ValueError(f"--data: {span.path}: {os.fsdecode(name)} is a link or sparse"
                                     f": make the tar with --dereference --hard-dereference")
                names.append(name)
                starts.append(start)
                sizes.append(size)
            elif ending in (b"cls", b"json"):
                if ending == b"cls" or key not in numbers:
                    numbers[key] = _class_number(os.pread(fd, max(size, 0), start), ending)
            elif TAR.search(path := os.fsdecode(name)):  # a compressed one is an error, in walk
                folder = span.folder + name[:name.rfind(b"/") + 1]
                inner.append(Span(span.tar, span.file, f"{span.path}/{path}", start, start + size,
                                  folder))
    labels = array("i", (numbers.get(name.rpartition(b".")[0], NO_CLASS) for name in names))
    folder = span.folder
    if any(b"/" not in name for name in names):
        folder += os.fsencode(stem(span.path)) + b"/"
    else:  # a class folder needs no number
        labels = array("i", (max(label, NO_CLASS) for label in labels))
    return [folder + name for name in names], starts, sizes, labels, inner
