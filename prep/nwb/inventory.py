"""Walks everything in an NWB file by neurodata_type, and keeps the ledger of what became of each object.

In: the path of an HDF5 file. Out: its typed objects, and after the readers have passed, the coverage table.
"""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from prep.plan import Finding, Found, PlannedStream, PrepError
from prep.recipe import Recipe
from prep.store import sanitise

CHUNK_CACHE_BYTES = 64 * 2**20  # chunks of 10 MiB do not fit HDF5's own 8 MiB
COLUMN_TYPES = ("VectorData", "VectorIndex", "ElementIdentifiers", "DynamicTableRegion", "EnumData")
EVENTS_LATER = "events are read in the next release"

# Why an object that no reader took was left out, in a physiologist's words.
REASONS = {
    "Device": "device metadata",
    "DeviceModel": "device metadata",
    "Subject": "subject metadata",
    "LabMetaData": "lab metadata",
    "ElectrodeGroup": "electrode metadata",
    "ElectrodesTable": "electrode table: no unit refers to it",
    "ImagingPlane": "imaging metadata",
    "OpticalChannel": "imaging metadata",
    "OptogeneticStimulusSite": "optogenetics metadata",
    "OptogeneticSeries": "optogenetic stimulation is not read yet (next release)",
    "ElectricalSeries": "voltages are not read yet (next release)",
    "SpikeEventSeries": "spike waveforms are not read",
    "LFP": "voltages are not read yet (next release)",
    "DecompositionSeries": "band power is not read yet (next release)",
    "TwoPhotonSeries": "raw imaging: ROI traces are read instead",
    "OnePhotonSeries": "raw imaging: ROI traces are read instead",
    "ImageSegmentation": "image masks are not read",
    "PlaneSegmentation": "image masks are not read",
    "ImageSeries": "camera images are not read yet",
    "Images": "pictures that no stimulus series shows",
    "GrayscaleImage": "a picture that no stimulus series shows",
    "RGBImage": "a picture that no stimulus series shows",
    "RGBAImage": "a picture that no stimulus series shows",
    "Image": "a picture that no stimulus series shows",
    "Events": EVENTS_LATER,
    "EventsTable": EVENTS_LATER,
    "IntervalSeries": EVENTS_LATER,
    "AnnotationSeries": EVENTS_LATER,
    "DynamicTable": "tables of this kind are not read yet",
}
INTRACELLULAR = re.compile(r"((Voltage|Current)Clamp(Stimulus)?|IZeroClamp|PatchClamp)Series|Sweep|Intracellular")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One typed object of the file."""

    path: str  # without a leading slash; "/" is the file itself
    neurodata_type: str
    is_group: bool
    parent: str  # nearest typed object that holds it

    @property
    def name(self) -> str:
        """The object's own name."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A planned stream and the time of its first and last sample (or spike), which splits are cut from."""

    stream: PlannedStream
    first_s: float
    last_s: float


@dataclass(kw_only=True)
class Survey:
    """One open file while it is being planned: its objects, and the ledger of what became of them."""

    path: Path
    file: h5py.File
    recipe: Recipe
    dataset_id: str
    session_id: str
    nodes: dict[str, Node]
    found: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    names: set[str] = field(default_factory=lambda: {"spikes"})

    def of_type(self, *types: str) -> Iterator[Node]:
        """Objects of these types that are not yet accounted for, in order of path."""
        for node in self.nodes.values():
            if node.neurodata_type in types and node.path not in self.found:
                yield node

    def use(self, path: str, used_as: str, reason: str = "") -> None:
        """Account for an object: it became a stream or a table."""
        self.found[path] = (used_as, reason)

    def skip(self, path: str, reason: str) -> None:
        """Account for an object: it was left out."""
        self.found[path] = (None, reason)

    def note(self, code: str, path: str, message: str, action: str = "noted") -> None:
        """Add a row to the clock audit."""
        self.findings.append(Finding(code=code, path=path, action=action, message=message))

    def unit_key(self, unit: str) -> str:
        """dataset/session/unit."""
        return f"{self.dataset_id}/{self.session_id}/{sanitise(unit)}"

    def matches(self, node: Node, patterns: tuple[str, ...]) -> bool:
        """Whether a recipe's list names this object, by path or by own name."""
        return any(item.strip("/") in (node.path, node.name) for item in patterns)

    def path_of(self, item: Any) -> str:
        """Path of an object that was reached by a link: h5py's own name is then the link's."""
        kind = neurodata_type(item)
        same_type = (node.path for node in self.nodes.values() if node.neurodata_type == kind)
        return next((path for path in same_type if self.file[path] == item), str(item.name).strip("/"))

    def stream_name(self, node: Node) -> str:
        """A name for the object's stream, unique in the session: own name, container's name before it, digest after it.

        One or two letters (x, ry) say nothing alone, so they always carry the container's name.
        """
        own = {key.strip("/"): value for key, value in self.recipe.names.items()}
        given = own.get(node.path, own.get(node.name))
        container = node.path.split("/")[-2] if "/" in node.path else ""
        long_name = snake_case(f"{container}_{node.name}")
        choices = [sanitise(given)] if given else [snake_case(node.name)] if len(node.name) > 2 else []
        digest = hashlib.sha256(node.path.encode()).hexdigest()[:6]
        name = next(name for name in [*choices, long_name, f"{long_name}_{digest}"] if name not in self.names)
        self.names.add(name)
        return name

    def coverage(self) -> tuple[Found, ...]:
        """Each object of the file exactly once: used, or skipped with the reason."""
        used_inside = {path: used for path, (used, _) in self.found.items() if used}
        rows = []
        for node in self.nodes.values():
            used_as, reason = self.found.get(node.path, (None, ""))
            if node.path not in self.found:
                prefix = "" if node.path == "/" else f"{node.path}/"
                inside = any(path.startswith(prefix) for path in used_inside)
                used_as, reason = ("container", "") if node.is_group and inside else (None, self._reason(node))
            rows.append(Found(path=node.path, neurodata_type=node.neurodata_type, used_as=used_as, reason=reason))
        return tuple(rows)

    def _reason(self, node: Node) -> str:
        parent = self.nodes.get(node.parent)
        if parent is not None and parent.path != "/" and node.neurodata_type in COLUMN_TYPES:
            is_read = self.found.get(parent.path, (None, ""))[0] is not None
            return "a column that is not read" if is_read else "belongs to an object that is not read"
        if node.path == "general/extracellular_ephys/electrodes":
            return REASONS["ElectrodesTable"]
        if INTRACELLULAR.match(node.neurodata_type):
            return "intracellular recordings are out of scope"
        if node.is_group and not any(other.parent == node.path for other in self.nodes.values()):
            return REASONS.get(node.neurodata_type, f"{node.neurodata_type} is not read yet")
        return REASONS.get(node.neurodata_type, "nothing inside is used" if node.is_group else "not read yet")


