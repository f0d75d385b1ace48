"""Stores for tests of the report, from one session to a hundred, odd ones among them, and a browser that reads it.

In: numbers and names. Out: stores of hand-built sessions; a headless Chromium, driven over a pipe.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from store_builders import SECOND_NS, session, stream, target, write_plan

from prep import catalog
from prep.disk import write_json
from prep.plan import Finding, Found, PlannedStream, SessionPlan, Units
from prep.settings import EVENT_FIELDS
from prep.tokens import HeldTokens

ORIGIN_NS = 12_000_000 * SECOND_NS
REGIONS = ("VISp", "VISl", "CA1", "LP", "")
SCRIPT = "<script>document.title='taken'</script>"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE_S = 60.0


# ---------------------------------------------------------------- stores


def events(name: str, types: tuple[str, ...], times_s: np.ndarray, modality: str = "behavior") -> PlannedStream:
    """A stream of events at these seconds of the session, types in turn."""
    planned = stream(
        name,
        "event",
        modality,
        (len(times_s), 1, len(EVENT_FIELDS)),
        types=types,
        fields=EVENT_FIELDS,
        channels=(name,),
    )
    values = np.full((len(times_s), 1, len(EVENT_FIELDS)), np.nan, np.float32)
    values[::2, 0, EVENT_FIELDS.index("duration_s")] = 0.4
    return replace(
        planned,
        spec=replace(planned.spec, duration_ns=1, sample_ns=1),
        start_ns=ORIGIN_NS + np.round(times_s * SECOND_NS).astype(np.int64),
        reader=HeldTokens(values=values),
        types=(np.arange(len(times_s)) % max(1, len(types))).astype(np.int32),
    )


def rich(recording: Path, session_id: str, seed: int, dataset_id: str = "d1") -> SessionPlan:
    """A session with all kinds of streams, regions, depths, findings with numbers and with a list of residuals."""
    plan = session(recording, session_id, seed, dataset_id)
    rng = np.random.default_rng(seed)
    num_units = len(plan.units.unit_key)
    units = replace(
        plan.units,
        region=[REGIONS[(seed + i) % len(REGIONS)] for i in range(num_units)],
        quality=["good", "mua", "", "good", "noise"],
        depth_um=rng.uniform(0, 3000, num_units).astype(np.float32),
    )
    knots_s = np.linspace(0, 13, 14)
    findings = (
        Finding(
            code="clock-drift",
            path="acquisition/pulses",
            action="noted",
            message="the camera runs slow",
            numbers={
                "drift_ppm": 50.2,
                "knot_s": knots_s.tolist(),
                "residual_ms": np.sin(knots_s).tolist(),
            },
        ),
        Finding(code="unsorted", path="units", action="repaired", message="sorted", numbers={"num_samples": 3.0}),
    )
    coverage = (
        Found(path="units", neurodata_type="Units", used_as="spikes"),
        Found(path="units/spike_times", neurodata_type="VectorData", used_as="spikes"),
        Found(
            path="units/waveform_mean", neurodata_type="VectorData", used_as=None, reason="a column that is not read"
        ),
        Found(path="units/waveform_sd", neurodata_type="VectorData", used_as=None, reason="a column that is not read"),
        Found(path="general/devices/probe", neurodata_type="Device", used_as=None, reason="device metadata"),
    )
    behaviour = (
        events("behavior_events", ("lick_left", "lick_right", "reward"), np.linspace(0.2, 12.7, 33)),
        events("gratings", ("drifting_grating",), np.arange(0.5, 12, 1.5), "stimulus"),
    )
    return replace(
        plan,
        subject_id=f"mouse-{seed % 7}",
        units=units,
        streams=(*plan.streams, *behaviour),
        findings=findings,
        coverage=coverage,
    )


def build(root: Path, *plans: SessionPlan) -> Path:
    """A store of these sessions."""
    root.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        write_plan(plan, target(root, plan))
    catalog.write(root)
    return root


def many(root: Path, recording: Path, number: int = 100) -> Path:
    """`number` small sessions in three datasets: six of ten, three of ten, one of ten. The first ten are copied."""
    shares = ("vision",) * 6 + ("motor",) * 3 + ("sleep",)
    build(root, *(rich(recording, f"s{i:04d}", i + 1, share) for i, share in enumerate(shares)))
    for i in range(len(shares), number):
        name = f"{shares[i % len(shares)]}/s{i % len(shares):04d}"
        copy_session(root, name, f"s{i:04d}")
    catalog.write(root)
    return root


def copy_session(root: Path, name: str, session_id: str) -> None:
    """The session `dataset/session` once more under another id: writing a hundred takes half a minute."""
    folder = root / f"{name}.zarr"
    shutil.copytree(folder, folder.with_name(f"{session_id}.zarr"))
    content = json.loads((root / f"{name}.manifest.json").read_text())
    content["session"] |= {"session_id": session_id, "path": f"{folder.parent.name}/{session_id}.zarr"}
    write_json(folder.with_name(f"{session_id}.manifest.json"), content)


def bare(recording: Path, session_id: str, *streams: PlannedStream, **more: Any) -> SessionPlan:
    """A session of these streams and nothing else: no units, tables, splits, licence, subject."""
    empty = Units(unit_key=[], kind=[], region=[], quality=[], xyz_um=np.zeros((0, 3), np.float32))
    plan = SessionPlan(
        dataset_id="odd",
        session_id=session_id,
        subject_id="",
        source=recording,
        licence="",
        units=empty,
        streams=streams,
        stimuli=(),
        intervals={},
        splits=(),
        coverage=(),
        findings=(),
    )
    return replace(plan, **more)


def nothing_but_nan(name: str, num_tokens: int) -> PlannedStream:
    """A trace without a single observed sample."""
    return stream(name, "trace", "behavior", (num_tokens, 2, 3), channels=("x", "y"), missing_shard=(0, num_tokens))


# ---------------------------------------------------------------- what a page holds


def content(page: str) -> dict[str, Any]:
    """The data that a page holds."""
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    assert found
    result: dict[str, Any] = json.loads(found[1])
    return result


def titles(page: str) -> list[str]:
    """Titles of a page's pictures."""
    found = re.search(r'<script type="application/json" id="pictures">(.*?)</script>', page, re.DOTALL)
    assert found
    return [picture["title"] for picture in json.loads(found[1])]


