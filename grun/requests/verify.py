"""`requests verify`: is the store as it was written, is the base the same, and is what was forgotten still forgotten.

The report has figures and hashes, never a question or an answer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from grun.config.options import DataConfig, ModelConfig, RequestsConfig
from grun.config.values import from_dict
from grun.data import templates
from grun.data.corpus import load_corpus
from grun.data.encoding import EncodedRow, collate
from grun.data.jsonl import read_rows
from grun.data.rows import Row
from grun.data.templates import Template
from grun.errors import ConfigError, GrunError, ModelError, RunError
from grun.evaluation.generation import generate_answers
from grun.evaluation.metrics import METRICS
from grun.evaluation.scoring import evaluating
from grun.evaluation.table import GateRecord, GenerationRecord, Table
from grun.loading.adapters import Loaded, load_model
from grun.loading.stored import of_store
from grun.method.adapter import AdapterConfig
from grun.method.stack.forget_rows import salted_hashes
from grun.method.stack.manifest import TEXT_FILE, Problem, Request
from grun.method.stack.stack import GrunStack
from grun.requests.rates import adapter_config, promise
from grun.requests.signing import public_key_of, signature_problem
from grun.requests.store import RequestStore
from grun.runtime.files import taken, write_json, write_text, writing

log = logging.getLogger(__name__)

FIGURES = ("fact_recall", "rouge_l", "gate_open")
"""Metrics of a request's own questions."""


@dataclass(frozen=True)
class Finding:
    """What was found of one request."""

    id: str
    state: str
    rows: int
    """Number of its forget rows."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """See `evaluate_request`; empty where it was not asked."""
    not_asked: str | None = None
    """Why its questions were not asked, or None."""
    bound: float | None = None
    """Largest share of rows to keep that opens its gate, in expectation; None: nothing is promised."""
    calibration: int | None = None
    """Rows, or groups of them, of which that follows."""
    recall: float | None = None
    """Share of forget prompts that opened the gate when it was calibrated."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    time: str
    """UTC, ISO 8601."""
    store: str
    """Folder."""
    digest: str
    """The manifest's."""
    head: str | None
    """Of the history: note it elsewhere, and a later `verify head=...` shows a store that was rolled back."""
    signed_by: str | None
    """Public key that the signature of the head names; `public_key` checks that it is one. None: it is not signed."""
    since: list[str] | None
    """What was done after the head that was given; None: none was given, or it is not in the history."""
    model: str | None
    """Base that was loaded; None: none was."""
    fingerprint: str | None
    """Its fingerprint."""
    expected_fingerprint: str | None
    """That of the manifest; quantized weights have another one, and are not compared."""
    problems: list[Problem]
    """Everything that is wrong."""
    requests: list[Finding]
    """In the order of adding."""
    false_positives: str | None = None
    """What the requests in force promise together, in words; None: none was calibrated, and the store has no rate."""


def verify(options: RequestsConfig) -> tuple[Verification, Path | None]:
    """Verify a store and write the dated report; what was found, and the report's JSON file, None: it is read-only.

    RunError if the manifest cannot be read at all: then nothing can be compared.
    """
    store = RequestStore.open(str(options.store))
    public_key = None if options.public_key is None else public_key_of(options.public_key)
    now = datetime.now(UTC)
    problems = store.check()
    manifest = store.manifest
    signed_by = None if manifest.signature is None else manifest.signature.public_key
    named = public_key or (find_spec("cryptography") and signed_by)
    if named and (text := signature_problem(manifest.signature, manifest.head, named)):
        problems.append(Problem(None, text))
    since = None if options.head is None else manifest.since(options.head)
    if options.head is not None and since is None:
        text = f"the history lacks the head {options.head}: the store was rolled back, or its history rewritten"
        problems.append(Problem(None, text))
    model, loaded, of_base = None, None, None
    if not options.files_only:
        model = _model_config(store, options.model)
        loaded, of_base, more = _load(store, model, readable=not problems)
        problems += more
    promised = promise(store)
    verification = Verification(
        time=now.isoformat(timespec="seconds"),
        store=str(store.folder),
        digest=manifest.digest,
        head=manifest.head,
        signed_by=signed_by,
        since=None if since is None else [f"{event.action} {event.request}, {event.time}" for event in since],
        model=None if model is None else model.path,
        fingerprint=of_base,
        expected_fingerprint=None if manifest.base is None else manifest.base.fingerprint,
        problems=problems,
        requests=[_finding(store, request, loaded, options, problems) for request in manifest.requests],
        false_positives=str(promised) if promised.bounds or promised.rate is not None else None,
    )
    path = store.folder / "reports" / f"verify-{now:%Y%m%dT%H%M%S%fZ}.json"
    try:
        with writing(path.parent), taken(store.folder, lock="reports", wait=True):
            write_json(path, asdict(verification))
            write_text(path.with_suffix(".md"), in_markdown(verification))
    except RunError as error:
        log.warning("the report is printed only: %s", error)
        return verification, None
    return verification, path