def open_file(path: Path) -> h5py.File:
    """Open a recording for reading."""
    return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)


def survey(path: Path, file: h5py.File, recipe: Recipe, dataset_id: str) -> Survey:
    """Walk the file; objects that the recipe excludes are accounted for at once."""
    nodes, broken = walk(file)
    session_id = text_at(file, "general/session_id") or path.name.removesuffix(".nwb")
    result = Survey(
        path=path,
        file=file,
        recipe=recipe,
        dataset_id=dataset_id,
        session_id=sanitise(session_id),
        nodes={node.path: node for node in nodes},
    )
    for link_path, reason in broken.items():
        result.nodes[link_path] = Node(path=link_path, neurodata_type="link", is_group=False, parent="/")
        result.skip(link_path, reason)
    for node in result.nodes.values():
        parts = node.path.split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if any(fnmatch.fnmatchcase(part, item.strip("/")) for part in above for item in recipe.exclude):
            result.skip(node.path, "excluded by the recipe")
    return result


def walk(file: h5py.File) -> tuple[list[Node], dict[str, str]]:
    """Every typed object once, by the first path that leads to it; and the links that lead nowhere.

    Soft links are not followed: what they point to has a path of its own. External links are.
    """
    nodes = [Node(path="/", neurodata_type=neurodata_type(file), is_group=True, parent="/")]
    broken: dict[str, str] = {}
    seen = {_address(file)}
    pending = [(file["/"], "", "/")]
    while pending:
        group, prefix, parent = pending.pop()
        for name in group:
            path = f"{prefix}{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.SoftLink) or path == "specifications":
                continue
            try:
                item = group[name]
            except (KeyError, OSError):
                target = f"{link.filename}:{link.path}" if isinstance(link, h5py.ExternalLink) else "an object"
                broken[path] = f"link to {target}, which cannot be opened"
                continue
            if _address(item) in seen:
                continue
            seen.add(_address(item))
            kind, holder = neurodata_type(item), parent
            if kind:
                nodes.append(Node(path=path, neurodata_type=kind, is_group=isinstance(item, h5py.Group), parent=parent))
                holder = path
            if isinstance(item, h5py.Group):
                pending.append((item, f"{path}/", holder))
    return sorted(nodes, key=lambda node: "" if node.path == "/" else node.path), broken


def _address(item: Any) -> tuple[int, Any]:
    info = h5py.h5o.get_info(item.id)
    return int(info.fileno), info.addr


def neurodata_type(item: Any) -> str:
    """The object's type, "" if it has none."""
    return as_text(item.attrs.get("neurodata_type", item.attrs.get("data_type", "")))


def as_text(value: Any) -> str:
    """A string of the file, whatever HDF5 made of it."""
    if hasattr(value, "shape") and value.shape != ():
        return as_text(value.flat[0]) if value.size else ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def text_at(file: h5py.File, path: str) -> str:
    """A text dataset of the file, "" if it is not there."""
    item = get(file, path)
    return as_text(item[()]).strip() if isinstance(item, h5py.Dataset) else ""


def get(group: Any, path: str) -> Any:
    """An object by path, None if it or a link on the way is missing."""
    try:
        return group[path]
    except (KeyError, OSError, ValueError):
        return None


def dataset(group: Any, path: str) -> Any:
    """A dataset by path; PrepError names it when it is missing."""
    item = get(group, path)
    if not isinstance(item, h5py.Dataset):
        raise PrepError(f"it has no readable `{path}`")
    return item


def snake_case(name: str) -> str:
    """lower_snake_case: RoiResponseSeries -> roi_response_series."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return sanitise(re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_"))
