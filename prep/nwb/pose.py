"""Pose: where key points of the body are, and how sure the tracker is of each (ndx-pose).

In: PoseEstimationSeries of the file. Out: a stream of modality `behavior` for each key point.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from prep.nwb.file import get, is_dataset
from prep.nwb.inventory import Draft, Node, Survey
from prep.nwb.series import Series, read_series, scan, trace_stream
from prep.plan import PrepError

AXES = ("x", "y", "z")


def read_pose(survey: Survey) -> list[Draft]:
    """Plan one stream for each key point; points of low confidence are left as the tracker gave them."""
    drafts = []
    for node in list(survey.of_type("PoseEstimationSeries")):
        with survey.reading(node):
            drafts.append(_plan(survey, node))
    return drafts


def _plan(survey: Survey, node: Node) -> Draft:
    points = read_series(survey, node)
    if points.num_columns not in (2, 3):
        raise PrepError(f"it has {points.num_columns} columns; a key point has x, y and perhaps z")
    if scan(points)[2]:
        raise PrepError("all its samples are the same or missing")
    series = _with_confidence(survey, node, points)
    name = survey.stream_name(node)
    words = (*AXES[: points.num_columns], "confidence")[: series.num_columns]
    draft = trace_stream(survey, series, name, "behavior", columns=tuple(f"{name}/{word}" for word in words))
    is_alone = series.num_columns == points.num_columns
    survey.use(node.path, name, "it has no confidence of each sample" if is_alone else "")
    return draft


def _with_confidence(survey: Survey, node: Node, points: Series) -> Series:
    """The key point with the tracker's confidence as its last column, where there is one for each sample."""
    confidence: Any = get(survey.file, f"{node.path}/confidence")
    num_samples = points.data.size // points.num_columns
    shapes = ((num_samples,), (num_samples, 1))
    if not is_dataset(confidence) or confidence.shape not in shapes or confidence.dtype.kind not in "fiub":
        return points
    return replace(
        points,
        datasets=(*points.datasets, f"{node.path}/confidence"),
        num_columns=points.num_columns + 1,
        conversion=np.append(points.conversion, 1.0),
        offset=np.append(points.offset, 0.0),
    )
