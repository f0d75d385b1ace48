"""Stimulus pixels in NWB files that have a clock: films, templates, pictures, their tones, and each frame stored once.

In: files that nwb_builders writes. Out: nothing.
"""

from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, reason, replace, stream, values, with_units, write
from pynwb import NWBFile
from pynwb.base import ImageReferences, Images
from pynwb.image import GrayscaleImage, ImageSeries, IndexSeries, OpticalSeries, RGBImage

from prep.nwb.session import UnusableFile, plan_session
from prep.plan import SessionPlan
from prep.recipe import Recipe


def movie(pixels: np.ndarray, name: str = "frames", **keywords: object) -> ImageSeries:
    clock = {} if {"rate", "timestamps"} & set(keywords) else {"rate": 30.0}
    return ImageSeries(name=name, data=pixels, unit="n.a.", format="raw", **clock, **keywords)


def index_series(target: ImageSeries | Images, index: list[int], time_s: list[float]) -> IndexSeries:
    """pynwb only reads the link to an ImageSeries, so the series is made the way that its reader makes it."""
    link = "indexed_images" if isinstance(target, Images) else "indexed_timeseries"
    series = IndexSeries.__new__(IndexSeries, in_construct_mode=True)
    series.__init__(name="shown", data=index, unit="N/A", timestamps=time_s, **{link: target})
    series._in_construct_mode = False
    return series


def ordered(*pictures: GrayscaleImage | RGBImage) -> Images:
    order = ImageReferences(name="order_of_images", data=list(pictures))
    return Images(name="images", images=list(pictures), order_of_images=order)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def seen(session: SessionPlan, name: str) -> np.ndarray:
    """What a stream shows, token by token; all its tokens show something."""
    index = values(stream(session, name))[:, 0, 0]
    stimulus = next(item for item in session.stimuli if item.digest == stream(session, name).spec.stimulus)
    assert index.min() >= 0
    return stimulus.reader.read(0, stimulus.shape[0])[index]


def test_an_index_series_points_into_the_pixels_of_its_template(tmp_path: Path):
    pixels = noise(4, 6, 5)

    def fill(nwb: NWBFile) -> None:
        template = movie(pixels)
        nwb.add_stimulus_template(template)
        nwb.add_stimulus(index_series(template, [2, 0, 3, 9], [1.0, 1.5, 2.5, 2.6]))

    session = plan(tmp_path, fill)
    item, (stimulus,) = stream(session, "shown"), session.stimuli
    assert values(item)[:, 0, 0].tolist() == [2, 0, 3, -1]
    assert item.start_ns.tolist() == [1_000_000_000, 1_500_000_000, 2_500_000_000, 2_600_000_000]
    assert (item.spec.kind, item.spec.channels, item.spec.stimulus) == ("frames", ("screen",), stimulus.digest)
    assert np.array_equal(stimulus.reader.read(1, 4), pixels[1:])
    assert "frame-index" in codes(session)
    used = {row.path: row.used_as for row in session.coverage}
    assert used["stimulus/templates/frames"] == used["stimulus/presentation/shown"] == "shown"


def test_an_image_series_that_was_shown_is_its_own_index(tmp_path: Path):
    pixels = RNG.random((30, 4, 5)).astype(np.float32)
    session = plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(pixels, rate=10.0, starting_time=2.0)))
    assert values(stream(session, "frames"))[:, 0, 0].tolist() == list(range(30))
    assert np.array_equal(session.stimuli[0].reader.read(0, 30), np.rint(pixels * 255.0).astype(np.uint8))


def test_a_film_that_is_shown_ten_times_is_stored_once(tmp_path: Path):
    film = noise(12, 6, 5)
    session = plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(np.tile(film, (10, 1, 1)))))
    (stimulus,) = session.stimuli
    assert stimulus.shape == (12, 6, 5)
    assert np.array_equal(stimulus.reader.read(0, 12), film)
    assert values(stream(session, "frames"))[:, 0, 0].tolist() == list(range(12)) * 10


def test_stills_that_are_held_for_many_refreshes_are_stored_once(tmp_path: Path):
    stills = noise(3, 6, 5)
    shown = np.repeat(stills[[2, 0, 2, 1]], 15, axis=0)
    session = plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(shown)))
    assert session.stimuli[0].shape == (3, 6, 5)
    assert np.array_equal(session.stimuli[0].reader.read(0, 3), stills[[2, 0, 1]]), "in order of first appearance"
    assert np.array_equal(seen(session, "frames"), shown)


def test_a_template_with_frames_that_repeat_keeps_the_meaning_of_its_index(tmp_path: Path):
    pixels = noise(3, 6, 5)[[0, 1, 0, 2]]

    def fill(nwb: NWBFile) -> None:
        template = movie(pixels)
        nwb.add_stimulus_template(template)
        nwb.add_stimulus(index_series(template, [3, 2, 1, 0], [1.0, 2.0, 3.0, 4.0]))

    session = plan(tmp_path, fill)
    assert session.stimuli[0].shape == (3, 6, 5)
    assert np.array_equal(seen(session, "shown"), pixels[::-1])


def test_the_same_frames_have_the_same_digest_in_every_session(tmp_path: Path):
    film = noise(5, 6, 5)
    plans = [
        plan(tmp_path, lambda nwb, pixels=pixels: nwb.add_stimulus(movie(pixels)))
        for pixels in (film, np.tile(film, (3, 1, 1)), film[::-1])
    ]
    once, thrice, backwards = (session.stimuli[0].digest for session in plans)
    assert once == thrice != backwards


