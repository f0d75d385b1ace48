"""The order of the suite: files that take long come first, so that two workers end at about the same time.

In: the collected tests. Out: the same, in the order in which `--dist loadfile` deals files to workers.
"""

import pytest

LONG = (
    "test_train_loop",
    "test_readme",
    "test_train_demo",
    "test_train_validation",
    "test_prep_flow",
    "test_train_muon",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files in the order of LONG, then the others as they were."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
