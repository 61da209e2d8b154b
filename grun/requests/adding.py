"""`requests add` and `requests remove`: adapters that are there, to be trained, or to be trained again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.config.options import RequestsConfig, UnlearnConfig
from grun.config.values import from_dict, to_dict
from grun.data.corpus import Corpus, load_corpus
from grun.data.rows import Row, hash_rows
from grun.data.templates import OPTIONS
from grun.errors import AdapterError, ConfigError, DataError, RunError
from grun.evaluation.probe import asked_first
from grun.loading.checks import check
from grun.loading.resolve import resolve
from grun.loading.stored import of_store
from grun.method.actions import EDIT
from grun.method.adapter import AdapterConfig
from grun.method.edits import LOREFT
from grun.method.gate import KEYWORDS
from grun.method.parametrization import traits_of
from grun.method.stack.forget_rows import check_forget_rows, salted_hashes
from grun.method.stack.manifest import MANIFEST_FILE, Request, check_id
from grun.requests.rates import report, with_share
from grun.requests.signing import read_key
from grun.requests.store import RequestStore
from grun.runtime.files import read_json, target
from grun.runtime.files import remove as remove_written
from grun.runtime.records import Run, read_record
from grun.runtime.runs import IDENTITY_FILE, RUN_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """A request whose adapter is to be trained, or was."""

    id: str
    config: UnlearnConfig
    rows: Sequence[Row]
    """Its forget rows."""
    independent: bool
    """Trained on the bare base, whatever is in force."""
    replace: bool = False
    store_text: bool = False
    note: str = ""


def add(options: RequestsConfig, arguments: Sequence[str]) -> Path:
    """Put an adapter into a store, which is made if need be, and return its folder there.

    Args:
        options: of the command.
        arguments: `key=value` options of `unlearn`.

    Raises:
        ConfigError, DataError, AdapterError, RunError: see `RequestStore.add` and `unlearn`; the store is then as it
            was before.
    """
    request_id, folder = str(options.id), target(str(options.store), "store")
    check_id(request_id)
    store, known = opened(options) if options.replace or (folder / MANIFEST_FILE).exists() else None, None
    if store is not None:
        store.check_new(request_id, replace=options.replace)
        _refuse_another_rule(store, options)
        known = store.manifest.request(request_id) if options.replace else None
    if options.adapter is not None:
        return _take(options, Path(options.adapter).expanduser(), arguments)
    made = options if store is None else store.manifest
    config = with_share(_config(known, arguments, folder), made.false_positives, made.capacity)
    if known is not None:
        template = {f"data.{key}": getattr(config.data, key) for key in OPTIONS}
        _refuse_another_template(options, f"request {request_id}", template)
    rows = load_rows(config).forget
    was_independent = known is None or not known.beside
    training = Training(
        id=request_id,
        config=config,
        rows=rows,
        independent=was_independent if options.independent is None else options.independent,
        replace=options.replace,
        store_text=options.store_text or (known is not None and known.text_stored),
        note=options.note or ("" if known is None else known.note),
    )
    return train(_opened_or_made(options), training)


def remove(store: RequestStore, request_id: str, *, retrain: bool) -> list[str]:
    """Remove a request; ids of those that had it in force in training, which `retrain` trains again at once.

    What they are trained with is looked for before anything is removed.

    Raises:
        ConfigError: there is no such request; one to be trained again came in without its options.
        DataError: the data of one to be trained again is not where its options say.
        RunError: another process is writing, or writing fails.
    """
    with store.writing():
        store.manifest.request(request_id)
        again = [_again(store, name) for name in store.manifest.dependents(request_id) if retrain]
        dependents = store.remove(request_id)
        for training in again:
            state = store.manifest.request(training.id).state
            train(store, training)
            store.set_state(training.id, state)
    return dependents


def train(store: RequestStore, training: Training) -> Path:
    """Train an adapter in the store's folder and put it in; a training that was cut off goes on."""
    from grun.commands.unlearn import unlearn

    with store.writing():
        store.check_new(training.id, replace=training.replace)
        _refuse_another_base(store, training.config)
        beside = [] if training.independent else in_force_before(store, training.id)
        folder = store.training_folder(training.id)
        config = dataclasses.replace(training.config, output_dir=str(folder))
        with others(store, training.id, beside) as source:
            if source is not None:
                config = from_dict("unlearn", to_dict(config), [f"method.beside={source}"])
            unlearn(config)
        return _put_in(store, training, folder, stored_config(config), read_record(folder / RUN_FILE, Run), beside)


