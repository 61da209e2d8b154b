"""From profiles and key=value arguments to a config: who wins, what is refused, and the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grun.config.checks import quirks_in_force
from grun.config.definitions import described
from grun.config.options import UnlearnConfig
from grun.config.values import COMMANDS, WITHOUT_PROFILE, describe, from_dict, to_dict, to_yaml
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.loading.resolve import resolve
from grun.objectives.objective import build_objective


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


# -- the packaged ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in WITHOUT_PROFILE])
@pytest.mark.parametrize("profile", sorted(described("profile")))
def test_every_profile_resolves_for_every_command(profile: str, command: str) -> None:
    config = resolve(command, [f"profile={profile}"])
    check(config)
    assert isinstance(config, COMMANDS[command])
    assert config.profile == profile


@pytest.mark.parametrize("objective", ["ga", "gd", "idk", "npo"])
def test_the_demo_knows_every_objective(objective: str) -> None:
    config = resolve("unlearn", [f"objective={objective}"])
    assert config.objective == objective
    check(config)


@pytest.mark.parametrize(
    ("profile", "gate", "model"), [("llama3.1", "mlp_3", "Llama-3.1-8B"), ("mistral", "linear", "Mistral-7B-v0.1")]
)
def test_real_models_have_the_published_settings(profile: str, gate: str, model: str) -> None:
    """Spec 2.4."""
    for objective, retain, forget in (("gd", 2.0, 1.0), ("idk", 1.0, 1.0), ("npo", 1.0, 100.0)):
        config = resolve("unlearn", [f"profile={profile}", f"objective={objective}"])
        assert config.train.lr == 4e-3
        assert config.train.epochs == 40
        assert config.train.batch_size == 16
        assert (config.train.schedule, config.train.warmup, config.train.weight_decay) == ("linear", 0.0, 0.0)
        assert config.train.max_grad_norm == 1.0
        assert config.method.blocks == [20, 25, 31]
        assert config.method.rank == 4
        assert config.method.gate == gate
        assert config.loss.beta == (0.1 if objective == "npo" else None)
        assert config.loss.gate_warmup_steps == 0
        weights = build_objective(objective, config.loss, gated=True).weights
        assert weights == {"forget": forget, "retain": retain, "gate": 10.0}
        assert (config.data.name, config.data.forget, config.seed) == ("tofu", "forget05", 42)
        assert quirks_in_force(config) == []
    assert resolve("finetune", [f"profile={profile}"]).model.path.endswith(f"/{model}")


def test_finetuning_of_real_models_is_the_published_one() -> None:
    for profile, epochs in (("llama3.1", 5), ("mistral", 8)):
        config = resolve("finetune", [f"profile={profile}"])
        train = config.train
        assert (config.model.dtype, train.precision) == ("bfloat16", "auto")
        assert (train.micro_batch_size, train.gradient_checkpointing, train.schedule) == (4, True, "linear")
        assert (config.data.subset, config.data.retain_rows, config.data.unknown_rows) == ("all", None, 0)  # 4000 rows
        evaluation = resolve("evaluate", [f"profile={profile}"])
        assert config.data == evaluation.data and evaluation.data.limit is None  # the template among others
        assert (train.epochs, train.batch_size, train.lr, train.weight_decay, train.warmup) == (
            *(epochs, 32, 1e-5, 0.01, 0.1),
        )


# -- who wins ---------------------------------------------------------------------------------------------------------

LAYERS = """
base: [demo]
seed: 5
data: {max_length: 100}
unlearn:
  seed: 6
  data: {max_length: 200}
  loss: {beta: 0.2, gate_weight: 3.0}
  objectives:
    npo:
      loss: {beta: 0.3}
