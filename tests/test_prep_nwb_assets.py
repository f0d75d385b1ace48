"""Stimulus pixels outside the recording: pictures, arrays and films by the recipe's asset map, and their digests.

In: assets and NWB files that the tests write. Out: nothing.
"""

import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from nwb_builders import reason, stream, values, with_units, write
from PIL import Image
from pynwb import NWBFile
from pynwb.image import ImageSeries
from test_prep_nwb_stimulus import noise
from test_prep_nwb_stimulus_tables import every, frames, pixels, table

from prep.asset_files import with_digests
from prep.nwb.assets import open_asset
from prep.nwb.session import plan_session
from prep.plan import SessionPlan
from prep.recipe import Asset, Recipe
from prep.settings import ConfigError


def film(path: Path, shots: np.ndarray, rate: int = 8, codec: str = "libx264") -> Path:
    """Write frames (F, H, W, 3) with a key frame every 12 and frames out of order, so that decoding has to seek."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate)
        track.height, track.width = shots.shape[1:3]
        track.pix_fmt = "yuv420p"
        track.options = {"g": "12", "crf": "2"} if codec == "libx264" else {"g": "12"}
        for shot in shots:
            container.mux(track.encode(av.VideoFrame.from_ndarray(shot, format="rgb24")))
        container.mux(track.encode())
    return path


def steps(num: int, channels: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    """Frames (num, 32, 48, 3), each brighter than the one before."""
    level = np.linspace(20, 230, num)[:, None, None, None] * np.array(channels)
    return np.broadcast_to(level, (num, 32, 48, 3)).astype(np.uint8)


def planned(folder: Path, fill: Callable[[NWBFile], None], *assets: Asset) -> SessionPlan:
    """The plan of a file whose recipe lies in the same folder."""
    return plan_session(write(folder, fill), Recipe(assets=assets, folder=folder), "d1")


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ---------------------------------------------------------------- kinds of files


def test_a_picture_is_grey_or_colour_by_its_own_mode(tmp_path: Path):
    grey, colour = noise(6, 8), noise(6, 8, 3)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(np.dstack([colour, np.full((6, 8), 255, np.uint8)])).save(tmp_path / "opaque.png")
    for name, expected in (("grey", grey), ("colour", colour), ("opaque", colour)):
        source, rate_hz = open_asset(tmp_path / f"{name}.png")
        assert rate_hz is None
        assert source.shape == (1, *expected.shape)
        assert np.array_equal(source.take(np.array([0]))[0], expected)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (5, 6, 8), (5, 6, 8, 3)])
def test_an_array_is_a_picture_or_a_film_by_its_shape(tmp_path: Path, shape: tuple[int, ...]):
    array = noise(*shape)
    np.save(tmp_path / "a.npy", array)
    source, _ = open_asset(tmp_path / "a.npy")
    expected = array if shape[0] == 5 else array[None]
    assert source.shape == expected.shape
    assert np.array_equal(source.take(np.arange(len(expected))), expected)


def test_frames_of_a_film_are_found_again_wherever_reading_starts(tmp_path: Path):
    path = film(tmp_path / "a.mp4", steps(50, (1, 0.5, 0.2)))
    source, rate_hz = open_asset(path)
    whole = decoded(path)
    assert (source.shape, rate_hz) == ((50, 32, 48, 3), 8.0)
    assert len({shot.tobytes() for shot in whole}) == 50, "each frame can be told from the others"
    for wanted in (np.arange(50), np.array([0]), np.array([49]), np.arange(11, 14), np.array([3, 30, 31, 47])):
        assert np.array_equal(source.take(wanted), whole[wanted])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_film_without_colours_is_grey(tmp_path: Path, codec: str):
    path = film(tmp_path / "a.mp4", steps(20), codec=codec)
    source, _ = open_asset(path)
    assert source.shape == (20, 32, 48)
    assert np.array_equal(source.take(np.arange(20)), np.rint(decoded(path).mean(axis=3)))


# ---------------------------------------------------------------- by name


def test_movies_by_hash_play_from_the_asset_map(tmp_path: Path):
    (tmp_path / "clips").mkdir()
    shots = {name: noise(4, 6, 8) for name in ("h1", "h2")}
    for name, clip in shots.items():
        np.save(tmp_path / "clips" / f"{name}.npy", clip)
    rows = table("trials", [1.0, 2.0, 3.0], [2.0, 3.0, 3.5], condition_hash=["h2", "h1", "h2"])
    assets = (Asset(match="h*", file="clips/{name}.npy", rate_hz=4.0),)
    session = planned(tmp_path, rows, *assets)
    assert frames(session, "trials_frames") == [
        (1.0, 4), (1.25, 5), (1.5, 6), (1.75, 7), (2.0, 0), (2.25, 1), (2.5, 2), (2.75, 3), (3.0, 4), (3.25, 5),
        (3.5, -1),
    ]  # fmt: skip
    assert np.array_equal(pixels(session, "trials_frames"), np.concatenate([shots["h1"], shots["h2"]]))


def test_pictures_of_the_asset_map_follow_the_frame_column_or_the_name(tmp_path: Path):
    scenes = noise(5, 6, 8)
    np.save(tmp_path / "scenes.npy", scenes)
    Image.fromarray(scenes[3]).save(tmp_path / "im7.png")
    numbered = table("natural_scenes_presentations", [1.0, 2.0], [1.25, 2.25], frame=[3, -1])
    named = table("images_presentations", [5.0], [5.25], image_name=["im7"])
    assets = (Asset(match="natural_scenes", file="scenes.npy"), Asset(match="im*", file="{name}.png"))
    session = planned(tmp_path, every(numbered, named), *assets)
    assert frames(session, "natural_scenes_frames") == [(1.0, 3), (1.25, -1)]
    assert frames(session, "images_frames") == [(5.0, 0), (5.25, -1)]
    assert np.array_equal(pixels(session, "images_frames")[0], pixels(session, "natural_scenes_frames")[3])


def test_a_series_with_pixels_in_another_file_takes_them_from_the_asset_map(tmp_path: Path):
    path = film(tmp_path / "flight.mp4", steps(16))

    def fill(nwb: NWBFile) -> None:
        series = ImageSeries(
            name="flight", external_file=["./videos/flight.mp4"], starting_frame=[0], format="external",
            timestamps=np.arange(16) / 8, unit="n.a.",
        )  # fmt: skip
        nwb.add_stimulus(series)
        with_units(np.arange(1.0, 20.0))(nwb)

    without = planned(tmp_path, fill)
    assert "Name that file under `assets` of the recipe" in reason(without, "stimulus/presentation/flight")
    session = planned(tmp_path, fill, Asset(match="*.mp4", file="{name}"))
    assert values(stream(session, "flight"))[:, 0, 0].tolist() == list(range(16))
    assert np.array_equal(pixels(session, "flight"), np.rint(decoded(path).mean(axis=3)))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("im7.png", None, "im7.png does not exist. Add the file, or narrow assets[0].match"),
        ("im7.png", b"no picture", "im7.png cannot be used: it is not readable as a picture"),
        ("im7.npy", b"no array", "im7.npy cannot be used: it is not readable as an array"),
        ("im7.mp4", b"no film", "im7.mp4 cannot be used: it is not readable as a film"),
        ("im7.tiff", b"x", "im7.tiff cannot be used: .tiff is not a known kind of asset; expected one of .png, .jpg"),
    ],
)
def test_an_asset_that_is_missing_or_broken_is_refused_by_key_path_and_stimulus(
    tmp_path: Path, file: str, content: bytes | None, message: str
):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    rows = table("images_presentations", [5.0], [5.25], image_name=["im7"])
    session = planned(tmp_path, rows, Asset(match="im*", file=file.replace("im7", "{name}")))
    (finding,) = session.refused
    assert finding.path == "intervals/images_presentations"
    assert finding.message.startswith("assets[0].file of the recipe, for the stimulus 'im7': ")
    assert message in finding.message
    assert [item.spec.name for item in session.streams] == ["images"], "what was shown is still told"


def test_a_name_cannot_lead_out_of_the_assets_folder(tmp_path: Path):
    Image.fromarray(noise(6, 8)).save(tmp_path / "secret.png")
    (tmp_path / "assets").mkdir()
    rows = table("images_presentations", [5.0], [5.25], image_name=["../secret"])
    assets = (Asset(match="*", file="assets/{name}.png"),)
    (finding,) = planned(tmp_path, rows, *assets).refused
    assert "leads out of the assets' folder" in finding.message


def test_a_film_needs_a_rate_to_be_played(tmp_path: Path):
    np.save(tmp_path / "h1.npy", noise(4, 6, 8))
    rows = table("trials", [1.0], [2.0], condition_hash=["h1"])
    session = planned(tmp_path, rows, Asset(match="h1", file="h1.npy"))
    (finding,) = [finding for finding in session.findings if finding.code == "no-pixels"]
    assert "set rate_hz of its entry in `assets` of the recipe" in finding.message


# ---------------------------------------------------------------- digests


def test_the_digest_of_an_asset_is_that_of_its_content(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    assets = (Asset(match="x", file="a.png"), Asset(match="*", file="{name}.png"))
    first = with_digests(assets, tmp_path)
    assert first == with_digests(assets, tmp_path)
    assert first[0].sha256 == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    (tmp_path / "b.png").write_bytes(b"other")
    second = with_digests(assets, tmp_path)
    assert [one.sha256 == two.sha256 for one, two in zip(first, second, strict=True)] == [True, False]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "a.png",
            "assets[1].file = 'a.png': {folder}/a.png does not exist. Give a path relative to the recipe's folder.",
        ),
        ("{name}.gif", "assets[1].file = '{name}.gif': no file in {folder} fits it, whatever the name. Check folder"),
    ],
)
def test_an_asset_without_a_file_is_an_error_that_names_its_key(tmp_path: Path, file: str, message: str):
    (tmp_path / "b.png").write_bytes(b"b")
    assets = (Asset(match="b", file="b.png"), Asset(match="x", file=file))
    with pytest.raises(ConfigError, match="^" + re.escape(message.replace("{folder}", str(tmp_path)))):
        with_digests(assets, tmp_path)
