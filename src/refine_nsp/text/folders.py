"""Find the files that a name means, and the split that each belongs to.

A name is a file, a glob, or a folder as the hub, an editor or a cluster leaves it. The rules for splits are those of `datasets`: words
like train, dev or test in the names of folders, or else of files, or shards called `NAME-00000-of-00001`. A README that lists the files of
each configuration comes before them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from refine_nsp.errors import RefineError, closest
from refine_nsp.text.formats import FORMATS, KNOWN, RECORD_ENDINGS, ending_of, format_of, is_empty, say, unpacked

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
APART = r"[-._ 0-9]"  # characters that may stand next to a split's word in a name
SHARD = re.compile(r"(?:data/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
ABOUT_DATA = re.compile(r"(readme([-_ ].*)?|licen[sc]e|copying|notice|citation)(\..*)?", re.IGNORECASE)
STATE_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
SHOWN = 4  # a warning lists so many names of files for each reason

LeftOut = list[tuple[str, str]]  # a file's name and why it is not read
T = TypeVar("T")


@dataclass
class Found:
    """Hold all files that a name means, those of each split (empty where no name says one), and what is left out next to them."""

    files: list[Path]
    splits: dict[str, list[Path]] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=list)

    @property
    def of_no_split(self) -> list[Path]:
        belonging = {file for files in self.splits.values() for file in files}
        return [file for file in self.files if file not in belonging]


def path_of(name: str) -> Path:
    """Return the path of a name, its `~` expanded."""
    return Path(name).expanduser()


def is_local(name: str) -> bool:
    """Tell whether a name is that of files on this machine, and not of the hub."""
    return path_of(name).exists() or glob.has_magic(name)


def say_left_out(name: str, left_out: LeftOut) -> None:
    """Say in one line which files are not read, by reason."""
    parts = [
        f"{', '.join(files[:SHOWN])}{f' and {len(files) - SHOWN} more' if len(files) > SHOWN else ''} ({why})"
        for why, files in _grouped((why, file) for file, why in left_out).items()
    ]
    if parts:
        say(f"{name}: not read: {'; '.join(parts)}")


def find_files(name: str, config: str | None) -> Found | None:
    """Find the files that a path, folder or glob means, None for a name of the hub. Raises RefineError where none can be read."""
    path = path_of(name)
    if path.is_dir():
        found = _in_folder(path, config)
    elif config is not None and (path.exists() or glob.has_magic(name)):
        raise _no_configurations(name, config)
    elif path.is_file():
        if format_of(path) is None:
            raise RefineError(f"{path}: unknown format {path.suffix or '(no ending)'}; expected {KNOWN}")
        if is_empty(path):
            raise RefineError(f"{path} is empty")
        return Found([path])
    elif glob.has_magic(name):
        if not (named := sorted(glob.glob(str(path), recursive=True))):
            raise RefineError(f"no file matches {name!r}")
        files, left_out = _readable([(p.name, p) for p in map(Path, named)])
        found = Found(files, left_out=left_out)
    else:
        if ending_of(path) in FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise RefineError(f"no file or folder {name!r}")
        return None
    if not found.files:
        beside = "; ".join(f"{file} ({why})" for file, why in found.left_out[:SHOWN])
        raise RefineError(f"{name} holds no file to train on; expected {KNOWN}" + (f"; not read: {beside}" if beside else ""))
    return found


def _no_configurations(name: str, config: str) -> RefineError:
    return RefineError(f"dataset_config={config!r}: {name} has no configurations; leave it out")


def _in_folder(folder: Path, config: str | None) -> Found:
    folder = _snapshot(folder)
    hidden: LeftOut = []
    entries = sorted(_walk(folder, folder, hidden, {folder.resolve()}), key=lambda entry: entry[0])
    files, left_out = _readable(entries)
    left_out = [*hidden, *left_out]
    if configurations := _configurations(folder):
        return _of_configuration(folder, Found(files, left_out=left_out), configurations, config)
    if config is not None:
        raise _no_configurations(str(folder), config)
    return Found(files, splits_of(folder, files), left_out)


def _snapshot(folder: Path) -> Path:
    """Return the snapshot that `main` points to, or the newest one, in a folder of the hub's cache; any other folder as it is."""
    if not ((folder / "refs").is_dir() and (folder / "snapshots").is_dir() and (folder / "blobs").is_dir()):
        return folder
    main = folder / "refs" / "main"
    named = folder / "snapshots" / main.read_text("utf-8").strip() if main.is_file() else folder
    there = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    return named if named in there else there[-1] if there else folder