"""


def test_later_layers_win(tmp_path: Path) -> None:
    """Defaults, base, shared sections, the command's, the objective's, arguments."""
    profile = f"profile={write(tmp_path, 'mine.yaml', LAYERS)}"
    plain = resolve("unlearn", [])
    assert (plain.seed, plain.data.max_length, plain.loss.beta) == (42, None, None)
    mine = resolve("unlearn", [profile])
    assert mine.method.gate == plain.method.gate and mine.data.template == "tiny"  # from the base
    assert (mine.seed, mine.data.max_length, mine.loss.beta, mine.loss.gate_weight) == (6, 200, 0.2, 3.0)
    assert resolve("finetune", [profile]).seed == 5
    npo = resolve("unlearn", [profile, "objective=npo"])
    assert (npo.loss.beta, npo.loss.gate_weight) == (0.3, 3.0)
    given = resolve("unlearn", [profile, "objective=npo", "loss.beta=0.4", "seed=7"])
    assert (given.loss.beta, given.seed, given.data.max_length) == (0.4, 7, 200)


def test_the_last_of_two_arguments_wins() -> None:
    assert resolve("unlearn", ["seed=1", "seed=2"]).seed == 2


def test_an_objective_named_in_a_profile_picks_its_settings(tmp_path: Path) -> None:
    profile = write(tmp_path, "mine.yaml", LAYERS.replace("  seed: 6", "  objective: npo"))
    config = resolve("unlearn", [f"profile={profile}"])
    assert (config.objective, config.loss.beta) == ("npo", 0.3)


DESIGNED = """
base: demo
unlearn:
  method: {rank: 2}
  designs:
    robust:
      method: {rank: 9}
      train: {lr: 0.25}
      objectives:
        npo: {train: {lr: 0.5}}
