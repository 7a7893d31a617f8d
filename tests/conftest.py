"""Eight virtual CPU devices for every test, and one cache of compiled programs; set before JAX is
imported. Most of a test's time is compiling: many compile the same, and none needs fast code."""

import getpass
import os
import pathlib
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # At 0 some gradients come out as NaN, at 1 LLVM aborts on some programs (JAX 0.10.2).
        "--xla_backend_optimization_level=2",
    ]
)
_cache = pathlib.Path(tempfile.gettempdir()) / f"jaxpt-tests-{getpass.getuser()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped has failed")
    parser.addoption("--all-meshes", action="store_true", help="all meshes with all architectures")


def _failed_if_skipped(report, config):
    """For CI, where nothing that a test needs may be missing."""
    if report.skipped and not hasattr(report, "wasxfail") and config.getoption("no_skips"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which --no-skips forbids: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return _failed_if_skipped((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _failed_if_skipped((yield), collector.config)
