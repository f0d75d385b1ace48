"""Which files a person means by a list of files, folders and URLs.

In: folders, lists, a web server and an S3 server on loopback. Out: input files: label, dataset, place; messages.
"""

from pathlib import Path
from typing import Any

import pytest
import remote_builders
from remote_builders import Handler, Served, one, put

from prep.disk import StoreError
from prep.files import find_files
from prep.staging import stage
from prep.urls import RemoteError

CONTENT = b"a recording"

nothing_of_this_machine = pytest.fixture(autouse=True)(remote_builders.nothing_of_this_machine)
web = pytest.fixture(remote_builders.web_server)
s3_address = pytest.fixture(scope="module")(remote_builders.s3_server)
bucket = pytest.fixture(remote_builders.empty_bucket)


def test_a_url_without_a_files_name_gets_the_servers(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/assets/1/download/"] = Served(b"", location=f"{address}/blobs/2")
    handler.files["/blobs/2"] = Served(CONTENT, filename="../sub-1_ses-2.nwb")
    found = one(f"{address}/assets/1/download/", tmp_path)
    assert found.name == "sub-1_ses-2.nwb" and stage(found).bytes == len(CONTENT)


def test_a_folder_behind_https_is_not_guessed(web: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = web
    handler.files["/data/"] = Served(b"<html>")
    with pytest.raises(RemoteError, match=r"names no file, and a folder cannot be listed over https\. Write one URL"):
        one(f"{address}/data/", tmp_path)
    with pytest.raises(RemoteError, match=r"Give an NWB-Zarr folder as s3://"):
        one(f"{address}/data/a.nwb.zarr", tmp_path)


def test_other_kinds_of_url_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"gs://b/a\.nwb: gs:// is not read\. SRC is files, folders, https:// or s3"):
        find_files(["gs://b/a.nwb"], None, tmp_path)
    with pytest.raises(StoreError, match="a URL is read where there is a store"):
        find_files(["https://host/a.nwb"], None)


def test_urls_of_one_folder_are_joined_and_named_after_it(tmp_path: Path) -> None:
    urls = [f"https://host/set%201/sub-1_{part}.nwb?key={part}" for part in ("image", "ecephys")]
    (file,) = find_files(urls, None, tmp_path, join=r"(sub-\d+)_")
    assert file.label == "sub-1_ecephys.nwb + sub-1_image.nwb" and file.dataset_id == "set 1"
    assert [item.url[-7:] for item in file.remotes] == ["ecephys", "y=image"]
    assert len(find_files([*urls, urls[0]], None, tmp_path)) == 2


def test_a_prefix_is_listed_as_a_folder_is(bucket: Any, tmp_path: Path) -> None:
    names = ["b.nwb", "a/c.nwb", "a/.hidden/d.nwb", "a/readme.md", "z.nwb.zarr/.zgroup", "z.nwb.zarr/acquisition/0.0"]
    for name in names:
        put(bucket, f"set/{name}", b"x")
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    put(bucket, "settled/e.nwb", b"x")
    ours = find_files(["s3://lab/set"], None, tmp_path / "out")
    local = find_files([tmp_path / "set"], None, tmp_path / "out")
    assert [(file.label, file.dataset_id) for file in ours] == [(file.label, file.dataset_id) for file in local]
    assert [file.remotes[0].is_folder for file in ours] == [False, False, True]
    assert [file.label for file in find_files(["s3://lab"], None, tmp_path)] == [
        *(f"set/{name}" for name in ("a/c.nwb", "b.nwb", "z.nwb.zarr")),
        "settled/e.nwb",
    ]
    assert find_files(["s3://lab/set/b.nwb"], None, tmp_path)[0].dataset_id == "set"
    assert find_files(["s3://lab/set/z.nwb.zarr/"], None, tmp_path)[0].remotes[0].is_folder
    with pytest.raises(StoreError, match=r"s3://lab/set/a/\.hidden holds no NWB file|holds no NWB file"):
        put(bucket, "notes/readme.md", b"x")
        find_files(["s3://lab/notes"], None, tmp_path)


def test_a_list_that_says_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(StoreError, match=r"@.*empty\.txt: the list is empty\. Expected one file, folder or URL per"):
        find_files([f"@{tmp_path}/empty.txt"], None, tmp_path)
    with pytest.raises(StoreError, match=r"@.*none\.txt: the list cannot be read"):
        find_files([f"@{tmp_path}/none.txt"], None, tmp_path)
