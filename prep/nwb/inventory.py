"""Walks everything in an NWB file by neurodata_type, and keeps the ledger of what became of each object.

In: the path of an HDF5 file. Out: its typed objects, and after the readers have passed, the coverage table.
"""

import contextlib
import fnmatch
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.file import address, hollow, is_group, links, neurodata_type, text_at
from prep.plan import BrokenObject, Finding, Found, PlannedStimulus, PlannedStream, PrepError, Units
from prep.recipe import Recipe
from prep.store import sanitise

COLUMN_TYPES = ("VectorData", "VectorIndex", "ElementIdentifiers", "DynamicTableRegion", "EnumData")
# What reading a damaged or odd object may end in.
UNREADABLE = (
    OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError
)  # fmt: skip

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
    "OptogeneticSeries": "optogenetic stimulation is not read",
    "ElectricalSeries": "voltages are read as band power where the recipe asks for it (`lfp`)",
    "SpikeEventSeries": "spike waveforms are not read",
    "LFP": "voltages are read as band power where the recipe asks for it (`lfp`)",
    "DecompositionSeries": "band power of others is not read",
    "TwoPhotonSeries": "raw imaging: ROI traces are read instead",
    "OnePhotonSeries": "raw imaging: ROI traces are read instead",
    "ImageSegmentation": "image masks are not read",
    "PlaneSegmentation": "image masks are not read",
    "ImageSeries": "camera images are not read",
    "Images": "pictures that no stimulus series shows",
    "GrayscaleImage": "a picture that no stimulus series shows",
    "RGBImage": "a picture that no stimulus series shows",
    "RGBAImage": "a picture that no stimulus series shows",
    "Image": "a picture that no stimulus series shows",
    "DynamicTable": "a table without a column of times that rise from row to row",
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
    """A planned stream, and what the session needs to know beside it.

    `units` are the rows of the unit table that the stream's sources are; the session sets the stream's first_unit.
    """

    stream: PlannedStream
    first_s: float  # time of the first sample (or spike, or event), which splits are cut from
    last_s: float
    time_s: npt.NDArray[np.float64] | None = None  # (T,) of each sample or event: for audits across streams
    units: Units | None = None
    stimuli: tuple[PlannedStimulus, ...] = ()


@dataclass(kw_only=True)
class Survey:
    """One open file while it is being planned: its objects, and the ledger of what became of them."""

    path: Path
    file: Any  # the open root group
    recipe: Recipe
    dataset_id: str
    session_id: str
    nodes: dict[str, Node]
    found: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    names: set[str] = field(default_factory=lambda: {"spikes"})
    also: dict[str, str] = field(default_factory=dict)  # object: a stream made of it beside what it is used as
    clock_maps: dict[str, Any] = field(default_factory=dict)  # pattern: map of another clock's times to the session's
    addresses: dict[Any, str] = field(default_factory=dict)  # of each object: its path
    kept: list[Any] = field(default_factory=list)  # open datasets that are read again: see prep.nwb.file.holding
    spans: list[Any] | None = None  # of the file's clocks, once they are looked at (prep.nwb.clocks)

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

    def refuse(self, path: str, message: str) -> None:
        """Account for an object that is broken: it is left out, named in the summary, and the rest goes on."""
        self.skip(path, message)
        self.note("broken-object", path, message, "refused")

    @contextlib.contextmanager
    def reading(self, node: Node) -> Iterator[None]:
        """Read one object: a PrepError skips it, a BrokenObject or an error of the file refuses it; others go on."""
        num_findings, names, found = len(self.findings), set(self.names), dict(self.found)
        try:
            yield
        except UNREADABLE as error:
            del self.findings[num_findings:]
            self.names, self.found = names, found
            if isinstance(error, PrepError) and not isinstance(error, BrokenObject):
                self.skip(node.path, str(error))
            else:
                told = str(error) if isinstance(error, PrepError) else f"it cannot be read ({one_line(error)})"
                self.refuse(node.path, told)

    def note(self, code: str, path: str, message: str, action: str = "noted", **numbers: float | list[float]) -> None:
        """Add a row to the clock audit."""
        self.findings.append(Finding(code=code, path=path, action=action, message=message, numbers=numbers))

    def unit_key(self, unit: str) -> str:
        """dataset/session/unit."""
        return f"{self.dataset_id}/{self.session_id}/{sanitise(unit)}"

    def matches(self, node: Node, patterns: tuple[str, ...]) -> bool:
        """Whether a recipe's list names this object, by path or by own name; * and ? match as in a shell."""
        return any(is_named(text, item.strip("/")) for item in patterns for text in (node.path, node.name))

    def path_of(self, item: Any) -> str:
        """Path of an object that was reached by a link: h5py's own name is then the link's."""
        return self.addresses.get(address(item)) or str(item.name).strip("/")

    def stream_name(self, node: Node) -> str:
        """A name for the object's stream, unique in the session: own name, container's name before it, digest after it.

        One or two letters (x, ry) say nothing alone, so they always carry the container's name.
        """
        own = {key.strip("/"): value for key, value in self.recipe.names.items()}
        given = own.get(node.path, own.get(node.name))
        container = node.path.split("/")[-2] if "/" in node.path else ""
        long_name = snake_case(f"{container}_{node.name}")
        own_name = snake_case(node.name)
        choices = [sanitise(given)] if given else [own_name] if len(node.name) > 2 and own_name != "unnamed" else []
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
            if node.path in self.also:
                used_as = f"{used_as}, {self.also[node.path]}" if used_as else self.also[node.path]
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


