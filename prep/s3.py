"""S3: objects opened, listed, put and removed; every object that is put is confirmed by the server's own checksum.

In: s3:// URLs, files and bytes with their sha256. Out: Answers, rows of a listing, ETags; RemoteError.

Reading is anonymous unless the usual places (AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws, ...) hold credentials; another
endpoint than Amazon's comes from AWS_ENDPOINT_URL. Proxies come from the environment too.
"""

import base64
import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from prep.disk import DigestError
from prep.urls import TIMEOUT_S, Answer, Listed, NotThereError, RemoteError, Trouble, persist, refusal, told

NUM_STREAMS = 16  # requests at once
ABSENT = "*"  # the condition that there is nothing under that name yet
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every machine that has workers"
DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "RequestTimeout", "IncompleteBody")


class OutrunError(Exception):
    """Somebody else has written what was to be written only if nobody else had."""


def client() -> Any:
    """The client of this process; botocore's are safe to share between threads, not with a forked process."""
    return _client(os.getpid())


@functools.cache
def _client(pid: int) -> Any:
    import botocore.session  # slow to import, and only some sources need it
    from botocore.config import Config

    session = botocore.session.get_session()
    config = Config(
        signature_version=None if session.get_credentials() else botocore.UNSIGNED,
        connect_timeout=TIMEOUT_S,
        read_timeout=TIMEOUT_S,
        max_pool_connections=NUM_STREAMS,
        retries={"mode": "standard", "total_max_attempts": 1},  # tries are counted by `persist`
    )
    return session.create_client("s3", config=config)


def forget_clients() -> None:
    """Make the next request look for credentials and endpoint anew."""
    _client.cache_clear()


def bucket_and_key(url: str) -> tuple[str, str]:
    """s3://bucket/a/b -> bucket, a/b."""
    bucket, _, key = url[len("s3://") :].partition("/")
    if not bucket:
        raise RemoteError(f"{url} names no bucket. Expected s3://bucket/prefix.")
    return bucket, key


@contextlib.contextmanager
def _errors(url: str, *, is_put: bool = False) -> Iterator[None]:
    """The errors of botocore as ours."""
    from botocore import exceptions as e

    try:
        yield
    except e.ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400))
        code = str(error.response.get("Error", {}).get("Code", ""))
        raise _refusal(url, status, code, is_put) from error
    except (e.ParamValidationError, ValueError) as error:
        raise RemoteError(f"{url}: this is no URL that can be asked for ({told(error)}).") from error
    except (e.NoCredentialsError, e.PartialCredentialsError, e.CredentialRetrievalError, e.ProfileNotFound) as error:
        raise RemoteError(f"{url}: no good credentials ({told(error)}). Mend them: {CREDENTIALS}.") from error
    except (e.SSOError, e.TokenRetrievalError) as error:
        raise RemoteError(
            f"{url}: no good credentials ({told(error)}). Log in again, as by `aws sso login`."
        ) from error
    except e.BotoCoreError as error:
        raise Trouble(f"no answer ({told(error)})") from error


def _refusal(url: str, status: int, code: str, is_put: bool) -> Exception:
    where = f"{url}: the server answers {status} {code}".rstrip()
    if code == "NoSuchBucket":
        name = bucket_and_key(url)[0]
        return RemoteError(f"{where}: there is no bucket {name!r}. Check its name and AWS_ENDPOINT_URL, or make it.")
    if code in DAMAGED:
        return Trouble(f"the bytes did not arrive as they were sent ({code})")
    if code == "EntityTooLarge":
        return RemoteError(f"{where}: one object holds at most 5 GB. Give the streams of the recipe fewer sources.")
    if status in (409, 412):
        return OutrunError(where)
    if status in (401, 403) and is_put:
        what = "it may not be written. Its owner must allow these credentials s3:PutObject, GetObject, DeleteObject"
        return RemoteError(f"{where}: {what} below the prefix, and s3:ListBucket; or {CREDENTIALS}.")
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        return RemoteError(f"{where}: the credentials are too old. Renew them, then run the same command again.")
    if status == 400 and is_put:
        return RemoteError(f"{where}. Is this an S3 server that knows x-amz-checksum-sha256? Check AWS_ENDPOINT_URL.")
    return refusal(url, status, code)


def check_credentials(url: str) -> None:
    """Say now what the first write would say. Raises RemoteError."""
    import botocore

    with _errors(url):
        is_anonymous = client().meta.config.signature_version is botocore.UNSIGNED
    if is_anonymous:
        raise RemoteError(f"{url}: writing needs credentials, and none were found: {CREDENTIALS}.")


