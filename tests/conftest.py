"""Skips are failures, unless a test needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

# Tiny products: threads that wait for one another cost several times what they save. Set before
# torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first: at the end one worker would wait for the other's."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/patches/"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip without the gpu mark into a failure that says so."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; only tests marked gpu may be"
    return report
