"""All baselines of one split of a recording: regressions and small networks, trained anew.

In: a Recording, a fold. Out: {name: {task: prediction of the test block}}, and what each took.
"""

import time

from bench.science import protocol, windows
from bench.science.networks import NETWORKS
from bench.science.recordings import Recording
from bench.science.regressions import REGRESSIONS

BASELINES = REGRESSIONS | NETWORKS
SPIKE_TASKS, TRACE_TASKS = ("hd_acausal", "hd_causal", "cosmooth", "forecast"), ("forecast_ca",)


def tasks(recording: Recording) -> tuple[str, ...]:
    """What can be asked of a recording."""
    of_spikes = SPIKE_TASKS if recording.heading.size else SPIKE_TASKS[2:]
    return (of_spikes if recording.spike_times else ()) + (TRACE_TASKS if recording.traces.size else ())


def baselines(
    recording: Recording, fold: int | None = None, cpu_s: dict[tuple[str, str], float] | None = None
) -> dict[str, dict[str, protocol.Prediction]]:
    """Each baseline's predictions of each of its tasks; `cpu_s` gets the CPU seconds by (name, task)."""
    found: dict[str, dict[str, protocol.Prediction]] = {}
    for name, task in pairs(recording):
        began = time.process_time()
        said = BASELINES[name][task](recording, task, fold)
        if cpu_s is not None:
            cpu_s[name, task] = time.process_time() - began
        query = protocol.queries(recording, task, "test", fold)
        found.setdefault(name, {})[task] = windows.answer(recording, task, query, said)
    return found


def pairs(recording: Recording) -> list[tuple[str, str]]:
    """(name, task) of the baselines that fit the recording."""
    possible = tasks(recording)
    return [(name, task) for name, of_task in BASELINES.items() for task in of_task if task in possible]
