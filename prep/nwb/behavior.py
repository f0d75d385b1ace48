"""Behaviour: running, pupil, position, heading.

In: SpatialSeries and TimeSeries of the file. Out: streams of modality `behavior`.
"""

import numpy as np

from prep.nwb.inventory import Draft, Node, Survey
from prep.nwb.series import Series, read_series, scan, trace_stream
from prep.plan import PrepError

TURN_USED = 0.9  # an angle is certain where its values fill the turn


def read_behavior(survey: Survey) -> list[Draft]:
    """Plan one stream per behaviour series of acquisition and processing; those that mark moments are read before."""
    drafts = []
    for node in list(survey.of_type("SpatialSeries", "TimeSeries")):
        if not node.path.startswith(("acquisition/", "processing/")):
            is_shown = node.path.startswith("stimulus/")
            kept = "a series outside of acquisition and processing"
            survey.skip(node.path, "a stimulus that is a signal is not read" if is_shown else kept)
            continue
        with survey.reading(node):
            drafts.append(_plan(survey, node))
    return drafts


def _plan(survey: Survey, node: Node) -> Draft:
    series = read_series(survey, node)
    low, high, is_constant = scan(series)
    if np.isnan(low):
        raise PrepError("all its samples are missing")
    if is_constant:
        raise PrepError("all its samples are the same or missing")
    unit_rad = _angle_unit(survey, node, series, low, high)
    angles_rad = None if unit_rad is None else np.full(series.num_columns, unit_rad)
    name = survey.stream_name(node)
    columns = [name] if series.num_columns == 1 else [f"{name}/{i}" for i in range(series.num_columns)]
    draft = trace_stream(survey, series, name, "behavior", columns=tuple(columns), angles_rad=angles_rad)
    told = ["an angle: cos and sin"] if unit_rad is not None else []
    told += ["time is the second axis in the file"] if series.transposed else []
    survey.use(node.path, name, "; ".join(told))
    return draft


def _angle_unit(survey: Survey, node: Node, series: Series, low: float, high: float) -> float | None:
    """Radians per unit if the series is an angle, else None.

    Certain is: a unit of angle, and values that fill one turn, [0, 2 pi] or [-pi, pi]. The recipe decides the rest.
    """
    unit_rad = unit_in_rad(series.unit)
    if survey.matches(node, survey.recipe.not_angles):
        return None
    if survey.matches(node, survey.recipe.angles):
        return unit_rad or 1.0
    if unit_rad is None:
        return None
    low_rad, high_rad = low * unit_rad, high * unit_rad
    tolerance = 1e-3
    within = any(start - tolerance <= low_rad and high_rad <= start + 2 * np.pi + tolerance for start in (0.0, -np.pi))
    if within and high_rad - low_rad >= TURN_USED * 2 * np.pi:
        return unit_rad
    message = f"unit is {series.unit}, values {low:.4g} to {high:.4g}: not taken as an angle"
    survey.note("maybe-angle", node.path, f"{message}. If it is one, list it in the recipe's `angles`")
    return None


def unit_in_rad(unit: str) -> float | None:
    """Radians per unit for rad, radian(s), deg, degree(s); None for anything else, such as degrees C or rad/s."""
    word = unit.lower().rstrip("s.")
    return {"rad": 1.0, "radian": 1.0, "deg": np.pi / 180, "degree": np.pi / 180, "°": np.pi / 180}.get(word)
