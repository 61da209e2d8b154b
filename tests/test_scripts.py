"""The cmd_*.sh scripts, on copies with a stand-in for the interpreter: what is called, in which order, and set-up."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baselines.rmu.options import RmuOptions
from grun.loading.resolve import resolve

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("cmd_*.sh"))

# Logs its calls, refuses what contains "bogus", and prints a folder as `finetune` does.
PYTHON_LOGGING_CALLS = """#!/bin/sh
echo "$*" >>calls
case "$*" in *bogus*) echo "error: unknown option" >&2; exit 2 ;; *--print-config*) exit 0 ;; esac
case "$*" in
  *"grun finetune"*without_forget*) mkdir -p models/reference; echo models/reference ;;
  *"grun finetune"*) mkdir -p models/known; echo "a line before"; echo models/known ;;
  *--output_dir*) mkdir -p results/rmu; echo results/rmu ;;
  *--output_path*) mkdir -p results/llm360; echo results/llm360 ;;
  *"grun unlearn"*grun_rmu*) mkdir -p results/grun_rmu; echo results/grun_rmu ;;
esac
"""

# As published, but for the program's name.
LLAMA = (
    "--model_name meta-llama/Llama-3.1-8B --batch_size 4 --layer_ids 13,14,15 --layer_id 15 --max_num_batches 150 "
    "--layer_ids 13,14,15 --layer_id 15 --retain_corpora wikitext,wikitext --forget_corpora "
    "bio-forget-corpus,cyber-forget-corpus --steering_coeffs 30,30 --alpha 350,350 --lr 5e-5 --seed 42"
)
MISTRAL = (
    "--model_name mistralai/Mistral-7B-v0.1 --batch_size 4 --layer_ids 13,14,15 --layer_id 15 --max_num_batches 150 "
    "--retain_corpora wikitext,wikitext --forget_corpora bio-forget-corpus,cyber-forget-corpus "
    "--steering_coeffs 27,27 --alpha 1600,1600 --min_len 200 --lr 5e-5 --seed 42"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts alone, without any environment."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in [*SCRIPTS, "requirements.txt", "requirements-dev.txt", "pyproject.toml"]:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    return folder


def run(checkout: Path, script: str, *arguments: str, cwd: Path | None = None, **variables: str):
    variables = {"PROFILE": "demo"} | variables
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(
        ["bash", str(checkout / script), *arguments],
        cwd=cwd or checkout,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def with_logging_python(checkout: Path) -> Path:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON_LOGGING_CALLS)
    python.chmod(0o755)
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(checkout / name, checkout / ".venv" / f"installed-{name}")
    return checkout


def calls(checkout: Path) -> list[str]:
    """The commands that were run, without those that only checked options."""
    lines = (checkout / "calls").read_text().splitlines()
    return [line.removeprefix("-m grun ") for line in lines if "--print-config" not in line]


def printed(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The commands a dry run printed, as words, without interpreter and `-m grun`."""
    assert result.returncode == 0, result.stderr
    return [shlex.split(line)[3:] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"scripts/{path.name}" for path in ROOT.glob("scripts/*.sh")), ".ci/run"])
def test_script_is_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / name], check=True)


@pytest.mark.parametrize(
    "name", ["cmd_finetune.sh", "cmd_grun.sh", "cmd_baseline.sh", "cmd_eval.sh", "cmd_serve.sh", "cmd_wmdp.sh"]
)
def test_help_needs_no_environment(checkout: Path, name: str) -> None:
    result = run(checkout, name, "--help")
    assert result.returncode == 0
    assert "DRY_RUN" in result.stdout and "#" not in result.stdout
    assert not (checkout / ".venv").exists()