def evaluate_request(
    model: GrunStack,
    tokenizer: Any,
    template: Template,
    rows: Sequence[Row],
    *,
    own: str,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float | None]:
    """Ask a request's own questions of a model.

    Args:
        model: with the requests in force.
        tokenizer: of the base.
        template: puts the questions as the request was trained with.
        rows: its forget rows, each with a prompt.
        own: id of the request.
        batch_size: questions asked at a time.
        max_new_tokens: longest answer, tokens.

    Returns:
        fact_recall (share of greedy answers that contain the row's key fact; None unless every row names one), rouge_l
        (recall of the forgotten answers, mean) and gate_open (share of prompts at whose last token the request's own
        gate, mean over blocks, is above 0.5).
    """
    prompts = [tuple(templates.encode_prompt(template, tokenizer, row.prompt, row.earlier)) for row in rows]
    pad_id = int(tokenizer.pad_token_id)
    answers = generate_answers(model, tokenizer, prompts, batch_size, max_new_tokens, pad_id)
    table = Table(
        generations=[
            GenerationRecord("forget", number, row.prompt or "", row.completion, row.fact, answer.text)
            for number, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]
    )
    gates = gates_at_prompts(model, prompts, batch_size, pad_id)[own]
    table.gates = [GateRecord("forget", number, of_prompt) for number, of_prompt in enumerate(gates)]
    return {name: METRICS.get(name).compute(table, "forget") for name in FIGURES}


@torch.no_grad()
def gates_at_prompts(
    model: GrunStack, prompts: Sequence[Sequence[int]], batch_size: int, pad_id: int
) -> dict[str, list[dict[int, float]]]:
    """Gate probabilities at the last token of each prompt.

    Args:
        model: whose gates are read.
        prompts: token ids.
        batch_size: prompts a pass.
        pad_id: id of padding, which is masked.

    Returns:
        By request, for each prompt, by block.
    """
    found: dict[str, list[dict[int, float]]] = {}
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            rows = [EncodedRow(tuple(prompt), ()) for prompt in prompts[start : start + batch_size]]
            batch = collate(rows, pad_id).to(model.device)
            model(batch.input_ids, batch.attention_mask, prompt_lengths=batch.prompt_lengths)
            for name, gates in model.request_gates.items():
                # A gate that reads every token has a column for each; one that reads the last prompt token has one.
                found.setdefault(name, []).extend(
                    {block: float(values[row, min(length, values.shape[1]) - 1]) for block, values in gates.items()}
                    for row, length in enumerate(batch.prompt_lengths.tolist())
                )
    return found


def forget_rows(store: RequestStore, request: Request) -> list[Row] | str:
    """Rows of a request, from its stored text or from where its options say; else why they cannot be had."""
    if request.text_stored:
        try:
            rows = read_rows(store.adapter_folder(request.id) / TEXT_FILE)
        except GrunError as error:
            return f"its stored text cannot be read: {error}"
    elif "data" not in request.config:
        return "its text is not stored, and nothing says where its data are"
    else:
        try:
            data = from_dict("unlearn", {"data": request.config["data"] | {"allow_overlap": True}}).data
            rows = load_corpus(data).forget
        except (GrunError, OSError) as error:
            return f"its data cannot be loaded: {error}"
    if salted_hashes(rows, store.manifest.salt) != request.data.hashes:
        return "its data are not those it was added with: their salted hashes differ"
    if any(row.prompt is None for row in rows):
        return "its rows are plain texts, which ask nothing"
    return rows


