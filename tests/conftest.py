"""Settings of all test processes. The fixtures are in `tiny_models.py`: who only hands out tests loads no torch."""

import gc
import os
from collections.abc import Generator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

import pytest

gc.disable()  # until all is imported, which leaves few cycles and many objects


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, so that a test says the same on every machine."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    hands_out = config.option.numprocesses and not config.option.collectonly and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("tiny_models")


def pytest_collection_finish() -> None:
    """Look for cycles in what tests make, not in what was imported."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call() -> Generator[None]:
    """End a test's child process that an exception led out of its work: it would go on as a second test worker."""
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(1)


def pytest_sessionfinish() -> None:
    """Extensions that look for leaks when Python ends find none."""
    gc.unfreeze()