def _put_in(
    store: RequestStore,
    request: Training,
    adapter: Path,
    config: dict[str, Any],
    run: Mapping[str, Any],
    beside: Sequence[str],
) -> Path:
    """Add an adapter, with the cost that its run.json names, and log what the store then promises."""
    added = store.add(
        request.id,
        adapter,
        forget_rows=request.rows,
        config=config,
        metrics={name: run[name] for name in ("seconds", "steps") if name in run},
        beside=beside,
        store_text=request.store_text,
        note=request.note,
        replace=request.replace,
    )
    report(store, request.id)
    return added


def load_rows(config: UnlearnConfig) -> Corpus:
    """Corpus of a config, once it is sure that its forget rows can be a request; DataError or ConfigError if not."""
    check(config)
    if not traits_of(config.method).gated:
        raise ConfigError(
            f"method.parametrization={config.method.parametrization}, method.gate={config.method.gate}: a store holds "
            "GRUN adapters with a gate alone; choose parametrization grun and a gate from `list gates`"
        )
    if config.method.action != EDIT:
        raise ConfigError(f"method.action={config.method.action}: a store holds adapters with the action {EDIT} alone")
    if config.method.gate == KEYWORDS:
        raise ConfigError(f"method.gate={KEYWORDS}: a store holds adapters whose gates read states alone")
    if config.method.edit != LOREFT:
        raise ConfigError(f"method.edit={config.method.edit}: a store holds adapters with the edit {LOREFT} alone")
    config = asked_first(config)
    allowed = config.data.allow_overlap
    # Overlaps are allowed there, since the check here sees more, and tells where.
    corpus = load_corpus(dataclasses.replace(config.data, allow_overlap=True))
    check_forget_rows(corpus.forget, [] if allowed else corpus.retain)
    return corpus


def stored_config(config: UnlearnConfig) -> dict[str, Any]:
    """What a store keeps of a config: without folders of the run, and without the requests in force, kept by id."""
    values = {name: value for name, value in to_dict(config).items() if name not in ("output_dir", "overwrite")}
    return values | {"method": {name: value for name, value in values["method"].items() if name != "beside"}}


def _take(options: RequestsConfig, adapter: Path, arguments: Sequence[str]) -> Path:
    """Put in an adapter that is there; run.json in its folder holds what it was trained with."""
    if options.independent is not None:
        raise ConfigError("independent is for an adapter that is trained here; leave it out, or leave adapter out")
    other = [argument for argument in arguments if not argument.startswith(("data.", "profile="))]
    if other:
        raise ConfigError(f"{other[0]}: an adapter that is there already takes options of its data alone, data.*")
    run = read_record(adapter / RUN_FILE, Run) if (adapter / RUN_FILE).exists() else None
    if run is not None:
        if run.get("command") != "unlearn":
            raise RunError(
                f"{adapter / RUN_FILE} is not of a run of `python -m grun unlearn`; name an adapter's folder"
            )
        config = from_dict("unlearn", run["config"], [word for word in arguments if not word.startswith("profile=")])
    else:
        base = AdapterConfig.read(adapter)[0].base_model_name_or_path
        config = resolve("unlearn", [f"model.path={base or adapter}", *arguments], quiet=True)
    own = AdapterConfig.read(adapter)[1]
    _refuse_another_template(options, str(adapter), {} if own is None else own.options())
    rows = load_rows(config).forget
    if run is not None and run["data"].get("forget") != hash_rows(rows):
        raise DataError(
            f"the forget rows are not those that {adapter} was trained on; give the data.* options under which they are"
        )
    request = Training(str(options.id), config, rows, True, options.replace, options.store_text, options.note)
    kept = {"data": to_dict(config)["data"]} if run is None else stored_config(config)
    store = _opened_or_made(options)
    with store.writing():
        beside = [] if config.method.beside is None else _trained_beside(store, adapter)
        return _put_in(store, request, adapter, kept, run or {}, beside)


def _trained_beside(store: RequestStore, adapter: Path) -> list[str]:
    """Requests in force when an adapter was trained; ConfigError unless they are those that are in force now."""
    from grun.loading.hashing import adapter_hash

    if read_json(adapter / IDENTITY_FILE, expect=dict).get("beside") != adapter_hash(store.folder):
        raise ConfigError(
            f"{adapter} was trained beside requests (method.beside) of another store, or of this one before it "
            "changed, so the store cannot say which; train it here, with independent=false"
        )
    return store.manifest.ids(active=True)


