"""What tests/runtime/test_processes.py lets two processes do; a program that each of them runs.

    python two_processes.py MODE FOLDER          (with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set)

Findings go to FOLDER/findings-RANK.json.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

torch.set_num_threads(1)

import demo  # noqa: E402
from tiny import blocks_of, ragged_rows, tiny  # noqa: E402
from training_tasks import Broken, finetune_task, unlearn_task  # noqa: E402

from grun.cli import main  # noqa: E402
from grun.commands.unlearn import make_parametrization  # noqa: E402
from grun.config.options import LoraConfig, MethodConfig, TrainConfig, UnlearnConfig  # noqa: E402
from grun.errors import ConfigError, GrunError  # noqa: E402
from grun.objectives.objective import build_objective  # noqa: E402
from grun.runtime import processes, sharding  # noqa: E402
from grun.training.step_trainer import gradient_norm  # noqa: E402
from grun.training.train import train  # noqa: E402
from grun.training.unlearning import UnlearnRows, UnlearnTask  # noqa: E402

STEPS = 8
KILLED_AT = 7
"""0-based step at which the second process dies; the newest checkpoint is that of step 6."""
EVALUATION = ["data.limit=6", "batch_size=4", "max_new_tokens=4"]


def options(**more: Any) -> TrainConfig:
    """13 rows in steps of 4, 4, 4 and 1: in the last of each epoch one of two processes has no row."""
    return TrainConfig(
        epochs=2, batch_size=4, lr=0.01, weight_decay=0.1, save_steps=0, engine="plain", question_weight=0.3, **more
    )


def baseline_task(parametrization: str, objective: str) -> UnlearnTask:
    """LoRA or all weights, without dropout, which torch draws and not by row."""
    method = MethodConfig(parametrization=parametrization, lora=LoraConfig(dropout=0.0))
    config = UnlearnConfig(objective=objective, method=method, train=options(), seed=3)
    base = tiny("llama", dtype=torch.float64)
    torch.manual_seed(5)
    made = make_parametrization(config, [])
    made.prepare(base, None)
    data = UnlearnRows(ragged_rows(13, seed=1), ragged_rows(13, seed=2), ragged_rows(29, seed=3))
    of_objective = build_objective(objective, config.loss, gated=False)
    return UnlearnTask(made, of_objective, data, config, pad_id=0, device=base.device)


CASES: dict[str, Callable[[], tuple[Any, TrainConfig]]] = {
    "gd": lambda: (unlearn_task(options(), "gd"), options()),
    "npo": lambda: (unlearn_task(options(), "npo", dropout=0.2), options()),
    "micro": lambda: (unlearn_task(options(micro_batch_size=1), "gd"), options(micro_batch_size=1)),
    "lora": lambda: (baseline_task("lora", "npo"), options()),
    "full": lambda: (baseline_task("full", "gd"), options()),
    "finetune": lambda: (finetune_task(options()), options()),
    "finetune_micro": lambda: (finetune_task(options(micro_batch_size=1)), options(micro_batch_size=1)),
}
"""Trainings that two processes and one must do alike, in float64."""


def resumable() -> tuple[Any, TrainConfig]:
    config = options()
    config.save_steps, config.keep_all_checkpoints = STEPS // 2, True
    return unlearn_task(config, "gd", dropout=0.2), config


def run_case(name: str, folder: Path) -> None:
    task, config = CASES[name]()
    train(task, config, folder, seed=0)


def outcome(function: Callable[[], Any]) -> list[str]:
    """Kind and message of what a function raises."""
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def stops(folder: Path) -> None:
    """The loss is not finite in one of the two processes."""
    spoil = (lambda total: total * math.nan) if processes.rank() == 1 else None
    config = options()
    train(Broken(unlearn_task(config), 4, loss=spoil), config, folder, seed=0)


def fails_in(number: int) -> None:
    with processes.agreed():
        if processes.rank() == number:
            raise ConfigError("only here")


def fails_first() -> None:
    with processes.first_goes_first():
        raise ConfigError("not even begun by others")


def command(*arguments: str) -> list[Any]:
    """Exit status, stdout and the errors among stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    return [status, out.getvalue(), [line for line in err.getvalue().splitlines() if line.startswith("error: ")]]