def svgs(page: str) -> list[str]:
    """The drawings of a page."""
    return [base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]


# ---------------------------------------------------------------- the browser


def chromium() -> str | None:
    """Where Chromium is; None where there is none."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@dataclass
class Browser:
    """One page of a headless Chromium: speaks the DevTools protocol, and remembers requests and complaints."""

    to_browser: int
    from_browser: int
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # errors, warnings, exceptions
    events: list[str] = field(default_factory=list)
    target: str | None = None
    _number: int = 0
    _buffer: bytes = b""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its result; what happens meanwhile is remembered."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self.target} if self.target else {}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def start(self) -> None:
        """Attach to a page of its own, and listen to all that it does."""
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.target = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Open a file in a window of this size, and wait until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._receive()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; what a promise resolves to."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path: Path, most_px: int = 6000) -> Path:
        """The whole page as PNG, down to `most_px`."""
        height = min(most_px, self.run("document.documentElement.scrollHeight"))
        width = self.run("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))
        return path

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            part = os.read(self.from_browser, 1 << 20)
            assert part and time.monotonic() < deadline, "Chromium went away or says nothing"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, params = message.get("method", ""), message.get("params", {})
        self.events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:200])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['level']}: {params['entry']['text']}")
        return message


@contextmanager
def browser() -> Iterator[Browser]:
    """A running Chromium with a profile of its own; bash gives it the pipe as descriptors 3 and 4."""
    program = chromium()
    assert program is not None
    child_reads, we_write = os.pipe()
    we_read, child_writes = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        redirect = f'exec "$@" 3<&{child_reads} 4>&{child_writes}'
        process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", *command],
            pass_fds=(child_reads, child_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_reads)
        os.close(child_writes)
        try:
            page = Browser(we_write, we_read)
            page.start()
            yield page
            page.target = None
            page.call("Browser.close")
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()
            os.close(we_write)
            os.close(we_read)