def _walk(folder: Path, top: Path, hidden: LeftOut, seen: set[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder with their names from its top. Links are followed, but never back to a folder above."""
    for path in sorted(folder.iterdir()):
        name = path.relative_to(top).as_posix()
        is_folder = path.is_dir()
        if path.name.startswith(".") or (is_folder and path.name.startswith("__")):
            hidden.append((name + "/" * is_folder, "hidden"))
        elif is_folder:
            if path.resolve() not in seen:
                yield from _walk(path, top, hidden, seen | {path.resolve()})
            else:
                hidden.append((name + "/", "a link to a folder above it"))
        else:
            yield name, path


def _readable(entries: Iterable[tuple[str, Path]]) -> tuple[list[Path], LeftOut]:
    """Part files, given with their names, into those that hold data and those that are not read, with the reason."""
    entries = list(entries)
    endings = {ending_of(path) for _, path in entries if _role(path) == "data"}
    # A folder may hold nothing but notes in Markdown. Then they are the text, and a README is one of them.
    notes = (".md", ".rst") if endings and endings <= {".md", ".rst"} else ()
    files: dict[Path, Path] = {}  # by the path that links lead to
    left_out: LeftOut = []
    for name, path in entries:
        role = _role(path)
        if role == "describes the data" and ending_of(path) in notes:
            role = "data"
        if role == "data" and (same := files.get(path.resolve()) or files.get(unpacked(path).absolute())):
            role = f"the same as {same.name}"
        if role == "data":
            files[path.resolve()] = path
        else:
            left_out.append((name, role))
    return list(files.values()), left_out


def _role(path: Path) -> str:
    """Return `data` for a file of a folder that is read, and the reason for one that is not."""
    if path.is_dir():
        return "a folder"
    if not path.exists():
        return "a link to nothing"
    if path.name.lower() in STATE_FILES or (ABOUT_DATA.fullmatch(path.name) and ending_of(path) not in RECORD_ENDINGS):
        return "describes the data"
    if format_of(path) is None:
        return "not a format that is read"
    return "empty" if is_empty(path) else "data"


def splits_of(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Group files into splits by their names, as `datasets` does. Return an empty dict where no name says a split."""
    names = {file: file.relative_to(folder).as_posix() for file in files}
    shards = {file: match[1] for file, name in names.items() if (match := SHARD.fullmatch(name))}
    if any(words_in(split) for split in shards.values()) or any(names[file].startswith("data/") for file in shards):
        return _grouped((split, file) for file, split in shards.items())
    folders = _grouped((s, file) for file, name in names.items() for s in words_in(*name.split("/")[:-1]))
    return folders or _grouped((s, file) for file in files for s in words_in(file.name))


def words_in(*names: str) -> list[str]:
    """Return the splits whose words stand in names, in the order train, validation, test."""
    return [
        split
        for split, words in SPLIT_WORDS.items()
        if any(re.search(rf"(^|{APART})({'|'.join(words)})({APART}|$)", name, re.IGNORECASE) for name in names)
    ]


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for split, file in pairs:
        groups.setdefault(split, []).append(file)
    return groups


def choose(there: Sequence[str], asked: Sequence[str], of_no_split: bool, name: str) -> str | None:
    """Choose the first split of `asked` that is there, or the only one, which a warning names. None stands for the files of no split."""
    for wanted in asked:
        for split in (wanted, *(s for s in words_in(wanted) if wanted in SPLIT_WORDS[s])):  # `dev` asks for validation
            if split in there:
                return split
    if not there or (of_no_split and "train" in asked):
        return None
    if len(there) == 1 and not of_no_split:
        say(f"{name}: no split {' or '.join(asked)}; the only one, {there[0]}, is read")
        return there[0]
    wanted = f"{' or '.join(map(repr, asked))}{closest(asked[0], there)}"
    raise RefineError(f"{name} has no split {wanted}; it has {', '.join(there)}: name one of them, or a file")


def _configurations(folder: Path) -> list[dict[str, object]]:
    """Return the configurations that a folder's README lists, as on the hub; an empty list where it does not."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        listed = (yaml.safe_load(match[1]) or {}).get("configs") if match else None
    except (yaml.YAMLError, AttributeError):
        return []
    return [c for c in listed if isinstance(c, dict) and c.get("data_files")] if isinstance(listed, list) else []


def _of_configuration(folder: Path, found: Found, listed: Sequence[dict[str, object]], config: str | None) -> Found:
    """Keep the files of one configuration. Raises RefineError where none of several is named, or the one named is not there."""
    names = [str(c.get("config_name", "default")) for c in listed]
    if config is None:
        default = next((n for n, c in zip(names, listed, strict=True) if c.get("default")), "default")
        config = names[0] if len(names) == 1 else default
        if config not in names:
            raise RefineError(f"{folder} has several configurations ({', '.join(names)}); name one with --dataset_config")
    if config not in names:
        raise RefineError(f"{folder} has no configuration {config!r}{closest(config, names)}; it has {', '.join(names)}")
    given = listed[names.index(config)]["data_files"]
    entries = given if isinstance(given, list) else [given]
    splits: dict[str, list[Path]] = {}
    for entry in entries:
        split, patterns = (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            matching = re.compile(_pattern(str(pattern)))
            splits.setdefault(split, []).extend(f for f in found.files if matching.fullmatch(f.relative_to(folder).as_posix()))
    files = list(dict.fromkeys(f for of_split in splits.values() for f in of_split))
    others = [(f.relative_to(folder).as_posix(), f"not of the configuration {config}") for f in found.files if f not in files]
    return Found(files, {split: of_split for split, of_split in splits.items() if of_split}, [*found.left_out, *others])


def _pattern(text: str) -> str:
    """Make a regular expression of a pattern of names: `**` matches across folders, `*` and `?` within one, [..] one of several."""
    made = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", os.path.normpath(text).replace(os.sep, "/"))
    return "".join(made.get(part, part if part.startswith("[") and part.endswith("]") else re.escape(part)) for part in parts)