# ---------------------------------------------------------------- reading


def open_object(url: str, start: int) -> Answer:
    """An object from byte `start` on. Raises RemoteError, Trouble."""
    bucket, key = bucket_and_key(url)
    more = {"Range": f"bytes={start}-"} if start else {}
    with _errors(url):
        answer = client().get_object(Bucket=bucket, Key=key, **more)
    match = re.match(r"bytes \d+-\d+/(\d+)$", answer.get("ContentRange", ""))
    return Answer(
        size=int(match[1]) if match else int(answer["ContentLength"]),
        etag=str(answer.get("ETag", "")),
        md5=_md5_of(answer),
        start=start if match else 0,
        body=answer["Body"],
    )


def _md5_of(answer: dict[str, Any]) -> str:
    """The md5 of an object, which its ETag is where it came in one piece and is not encrypted by a key of the user."""
    found = str(answer.get("ETag", "")).strip('"')
    is_md5 = re.fullmatch(r"[0-9a-f]{32}", found) and "kms" not in answer.get("ServerSideEncryption", "")
    return found if is_md5 and "SSECustomerAlgorithm" not in answer else ""


def list_objects(url: str) -> list[Listed]:
    """Every object below s3://bucket/prefix, the prefix being a folder; [] where there is none. Raises RemoteError."""
    bucket, key = bucket_and_key(url)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""

    def attempt() -> list[Listed]:
        with _errors(url):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            found = [row for page in pages for row in page.get("Contents", ())]
        rows = [(row["Key"].removeprefix(prefix), row) for row in found if not row["Key"].endswith("/")]
        return [Listed(path=PurePosixPath(name), size=row["Size"], etag=row["ETag"]) for name, row in rows]

    return persist(url, attempt)


# ---------------------------------------------------------------- writing


def put_file(url: str, path: Path, sha256: str) -> str:
    """Send a file that is what its manifest says, which the server has to confirm. Returns its ETag.

    Raises DigestError where the file is another one, RemoteError, OSError.
    """
    with open(path, "rb") as file:
        found, md5 = (hashlib.file_digest(_rewound(file), kind).hexdigest() for kind in ("sha256", "md5"))
        if found != sha256:
            raise DigestError(f"{path} changed after it was sealed: its sha256 is {found}, its manifest says {sha256}.")

        def attempt() -> str:
            return _put(url, _rewound(file), sha256, md5, {})

        return persist(url, attempt)


def _rewound(file: BufferedReader) -> BufferedReader:
    file.seek(0)
    return file


def put_bytes(url: str, content: bytes, only_over: str = "") -> str:
    """Send bytes; `only_over`: an ETag that must still be there, or ABSENT. Returns the ETag.

    Raises OutrunError where something else is there, RemoteError.
    """
    condition = {} if not only_over else {"IfNoneMatch": "*"} if only_over == ABSENT else {"IfMatch": only_over}
    digests = hashlib.sha256(content).hexdigest(), hashlib.md5(content, usedforsecurity=False).hexdigest()
    return persist(url, lambda: _put(url, content, *digests, condition))


def _put(url: str, body: bytes | BufferedReader, sha256: str, md5: str, condition: dict[str, str]) -> str:
    bucket, key = bucket_and_key(url)
    checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
    try:
        with _errors(url, is_put=True):
            answer = client().put_object(
                Bucket=bucket, Key=key, Body=body, ChecksumAlgorithm="SHA256", ChecksumSHA256=checksum, **condition
            )
    except NotThereError as error:  # an If-Match of what was removed meanwhile
        raise OutrunError(str(error)) from error
    confirmed = {answer.get("ChecksumSHA256"): checksum, _md5_of(answer): md5}
    confirmed = {told_us: expected for told_us, expected in confirmed.items() if told_us}
    if not confirmed or any(told_us != expected for told_us, expected in confirmed.items()):
        raise Trouble(f"the server does not confirm the checksum of what was sent (it says {sorted(confirmed)})")
    return str(answer["ETag"])


def remove(url: str) -> None:
    """Remove an object; one that is not there is no error. Raises RemoteError."""
    bucket, key = bucket_and_key(url)

    def attempt() -> None:
        with _errors(url, is_put=True):
            client().delete_object(Bucket=bucket, Key=key)

    persist(url, attempt)