def in_markdown(found: Verification) -> str:
    """The report for people."""
    lines = [
        f"# Verification of {found.store}, {found.time}",
        "",
        f"Manifest digest `{found.digest}`. "
        + ("No model was loaded." if found.model is None else f"Base {found.model}, fingerprint `{found.fingerprint}`")
        + (f", the store's is `{found.expected_fingerprint}`." if found.model is not None else ""),
        "",
        f"head: {found.head}" + ("" if found.signed_by is None else f", signed by {found.signed_by}"),
        *([] if found.since is None else ["", f"Done after the head given: {'; '.join(found.since) or 'nothing'}."]),
        "",
        *([f"**{len(found.problems)} wrong:**", ""] if found.problems else ["Nothing wrong was found."]),
        *(f"- {problem}" for problem in found.problems),
        "",
        "| request | state | rows | fact recall | ROUGE-L | own gate open | recall | bound | n | not asked |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for one in found.requests:
        figures = [*(one.figures.get(name) for name in FIGURES), one.recall]
        texts = ["-" if value is None else f"{value:.3f}" for value in figures]
        texts += ["-" if value is None else f"{value:.3g}" for value in (one.bound, one.calibration)]
        shown = " | ".join(texts)
        lines.append(f"| {one.id} | {one.state} | {one.rows} | {shown} | {one.not_asked or ''} |")
    if found.false_positives is not None:
        lines += ["", f"False positives: {found.false_positives}."]
    lines += ["", "The base weights still contain the data; the effect exists where the requests are loaded.", ""]
    return "\n".join(lines)


def _model_config(store: RequestStore, given: ModelConfig) -> ModelConfig:
    """The base that is given, or else the one that the manifest names, and how; ConfigError if there is neither."""
    base, there = store.manifest.base, of_store(store.folder)
    if base is None or there is None:
        return given
    # As it was loaded when the requests were trained, unless something else is asked for.
    given = dataclasses.replace(
        given,
        dtype=there.options.get("model.dtype", "auto") if given.dtype == "auto" else given.dtype,
        quantization=given.quantization or there.options.get("model.quantization"),
    )
    if given.path is not None:
        return given
    if base.name is None:
        raise ConfigError("the store does not know the name of its base; set model.path, or files_only=true")
    return dataclasses.replace(given, path=base.name, revision=given.revision or base.revision)


def _load(
    store: RequestStore, config: ModelConfig, *, readable: bool
) -> tuple[Loaded | None, str | None, list[Problem]]:
    """The base with what is in force on it (None: it cannot be asked), its fingerprint, and what is wrong with it."""
    base = store.manifest.base
    if base is None:  # no request was ever added
        return None, None, []
    stack = str(store.folder) if readable and store.manifest.ids(active=True) else None
    try:
        loaded = load_model(config, stack, strict=False, gate_threshold=None)
    except GrunError as error:
        return None, None, [Problem(None, f"the base cannot be loaded with the requests on it: {error}")]
    found = loaded.identity["base"]
    if found == base.fingerprint or config.quantization is not None:
        return (None if stack is None else loaded), found, []
    text = f"{config.path} is not the base of this store: fingerprint {found}, the store's is {base.fingerprint}"
    return None, found, [Problem(None, text)]


def _finding(
    store: RequestStore, request: Request, loaded: Loaded | None, options: RequestsConfig, problems: list[Problem]
) -> Finding:
    """What is found of a request; what is wrong with its figures is added to `problems`."""
    asked = _ask(store, request, loaded, options, problems)
    figures, not_asked = ({}, asked) if isinstance(asked, str) else (asked, None)
    config = adapter_config(store, request.id)  # None is one of `problems`
    gate = {name: getattr(config, f"gate_{name}", None) for name in ("bound", "calibration", "recall")}
    return Finding(request.id, request.state, request.data.rows, figures, not_asked, **gate)


def _ask(
    store: RequestStore, request: Request, loaded: Loaded | None, options: RequestsConfig, problems: list[Problem]
) -> dict[str, float | None] | str:
    """Figures of a request, or why there are none."""
    if request.state != "active":
        return "not in force"
    if loaded is None:
        return "files only" if options.files_only else "no model could be asked; see what is wrong"
    rows = forget_rows(store, request)
    if isinstance(rows, str):
        return rows
    log.info("asking the %d questions of request %s", len(rows), request.id)
    stored = AdapterConfig.read(store.adapter_folder(request.id))[1]
    template = templates.resolve("auto", stored or loaded.template, loaded.tokenizer, None, DataConfig().date)
    sizes = {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}
    try:
        figures = evaluate_request(loaded.model, loaded.tokenizer, template, rows, own=request.id, **sizes)
    except ModelError as error:
        problems.append(Problem(request.id, f"its questions cannot be asked: {error}"))
        return "the model gives no numbers"
    recall, most = figures.get("fact_recall"), options.recall_at_most
    if recall is not None and most is not None and recall > most:
        problems.append(Problem(request.id, f"fact recall on its own questions is {recall:.3f}, above {most}"))
    return figures