def test_images_are_shown_in_their_order(tmp_path: Path):
    first, second = noise(2, 3, 4)

    def fill(nwb: NWBFile) -> None:
        images = ordered(GrayscaleImage(name="b", data=second), GrayscaleImage(name="a", data=first))
        nwb.add_stimulus_template(images)
        nwb.add_stimulus(index_series(images, [0, 1, 0], [1.0, 2.0, 3.0]))

    assert np.array_equal(seen(plan(tmp_path, fill), "shown"), np.stack([second, first, second]))


def test_pictures_of_several_sizes_give_one_stream_for_each_size(tmp_path: Path):
    small, large, colour = noise(3, 4), noise(6, 8), noise(3, 4, 3)

    def fill(nwb: NWBFile) -> None:
        images = ordered(
            GrayscaleImage(name="a", data=small),
            GrayscaleImage(name="b", data=large),
            RGBImage(name="c", data=colour),
        )
        nwb.add_stimulus_template(images)
        nwb.add_stimulus(index_series(images, [1, 0, 2, 0], [1.0, 2.0, 3.0, 4.0]))

    session = plan(tmp_path, fill)
    shown = {item.spec.name: values(item)[:, 0, 0].tolist() for item in session.streams}
    assert shown == {
        "shown_3x4": [-1, 0, -1, 0],
        "shown_6x8": [0, -1, -1, -1],
        "shown_3x4x3": [-1, -1, 0, -1],
    }
    assert [np.array_equal(item.reader.read(0, 1)[0], picture)
            for item, picture in zip(session.stimuli, (small, large, colour), strict=True)] == [True] * 3  # fmt: skip


def test_an_optical_series_is_a_film(tmp_path: Path):
    pixels = noise(9, 4, 5, 3)
    series = OpticalSeries(
        name="screen", data=pixels, unit="n.a.", rate=30.0, format="raw", distance=0.3, field_of_view=[0.5, 0.3, 0.3],
        orientation="upright",
    )  # fmt: skip
    assert np.array_equal(seen(plan(tmp_path, lambda nwb: nwb.add_stimulus(series)), "screen"), pixels)


@pytest.mark.parametrize(
    ("given", "expected", "bits"),
    [
        (np.array([0, 7, 255], np.uint16), [0, 7, 255], None),
        (np.array([0, 2048, 4095], np.uint16), [0, 128, 255], None),
        (np.array([0, 32768, 65535], np.uint16), [0, 128, 255], None),
        (np.array([0, 512, 1000], np.int32), [0, 128, 249], 10),
        (np.array([-1.0, 0.0, 1.0]), [0, 128, 255], None),
        (np.array([0.0, 17.0, 255.0], np.float32), [0, 17, 255], None),
        (np.array([False, True, True]), [0, 255, 255], None),
    ],
)
def test_values_with_an_evident_range_become_8_bits(
    tmp_path: Path, given: np.ndarray, expected: list[int], bits: int | None
):
    path = write(tmp_path, lambda nwb: nwb.add_stimulus(movie(noise(3, 4, 5))))
    replace(path, "stimulus/presentation/frames/data", np.repeat(given, 20).reshape(3, 4, 5))
    if bits is not None:
        with h5py.File(path, "r+") as file:
            file["stimulus/presentation/frames/bits_per_pixel"] = bits
    session = plan_session(path, Recipe(), "d1")
    assert seen(session, "frames")[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((3, 4, 5), 300, np.uint16), "uint16 from 300 to 300; which value is white is not in the file"),
        (np.full((3, 4, 5), -3, np.int16), "int16 from -3 to -3; which value is white is not in the file"),
        (np.full((3, 4, 5), 7.5), "floats from 7.5 to 7.5; what is black and white is not in the file"),
        (np.full((3, 4, 5), np.nan), "some of its pixels are not numbers"),
        (np.zeros((3, 4, 5, 2), np.uint8), r"\(3, 4, 5, 2\), expected frames x height x width"),
        (np.zeros((3, 0, 5), np.uint8), "no pixels in the file"),
    ],
)
def test_pixels_that_cannot_be_shown_are_skipped_with_the_reason(tmp_path: Path, pixels: np.ndarray, message: str):
    with pytest.raises(UnusableFile, match=message):
        plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(pixels)))


def test_many_more_time_stamps_than_frames_are_refused_by_name(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        nwb.add_stimulus(movie(noise(30, 4, 5), timestamps=np.arange(30.0)))
        with_units(np.arange(1.0, 20.0))(nwb)

    path = write(tmp_path, fill)
    replace(path, "stimulus/presentation/frames/timestamps", np.arange(300.0))
    session = plan_session(path, Recipe(), "d1")
    assert session.stimuli == ()
    assert "30 samples but 300 time stamps" in reason(session, "stimulus/presentation/frames")
    assert [finding.path for finding in session.refused] == ["stimulus/presentation/frames"]


def test_a_template_that_nobody_shows_is_no_stimulus(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        nwb.add_stimulus_template(movie(np.zeros((3, 4, 5), np.uint8)))
        with_units([1.0, 2.0])(nwb)

    session = plan(tmp_path, fill)
    assert session.stimuli == ()
    assert "no IndexSeries, and no table that names it" in reason(session, "stimulus/templates/frames")
