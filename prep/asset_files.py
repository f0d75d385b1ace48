"""Digests of the asset map: stimulus pixels that lie beside the recipe are a part of what the recipe says.

In: the `assets` of a recipe, and its folder. Out: the same, each with the sha256 of its content; pure stdlib.
"""

import glob
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from prep.settings import ConfigError

NAME = "{name}"  # in `file`: the name of the stimulus as the tables give it


class AssetEntry(Protocol):
    """One entry of a recipe's `assets`; see prep.recipe.Asset."""

    @property
    def file(self) -> str:
        """Path relative to the recipe's folder."""
        ...


T = TypeVar("T", bound=AssetEntry)


def with_digests(assets: tuple[T, ...], folder: Path) -> tuple[T, ...]:
    """The entries with `sha256` of what they stand for: a file's own digest, of a `{name}` that of all files it fits.

    Raises ConfigError where an entry stands for no file; its message starts with the key, as in `recipe: key ...`.
    """
    return tuple(
        replace(asset, sha256=_sha256(asset.file, f"assets[{number}].file", folder))  # type: ignore[type-var]  # mypy does not see that each kind is a dataclass
        for number, asset in enumerate(assets)
    )


def _sha256(file: str, key: str, folder: Path) -> str:
    if NAME not in file:
        path = folder / file
        if not path.is_file():
            raise ConfigError(f"{key} = {file!r}: {path} does not exist. Give a path relative to the recipe's folder.")
        return _of_file(path)
    pattern = NAME.join(glob.escape(part) for part in file.split(NAME)).replace(NAME, "*")
    found = sorted(name for name in glob.glob(pattern, root_dir=folder) if (folder / name).is_file())
    if not found:
        raise ConfigError(f"{key} = {file!r}: no file in {folder} fits it, whatever the name. Check folder and suffix.")
    lines = (f"{Path(name).as_posix()} {_of_file(folder / name)}\n" for name in found)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
