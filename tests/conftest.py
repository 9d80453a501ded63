"""Every n-th of the selected tests, where MEDGPT_TEST_SHARE says n: a part of a slow suite."""

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    share = int(os.environ.get("MEDGPT_TEST_SHARE", "1"))
    if share > 1:
        left = [item for n, item in enumerate(items) if n % share]
        config.hook.pytest_deselected(items=left)
        items[:] = items[::share]