def unlearn_arguments(folder: Path, name: str, *more: str) -> list[str]:
    own = [f"model.path={folder / 'taught'}", f"output_dir={folder / name}", f"cache.dir={folder / name}-cache"]
    return ["unlearn", *demo.DATA, *demo.TRAINING, *own, *more]


def evaluate_arguments(folder: Path, name: str, *more: str) -> list[str]:
    adapter = [f"model.path={folder / 'taught'}", f"adapter={folder / 'adapter'}"]
    return ["evaluate", *demo.DATA, *EVALUATION, *adapter, f"output_dir={folder / name}", *more]


def short_passes() -> contextlib.AbstractContextManager[Any]:
    """Within the block rows are frozen in several passes."""
    return mock.patch("grun.cache.prefix.tokens_per_pass", lambda _: 64)


def sharded() -> dict[str, Any]:
    """Two steps with weights cut by `fully_shard`, against the same with whole ones; the second after a reload."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    models = []
    for cut in (False, True):
        model = tiny("llama", tie_word_embeddings=True)
        if cut:
            for block in blocks_of(model, "llama"):
                fully_shard(block)
            fully_shard(model)
        models.append(model)
    whole, parts = models
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        found[f"norms {step}"] = [float(gradient_norm(model)) for model in models]
        state = sharding.whole_state(parts)
        of_optimizer = sharding.whole_state(parts, optimizers[1])
        sharding.take_state(parts, {name: value + 1 for name, value in state.items()})  # lose it, and take it back
        sharding.take_state(parts, state)
        sharding.take_state(parts, of_optimizer, optimizers[1])
    state = sharding.whole_state(parts)
    sharding.put_back(parts, state)
    found["holds"] = len(state)
    if processes.is_first():
        named = dict(parts.named_parameters())
        differences = [(named[name] - value).detach().abs().max() for name, value in whole.named_parameters()]
        found["apart"] = float(max(differences))
        found["tied"] = parts.get_input_embeddings().weight is parts.get_output_embeddings().weight
    return found


def checks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with processes.connected():
        for name in CASES:
            run_case(name, folder / f"two-{name}")
        task, config = resumable()
        train(task, config, folder / "saved-by-two", seed=0)
        task, config = resumable()
        found["resumed"] = train(task, config, folder / "saved-by-one", seed=0).resumed_from
        found["nan"] = outcome(lambda: stops(folder / "nan"))
        found["fails in 0"], found["fails in 1"] = outcome(lambda: fails_in(0)), outcome(lambda: fails_in(1))
        found["fails first"] = outcome(fails_first)
        found["sharded"] = sharded()
        found["of first"] = processes.of_first(lambda: f"by {processes.rank()}")
        found["summed"] = processes.summed({"a": processes.rank() + 1.0})
        found["merged"] = processes.merged({processes.rank(): "here"})
    with short_passes():
        found["unlearn"] = command(*unlearn_arguments(folder, "two"))
    found["again"] = command(*unlearn_arguments(folder, "two"))
    found["other"] = command(*unlearn_arguments(folder, "two", "seed=5"))
    found["missing"] = command("unlearn", "data.name=jsonl", "data.forget=/nowhere.jsonl", "data.retain=/nowhere.jsonl")
    found["evaluate"] = command(*evaluate_arguments(folder, "evaluated-by-two"))
    found["goes on"] = command(*evaluate_arguments(folder, "cut-off"))
    return found


def killed(folder: Path) -> dict[str, Any]:
    """The second process is killed in the middle of a step; the first one's exit status is that of the command."""
    data = UnlearnTask.data

    def dies(task: UnlearnTask, step: int) -> Any:
        if step == KILLED_AT and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return data(task, step)

    UnlearnTask.data = dies  # type: ignore[method-assign]
    sys.exit(main(unlearn_arguments(folder, "killed", "train.save_steps=2", "method.dropout=0.2")))


if __name__ == "__main__":
    gc.freeze()  # Trainer collects garbage in every run; what is imported here is none
    where = Path(sys.argv[2])
    modes = {"checks": checks, "killed": killed}
    try:
        findings = modes[sys.argv[1]](where)
    except GrunError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    (where / f"findings-{processes.rank()}.json").write_text(json.dumps(findings))
