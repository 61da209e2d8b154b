"""`evaluate suite=lm_eval`: tasks of lm-evaluation-harness, for models with every kind of adapter."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.options import EvaluateConfig
from grun.data.templates import Template
from grun.errors import ConfigError, DataError
from grun.evaluation.suites.base import Measured, Suite
from grun.runtime.files import content_hash, file_hash

if TYPE_CHECKING:
    from grun.loading.adapters import Loaded

SAMPLES_FILE = "samples.jsonl"
NOT_RESULTS = ("alias", "name", "sample_len")
"""What lm-evaluation-harness writes among a task's metrics."""
_OF_MODEL = ("revision", "dtype", "device_map", "quantization", "attention", "trust_remote_code")
MODEL_ARGUMENTS = {
    **{"pretrained": "model.path", "adapter": "adapter", "store": "adapter"},
    **{name: f"model.{name}" for name in _OF_MODEL},
    **{name: name for name in ("gate_threshold", "strict")},
}
"""`--model_args` of the model `grun` on the harness' own command line, and the option of `evaluate` that each is."""


def check_installed(what: str) -> None:
    """ConfigError, beginning with `what`, where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{what} needs lm-evaluation-harness, which is not installed: pip install 'grun-unlearning[harness]'"
        )


class HarnessSuite(Suite):
    """Tasks of lm-evaluation-harness, scored by `score`.

    Where the template in force is a chat template, tasks are asked in it (data.template=text: as they are worded). A
    GRUN adapter reads and edits at each request's last context token; text is generated through the base that carries
    it. Results: `results` and `groups`: metrics by task and by group of tasks, as the harness names them (`acc,none`),
    standard errors among them; `versions` and `num_fewshot` of the tasks, `samples` (their numbers) and
    `lm_eval`, the harness' version. samples.jsonl has each question's number, log-likelihoods or text, and target.
    """

    in_template = False

    def __init__(self, config: EvaluateConfig) -> None:
        """Find the tasks.

        Raises:
            ConfigError: the harness is missing, a task is unknown, or pins the number of examples.
            DataError: a task's data cannot be loaded.
        """
        check_installed("suite=lm_eval")
        from lm_eval.tasks import TaskManager

        super().__init__(config)
        self.folder = None if config.task_folder is None else Path(config.task_folder).expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"task_folder={config.task_folder}: no such folder; name one of tasks' YAML files")
        self.manager = TaskManager(include_path=None if self.folder is None else str(self.folder))
        unknown = [task for task in config.tasks if not self.manager.match_tasks([task])]
        if unknown:
            raise ConfigError(
                f"lm-evaluation-harness knows no task {unknown[0]!r}; its tasks: python -m lm_eval ls tasks; your own: "
                "task_folder=FOLDER"
            )
        self.tasks = self._load()

    def _load(self) -> dict[str, Any]:
        """The tasks by name, those of groups too."""
        try:
            found: dict[str, Any] = self.manager.load(self.config.tasks)["tasks"]
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"tasks={self.config.tasks} cannot be loaded: {line}") from error
        pinned = [name for name, task in found.items() if task.get_config("num_fewshot") == 0]
        if self.config.num_fewshot and pinned:
            raise ConfigError(
                f"num_fewshot={self.config.num_fewshot}: {pinned[0]} pins 0 examples and lm-evaluation-harness would "
                "silently ask without any; leave num_fewshot out, or put a copy of the task without it in task_folder"
            )
        return found

    def settings(self, loaded: Loaded) -> dict[str, Any]:
        """Tasks, their versions, and your own tasks' files."""
        config = self.config
        files = sorted(path for path in self.folder.rglob("*") if path.is_file()) if self.folder else []
        return {
            "tasks": list(config.tasks),
            "versions": {name: task.VERSION for name, task in self.tasks.items()},
            "task_folder": content_hash([[path.name, file_hash(path)] for path in files]) if files else None,
            "num_fewshot": config.num_fewshot,
            "limit": config.data.limit,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "template": None if (template := self._chat(loaded)) is None else template.to_dict(),
        }

    def _chat(self, loaded: Loaded) -> Template | None:
        """The chat template in force; None: tasks are asked as they are worded."""
        template = self.template(loaded)
        return template if template.kind == "chat" else None

    def measure(self, loaded: Loaded) -> Measured:
        """Run the tasks."""
        import lm_eval

        from grun.evaluation.suites.lm_harness_model import HarnessModel

        config, template = self.config, self._chat(loaded)
        chat: dict[str, Any] = {}
        if template is not None:
            chat = {"apply_chat_template": True, "system_instruction": template.system_prompt}
            chat["fewshot_as_multiturn"] = bool(config.num_fewshot)
        with self.enough_memory("evaluating"):
            found = lm_eval.simple_evaluate(
                model=HarnessModel(loaded.model, loaded.tokenizer, config.batch_size, template),
                tasks=list(config.tasks),
                num_fewshot=config.num_fewshot,
                batch_size=config.batch_size,
                limit=config.data.limit,
                task_manager=self.manager,
                **chat,
            )
        results = {
            "results": {name: _metrics(values) for name, values in found["results"].items()},
            "groups": {name: _metrics(values) for name, values in found.get("groups", {}).items()},
            "versions": found["versions"],
            "num_fewshot": found["n-shot"],
            "samples": found["n-samples"],
            "lm_eval": importlib.metadata.version("lm_eval"),
        }
        lines = [
            {"task": name, "doc": sample["doc_id"], "responses": sample["filtered_resps"], "target": sample["target"]}
            for name, samples in found["samples"].items()
            for sample in samples
        ]
        return Measured(results, {SAMPLES_FILE: lines})


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers alone; a standard error that the harness could not give is left out."""
    return {name: value for name, value in values.items() if name not in NOT_RESULTS and value != "N/A"}