class TestDryRun:
    def test_a_real_model_is_the_default_and_nothing_is_taught(self, checkout: Path) -> None:
        commands = printed(run(checkout, "cmd_grun.sh", DRY_RUN="1", PROFILE=""))
        assert [command[0] for command in commands] == [*["unlearn"] * 3, "evaluate", "report"]
        assert all({"profile=smollm2", "model.path=smollm2"} <= {*command} for command in commands[:-1])
        (sweep,) = printed(run(checkout, "cmd_baseline.sh", DRY_RUN="1", PROFILE=""))
        assert {"sweep", "sweep=smollm2", "profile=smollm2", "model=smollm2"} <= {*sweep}
        evaluate, report = printed(run(checkout, "cmd_eval.sh", DRY_RUN="1", PROFILE=""))
        assert {"evaluate", "model.path=smollm2", "profile=smollm2"} <= {*evaluate} and report[0] == "report"
        own = printed(run(checkout, "cmd_grun.sh", DRY_RUN="1", PROFILE="", MODEL="my/model"))
        assert all("model.path=my/model" in command for command in own[:-1])

    def test_prints_the_whole_demo_and_sets_nothing_up(self, checkout: Path) -> None:
        commands = printed(run(checkout, "cmd_grun.sh", DRY_RUN="1"))
        stages = ["finetune", "finetune", "evaluate", *["unlearn"] * 3, "evaluate", "report"]
        assert [command[0] for command in commands] == stages
        assert not (checkout / ".venv").exists()

    def test_overrides_reach_their_stages(self, checkout: Path) -> None:
        overrides = ["train.lr=0.1", "finetune.train.lr=0.2", "evaluate.batch_size=3", "unlearn.seed=1"]
        overrides += ["data.forget=x", "overwrite=true"]
        for command in printed(run(checkout, "cmd_grun.sh", *overrides, DRY_RUN="1")):
            stage = command[0]
            assert ("train.lr=0.1" in command) == (stage == "unlearn")
            assert ("seed=1" in command) == (stage == "unlearn")
            assert ("train.lr=0.2" in command) == (stage == "finetune")
            assert ("batch_size=3" in command) == (stage == "evaluate")
            assert ("overwrite=true" in command) == (stage in ("unlearn", "evaluate"))
            assert ("data.forget=x" in command) == (stage != "report")

        (alone,) = printed(run(checkout, "cmd_finetune.sh", "overwrite=true", DRY_RUN="1", RETAIN_ONLY="0"))
        assert "overwrite=true" in alone

    def test_a_given_model_is_not_taught_and_spaces_survive(self, checkout: Path) -> None:
        variables = {"PROFILE": "llama3.1", "MODEL": "/my models/it's", "DATA_DIR": "my data", "OBJECTIVES": "npo"}
        result = run(checkout, "cmd_grun.sh", DRY_RUN="1", **variables)
        results = "output_dir=results/llama3.1"
        model = ["profile=llama3.1", "model.path=/my models/it's"]
        together = ["adapters=[results/llama3.1/npo]", "with_base=before"]
        assert printed(result) == [
            ["unlearn", *model, "objective=npo", "data.path=my data", f"{results}/npo"],
            ["evaluate", *model, *together, "data.path=my data", f"{results}/evaluation"],
            ["report", "profile=llama3.1", "results_dir=results/llama3.1"],
        ]
        assert "RETAIN_MODEL" in result.stderr

    def test_retain_model_is_evaluated(self, checkout: Path) -> None:
        commands = printed(run(checkout, "cmd_grun.sh", DRY_RUN="1", MODEL="m", RETAIN_MODEL="r", OBJECTIVES="gd"))
        folder = "results/demo/evaluation/retain_only"
        assert commands[0] == ["evaluate", "profile=demo", "model.path=r", f"output_dir={folder}"]
        assert all(f"reference={folder}" in command for command in commands[1:] if command[0] == "evaluate")

    def test_a_published_target_is_taken_by_its_hub_id(self, checkout: Path) -> None:
        target = "open-unlearning/tofu_Llama-3.2-1B-Instruct"
        variables = {"PROFILE": "tofu_llama3.2_1b", "RETAIN_MODEL": f"{target}_retain90", "OBJECTIVES": "gd"}
        retained, *commands, report = printed(run(checkout, "cmd_grun.sh", DRY_RUN="1", **variables))
        assert [command[0] for command in commands] == ["unlearn", "evaluate"] and report[0] == "report"
        assert f"model.path={target}_retain90" in retained
        assert all(f"model.path={target}_full" in command for command in commands)

    def test_what_the_first_command_made_is_served_or_made_first(self, checkout: Path) -> None:
        options = ["port=1", "unlearn.seed=1"]
        unlearn, serve = printed(run(checkout, "cmd_serve.sh", *options, DRY_RUN="1", PROFILE=""))
        assert {"unlearn", "model.path=smollm2", "objective=idk", "output_dir=results/smollm2-short/idk"} <= {*unlearn}
        assert "seed=1" in unlearn and "port=1" not in unlearn
        own = ["serve", "profile=smollm2", "model.path=smollm2"]
        assert serve == [*own, "adapter=results/smollm2-short/idk", "port=1"]
        for folder in ("results/smollm2-short/idk", "results/smollm2/idk"):
            (checkout / folder).mkdir(parents=True)
            (checkout / folder / "adapter_model.safetensors").touch()
            (serve,) = printed(run(checkout, "cmd_serve.sh", *options, DRY_RUN="1", PROFILE=""))
            assert serve == [*own, f"adapter={folder}", "port=1"]
        variables = {"ADAPTER": "my store", "MODEL": "m"}
        (serve,) = printed(run(checkout, "cmd_serve.sh", DRY_RUN="1", **variables))
        assert serve == ["serve", "profile=demo", "model.path=m", "adapter=my store"]

    def test_published_evaluation_variables(self, checkout: Path) -> None:
        variables = {"PROFILE": "mistral", "MODEL": "m", "JSON_FILE": "forget05", "QUANT": "no", "LORA_PATH": "None"}
        variables |= {"DRY_RUN": "1", "REFT_PATH": "x/gd"}
        base, report = printed(run(checkout, "cmd_eval.sh", BASE_OR_REFT="base", **variables))
        assert "data.forget=forget05" in base and "output_dir=results/mistral/evaluation/before" in base
        assert not any(word.startswith("adapter=") for word in base)
        edited, report = printed(run(checkout, "cmd_eval.sh", BASE_OR_REFT="reft", **variables))
        assert report == ["report", "profile=mistral", "results_dir=results/mistral"]
        assert "adapter=x/gd" in edited and "output_dir=results/mistral/evaluation/gd" in edited

    def test_baselines_are_one_sweep_after_both_models_are_taught(self, checkout: Path) -> None:
        all_rows, without, sweep = printed(run(checkout, "cmd_baseline.sh", DRY_RUN="1"))
        assert (all_rows[0], without[0]) == ("finetune", "finetune") and "data.subset=without_forget" in without
        assert sweep == [
            *("sweep", "sweep=demo", "profile=demo", "model=models/<taught>"),
            *("retain_model=models/<taught without_forget>", "results_dir=results/demo-baselines", "jobs=2"),
            *("objectives=[gd,idk,npo]", "parametrizations=[full,lora,grun]", "seeds=[42]"),
        ]
        assert not (checkout / ".venv").exists()

    def test_options_of_baselines_come_through_to_their_stages(self, checkout: Path) -> None:
        variables = {"PROFILE": "llama3.1", "MODEL": "my model", "RETAIN_MODEL": "r", "DATA_DIR": "my data"}
        variables |= {"OBJECTIVES": "npo", "PARAMETRIZATIONS": "lora grun", "SEEDS": "1 2", "JOBS": "3", "TUNE": "1"}
        variables |= {"LAUNCHER": "sbatch --wrap '{command}'", "DRY_RUN": "1"}
        overrides = ["method.blocks=[4,5]", "evaluate.batch_size=3", "sweep.discard_models=true", "data.limit=9"]
        (sweep,) = printed(run(checkout, "cmd_baseline.sh", *overrides, **variables))
        assert sweep[:6] == [
            *("sweep", "sweep=llama3.1", "profile=llama3.1", "model=my model", "retain_model=r"),
            "results_dir=results/llama3.1-baselines",
        ]
        assert {"jobs=3", "--tune", "launcher=sbatch --wrap '{command}'", "discard_models=true"} <= set(sweep)
        config = resolve("sweep", [word for word in sweep[1:] if word != "--tune"])
        assert (config.objectives, config.parametrizations, config.seeds) == (["npo"], ["lora", "grun"], [1, 2])
        assert config.unlearn == ["data.path=my data", "method.blocks=[4,5]", "data.limit=9"]
        assert config.evaluate == ["batch_size=3", "data.limit=9"]

    def test_the_demo_of_knowledge_runs_every_method_and_evaluates_each(self, checkout: Path) -> None:
        commands = printed(run(checkout, "cmd_wmdp.sh", DRY_RUN="1"))
        assert [command[0] for command in commands[:6]] == ["corpora", *["finetune"] * 3, *["evaluate"] * 2]
        first, again, everything = commands[1:4]
        assert "model.path=tiny" in first and "model.path=models/<taught without_forget>" in again
        assert {"data.subset=all", "model.path=models/<taught without_forget>"} <= set(everything)
        assert {"choices_at_least=0.85", "cloze_at_least=0.9"} <= set(commands[4])
        folders = [
            word for command in commands for word in command if word.startswith("output_dir=") and "eval" in word
        ]
        evaluated = [folder.rpartition("/")[2] for folder in folders]
        methods = ["rmu", "grun_rmu", "max_entropy", "min_posterior", "random_mapping"]
        assert evaluated == ["1", "retain_only", *methods]
        assert commands[-1] == ["report", "profile=wmdp_demo", "results_dir=results/wmdp-demo"]
        of_rmu = next(command for command in commands if "--max_num_batches" in command)
        assert "results/wmdp-demo/corpora/forget.jsonl" in of_rmu
        adapters = [word for command in commands for word in command if word.startswith("adapter=")]
        assert adapters == ["adapter=results/wmdp-demo/rmu", "adapter=results/wmdp-demo/grun_rmu"]

    @pytest.mark.parametrize(("needed", "status"), [(1, 0), (2, 0), (3, 0), (4, 3)])
    def test_a_model_of_the_demo_that_knows_too_little_is_taught_on(
        self, checkout: Path, needed: int, status: int
    ) -> None:
        """The stand-in's evaluation ends with status 3 until the model has been taught as often as needed."""
        with_logging_python(checkout)
        python = checkout / ".venv" / "bin" / "python"
        python.write_text(
            python.read_text()
            + f"""case "$*" in *choices_at_least*)
  folder=$(echo "$*" | sed 's/.*output_dir=\\([^ ]*\\).*/\\1/'); mkdir -p "$folder"; echo "$*" >"$folder/evaluation"
  [ "$(basename "$folder")" -ge {needed} ] || exit 3 ;;
esac
"""
        )
        result = run(checkout, "cmd_wmdp.sh", METHODS="rmu")
        assert result.returncode == status, result.stderr
        taught = [call for call in calls(checkout) if call.startswith("finetune")]
        assert len(taught) == 1 + 2 * min(needed, 3)
        before = checkout / "results" / "wmdp-demo" / "evaluation" / "before" / "evaluation"
        assert before.exists() == (status == 0)
        assert status or f"taught/{needed}" in before.read_text()
        assert any(call.startswith("report") for call in calls(checkout)) == (status == 0)

    @pytest.mark.parametrize(("profile", "line"), [("llama3.1", LLAMA), ("mistral", MISTRAL)])
    def test_knowledge_profiles_hold_the_published_lines(self, checkout: Path, profile: str, line: str) -> None:
        commands = printed(run(checkout, "cmd_wmdp.sh", DRY_RUN="1", PROFILE=profile))
        found = next(command for command in commands if "--layer_id" in command)
        ours, published = (vars(RmuOptions.parser().parse_args(words)) for words in (found, shlex.split(line)))
        assert ours == {**published, "output_dir": ours["output_dir"], "verbose": ours["verbose"]}

    def test_alpaca_runs_a_retain_weight_after_the_other(self, checkout: Path) -> None:
        variables = {"PROFILE": "alpaca", "ALPHAS": "0 1200", "DATA_DIR": "my rows", "DRY_RUN": "1"}
        commands = printed(run(checkout, "cmd_wmdp.sh", **variables))
        assert commands[0][:3] == ["corpora", "source=safe_rlhf", "split=published"] and "path=my rows" in commands[0]
        alphas = [command[command.index("--alpha") + 1] for command in commands if "--alpha" in command]
        assert alphas == ["0", "1200"]
        assert "output_dir=results/wmdp-alpaca/evaluation/rmu_alpha_1200" in commands[-2]

    def test_the_real_model_runs_every_loss_with_both_gates(self, checkout: Path) -> None:
        """What is printed resolves, on the corpora that the first command makes."""
        commands = printed(run(checkout, "cmd_wmdp.sh", DRY_RUN="1", PROFILE="smollm2", SEED="7"))
        corpora = "results/wmdp-smollm2/corpora"
        assert commands[0][:3] == ["corpora", "source=elements", "model.path=smollm2"]
        assert commands[0][-1] == f"output_dir={corpora}"
        unlearned = [resolve("unlearn", command[1:]) for command in commands if command[0] == "unlearn"]
        losses = ["rmu", "max_entropy", "min_posterior", "random_mapping"]
        assert [(config.objective, config.design) for config in unlearned] == [
            (loss, design) for design in ("published", "pooled") for loss in losses
        ]
        for config in unlearned:
            assert (config.seed, config.data.path) == (7, corpora)
            assert config.method.gate_fit == ("logistic" if config.design == "pooled" else "joint")
        published = [command for command in commands if command[0].startswith("--model")]
        assert len(published) == 4 and all(corpora in command and "7" in command for command in published)
        evaluated = [resolve("evaluate", command[1:]) for command in commands if command[0] == "evaluate"]
        assert len(evaluated) == 1 + 4 + 8 and {config.data.path for config in evaluated} == {corpora}

    def test_corpora_that_are_there_are_taken(self, checkout: Path) -> None:
        variables = {"DRY_RUN": "1", "PROFILE": "smollm2", "METHODS": "rmu", "DATA_DIR": "there"}
        commands = printed(run(checkout, "cmd_wmdp.sh", **variables))
        assert commands[0][-1] == "output_dir=there" and {"data.path=there"} <= set(commands[1])

    def test_quantized_lora_and_single_continuations(self, checkout: Path) -> None:
        variables = {"PROFILE": "mistral", "MODEL": "m", "DRY_RUN": "1", "USE_LORA": "lora", "LORA_PATH": "x/lora"}
        (evaluated, _) = printed(run(checkout, "cmd_eval.sh", QUANT="8bit", DATA_TASK="normal", **variables))
        assert {"adapter=x/lora", "model.quantization=8bit", "continuations=[answer]"} <= set(evaluated)
        assert "output_dir=results/mistral/evaluation/lora-8bit" in evaluated


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "told"),
    [
        ("cmd_grun.sh", ["nonsense"], {}, "expected key=value"),
        ("cmd_grun.sh", ["--fast"], {}, "--fast"),
        ("cmd_grun.sh", ["objective=gd"], {}, "OBJECTIVES"),
        ("cmd_grun.sh", ["profile=x"], {}, "PROFILE=x"),
        ("cmd_grun.sh", ["evaluate.model.path=x"], {}, "MODEL=x"),
        ("cmd_grun.sh", ["finetune.seed=1"], {"MODEL": "m"}, "does not run"),
        ("cmd_grun.sh", [], {"RETAIN_ONLY": "yes"}, "expected 0 or 1"),
        ("cmd_grun.sh", ["sweep.tune=true"], {}, "does not run"),
        ("cmd_baseline.sh", ["sweep.jobs=3"], {}, "jobs is set by this script"),
        ("cmd_baseline.sh", ["objective=gd"], {}, "OBJECTIVES"),
        ("cmd_baseline.sh", ["report.profile=x"], {}, "does not run"),
        ("cmd_baseline.sh", [], {"RETAIN_ONLY": "yes"}, "expected 0 or 1"),
        ("cmd_finetune.sh", ["unlearn.seed=1"], {}, "does not run"),
        ("cmd_wmdp.sh", [], {"PROFILE": "gpt"}, "PROFILE=gpt"),
        ("cmd_wmdp.sh", [], {"METHODS": "rmu ga"}, "unknown method 'ga'"),
        ("cmd_wmdp.sh", [], {"METHODS": "grun_rmu_pooled"}, "unknown method 'grun_rmu_pooled'"),
        ("cmd_wmdp.sh", [], {"PROFILE": "crystalchat", "METHODS": "rmu"}, "no published RMU run"),
        ("cmd_eval.sh", [], {"USE_LORA": "lora"}, "LORA_PATH"),
        ("cmd_eval.sh", [], {"LORA_PATH": "x"}, "USE_LORA=lora"),
        ("cmd_eval.sh", [], {"USE_LORA": "lora", "LORA_PATH": "x", "REFT_PATH": "y"}, "two adapters"),
        ("cmd_eval.sh", [], {"DATA_TASK": "all"}, "normal, base or perturb"),
        ("cmd_eval.sh", [], {"BASE_OR_REFT": "reft"}, "REFT_PATH"),
        ("cmd_eval.sh", [], {"BASE_OR_REFT": "both"}, "base or reft"),
        ("cmd_eval.sh", [], {"PROFILE": "mistral"}, "MODEL"),
        ("cmd_serve.sh", [], {"PROFILE": "mistral"}, "MODEL"),
        ("cmd_serve.sh", ["adapter=x"], {"MODEL": "m"}, "adapter is set by this script"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    checkout: Path, script: str, arguments: list[str], variables: dict[str, str], told: str
) -> None:
    with_logging_python(checkout)
    result = run(checkout, script, *arguments, **variables)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line
    assert not (checkout / "calls").exists()


class TestRun:
    @pytest.mark.parametrize(
        ("script", "variables", "expected"),
        [
            (
                "cmd_grun.sh",
                {},
                [
                    "evaluate profile=demo model.path=models/reference output_dir=r/evaluation/retain_only",
                    "unlearn profile=demo model.path=models/known objective=gd output_dir=r/gd",
                    "evaluate profile=demo model.path=models/known adapters=[r/gd] with_base=before "
                    "reference=r/evaluation/retain_only output_dir=r/evaluation",
                    "report profile=demo results_dir=r",
                ],
            ),
            (
                "cmd_baseline.sh",
                {"PARAMETRIZATIONS": "grun", "JOBS": "1"},
                [
                    "sweep sweep=demo profile=demo model=models/known retain_model=models/reference results_dir=r "
                    "jobs=1 objectives=[gd] parametrizations=[grun] seeds=[42]",
                ],
            ),
        ],
    )
    def test_stages_run_in_order_on_the_taught_models(
        self, script: str, variables: dict[str, str], expected: list[str], checkout: Path, tmp_path: Path
    ) -> None:
        with_logging_python(checkout)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        result = run(checkout, script, cwd=elsewhere, OBJECTIVES="gd", RESULTS="r", **variables)
        assert result.returncode == 0, result.stderr
        taught = [f"finetune profile=demo data.subset={subset}" for subset in ("all", "without_forget")]
        assert calls(checkout) == [*taught, *expected]
        assert list(elsewhere.iterdir()) == []

    @pytest.mark.parametrize(
        ("script", "option", "variables"),
        [
            ("cmd_grun.sh", "report.bogus=1", {}),
            ("cmd_baseline.sh", "evaluate.bogus=1", {}),
            ("cmd_serve.sh", "bogus=1", {"MODEL": "m"}),
        ],
    )
    def test_options_of_the_last_stage_are_checked_before_the_first_runs(
        self, script: str, option: str, variables: dict[str, str], checkout: Path
    ) -> None:
        result = run(with_logging_python(checkout), script, option, **variables)
        assert result.returncode == 2 and "nothing was run" in result.stderr
        assert calls(checkout) == []

    @pytest.mark.parametrize(
        ("folder", "variables", "names", "expected"),
        [
            ("results/demo", {}, "gd npo", "adapters=[results/demo/gd,results/demo/npo] with_base=before"),
            ("it's, mine", {"QUANT": "8bit"}, "gd", "adapters=['it''s, mine/gd'] with_base=before suffix=-8bit"),
        ],
    )
    def test_eval_finds_the_adapters_of_a_folder_whatever_its_name(
        self, folder: str, variables: dict[str, str], names: str, expected: str, checkout: Path
    ) -> None:
        with_logging_python(checkout)
        for name in names.split():
            (checkout / folder / name).mkdir(parents=True)
            (checkout / folder / name / "adapter_config.json").touch()
        result = run(checkout, "cmd_eval.sh", RESULTS=folder, **variables)
        assert result.returncode == 0, result.stderr
        (together,) = [line for line in calls(checkout) if line.startswith("evaluate")]
        assert f" {expected} output_dir={folder}/evaluation" in together
        read = resolve("evaluate", [expected.partition(" with_base")[0], "data.name=demo"])
        assert read.adapters == [f"{folder}/{name}" for name in names.split()]

    @pytest.mark.parametrize(("jobs", "given", "threads"), [("1000", None, "1"), ("2", "3", "3")])
    def test_cells_at_a_time_share_the_threads(
        self, checkout: Path, jobs: str, given: str | None, threads: str
    ) -> None:
        python = with_logging_python(checkout) / ".venv" / "bin" / "python"
        python.write_text(python.read_text() + "echo $OMP_NUM_THREADS >threads\n")
        variables = {} if given is None else {"OMP_NUM_THREADS": given}
        assert run(checkout, "cmd_baseline.sh", JOBS=jobs, **variables).returncode == 0
        assert (checkout / "threads").read_text().split() == [threads]  # of the last command, the sweep

    def test_a_failing_stage_ends_the_run(self, checkout: Path) -> None:
        with_logging_python(checkout)
        python = checkout / ".venv" / "bin" / "python"
        python.write_text(PYTHON_LOGGING_CALLS + 'case "$*" in *"grun unlearn"*) exit 7 ;; esac\n')
        assert run(checkout, "cmd_grun.sh").returncode == 7
        assert "unlearn" in calls(checkout)[-1]

    def test_finetune_prints_the_folders_alone(self, checkout: Path) -> None:
        with_logging_python(checkout)
        assert run(checkout, "cmd_finetune.sh").stdout == "models/known\nmodels/reference\n"
        assert run(checkout, "cmd_finetune.sh", RETAIN_ONLY="0").stdout == "models/known\n"

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ([], ["-m ruff check .", "-m mypy", "-m pytest -q -n 2 --dist loadfile --no-loadscope-reorder"]),
            (["tests/test_x.py", "-k", "name"], ["-m pytest -q tests/test_x.py -k name"]),
            (["--slow"], ["-m pytest -q -m slow -n 2 --dist loadfile --no-loadscope-reorder"]),
        ],
    )
    def test_cmd_test_runs(self, checkout: Path, arguments: list[str], expected: list[str]) -> None:
        with_logging_python(checkout)
        assert run(checkout, "cmd_test.sh", *arguments).returncode == 0
        assert calls(checkout) == expected


