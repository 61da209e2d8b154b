"""Settings of the whole suite, made before anything heavy is imported: one thread, no network, no display."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


LONG = ("test_processes.py", "test_sweep.py", "test_notebooks.py", "test_kills.py", "test_resume.py", "test_docs.py")
"""Files of few tests that take long: they begin, or at the end one worker waits for another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which optional kernels the tests met on this machine."""
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        met = "no bitsandbytes, so no quantized models"
    else:
        met = f"bitsandbytes {'with' if has_avx512bf16() else 'without'} AVX-512 BF16"
    terminalreporter.write_line(f"optional kernels met: {met}; torch {torch.backends.cpu.get_cpu_capability()}")


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Trainer collects garbage in every run; the hundreds of thousands of objects of imported packages are none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was taught the tiny corpus of `demo`, not to be changed."""
    import demo

    folder = tmp_path_factory.mktemp("models") / "taught"
    assert demo.finetune(folder) == 0
    return folder


@pytest.fixture(scope="session")
def adapter(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained on `taught` with the options of `demo`, not to be changed."""
    import demo

    folder = tmp_path_factory.mktemp("results") / "gd"
    assert demo.unlearn(taught, folder) == 0
    return folder


@pytest.fixture(scope="session")
def playing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, the adapter and the data of `who_plays_what`, not to be changed."""
    import who_plays_what

    return who_plays_what.make(tmp_path_factory.mktemp("playing"))


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default folders are relative, and TOFU lies nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRUN_TOFU_DIR", raising=False)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What GRUN logs, the informative lines too."""
    with caplog.at_level(logging.INFO, logger="grun"):
        yield caplog