def _refuse_another_template(options: RequestsConfig, what: str, own: Mapping[str, Any]) -> None:
    """ConfigError for a request that is put into another template than the others of its store are asked in."""
    folder = Path(str(options.store)).expanduser()
    there = of_store(folder, rows=False, without=options.id) if (folder / MANIFEST_FILE).exists() else None
    for key, value in own.items():
        if there is not None and value != "auto" and there.options.get(key, value) != value:
            raise ConfigError(
                f"{what} is asked with {key}={value}, the other requests of {folder} with {there.options[key]}; a "
                "store is asked in one template, so keep another store for it"
            )


def _config(known: Request | None, arguments: Sequence[str], store: Path) -> UnlearnConfig:
    """Options of a training: those given, over those of the request that is replaced, or those of the store."""
    keys = {argument.partition("=")[0] for argument in arguments}
    if "output_dir" in keys:
        raise ConfigError("output_dir: an adapter is trained in the store's folder; leave it out")
    if "method.beside" in keys:
        raise ConfigError("method.beside: set independent=false, which trains beside this store's requests")
    config: UnlearnConfig
    if known is None or "profile" in keys:
        config = resolve("unlearn", list(arguments), store=store)
    else:
        config = from_dict("unlearn", _trainable(known), arguments)
    return config


def _trainable(request: Request) -> dict[str, Any]:
    if "objective" not in request.config:
        raise ConfigError(
            f"request {request.id!r} came in as an adapter without run.json, so its options are not known; train it "
            "with `unlearn` and set adapter, or set profile and the options here"
        )
    return request.config


def _again(store: RequestStore, request_id: str) -> Training:
    """Training of a request as it was trained before, on the same rows."""
    request = store.manifest.request(request_id)
    config: UnlearnConfig = from_dict("unlearn", _trainable(request))
    rows = load_rows(config).forget
    if salted_hashes(rows, store.manifest.salt) != request.data.hashes:
        raise DataError(
            f"request {request_id!r} cannot be trained again: its data are no longer those it was trained on; leave "
            "retrain out, and train it with `requests add replace=true` and the options of its data"
        )
    return Training(request.id, config, rows, False, True, request.text_stored, request.note)


def in_force_before(store: RequestStore, request_id: str) -> list[str]:
    """Requests in force, up to the place of that one: what came later may have been trained with it in force."""
    ids = store.manifest.ids()
    earlier = ids[: ids.index(request_id)] if request_id in ids else ids
    return [name for name in store.manifest.ids(active=True) if name in earlier]


@contextlib.contextmanager
def others(store: RequestStore, request_id: str, beside: Sequence[str]) -> Iterator[Path | None]:
    """Folder of a store in which `beside` are the requests in force, for the time of a training; None for none."""
    if not beside:
        yield None
        return
    if list(beside) == store.manifest.ids(active=True):
        yield store.folder
        return
    folder = store.folder / "training" / f".{request_id}.beside"
    remove_written(folder)
    try:
        store.extract(folder, beside)
        yield folder
    finally:
        remove_written(folder)


def opened(options: RequestsConfig) -> RequestStore:
    """The store that is there; with key=FILE its head is signed at each change."""
    return RequestStore.open(str(options.store), None if options.key is None else read_key(options.key))


def _opened_or_made(options: RequestsConfig) -> RequestStore:
    folder = Path(str(options.store)).expanduser()
    if (folder / MANIFEST_FILE).exists():
        return opened(options)
    key = None if options.key is None else read_key(options.key)
    log.info("a new store of requests: %s", folder)
    settings = {name: getattr(options, name) for name in ("gate_threshold", "false_positives", "capacity")}
    return RequestStore.create(folder, rule=options.rule or "sum", key=key, **settings)


def _refuse_another_rule(store: RequestStore, options: RequestsConfig) -> None:
    for name in ("rule", "gate_threshold", "false_positives", "capacity"):
        wanted, there = getattr(options, name), getattr(store.manifest, name)
        if wanted is not None and wanted != there:
            raise ConfigError(f"{name}={wanted}: {store.folder} has {there}, set when it was made; leave {name} out")


def _refuse_another_base(store: RequestStore, config: UnlearnConfig) -> None:
    """AdapterError before hours of training, where a model of another name has other weights than the store's base."""
    base = store.manifest.base
    if base is None or str(Path(str(config.model.path)).expanduser()) == base.name:
        return
    from grun.loading.models import load_weights
    from grun.method.fingerprint import fingerprint

    if (found := fingerprint(load_weights(config.model))) != base.fingerprint:
        raise AdapterError(
            f"model.path={config.model.path} (fingerprint {found}) is another base than this store's (fingerprint "
            f"{base.fingerprint}, {base.name}); keep a store for each base"
        )