# Makes a .venv whose python logs pip's calls, fails them while the file `broken` exists, and else is the real one.
BASE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv")
    mkdir -p "$3/bin"
    cat >"$3/bin/python" <<'END'
#!/bin/sh
case "$1 $2" in
  "-m pip") echo "$*" >>pip-calls; sleep 0.5; [ ! -e broken ] || { echo "no route to host"; exit 1; } ;;
  "-m grun"*) ;;
  *) exec REAL "$@" ;;
esac
END
    chmod +x "$3/bin/python" ;;
  *) exec REAL "$@" ;;
esac
"""


class TestSetUp:
    @pytest.fixture
    def bare(self, checkout: Path, tmp_path: Path) -> dict[str, str]:
        """The variables of a shell whose python3 makes stand-in environments."""
        python = tmp_path / "bin" / "python3"
        python.parent.mkdir()
        python.write_text(BASE_PYTHON.replace("REAL", shlex.quote(sys.executable) + " -S"))
        python.chmod(0o755)
        (checkout / "cmd_probe.sh").write_text('cd "$(dirname "$0")" && . scripts/environment.sh && echo "$PYTHON"\n')
        return {"PATH": f"{python.parent}:{os.environ['PATH']}"}

    def pip_calls(self, checkout: Path) -> int:
        log = checkout / "pip-calls"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def test_happens_once_until_the_requirements_change(self, checkout: Path, bare: dict[str, str]) -> None:
        first = run(checkout, "cmd_probe.sh", **bare)
        assert (first.returncode, first.stdout) == (0, ".venv/bin/python\n"), first.stderr
        assert "setting up .venv" in first.stderr
        again = run(checkout, "cmd_probe.sh", **bare)
        assert (again.stdout, again.stderr) == (".venv/bin/python\n", "")
        assert self.pip_calls(checkout) == 1
        with (checkout / "requirements.txt").open("a") as file:
            file.write("another==1.0\n")
        run(checkout, "cmd_probe.sh", **bare)
        assert self.pip_calls(checkout) == 2

    def test_what_tests_need_is_installed_for_tests_alone(self, checkout: Path, bare: dict[str, str]) -> None:
        for _ in range(2):
            assert run(checkout, "cmd_probe.sh", **bare).returncode == 0
            assert run(checkout, "cmd_probe.sh", NEED_DEV="1", **bare).returncode == 0
        first, second = (checkout / "pip-calls").read_text().splitlines()
        assert first.endswith("-r requirements.txt") and second.endswith("-r requirements-dev.txt")

    def test_failure_shows_pips_words_and_the_next_run_repairs_it(self, checkout: Path, bare: dict[str, str]) -> None:
        (checkout / "broken").touch()
        result = run(checkout, "cmd_probe.sh", **bare)
        assert result.returncode == 1 and result.stdout == ""
        assert "no route to host" in result.stderr
        (checkout / "broken").unlink()
        assert run(checkout, "cmd_probe.sh", **bare).returncode == 0

    def test_environment_cut_off_while_it_was_made_is_made_anew(self, checkout: Path, bare: dict[str, str]) -> None:
        half = checkout / ".venv" / "bin" / "python"
        half.parent.mkdir(parents=True)
        half.write_text("#!/bin/sh\nexit 0\n")
        half.chmod(0o755)
        (checkout / ".venv" / "unfinished").touch()
        assert run(checkout, "cmd_probe.sh", **bare).returncode == 0
        assert "exec" in half.read_text()

    def test_two_scripts_at_once_install_once(self, checkout: Path, bare: dict[str, str]) -> None:
        command = ["bash", str(checkout / "cmd_probe.sh")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        both = [subprocess.Popen(command, env=bare, text=True, **pipes) for _ in range(2)]
        outcomes = [process.communicate(timeout=60) for process in both]
        assert [stdout for stdout, _ in outcomes] == [".venv/bin/python\n"] * 2
        assert any("waiting for another script" in stderr for _, stderr in outcomes)
        assert self.pip_calls(checkout) == 1

    def test_active_environment_is_used_if_it_has_the_packages(self, checkout: Path, bare: dict[str, str]) -> None:
        here = run(checkout, "cmd_probe.sh", VIRTUAL_ENV=sys.prefix, **bare)
        assert here.stdout == f"{sys.prefix}/bin/python\n", here.stderr
        (checkout / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=999"]\n')
        other = run(checkout, "cmd_probe.sh", VIRTUAL_ENV=sys.prefix, **bare)
        assert other.stdout == ".venv/bin/python\n"
        assert "lacks torch>=999" in other.stderr

    def test_old_python_is_one_clear_line(self, checkout: Path, bare: dict[str, str], tmp_path: Path) -> None:
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            old = tmp_path / "bin" / name
            old.write_text('#!/bin/sh\n[ "$1" != --version ] || { echo "Python 3.8.1"; exit 0; }\nexit 1\n')
            old.chmod(0o755)
        result = run(checkout, "cmd_probe.sh", **bare)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert "Python >= 3.11" in line and "3.8.1" in line
