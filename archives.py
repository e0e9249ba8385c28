"""Images inside tar files, read where they lie: headers are walked once, the index is kept.

An image's path is the one that unpacking everything would give:

    a.tar holds c/1.jpg                    c/1.jpg
    c.tar holds 1.jpg, flat                c/1.jpg        a tar of flat images is a folder
    a.tar holds d/c.tar, that 1.jpg        d/c/1.jpg      so is a tar inside a tar

Folders around all images are left out. The class is the first folder that is left. In WebDataset's
shards it is the number beside IMAGE.jpg: all of IMAGE.cls, or "label" or "cls" of IMAGE.json.
The index of the n images of a split is a dict of arrays:

    names    uint8 [total bytes]   every path, end to end, in the order of classes, then of paths
    offsets  int64 [n + 1]         path i is names[offsets[i]:offsets[i + 1]]
    labels   int32 [n]             the class, a position in `classes`; below 0: none is told
    tars     int32 [n]             the tar of image i, a position in `files`
    starts   int64 [n]             its first byte there
    sizes    int64 [n]             its bytes
    classes  str [c]               names of folders; empty if labels are WebDataset's numbers
    files    str [t]               the tars, relative to `folder`
    stamps   int64 [t, 2]          bytes and mtime (ns) of each, by which a changed one is known
    folder   str []                the real path of the data's folder
"""

import contextlib
import itertools
import os
import re
import tempfile
import time
import zipfile
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from tars import EXTENSIONS, NO_CLASS, TAR, Span, scan_tar

ARRAYS = ("names", "offsets", "labels", "tars", "starts", "sizes", "classes", "files", "stamps",
          "folder")
