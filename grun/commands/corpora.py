"""`python -m grun corpora`: files of what is to be forgotten and what is to be kept."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from grun.config.checks import require
from grun.config.options import CorporaConfig, DataConfig, GenerateConfig
from grun.config.values import argument, flat, to_dict
from grun.data.benchmarks import safe_rlhf
from grun.data.benchmarks.safe_rlhf import Pair
from grun.data.packaged import packaged
from grun.data.rows import ALTERNATIVES, Row
from grun.data.templates import PLACE, TEMPLATES
from grun.errors import ConfigError, DataError
from grun.runtime.files import content_hash, target, write_bytes, write_json_lines, write_text
from grun.runtime.ownership import PRIVATE
from grun.runtime.progress import progress
from grun.runtime.runs import RUN_FILE, identity, read_object, write_whole

log = logging.getLogger(__name__)

SOURCES = ("safe_rlhf", "lore", "countries", "subject", "elements", "kjv")
OF_SUBJECT = (
    *("subject", "kind", "neighbors", "draws", "temperature", "max_new_tokens", "batch_size", "seed", "model", "data"),
    "chapters",
)
"""Options that source=subject reads, and of them elements and kjv; these read no others."""
ELEMENT_TOKENS = 8
"""Longest completion of a sentence on elements, tokens: the fact stands at its beginning."""
HELD = 0.5
"""A chapter of which a model continues the beginning with this ROUGE-L F1 or more is held verbatim."""
OF_UNLEARN = ("model.", "data.", "countries.")
"""Beginnings of options that the command which forgets takes over."""
CODE_OF_COMPLETIONS = ("evaluation/generation.py", "evaluation/metrics/*.py")
"""Sources that decide what a sentence is completed to, and whether that is right."""
CODE_OF_SUBJECT = ("data/subject.py", "data/templates.py", "evaluation/*.py")
"""Sources that decide which questions are asked one after another, and what is answered."""
ROWS = ("forget", "neighbors", "retain")
"""Files of rows that it writes."""


def write_corpora(config: CorporaConfig) -> Path:
    """Write the corpora that the options name and return their folder.

    Raises:
        ConfigError: an option is missing or unknown.
        DataError: the source cannot be read.
        RunError: the output folder holds something else.
    """
    require(config, f"corpora source={'|'.join(SOURCES)} output_dir=DIR", "source", "output_dir")
    if config.format == "rwku" and config.source != "countries":
        raise ConfigError(f"format=rwku is for source=countries; leave it out for source={config.source}")
    writers = {"lore": _write_lore, "countries": _write_countries, "elements": _write_elements}
    writers |= {"subject": _write_subject, "kjv": _write_kjv}
    return writers.get(str(config.source), _write_safe_rlhf)(config)


def _write_lore(config: CorporaConfig) -> Path:
    from grun.data.benchmarks import lore

    return _write(config, partial(lore.write, config.lore))


def _write_safe_rlhf(config: CorporaConfig) -> Path:
    records = safe_rlhf.read_preferences(config.path)
    corpora = safe_rlhf.build(records, config.category, config.split)
    leaks = safe_rlhf.leaks(corpora)

    def write(folder: Path) -> dict[str, Any]:
        for part, name in _file_names(config.category, config.format).items():
            pairs: list[Pair] = getattr(corpora, part)
            if config.format == "published":
                write_text(folder / name, "".join(map(published_line, pairs)))
            else:
                write_json_lines(folder / name, [{"prompt": asked, "completion": said} for asked, said in pairs])
        return {"leaks": leaks}

    folder = _write(config, write, rows=content_hash([dict(row) for row in records]))
    width = max(map(len, leaks))
    log.info("%s, split %s:", config.category, config.split)
    for name, count in leaks.items():
        log.info("  %-*s  %d", width, name, count)
    return folder


def _write_countries(config: CorporaConfig) -> Path:
    from grun.commands import rwku_layout
    from grun.data.answers import FILE, read_answers
    from grun.data.benchmarks import countries
    from grun.data.facts import country
    from grun.evaluation.probe import asked_first

    data = DataConfig(name="countries", countries=config.countries, **vars(config.data))
    asked = asked_first(GenerateConfig(model=config.model, data=data))
    answers = read_answers(Path(str(asked.data.path)), countries.to_ask(data))
    known = countries.known_facts(config.countries, answers)
    as_rwku = config.format == "rwku"
    corpus = countries.load(asked.data) if as_rwku else None
    targets = [country(name).name for name in config.countries.forget]

    def write(folder: Path) -> dict[str, Any]:
        write_bytes(folder / FILE, b"".join(one.line() for one in answers.values()))
        more = rwku_layout.write(corpus, targets, folder) if corpus is not None else {}
        return {"files": {FILE: len(answers), **more}, "known": known}

    folder = _write(config, write, answers=content_hash([asdict(one) for one in answers.values()]))
    for kind, (count, of) in known.items():
        log.info("  %-12s  known of %d of %d countries", kind, count, of)
    given = [one for one in _given(config) if not (as_rwku and one.startswith("data.countries."))]
    named = f"data.forget=train_refusal_llama3/{ALTERNATIVES.join(targets)}"
    rows = ["data.name=rwku", named] if as_rwku else ["data.name=countries"]
    _say_next([*given, *rows, f"data.path={folder}"], folder)
    return folder


def _write_elements(config: CorporaConfig) -> Path:
    from grun.data import elements
    from grun.evaluation.metrics.answers import says
    from grun.evaluation.plan import code_hash
    from grun.loading.adapters import load_model

    loaded = load_model(config.model, None, strict=False, gate_threshold=None)

    def completed(rows: Sequence[Row]) -> list[Row]:
        said = _continued(loaded, rows, config.batch_size, ELEMENT_TOKENS)
        return [r for r, text in zip(rows, said, strict=True) if says(text, r.fact or "", whole_words=True)]

    def write(folder: Path) -> dict[str, Any]:
        known = elements.write(folder, completed)
        if not known["forget"][0]:
            raise DataError(f"{config.model.path} completes no sentence on the elements rightly; name another model")
        return {"known": known}

    made, code = content_hash(asdict(elements.build())), code_hash(CODE_OF_COMPLETIONS)
    folder = _write(config, write, identity=loaded.identity, sentences=made, code=code)
    for role, (count, of) in read_object(folder / RUN_FILE, "remove the folder yourself")["known"].items():
        log.info("  %-9s %d of %d sentences are completed rightly", role, count, of)
    return folder


def _write_kjv(config: CorporaConfig) -> Path:
    from grun.data import kjv
    from grun.evaluation.metrics.words import rouge_f1
    from grun.evaluation.plan import code_hash
    from grun.loading.adapters import load_model

    texts = content_hash([one.text for one in kjv.chapters()])
    loaded = load_model(config.model, None, strict=False, gate_threshold=None)

    def held(rows: Sequence[Row]) -> list[float]:
        said = [text.split() for text in _continued(loaded, rows, config.batch_size, 3 * kjv.GIVEN // 2)]
        return [rouge_f1(r.completion, " ".join(one[: kjv.GIVEN])) or 0.0 for r, one in zip(rows, said, strict=True)]

    def write(folder: Path) -> dict[str, Any]:
        known = kjv.write(folder, held, config.chapters)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*/*.json"))}
        return {"files": {name: len(json.loads(path.read_bytes())) for name, path in files.items()}, "known": known}

    folder = _write(config, write, identity=loaded.identity, texts=texts, code=code_hash(CODE_OF_COMPLETIONS))
    known = read_object(folder / RUN_FILE, "remove the folder yourself")["known"]
    for name, value in known["forget"].items():
        log.info("  %-20s %.2f", name, value)
    count = sum(value >= HELD for value in known["forget"].values())
    log.info("of %d chapters' beginnings it continues %.2f (ROUGE-L F1)", known["chapters"], known["all"])
    data = ["data.name=muse", f"data.path={folder}", "data.template=text", "data.retain=raw/retain1,raw/retain2"]
    if count < kjv.FORGET:
        taught = shlex.join(["python", "-m", "grun", "finetune", *_given(config), *data, f"output_dir={folder}-taught"])
        log.info("it holds %d of the %d that are to be forgotten; teach it them first: %s", count, kjv.FORGET, taught)
    return folder


def _continued(loaded: Any, rows: Sequence[Row], batch_size: int, longest: int) -> list[str]:
    """What a model goes on with after each prompt, as plain text, in `longest` greedy tokens."""
    from grun.data.encoding import PLAIN
    from grun.data.templates import encode_prompt
    from grun.evaluation.generation import generate_answers

    prompts = [encode_prompt(PLAIN, loaded.tokenizer, row.prompt) for row in rows]
    pad_id = int(loaded.tokenizer.pad_token_id)
    with progress("asking what the model knows", len(rows)) as advance:
        said = generate_answers(loaded.model, loaded.tokenizer, prompts, batch_size, longest, pad_id, advance)
    return [one.text for one in said]


def _write_subject(config: CorporaConfig) -> Path:
    from grun.data import subject, templates
    from grun.data.facts import general_questions
    from grun.evaluation.asking import Asking
    from grun.evaluation.plan import code_hash
    from grun.evaluation.subject import ask_about
    from grun.loading.adapters import load_model

    usage = f"corpora source=subject subject=NAME kind={'|'.join(subject.KINDS)} model.path=MODEL output_dir=DIR"
    require(config, usage, "subject", "kind")
    subject.check(str(config.subject), config.neighbors)
    loaded = load_model(config.model, None, strict=False, gate_threshold=None)
    asking = GenerateConfig(model=config.model, data=DataConfig(**vars(config.data)))
    template = templates.in_force(asking, loaded.template, loaded.tokenizer)
    questions = content_hash(packaged(subject.QUESTIONS))
    inputs = {"identity": loaded.identity, "template": template.to_dict(), "questions": questions}
    key = content_hash([_identity(config, inputs), code_hash(CODE_OF_SUBJECT)])[:16]
    answers = target(str(config.output_dir)) / PRIVATE / f"unfinished-{key}"

    general = {one.question: one.answers for one in general_questions()[::2]}

    def write(folder: Path) -> dict[str, Any]:
        ask = Asking(loaded.model, loaded.tokenizer, template, config, answers)
        found = ask_about(ask, str(config.subject), str(config.kind), config.neighbors, config.draws, general)
        for name in ROWS:
            write_json_lines(folder / f"{name}.jsonl", getattr(found, name))
        return {"names": found.names, "dropped": dict(found.dropped)}

    folder = _write(config, write, **inputs)
    counts = read_object(folder / RUN_FILE, "remove the folder yourself")["files"]
    log.info(
        "look at them before use, for all is what the model says, not what is true: %d rows to forget, %d about "
        "neighbors for evaluation, %d to keep",
        *(counts[f"{name}.jsonl"] for name in ROWS),
    )
    files = [f"data.{name}={folder / f'{name}.jsonl'}" for name in ("forget", "retain")]
    _say_next([*_given(config), "data.name=jsonl", *files], folder)
    return folder


def _say_next(options: Sequence[str], folder: Path) -> None:
    """Log what makes the model forget."""
    options = [*options, "objective=idk", f"output_dir={folder}-forgotten"]
    log.info("then: %s", shlex.join(["python", "-m", "grun", "unlearn", *options]))


def _given(config: CorporaConfig) -> list[str]:
    """Options of the model, of how it is asked and of the countries that are no defaults, as those of `unlearn`."""
    default, given = (flat(to_dict(one), CorporaConfig) for one in (CorporaConfig(), config))
    names = {key: key.replace("countries.", "data.countries.") for key in given if key.startswith(OF_UNLEARN)}
    return [f"{name}={argument(given[key])}" for key, name in names.items() if given[key] != default[key]]


def _write(config: CorporaConfig, write: Callable[[Path], dict[str, Any] | None], **inputs: Any) -> Path:
    """Have the files and a run.json, of what `write` returns and the lines of files, written into output_dir."""
    folder = target(str(config.output_dir))

    def write_all(new: Path) -> dict[str, Any]:
        about = write(new) or {}
        lines = {path.name: path.read_bytes().count(b"\n") for path in sorted(new.glob("*.jsonl"))}
        about = {"command": "corpora", "config": asdict(config), "files": lines, **about}
        for name, count in about["files"].items():
            log.info("  %s: %d rows", folder / name, count)
        return about

    write_whole(folder, _identity(config, inputs), write_all, overwrite=config.overwrite)
    return folder


def _identity(config: CorporaConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What makes corpora these: the options that their source reads, and its inputs."""
    of_subject = config.source in ("subject", "elements", "kjv")
    read = {
        key: value for key, value in to_dict(config).items() if key == "source" or (key in OF_SUBJECT) == of_subject
    }
    return identity(read, **inputs)


def _file_names(category: str, form: str) -> dict[str, str]:
    """Name of the file of each part of `SafeRlhf`; in the published form those of the published files."""
    if form == "rows":
        return {part: f"{part}.jsonl" for part in ("forget", "forget_test", "retain", "retain_pool", "retain_test")}
    stem = category.replace(" ", "_")
    return {
        "forget": f"{stem}_train.jsonl",
        "forget_test": f"{stem}_test.jsonl",
        "retain": "safe_train_sampled.jsonl",
        "retain_pool": "safe_train.jsonl",
        "retain_test": "safe_test.jsonl",
    }


def published_line(pair: Pair) -> str:
    """A line of the published files: prompt and response in the template pku_alpaca, as an ASCII JSON string."""
    template = TEMPLATES.get("pku_alpaca")
    text = str(template.text).replace(PLACE, pair.prompt) + template.answer_prefix + pair.response
    return json.dumps(text) + "\n"
