"""A bucket on loopback that remembers what was asked of it, and stores that are built for it in this process.

In: fixtures of remote_builders. Out: an S3 server's log of writes, its objects, mirrors, credentials.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from moto.s3.models import S3Backend
from store_builders import session, target, write_plan

from prep import s3
from prep.mirror import Mirror

URL = "s3://lab/set"


@dataclass
class Log:
    """What was written to the server, in order, and how it is to misbehave."""

    puts: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)  # both
    slow_s: float = 0.0
    damages: str = ""  # the end of a key whose bytes are stored wrong


def log_of_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """What is put into the server, which runs in this process, and removed from it."""
    log, put, delete = Log(), S3Backend.put_object, S3Backend.delete_object

    def putting(self: Any, bucket: str, key: str, value: bytes, *args: Any, **more: Any) -> Any:
        time.sleep(log.slow_s)
        log.puts.append(key)
        log.events.append(f"put {key}")
        is_hit = bool(log.damages) and key.endswith(log.damages)
        return put(self, bucket, key, value[:-1] + b"?" if is_hit else value, *args, **more)

    def deleting(self: Any, bucket: str, key: str, *args: Any, **more: Any) -> Any:
        log.removed.append(key)
        log.events.append(f"remove {key}")
        return delete(self, bucket, key, *args, **more)

    monkeypatch.setattr(S3Backend, "put_object", putting)
    monkeypatch.setattr(S3Backend, "delete_object", deleting)
    yield log


def with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    s3.forget_clients()


def objects(bucket: Any, prefix: str = "set/") -> dict[str, str]:
    """Every object of the store with the digest of its bytes, but for what only tells about runs."""
    bodies = {key: bucket.get_object(Bucket="lab", Key=prefix + key)["Body"].read() for key in keys(bucket, prefix)}
    return {key: hashlib.sha256(body).hexdigest() for key, body in bodies.items() if key != ".lock"}


def keys(bucket: Any, prefix: str = "set/") -> list[str]:
    """The names of all objects of the store."""
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix=prefix)
    return [row["Key"].removeprefix(prefix) for page in pages for row in page.get("Contents", [])]


def mirror(build: Path) -> Mirror:
    """The store at URL, built in a folder of its own."""
    return Mirror(url=URL, build=build)


def seal(root: Path, session_id: str, seed: int = 1, recording: str = "a recording") -> str:
    """Write a hand-built session into a folder; where it lies from there."""
    path = root.parent / f"{session_id}.nwb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recording)
    plan = session(path, session_id, seed=seed)
    plan = replace(plan, streams=plan.streams[2:4], intervals={})  # a server in Python takes its time for each file
    write_plan(plan, target(root, plan))
    return target(root, plan).folder