"""


def test_a_design_takes_its_settings_over_the_profiles_others_and_arguments_win(tmp_path: Path) -> None:
    profile = f"profile={write(tmp_path, 'mine.yaml', DESIGNED)}"
    published, robust = resolve("unlearn", [profile]), resolve("unlearn", [profile, "design=robust"])
    assert (published.design, published.method.rank, published.method.edit_write) == ("published", 2, "last_prompt")
    assert (robust.method.rank, robust.train.lr, robust.method.gate) == (9, 0.25, "noisy_mlp_3")
    assert (robust.method.gate_read, robust.method.edit_write) == ("every_token", "every_token")
    assert (robust.loss.gate, robust.data.augment.forget_copies) == ("bce_max_last", 10)
    npo = resolve("unlearn", [profile, "design=robust", "objective=npo", "method.gate=linear"])
    assert (npo.train.lr, npo.method.gate) == (0.5, "linear")
    check(robust)


@pytest.mark.parametrize("profile", ["demo", "attack_demo", "tofu_small", "llama3.1", "mistral"])
@pytest.mark.parametrize("objective", ["gd", "idk", "npo"])
def test_profiles_with_questions_know_the_robust_design(profile: str, objective: str) -> None:
    config = resolve("unlearn", [f"profile={profile}", f"objective={objective}", "design=robust"])
    check(config)
    assert config.method.gate_accumulate == "running_max"
    assert config.loss.ascent_cap == (
        6.0 if objective == "gd" else None
    )  # unbounded ascent spoils edits at every token


def test_a_design_that_a_profile_or_parametrization_does_not_have_is_one_line() -> None:
    with pytest.raises(ConfigError, match="profile wmdp_demo has no settings for design=robust; .*add `base: designs`"):
        resolve("unlearn", ["profile=wmdp_demo", "design=robust"])
    with pytest.raises(ConfigError, match="unknown design 'robst': did you mean 'robust'"):
        resolve("unlearn", ["design=robst"])
    with pytest.raises(
        ConfigError, match="design=robust concerns GRUN's gate, which method.parametrization=lora does not"
    ):
        check(resolve("unlearn", ["design=robust", "method.parametrization=lora"]))


def test_bases_nest_and_later_ones_win(tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", "description: first\nseed: 1\nunlearn: {train: {epochs: 3, lr: 0.5}}")
    second = write(tmp_path, "second.yaml", f"base: {first}\nseed: 2")
    third = write(tmp_path, "third.yaml", "unlearn: {train: {epochs: 4}}")
    last = write(tmp_path, "last.yaml", f"base: [{second}, {third}]\nunlearn: {{method: {{rank: 2}}}}")
    config = resolve("unlearn", [f"profile={last}"])
    assert (config.seed, config.train.epochs, config.train.lr, config.method.rank) == (2, 4, 0.5, 2)


def test_an_empty_value_means_unset() -> None:
    assert resolve("unlearn", ["profile=llama3.1", "loss.retain_weight=", "model.path="]).loss.retain_weight is None


@pytest.mark.parametrize(
    "text", ["Q: {prompt}\nA:", "{prompt}", "Question: {prompt} Answer:", "[INST] {prompt} [/INST]", "'{prompt}' #1"]
)
def test_a_users_template_is_taken_as_it_is_though_it_looks_like_yaml(text: str) -> None:
    config = resolve("unlearn", [f"data.template={text}"])
    assert config.data.template == text
    check(config)


@pytest.mark.parametrize(
    ("option", "value"), [("model.revision", "1e5"), ("model.revision", "0123"), ("data.date", "2024-07-26")]
)
def test_texts_that_look_like_numbers_or_dates_stay_texts(option: str, value: str) -> None:
    section, _, name = option.partition(".")
    assert getattr(getattr(resolve("unlearn", [f"{option}={value}"]), section), name) == value


@pytest.mark.parametrize(
    ("command", "more"),
    [
        *((command, ["profile=llama3.1"]) for command in ("finetune", "unlearn", "evaluate", "generate")),
        ("unlearn", ["design=robust", "method.gate=linear"]),
    ],
)
def test_the_printed_config_is_a_profile(command: str, more: list[str], tmp_path: Path) -> None:
    config = resolve(
        command, [*more, "model.path=somewhere", "data.name=demo", "seed=3", "data.template=Q: {prompt} A:"]
    )
    printed = yaml.safe_load(to_yaml(config))
    profile = write(tmp_path, "printed.yaml", yaml.safe_dump({command: printed}))
    again = resolve(command, [f"profile={profile}"])
    assert again.profile == profile
    again.profile = config.profile
    assert again == config


def test_a_config_as_a_dict_gives_the_config_again() -> None:
    config = resolve("unlearn", ["profile=llama3.1", "method.blocks=[1,2]", "loss.retain_weight="])
    assert from_dict("unlearn", to_dict(config)) == config


def test_a_profile_that_changed_is_read_again(tmp_path: Path) -> None:
    profile = f"profile={write(tmp_path, 'mine.yaml', 'unlearn: {seed: 1}')}"
    assert resolve("unlearn", [profile]).seed == 1
    write(tmp_path, "mine.yaml", "unlearn: {seed: 2}")
    assert resolve("unlearn", [profile]).seed == 2


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unlern: {seed: 1}", "unknown section 'unlern': did you mean 'unlearn'?"),
        ("unlearn: {seeed: 1}", "seeed"),
        ("unlearn: {train: {lr: fast}}", "train.lr: Value 'fast'"),
        ("unlearn: 5", "section unlearn must hold options, not 5"),
        ("data: [1]", "section data must hold options"),
        ("unlearn: {objectives: {gdd: {seed: 1}}}", "unknown objective 'gdd': did you mean 'gd'?"),
        ("unlearn: {objectives: [gd]}", "unlearn.objectives must map names"),
        ("- a\n- b", "must map names to values"),
        ("unlearn: {seed: 1", "profile .*: "),
        (
            "base: [nope]",
            "unknown profile 'nope': known: attack_demo, demo, designs, grun_tofu, grun_wmdp, llama3.1, mistral",
        ),
    ],
)
def test_a_wrong_profile_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        resolve("unlearn", [f"profile={write(tmp_path, 'wrong.yaml', text)}"])
    assert "\n" not in str(error.value)


def test_empty_sections_are_no_mistake(tmp_path: Path) -> None:
    profile = write(tmp_path, "mine.yaml", "base:\nmodel:\nunlearn:\n")
    assert resolve("unlearn", [f"profile={profile}"]).train == UnlearnConfig().train


def test_a_profile_cannot_be_its_own_base(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"base: [{path}]")
    with pytest.raises(ConfigError, match="is a base of itself"):
        resolve("unlearn", [f"profile={path}"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.lr=abc", "train.lr: Value 'abc'"),
        ("method.blocks=5", r"method.blocks: expected a list in brackets"),
        ("method.blocks=[1,x]", "method.blocks: Value 'x'"),
        ("method.blocks=[1", r"cannot read method.blocks=\[1"),
        ("seed=1.5", "seed: Value '1.5'"),
        ("data.strict=maybe", "not a valid bool"),
        ("objective=", "objective: "),
        ("data=5", "unknown option 'data'"),
        ("train.lr", "'train.lr' is not key=value"),
    ],
)
def test_a_wrong_argument_is_one_line(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        resolve("unlearn", [argument])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.epochs=0", "train.epochs=0 must be greater than 0"),
        ("train.lr=nan", "train.lr=nan must be"),
        ("train.weight_decay=-0.1", "train.weight_decay=-0.1 must not be negative"),
        ("train.schedule=foo", "unknown train.schedule 'foo': known: constant, "),
        ("train.engine=warp", "unknown train.engine 'warp': known: cached, plain"),
        ("seed=-1", "seed=-1 must lie between 0"),
        ("method.dropout=1.0", r"method.dropout=1.0 must lie in \[0, 1\)"),
        ("method.blocks=[]", "must name at least one block"),
        ("method.blocks=[1,2,1]", "each once"),
        (
            "method.gate=mlp3",
            "unknown gate 'mlp3': did you mean 'mlp_3'? known: condition, keywords, linear, mlp_3, mlp_5, noisy_mlp_3, "
            "none, similarity",
        ),
        (
            "method.parametrization=foo",
            "unknown parametrization 'foo': known: full, grun, in_context, lora, output_filter, reft",
        ),
        ("objective=foo", "unknown objective 'foo': known: altpo, ceu, counterfactual, "),
        ("loss.forget=ce", "known forget terms: ga, ga_sum, wga, satimp, min_posterior, undial, "),
        ("compat=foo", "unknown compat 'foo': known: grun-paper, llm360, open-unlearning"),
        ("quirks=[foo]", "unknown quirk 'foo': known: dropout_on_hidden, kl_all_positions, "),
        ("data.name=foo", "unknown data.name 'foo': known: corpora, countries, demo, jsonl, lore, muse, rwku, tofu"),
        ("data.subset=foo", "unknown data.subset 'foo': known: all, forget, without_forget"),
        ("data.template=foo", "unknown template 'foo': known: auto, chat"),
        ("data.template={promt}", "must contain {prompt} exactly once"),
        ("model.dtype=int8", "unknown model.dtype 'int8': known: auto"),
    ],
)
def test_a_name_or_number_that_cannot_be_is_refused_before_anything_runs(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(resolve("unlearn", [argument]))
    assert message.replace(r"\[", "[").replace(r"\)", ")") in str(error.value)


def test_compat_switches_on_every_quirk_of_its_source() -> None:
    assert quirks_in_force(resolve("unlearn", [])) == []
    assert quirks_in_force(resolve("unlearn", ["quirks=[dropout_on_hidden]"])) == ["dropout_on_hidden"]
    of_grun = ["retain_fixed_pairing", "dropout_on_hidden", "kl_row_sum", "rmu_answer_states", "rmu_hidden_state_index"]
    assert quirks_in_force(resolve("unlearn", ["compat=grun-paper"])) == of_grun
    assert quirks_in_force(resolve("unlearn", ["compat=grun-paper", "quirks=[dropout_on_hidden]"])) == of_grun
    of_terms = ["kl_all_positions", "undial_all_positions"]
    assert quirks_in_force(resolve("unlearn", ["compat=open-unlearning"])) == of_terms
    of_llm360 = ["max_entropy_all_positions", "random_mapping_all_positions"]
    assert quirks_in_force(resolve("unlearn", ["compat=llm360"])) == of_llm360


@pytest.mark.parametrize("argument", ["loss.beta=null", "loss.beta="])
def test_an_option_of_a_profile_that_no_term_reads_is_refused_until_it_is_unset(argument: str, tmp_path: Path) -> None:
    profile = f"profile={write(tmp_path, 'mine.yaml', LAYERS)}"
    with pytest.raises(ConfigError, match=r"loss.beta=0.2 has no effect: .* with loss.beta=null$"):
        check(resolve("unlearn", [profile]))
    check(resolve("unlearn", [profile, argument]))


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_option_says_what_it_is(command: str) -> None:
    undocumented = [key for key, _, text in describe(COMMANDS[command]) if not text]
    assert undocumented == []