def survey(path: Path, file: Any, recipe: Recipe, dataset_id: str) -> Survey:
    """Walk the file; objects that the recipe excludes are accounted for at once."""
    nodes, broken, addresses = walk(file)
    result = Survey(
        path=path,
        file=file,
        recipe=recipe,
        dataset_id=dataset_id,
        session_id=named(text_at(file, "general/session_id"), path),
        nodes={node.path: node for node in nodes},
        addresses=addresses,
    )
    for broken_path, reason in broken.items():
        if broken_path in result.nodes:
            result.refuse(broken_path, reason)
            continue
        result.nodes[broken_path] = Node(path=broken_path, neurodata_type="link", is_group=False, parent="/")
        result.skip(broken_path, reason)
    for node in result.nodes.values():
        parts = node.path.split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if any(is_named(part, item.strip("/")) for part in above for item in recipe.exclude):
            result.skip(node.path, "excluded by the recipe")
    return result


def named(session_id: str, path: Path) -> str:
    """A session's name that is safe on disk: its id, or the file's stem where it has none that can be written so."""
    return sanitise(session_id if re.search(r"[A-Za-z0-9]", session_id) else stem(path))


def stem(path: Path) -> str:
    """A file's name without what says that it is NWB."""
    return path.name.removesuffix(".zarr").removesuffix(".nwb")


def is_named(text: str, pattern: str) -> bool:
    """Whether a pattern of a recipe means this text: as it stands (a name may have brackets), or as in a shell."""
    return text == pattern or fnmatch.fnmatchcase(text, pattern)


def walk(file: Any) -> tuple[list[Node], dict[str, str], dict[Any, str]]:
    """Every typed object once, by the first path that leads to it; links and arrays of nothing; paths by address."""
    nodes = [Node(path="/", neurodata_type=neurodata_type(file), is_group=True, parent="/")]
    broken: dict[str, str] = {}
    seen = {address(file): "/"}
    pending = [(file["/"], "", "/")]
    while pending:
        group, prefix, parent = pending.pop()
        for name, item, why in links(group):
            path = f"{prefix}{name}"
            if path == "specifications":
                continue
            if item is None:
                broken[path] = why
                continue
            if address(item) in seen:
                continue
            seen[address(item)] = path
            kind, holder = neurodata_type(item), parent
            why = hollow(item)
            if why:
                broken[path] = why
            if kind or why:
                nodes.append(Node(path=path, neurodata_type=kind or "array", is_group=is_group(item), parent=parent))
                holder = path
            if is_group(item):
                pending.append((item, f"{path}/", holder))
    return sorted(nodes, key=lambda node: "" if node.path == "/" else node.path), broken, seen


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def unique_names(names: Sequence[str], rows: Sequence[int]) -> list[str]:
    """Names of rows of a table, with the row behind those that occur twice."""
    count = Counter(names)
    return [f"{name}-{row}" if count[name] > 1 else name for name, row in zip(names, rows, strict=True)]


def snake_case(name: str) -> str:
    """lower_snake_case: RoiResponseSeries -> roi_response_series; letters lose their accents."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain)
    return sanitise(re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_"))