VERSION = 2  # of the file; one of another version is made anew
WORDS = {split: re.compile(rf"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE)
         for split, words in (("train", "train"), ("val", "val|validation"))}
UNREADABLE = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile  # what np.load raises
THREADS = 8  # each waits for the disk between two headers


def find(data, split: str) -> tuple[str, list[str]]:
    """(folder, tars in it) of a split of --data: all in DATA/SPLIT; or if that is empty or not
    there, those in DATA whose names have the word train, or val or validation. Split '': all in
    DATA, or the tar DATA itself.

    The list is empty where folders or images lie beside the tars: what is unpacked comes first.
    Raises ValueError for a name with both words.
    """
    data = os.fspath(data)
    if os.path.isfile(data):
        folder, name = os.path.split(data)
        return folder, [name] if TAR.search(name) and not split else []
    inside = _entries(os.path.join(data, split)) if split else _entries(data)
    if inside:
        unpacked = any(e.is_dir() or e.name.lower().endswith(EXTENSIONS) for e in inside)
        tars = [] if unpacked else [e for e in inside if TAR.search(e.name)]
    else:
        tars = [e for e in _entries(data) if TAR.search(e.name)]
        both = [e.path for e in tars if all(word.search(e.name) for word in WORDS.values())]
        if both:
            raise ValueError(f"--data: {min(both)} has train and val in its name: rename it")
        tars = [e for e in tars if split and WORDS[split].search(e.name)]
    return data, sorted(os.path.relpath(e.path, data) for e in tars)


def _entries(folder: str) -> list[os.DirEntry]:
    """What is in a folder, but for hidden names; nothing if it is not there."""
    if not os.path.isdir(folder):
        return []
    return [e for e in os.scandir(folder) if not e.name.startswith(".")]


# ----------------------------------------------------------------------------- the index of a split
def build(folder: str, files: list[str]) -> dict[str, np.ndarray]:
    """The index of these tars, without stamps. Raises ValueError for what `walk` does, no image,
    and two images of one path."""
    names, columns = [], [array("i"), array("q"), array("q"), array("i")]
    paths = [os.path.join(folder, file) for file in files]
    spans = [Span(i, path, path, 0, os.path.getsize(path)) for i, path in enumerate(paths)]
    with ThreadPoolExecutor(THREADS) as pool:
        while spans:
            tars, spans = spans, []
            bar = tqdm(pool.map(scan_tar, tars), "headers", len(tars), unit="tar", leave=False,
                       delay=5, dynamic_ncols=True)
            for (found, *more, inner), span in zip(bar, tars):
                spans += inner
                names += found
                for column, part in zip(columns, (array("i", [span.tar]) * len(found), *more)):
                    column += part
    if not names:
        raise ValueError(f"--data: {', '.join(files[:5])} in {folder or '.'}: not a single image "
                         f"({' '.join(EXTENSIONS)})")
    cut = 0  # the folders around all class folders
    while all(name.startswith(names[0][:_after(names[0], cut)]) and _after(name, _after(name, cut))
              for name in names):
        cut = _after(names[0], cut)
    for i, name in enumerate(names):  # in place, for memory; so that a class sorts before its paths
        names[i] = name[cut:].replace(b"/", b"\0", 1)
    # tars are mostly in order, which Python sorts in no time
    order = np.array(sorted(range(len(names)), key=names.__getitem__))
    names = [names[i] for i in order]
    tars, starts, sizes, labels = (np.array(column)[order] for column in columns)
    for i, (name, after) in enumerate(itertools.pairwise(names)):
        if name == after:
            which = " and ".join(sorted({files[tars[i]], files[tars[i + 1]]}))
            raise ValueError(f"--data: {_path(name)} is twice in {which}")
    classes = []
    if (labels == NO_CLASS).all():
        groups = [(key, sum(1 for _ in group)) for key, group in itertools.groupby(
            names, lambda name: name.partition(b"\0")[0])]
        classes = [os.fsdecode(name) for name, _ in groups]
        labels = np.repeat(np.arange(len(groups), dtype=np.int32), [count for _, count in groups])
    return dict(names=np.frombuffer(b"".join(names).replace(b"\0", b"/"), np.uint8),
                offsets=np.cumsum([0, *map(len, names)], dtype=np.int64), labels=labels, tars=tars,
                starts=starts, sizes=sizes, classes=np.array(classes, np.str_),
                files=np.array(files, np.str_), folder=np.array(os.path.realpath(folder)))


def _after(name: bytes, cut: int) -> int:
    """Where the next folder of a path begins, or its file; 0: there is none."""
    return name.find(b"/", cut) + 1


def _path(name: bytes) -> str:
    return os.fsdecode(name.replace(b"\0", b"/"))


class Index:
    """The file that keeps the indices of a run's splits: numpy's .npz, without pickle.

    path None: nothing is kept. given: it is --index; what is there and does not fit is an error,
    where a run's own file is made anew. keep: whether what was built is written.
    """

    def __init__(self, path=None, given: bool = False, keep: bool = True):
        self.path, self.given, self.keep = path, given, keep and path is not None

    @classmethod
    def of_run(cls, config, keep: bool = True):
        """That of --index, else OUTPUT_DIR/index.npz, if there is one."""
        own = config.output_dir and os.path.join(config.output_dir, "index.npz")
        return cls(config.index or own, config.index is not None, keep)

    def of(self, folder: str, split: str, files: list[str]) -> dict[str, np.ndarray]:
        """The index of a split, kept or built. Raises ValueError where `build` does, for a tar that
        is no longer there, and for an --index of other tars."""
        stats = [os.stat(os.path.join(folder, file)) for file in files]
        stamps = np.array([[stat.st_size, stat.st_mtime_ns] for stat in stats], np.int64)
        kept, odd = self._kept(folder, split or "all", files, stamps)
        if kept:
            return kept
        if odd and self.given:
            raise ValueError(f"--index {self.path} is not of --data {folder}: {odd}; give another "
                             f"path, where a new one is made")
        print((f"index {self.path}: {odd}; " if odd else "") + "reading the headers of "
              f"{len(files):,} tar{'s' * (len(files) > 1)}, {stamps[:, 0].sum() / 2**30:,.1f} GiB",
              flush=True)
        if self.keep:  # whether it can be written is told before the headers are read
            place = os.path.dirname(os.path.abspath(self.path))
            os.makedirs(place, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        begin = time.perf_counter()
        index = build(folder, files) | dict(stamps=stamps)
        seconds = time.perf_counter() - begin
        if self.keep:
            self._write({f"{split or 'all'}.{name}": index[name] for name in ARRAYS})
        print(f"{len(index['labels']):,} images in {seconds:.1f} s"
              + (f", kept in {self.path}" if self.keep else ""), flush=True)
        return index

    def _kept(self, folder: str, split: str, files: list[str], stamps: np.ndarray):
        """(the kept index or None, what is wrong with it or None)."""
        if self.path is None or not os.path.exists(self.path):
            return None, None
        try:
            arrays = self._read(f"{split}.")
        except UNREADABLE as e:
            return None, f"it cannot be read ({e})"
        if not arrays:
            return None, None
        kept = {name: arrays[f"{split}.{name}"] for name in ARRAYS}
        if not self.given and str(kept["folder"]) != os.path.realpath(folder):
            return None, f"it is of {kept['folder']}"
        listed = kept["files"].tolist()
        gone = sorted(set(listed) - set(files))
        if 0 < len(gone) < len(listed):
            raise ValueError(f"--data: {gone[0]} is missing, which {self.path} lists; bring it "
                             f"back, or remove {self.path}")
        new = sorted(set(files) - set(listed))
        if new:
            return None, f"it does not have {new[0]}"
        changed = [file for file, same in zip(files, (kept["stamps"] == stamps).all(1)) if not same]
        return (None, f"{changed[0]} has changed") if changed else (kept, None)

    def _read(self, begin: str = "") -> dict[str, np.ndarray]:
        """The file's arrays of names that begin so. Raises what is in UNREADABLE."""
        with np.load(self.path, allow_pickle=False) as file:
            version = int(file["version"]) if "version" in file else 1
            if version != VERSION:
                raise ValueError(f"it is of version {version}, not {VERSION}")
            return {name: file[name] for name in file.files if name.startswith(begin)}

    def _write(self, arrays: dict[str, np.ndarray]) -> None:
        """Atomically, beside the other splits' arrays that the file may have."""
        part = f"{self.path}.{os.getpid()}"
        with contextlib.suppress(*UNREADABLE):  # there is none, or none to keep
            arrays = self._read() | arrays
        with open(part, "wb") as file:
            np.savez(file, **arrays | dict(version=np.array(VERSION)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)
