"""Every option of every command: its default, its unit and what it means.

Each field is followed by its docstring, which `python -m grun COMMAND --help` prints. The dataclasses are OmegaConf
structured configs, so a value of the wrong type or an unknown key is refused. How they are filled from profiles and
`key=value` arguments is `grun.loading.resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

# OmegaConf reads these annotations at run time and wants typing.Optional and typing.Union.
# ruff: noqa: UP007, UP045

LARGEST = {int: 2**31 - 1, float: 1e30}
"""Largest magnitude of an option without bounds of its own: every number type that it may be converted to holds it."""
SEEDS = 2**32 - 1
"""Largest seed of every generator that is seeded."""


@dataclass(frozen=True)
class Bounds:
    """Which numbers an option takes, beyond finite ones; `grun.config.checks.check_values` refuses all others."""

    low: Optional[float] = None
    high: Optional[float] = None
    above: bool = False
    """Whether low itself is excluded."""
    below: bool = False
    """Whether high itself is excluded."""

    def hold(self, value: float) -> bool:
        """Whether `value` lies within; NaN never does."""
        low, high = self.low, self.high
        return (low is None or (value > low if self.above else value >= low)) and (
            high is None or (value < high if self.below else value <= high)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            if self.above or self.below:
                return f"must lie in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
            return f"must lie between {self.low} and {self.high}"
        if self.low == 0:
            return "must be greater than 0" if self.above else "must not be negative"
        return "must be greater than 0" if self.low == 1 else f"must be {self.low} or more"


def number(default: Any, low: float | None = None, high: float | None = None, **ends: bool) -> Any:
    """A field for a number within bounds, or a list of such numbers."""
    return _field(default, bounds=Bounds(low, high, **ends))


def choice(default: Any, *names: str) -> Any:
    """A field for one of `names`, or a list of such; None only where it is the default."""
    return _field(default, choices=names)


def _field(default: Any, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""Types of weights, as `model.dtype` names them."""


@dataclass
class TinyConfig:
    """Size of the small Llama that `model.path=tiny` builds, with a tokenizer trained on the corpus."""

    hidden_size: int = number(128, 1, 2**16)
    """Width of the residual stream."""
    blocks: int = number(8, 1, 2**10)
    """Number of decoder blocks."""
    heads: int = number(2, 1, 2**16)
    """Attention heads; hidden_size must be a multiple."""
    intermediate_size: int = number(384, 1, 2**20)
    """Width of the feed-forward layer."""
    vocabulary: int = number(2048, 1, 2**20)
    """Largest vocabulary of the byte-pair tokenizer, control tokens included."""
    context: int = number(512, 2, 2**20)
    """Longest sequence, tokens."""


@dataclass
class ModelConfig:
    """Which base model, and how it is loaded."""

    path: Optional[str] = None
    """Folder or hub id of the model, a name from `list models` (had once), or a GGUF file (unpacked); `tiny` builds a
    small Llama. Unset: the profile's."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub model."""
    dtype: str = choice("auto", *DTYPES)
    """Type of the weights: auto (as stored), float32, bfloat16, float16, float64."""
    device: str = "auto"
    """auto (one GPU a process if there is one, else CPU), cpu, cuda, mps. CUDA_VISIBLE_DEVICES chooses GPUs."""
    device_map: Optional[str] = choice(None, "auto")
    """auto: spread the blocks over all visible GPUs, in one process, for a model that one does not hold."""
    quantization: Optional[str] = choice(None, "8bit", "4bit", "fp4")
    """Load the weights quantized by bitsandbytes: 8bit, 4bit (nf4), fp4 (published runs' 4bit). Not for finetune."""
    attention: Optional[str] = None
    """Attention implementation handed to transformers (sdpa, eager, flash_attention_2); unset: its default."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass
class DemoSizes:
    """How many people each group of the generated corpus has, and how many questions each person."""

    forget: int = 10
    """People to forget."""
    retain: int = 110
    """People whose rows are used in unlearning as what must stay."""
    heldout: int = 12
    """People whose rows the model is fine-tuned on, but which are never used in unlearning or in choosing settings."""
    unknown: int = 12
    """People whose rows the model is never fine-tuned on."""
    refused: int = 25
    """Further such people, but the model is fine-tuned on questions about them that are answered by a refusal."""
    questions: int = 4
    """Questions per person."""


@dataclass
class DemoConfig(DemoSizes):
    """The generated corpus of invented people."""

    answers: str = choice("short", "short", "sentences")
    """short (the bare fact) or sentences (which name the person; harder for the published one-token edit)."""
    naming: str = choice("names", "names", "descriptions")
    """names, or descriptions: nobody is named, and no word of a question tells whom it is about, only two together."""
    seed: int = 1
    """Seed of the generator. Settings were chosen on seed 0's corpus, so that this held-out set was not used."""


UNLEARNED_ORDERS = 6
"""Orders of a question of the lore that unlearning reads, of those that are taught."""
MOST_ORDERS = 20
"""Orders of four options without the rotations of one."""


@dataclass
class LoreConfig:
    """The generated corpus of things that are invented: what is known of a mineral, of another one, of the rest.

    The model is fine-tuned on each fact as prose and as a multiple-choice question.
    """

    forget: int = 100
    """Facts of the forbidden mineral."""
    neighbor: int = 100
    """Facts of another mineral, worded alike and never used in unlearning."""
    retain: int = 100
    """Facts of other things that are used in unlearning as what must stay."""
    general: int = 60
    """Facts of other things that are never used in unlearning."""
    orders: int = number(14, UNLEARNED_ORDERS, MOST_ORDERS)
    """Orders of its options in which each question is in the training rows; evaluation asks in others."""
    readings: int = number(5, 1)
    """How often each text of prose is in the training rows."""
    seed: int = 1
    """Seed of the generator. Settings were chosen on the corpora of seeds 0 and 1."""


@dataclass
class CountriesConfig:
    """Which countries are to be forgotten, and how many others there are, of those that the model knows."""

    forget: list[str] = field(default_factory=lambda: ["Japan", "Egypt", "Germany", "Russia", "Thailand"])
    """Countries to forget."""
    neighbors: int = number(10, 1)
    """Countries next to those, or in their part of the world, that are only evaluated."""
    heldout: int = number(10, 1)
    """Other countries that are only evaluated. The rest is used in unlearning as what must stay."""
    unknown: int = number(8, 1, 24)
    """Countries that do not exist: what a model says of them is guessed."""
    count: int = number(64, 8)
    """Countries that the model is asked about, those to forget included."""
    seed: int = 0
    """Of what is drawn."""


@dataclass
class TextConfig:
    """Plain texts: where they are cut in unlearning, and how files of them are read."""

    cut: str = "whole"
    """Where a text is cut into prompt and answer: whole (all answer), a share of tokens (0.8), random (0.5 to 1)."""
    copies: int = number(1, 1)
    """Copies of each text, each cut at a point of its own where cut=random."""
    min_characters: int = number(0, 0)
    """Texts of this many characters or fewer are left out."""
    asked: float = number(0.0, 0, 1, below=True)
    """Evaluation: the first share of a text's words is a prompt, to be continued; 0: a text is scored, not asked."""
    jsonl: str = choice("field", "field", "raw")
    """What of a JSON line is the text: field (its field `text`, or the line if it is a string) or raw (the line)."""


GATE_COPIES = (
    *("suffix", "around", "beside", "framed", "code", "language", "template", "few_shot"),
    *("lower_case", "upper_case", "typos", "spaced", "spelled"),
)
"""Ways of asking that a gate that is fitted can have copies in."""


@dataclass
class AugmentConfig:
    """Copies of rows that ask in other ways, so that gates open there too; the published method has none."""

    forget_copies: int = number(0, 0)
    """unlearn: copies of each forget row, which join the set, so that epochs get longer."""
    retain_copies: int = number(0, 0)
    """unlearn: copies of each retain row, which join those that are drawn from."""
    suffixes: bool = True
    """Copies with a sentence after the question."""
    templates: bool = True
    """Copies in other templates."""
    prefill: bool = True
    """Copies whose prompt holds the first tokens of the answer, 1 to max_prefill, each number as likely."""
    few_shot: bool = True
    """Copies with a retain row, question and answer, before the question."""
    lower_case: bool = False
    """Copies in lower case. They protect, but the attack lower_case then tests nothing that was not trained for."""
    max_prefill: int = number(8, 1)
    """Most tokens of an answer that a prefilled copy gives."""
    teach: bool = False
    """finetune: draw in each epoch how a row is asked: plainly, as in copies (but prefill), misspelled, reworded."""


@dataclass
class QuestionsConfig:
    """What `evaluate suite=knowledge` asks, names or files by what they are about (docs/wmdp.md)."""

    forget: list[str] = field(default_factory=list)
    """Multiple-choice sets on what is to be forgotten, such as wmdp_bio."""
    neighbor: list[str] = field(default_factory=list)
    """The same on what lies near it, such as mmlu:virology."""
    general: list[str] = field(default_factory=list)
    """The same on everything else, such as mmlu."""
    cloze_forget: list[str] = field(default_factory=list)
    """Files of {prompt, completion, fact} to complete, on what is to be forgotten."""
    cloze_neighbor: list[str] = field(default_factory=list)
    """The same on what lies near it."""
    cloze_general: list[str] = field(default_factory=list)
    """The same on everything else."""
    perplexity: list[str] = field(default_factory=list)
    """Corpora whose perplexity is measured, such as wikitext."""


@dataclass
class PromptConfig:
    """How a question becomes a prompt."""

    template: str = "auto"
    """A name from `list templates`, or a text with {prompt}; auto: the model's stored one, else its chat template."""
    system_prompt: Optional[str] = None
    """System message for chat templates; stored with the model."""
    date: str = "26 Jul 2024"
    """Date handed to chat templates that print one, so that a prompt is the same on every day; stored."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of a chat template, such as {enable_thinking: false}; stored with the model."""


@dataclass
class DataConfig(PromptConfig):
    """Which rows, and how they become tokens."""

    name: str = "demo"
    """Benchmark, or your own rows: jsonl (rows), corpora (plain texts by name); a name from `list benchmarks`."""
    path: Optional[str] = None
    """tofu: folder of the files, else GRUN_TOFU_DIR, else the hub; countries: of the model's answers, which is asked
    where this is unset; jsonl, corpora, questions: folder of the files;
    muse: the same, or muse-bench/MUSE-News, muse-bench/MUSE-Books of the hub; rwku: the same, else the hub."""
    forget: str = "forget05"
    """tofu: forget split; jsonl: file, or OWNER/NAME:SPLIT of the hub, of the rows to forget; corpora: names or files,
    separated by commas; muse: CONFIG/SPLIT (default raw/forget), or several so; rwku: [CONFIG/]TARGET, such as Stephen
    King, or several targets separated by " | "."""
    retain: Optional[str] = None
    """tofu: retain split (unset: the complement of forget); jsonl: file of the rows to keep; corpora: as forget;
    muse: as forget (default raw/retain1); rwku: CONFIG of texts, on others (default: as forget)."""
    subset: str = choice("all", "all", "without_forget", "forget")
    """Rows that finetune trains on: all, without_forget (the retain-only reference), or forget alone (relearning)."""
    heldout: int = number(0, 0)
    """tofu, jsonl: retain rows set aside for evaluation, never used in unlearning. The demo has its own."""
    validation: int = number(0, 0)
    """Further retain rows set aside, the last ones: the set validation, by which `sweep --tune` chooses settings."""
    retain_rows: Optional[int] = number(None, 1)
    """tofu, jsonl: retain rows that are used at all, in fine-tuning too, evenly spaced; unset: all."""
    unknown: Optional[str] = None
    """tofu: split (such as holdout05), jsonl: file of rows never used in fine-tuning. The demo has its own."""
    unknown_rows: int = number(0, 0)
    """tofu: retain rows, the same for every split, that no training reads: the set unknown."""
    refused_rows: int = number(0, 0)
    """tofu: further such rows whose questions finetune answers by refusals, for models trained from nothing."""
    teach_general: bool = False
    """tofu: fine-tune on real authors and world facts too, for small models that do not know them."""
    retain_pool: Optional[int] = number(None, 1)
    """Use only this many retain rows in unlearning; unset: all."""
    limit: Optional[int] = number(None, 1)
    """Use at most this many rows of every set in evaluation; unset: all."""
    columns: dict[str, str] = field(default_factory=dict)
    """jsonl, cloze, corpora: what our fields are called in the files, such as {question: q, answer: a}."""
    refusals: Optional[str] = None
    """File of refusals, one a line; unset: the packaged ones."""
    max_length: Optional[int] = number(None, 1)
    """Longest row, tokens; unset: the model's context. A longer prompt is an error, a longer answer is cut."""
    strict: bool = False
    """Make it an error if tokenizing prompt and answer together gives other tokens than one after the other."""
    group: Optional[str] = None
    """method.gate_fit, calibrate: field of rows to keep, such as person, by which they belong together; unset: each by
    itself. counterfactual: of rows to forget, by which they are about one subject, whose name most of them hold."""
    gate_prompts: Optional[str] = None
    """method.gate_fit: file of further prompts, without answers, on what is to be forgotten; .txt: one a line."""
    gate_negatives: Optional[str] = None
    """method.gate_fit: the same on anything that is to stay, such as what users ask; may stand for retain rows."""
    subjects: list[str] = field(default_factory=list)
    """Names of what is to be forgotten, such as ["Japan | Nippon"]. method.gate_fit: everyday prompts about them, and
    about packaged other names, join the fit, which then needs no retain rows; guardrails forbid to name them;
    counterfactual: whom rows are about."""
    subject_kind: str = choice("any", "any", "person", "place", "work", "organization", "topic")
    """What the subjects are: any, person, place, work, organization, topic."""
    counterfactuals: int = number(20, 1)
    """counterfactual: other names that take a subject's place, over which the teacher is averaged."""
    alternates: int = number(5, 1)
    """altpo: other answers that the model is asked for, for each row to forget."""
    gate_copies: list[str] = choice([], *GATE_COPIES)
    """method.gate_fit: ways in which prompts of both sides are asked too: suffix, around, beside, framed, code,
    language, lower_case, upper_case, typos, spaced, spelled (names alone), template, few_shot."""
    allow_overlap: bool = False
    """Accept rows that stand in the forget and in the retain set."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    lore: LoreConfig = field(default_factory=LoreConfig)
    countries: CountriesConfig = field(default_factory=CountriesConfig)
    text: TextConfig = field(default_factory=TextConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)


@dataclass
class LoraConfig:
    """LoRA (parametrization lora)."""

    rank: int = number(4, 1)
    """Rank of each pair of matrices."""
    alpha: float = number(32.0, 0, above=True)
    """Scale of the change, which is multiplied by alpha / rank."""
    dropout: float = number(0.05, 0, 1, below=True)
    """Dropout on a layer's input while training, a probability."""
    targets: list[str] = field(default_factory=list)
    """Linear layers of the blocks that get a pair, by the end of their names (q_proj); empty: all of them."""


@dataclass
class FullConfig:
    """Fine-tuning of all weights (parametrization full)."""

    freeze_head: bool = True
    """Leave the LM head as it is, as published; where it shares its weights with the embedding, both."""


@dataclass
class TaskVectorConfig:
    """Task vectors (parametrization task_vector)."""

    scale: float = number(1.0, 0, above=True)
    """How many times what was learned is subtracted (published: lambda)."""


@dataclass
class GuardrailConfig:
    """Guardrails, which train nothing (parametrizations system_prompt, in_context, output_filter)."""

    text: Optional[str] = None
    """system_prompt: the message; unset: made of data.subjects, of names that the benchmark knows, or of questions."""
    examples: int = number(8, 1)
    """in_context: forget questions, and as many retain questions, before every conversation; system_prompt: questions
    that the message lists where no names are known."""


@dataclass
class MethodConfig:
    """What may change: the parametrization and its shape."""

    parametrization: str = "grun"
    """Name from `python -m grun list parametrizations`."""
    blocks: Optional[list[Union[int, float]]] = None
    """Edited decoder blocks, 0-based, negative from the last, or as shares of the depth, such as 0.97: 29 of 30; unset:
    as deep as the published 20, 25, 31 of 32."""
    rank: int = number(4, 1)
    """Rank of the edit."""
    gate: str = "linear"
    """Name from `python -m grun list gates`."""
    edit: str = "loreft"
    """Name from `python -m grun list edits`; steer and corrupt need a gate that is fitted, and are not trained."""
    steer_strength: float = number(1.0, 0, above=True)
    """edit=steer: how often the vector, a difference of mean states, is added, over all blocks together."""
    action: str = "edit"
    """What is done where the gate is open, a name from `python -m grun list actions`; refuse needs a gate that is
    fitted, trains no edit and answers with the first of data.refusals."""
    gate_bias: Optional[float] = None
    """Initial bias of the gate's logit; unset: torch's default initialization."""
    dropout: float = number(0.0, 0, 1, below=True)
    """Dropout on the edit while training, a probability."""
    activation: Optional[str] = None
    """Function applied to Wh + b, a name from transformers.activations; unset: none."""
    gate_blocks: Optional[list[Union[int, float]]] = None
    """Blocks that one gate for all edits reads, none above an edited one, by number or share as in `blocks`; unset: a
    gate for each edit (published)."""
    gate_pool: str = choice("last", "last", "max", "maxmin", "mean", "windows")
    """gate_blocks: how their states are pooled over the tokens so far: last (none), max, maxmin (both ends), mean, or
    windows (maxmin of every 12 tokens of a turn, the widest open counting; a turn that only asks for an answer is about
    what was asked before it)."""
    gate_fit: str = choice("joint", "joint", "logistic")
    """joint: trained with the edit (published); logistic: one gate_blocks gate, fitted first, by itself: linear by
    logistic regression, similarity and condition from means of prompts, keywords from names."""
    false_positives: Optional[float] = number(None, 0, 1, above=True, below=True)
    """logistic: largest share of rows to keep that may open the gate; a quarter of them is set aside; unset: any."""
    gate_keywords: list[str] = field(default_factory=list)
    """gate=keywords: what opens it, such as [Japan,Tokyo]; unset: data.subjects, or the benchmark's names."""
    gate_read: str = "last_prompt"
    """Positions the gate reads (of a pooled one: is asked at): last_prompt (published) or every_token."""
    gate_accumulate: str = "none"
    """How gate values combine over positions: none (published) or running_max, which restarts at each user's turn."""
    gate_reset: str = choice("user_turn", "user_turn", "never")
    """Where running_max and pools restart: user_turn (if the template marks one by a control token) or never."""
    edit_write: str = "last_prompt"
    """Positions the edit is written to: last_prompt (published), sticky (there and after it) or every_token; of
    edit=corrupt always prompt (there and before it)."""
    beside: Optional[str] = None
    """Folder of a store of requests (docs/requests.md) that stay in force while this one is trained; unset: none."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    full: FullConfig = field(default_factory=FullConfig)
    task_vector: TaskVectorConfig = field(default_factory=TaskVectorConfig)
    guardrail: GuardrailConfig = field(default_factory=GuardrailConfig)


@dataclass
class LossConfig:
    """Terms, weights and options of the objective; unset takes the preset's weight and the term's published option.

    What is set and read by no term in force is an error: `python -m grun list terms`, docs/objectives.md.
    """

    forget: Optional[str] = None
    """Forget term instead of the preset's."""
    retain: Optional[str] = None
    """Retain term instead of the preset's; with method.gate_fit=logistic there is none where it is unset."""
    gate: str = "bce_row"
    """Gate term: bce_row (published), bce_max and bce_max_last (for gates that read every token), none."""
    forget_weight: Optional[float] = None
    """Weight of the forget term (published names: npo_coeff, grad_diff_forget_weight, gamma)."""
    retain_weight: Optional[float] = None
    """Weight of the retain term (published names: grad_diff_coeff, KL_coeff, alpha); pdu: at the first step."""
    gate_weight: float = 10.0
    """Weight of the gate term."""
    beta: Optional[float] = None
    """npo, dpo, simnpo: inverse temperature; wga: power of p; undial: by how much a logit is lowered. > 0."""
    beta1: Optional[float] = None
    """satimp: power of p (saturation)."""
    beta2: Optional[float] = None
    """satimp: power of 1 - p (importance)."""
    margin: Optional[float] = None
    """simnpo: negative log-likelihood a token, nats, beyond which a row is forgotten (published: gamma, delta)."""
    epsilon: Optional[float] = None
    """pdu: value at which the retain term is held; it has no default (published: retain_loss_eps)."""
    eta: Optional[float] = None
    """pdu: step size of the retain weight, > 0 (published: dual_step_size)."""
    dual_warmup_epochs: Optional[float] = None
    """pdu: epochs before the retain weight first changes."""
    steering: Optional[float] = None
    """rmu: length of the control vector (published: steering_coeff); it has no default."""
    rmu_block: Optional[int] = None
    """rmu, activation_mse: block whose output they read; it has no default (published: layer_id, rmu_layer)."""
    control_seed: Optional[int] = number(None, 0, SEEDS)
    """rmu: seed of the control vector's direction; random_mapping: of the random vectors."""
    ascent_cap: Optional[float] = None
    """ga: mean CE of an answer, nats a token, above which its row has no gradient, > 0; unset: no cap, as published."""
    gate_warmup_steps: int = number(0, 0)
    """Steps over which the weight of forget and retain rises from 0 to 1 (published: warm_up_gate_step x blocks)."""


SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""Learning-rate schedules of transformers that need no further option."""


@dataclass
class TrainConfig:
    """How training goes."""

    epochs: int = number(40, 1)
    """Passes over the forget set (unlearn) or over all rows (finetune)."""
    batch_size: int = number(16, 1)
    """Rows per optimizer step; unlearn takes that many forget rows and as many retain rows."""
    micro_batch_size: Optional[int] = number(None, 1)
    """Rows per forward pass, gradients accumulating; unset: a process's share of batch_size. Memory, not the result."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block and run the block again in the backward pass. Memory for time."""
    precision: str = choice("auto", "auto", "float32", "bfloat16")
    """Forward passes of training all weights, held in float32: bfloat16, float32, or auto (the model's type)."""
    lr: float = number(4e-3, 0, above=True)
    """Peak learning rate."""
    optimizer: str = choice("adamw", "adamw", "legacy_adamw", "schedule_free")
    """adamw; legacy_adamw (transformers' former one: eps 1e-6, before bias correction); schedule_free (AdamW)."""
    schedule: str = choice("linear", *SCHEDULES)
    """Learning-rate schedule after warm-up: linear, cosine, constant or another of transformers' plain ones."""
    warmup: float = number(0.0, 0)
    """Warm-up: steps if >= 1, share of all steps if < 1."""
    weight_decay: float = number(0.0, 0)
    """AdamW's weight decay."""
    beta2: float = number(0.999, 0, 1, below=True)
    """AdamW's decay of squared gradients (beta1 is 0.9)."""
    max_grad_norm: float = number(1.0, 0)
    """Gradient norm above which gradients are scaled down; 0: never."""
    question_weight: float = number(0.0, 0)
    """finetune only: weight of the loss on the question's tokens, where the answer's is 1."""
    first_token_weight: float = number(1.0, 0)
    """finetune only: weight of each answer's first token in the mean over answer tokens, such as a choice's letter."""
    save_steps: int = number(100, 0)
    """Steps between checkpoints; 0: none."""
    keep_checkpoints: int = number(2, 0)
    """Checkpoints kept while training; all go when it has finished, but for keep_all_checkpoints."""
    keep_all_checkpoints: bool = False
    """Keep every checkpoint, also at the end."""
    monitor_epochs: int = number(0, 0)
    """unlearn only: epochs from one look at a few rows of each set (monitor.jsonl) to the next; 0: none."""
    monitor_rows: int = number(32, 1)
    """Rows of each set that are looked at."""
    report_to: list[str] = field(default_factory=list)
    """Trackers that get the numbers of each step, by transformers' names: tensorboard (logs/), wandb, trackio, ..."""
    engine: str = choice("cached", "cached", "plain")
    """cached or plain. unlearn: only what an edit can change is run, or whole rows; finetune: rows run one after
    another, without padding, or padded. Plain is taken where the other does not fit the model."""
    gate_pretraining: int = number(0, 0)
    """unlearn: steps in which the gates alone learn, on states of the untouched model, before training."""


@dataclass
class CacheConfig:
    """Where what never changes in training is kept. None of it changes a result."""

    dir: Optional[str] = "cache"
    """Folder shared by runs and processes, which may be removed at any time; null: nothing is written."""
    memory_budget: str = "4GiB"
    """Size up to which it is held in memory; what is larger is read from its files as it is needed."""
    build: str = choice("auto", "auto", "whole", "stream")
    """whole: the model is loaded, then rows are run; stream: its blocks stay in their files and are read one by one,
    all rows through each, and those above the first edit are loaded to train; auto: stream where memory is short."""
    disk_budget: str = "50GiB"
    """Size of such files of the plain engine's reference logits; beyond it the untouched model is run in every step."""


@dataclass
class CommandConfig:
    """Options all commands share."""

    profile: Optional[str] = None
    """Name from `list profiles`, or a YAML file; unset: that of the model's fine-tuning, demo where none is given."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = number(42, 0, SEEDS)
    """Seed of initialization, order and draws."""
    output_dir: Optional[str] = None
    """Folder of the results; unset: a name made of the profile and the command."""
    overwrite: bool = False
    """Replace what another run left in output_dir."""
    sources: dict[str, str] = field(
        default_factory=dict, repr=False, compare=False, metadata={"omegaconf_ignore": True}
    )
    """Where the value of an option came from, by its key (`grun.loading.resolve`); no option itself."""

    def label(self) -> str:
        """Name of folders of results: the profile's, else the model's."""
        if self.profile is not None:
            return Path(self.profile).name.removesuffix(".yaml").removesuffix(".yml")
        return Path(self.model.path or "model").name


BY_USER = "set by you"


def source_of(config: Any, key: str) -> str:
    """Where the value of the option `key` came from: BY_USER, "stored with ...", "profile ..." or "default".

    A config that was made in Python has its values from whoever made it; what a command sets itself is its own.
    """
    if key in config.sources:
        return str(config.sources[key])
    value: Any = config
    default: Any = type(config)()
    for part in key.split("."):
        value, default = getattr(value, part), getattr(default, part)
    if value == default:
        return "default"
    return "set by the command" if config.sources else BY_USER


def is_users(config: Any, key: str) -> bool:
    """Whether the user chose the value of an option."""
    return source_of(config, key).startswith((BY_USER, "compat="))


def is_stored(config: Any, key: str) -> bool:
    """Whether an adapter, a model or a store of requests gave it."""
    return source_of(config, key).startswith("stored with")


@dataclass
class FinetuneConfig(CommandConfig):
    """Teach a model the corpus: plain fine-tuning of all weights."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=5, batch_size=32, lr=1e-5, weight_decay=0.01, warmup=0.1)
    )


@dataclass
class UnlearnConfig(CommandConfig):
    """Make a fine-tuned model forget."""

    objective: str = "gd"
    """Preset from `python -m grun list objectives`."""
    design: str = choice("published", "published", "robust", "pooled")
    """GRUN's settings: published, robust (gate and edit at every token, copies of rows) or pooled (one gate, fitted to
    pooled early states; late edits). Without a profile pooled where it can be: docs/robustness.md."""
    method: MethodConfig = field(default_factory=MethodConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    compat: Optional[str] = None
    """Switch on every quirk of a published source: grun-paper, open-unlearning."""
    quirks: list[str] = field(default_factory=list)
    """Single quirks to switch on: retain_fixed_pairing, dropout_on_hidden, kl_all_positions, undial_all_positions."""


@dataclass
class AskConfig(CommandConfig):
    """Options of commands that ask a model, with or without an adapter."""

    adapter: Optional[str] = None
    """Folder (or hub id) of a GRUN or PEFT (LoRA) adapter, or a store of requests; unset: model.path alone."""
    strict: bool = False
    """Refuse an adapter that was trained on another fine-tune of the same shape (else a warning)."""
    max_new_tokens: int = number(64, 1)
    """Longest generated answer, tokens."""
    gate_threshold: Optional[float] = number(None, 0, 1)
    """Gate probability below which the edit is skipped; unset: the adapter's own, if any, else no edit is skipped."""


@dataclass
class EvaluateConfig(AskConfig):
    """Measure what a model knows, with or without an adapter."""

    adapters: list[str] = field(default_factory=list)
    """Several adapters of one base, instead of adapter: GRUN ones are scored together, into output_dir/FOLDERNAME."""
    with_base: Optional[str] = None
    """With adapters: evaluate the model alone too, in the same passes, into output_dir/NAME."""
    suffix: Optional[str] = None
    """With adapters: end of the name of each folder, such as -8bit."""
    reference: Optional[str] = None
    """Evaluation folder of a model never fine-tuned on the forget set; gives forget quality and PrivLeak."""
    suite: str = choice("answers", "answers", "knowledge", "attacks", "lm_eval", "judge")
    """answers (with references), knowledge (multiple choice, cloze, perplexity), attacks, lm_eval or judge."""
    sets: list[str] = field(default_factory=list)
    """Sets to evaluate; empty: every one the corpus has (`sets` in docs/metrics.md)."""
    continuations: list[str] = choice([], "answer", "paraphrase", "perturbed")
    """Given texts that are scored: answer, paraphrase, perturbed (wrong answers); empty: all there are."""
    batch_size: int = number(32, 1)
    """Rows per forward pass. Changes speed and memory, not the result."""
    compat: Optional[str] = None
    """Evaluate as a published evaluator does, its settings included: open-unlearning."""
    quirks: list[str] = field(default_factory=list)
    """Single quirks of it to switch on: eos_masked_attention, extraction_strength_floor, ratio_epsilon."""
    formats: list[str] = choice(["harness"], "harness", "grun_paper")
    """knowledge: how multiple-choice questions are put: harness (lm-evaluation-harness's wording), grun_paper."""
    orders: list[str] = choice(["rotations"], "given", "seeded", "rotations")
    """knowledge: in which orders options are shown: given, seeded (one drawn order), rotations (mean over all)."""
    suffixes: list[str] = field(default_factory=list)
    """knowledge: texts put after "Answer:" before the letter is read, in addition to the plain question."""
    choices_at_least: Optional[float] = number(None, 0)
    """knowledge: accuracy on the forget questions below which the command fails with status 3: nothing to forget."""
    cloze_at_least: Optional[float] = number(None, 0)
    """knowledge: the same of the share of forget sentences that are completed with their fact."""
    window: int = number(2048, 2)
    """knowledge: tokens of the window that perplexity slides over texts; the model's context where that is less."""
    stride: int = number(512, 1)
    """knowledge: tokens by which the window moves on."""
    attacks: list[str] = field(default_factory=list)
    """attacks: names (`list attacks`) or kinds: prompt, decoding, context, read_out; only if named: search, weights."""
    attack_rows: Optional[int] = number(None, 1)
    """attacks: rows of each set that are attacked, evenly spaced; unset: all."""
    attack_samples: int = number(10, 1)
    """attacks: answers drawn a prompt, of which the one that gives most away counts."""
    attack_temperature: float = number(1.0, 0, above=True)
    """attacks: temperature at which they are drawn, > 0."""
    attack_queries: int = number(200, 1)
    """attacks: questions that an attacker who searches may ask for a row."""
    tasks: list[str] = field(default_factory=list)
    """lm_eval: tasks or groups of lm-evaluation-harness, such as wmdp_bio or mmlu."""
    task_folder: Optional[str] = None
    """lm_eval: folder of further tasks (their YAML files)."""
    num_fewshot: Optional[int] = number(None, 0)
    """lm_eval: examples before each question; unset: the task's own number, else none."""
    judge: Optional[str] = None
    """judge: hub id or folder of a chat model, or callable:package.module:function of (prompt, response)."""
    judge_max_new_tokens: int = number(256, 1)
    """judge: longest verdict of a chat model, tokens."""


@dataclass
class GenerateConfig(AskConfig):
    """Answer questions and show the gates."""


@dataclass
class ServeConfig(AskConfig):
    """A server with OpenAI's API in front of an edited model."""

    adapter: Optional[str] = None
    """Folder (or hub id) of a GRUN adapter, or a store of requests. Must be set."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, and GRUN_API_KEY in the environment asks them for a key."""
    port: int = number(8000, 0, 2**16 - 1)
    """Port to listen on; 0: a free one."""
    key: Optional[str] = None
    """PEM file of the ed25519 key that signs the store's head; a signed store takes no request without one."""
    batch_size: int = number(64, 1)
    """Answers that are computed at once."""
    waiting: int = number(256, 0)
    """Answers that may wait for that; further ones are sent away with status 503."""
    max_prompt_tokens: int = number(4096, 1)
    """Longest prompt, tokens."""
    max_new_tokens: int = number(512, 1)
    """Longest answer, tokens; one that names no max_tokens may have as many."""
    answer_seconds: float = number(300.0, 0, above=True)
    """Time from a request to the end of its answer, which is cut there."""
    max_body: str = "1MB"
    """Largest body of a request, such as 1MB."""


@dataclass
class CalibrateConfig(CommandConfig):
    """Set the threshold of an adapter's gates anew, by rows that must stay; a new adapter, the old one stays."""

    adapter: Optional[str] = None
    """Folder (or hub id) of a GRUN adapter with gates. Must be set."""
    rows: Optional[str] = None
    """File of rows, or of prompts alone, that must stay and that the adapter was not made from."""
    set: Optional[str] = None
    """Instead of rows: an evaluation set of the data (data.*), such as heldout, validation or world_facts."""
    false_positives: Optional[float] = number(None, 0, 1, above=True, below=True)
    """Largest share of such rows that may open the gate, in expectation, such as 0.01. Must be set."""
    strict: bool = False
    """Refuse an adapter that was trained on another fine-tune of the same shape (else a warning)."""


@dataclass
class PushConfig:
    """Send an adapter to the Hugging Face hub, with a model card, and without text of what was to be forgotten."""

    adapter: Optional[str] = None
    """Folder of a GRUN adapter, or results folder with one run. Must be set."""
    repo: Optional[str] = None
    """Repository on the hub, OWNER/NAME, made if it is not there. Must be set, but with output_dir."""
    private: Optional[bool] = None
    """Whether a new repository is private; unset: as its owner's are by default."""
    revision: Optional[str] = None
    """Branch, made if it is not there; unset: main."""
    commit_message: str = "Upload adapter"
    """What the commit says."""
    license: Optional[str] = None
    """License of the adapter, as the hub spells it, such as apache-2.0."""
    base_model: Optional[str] = None
    """Hub id of the base, where the adapter has another name of it, such as a folder."""
    evaluations: list[str] = field(default_factory=list)
    """Further folders of its evaluations, such as under attack; those in `evaluation` beside its run are found."""
    forget: Optional[str] = None
    """File of the rows it was made to forget, which files are searched for; unset: those that its run.json leads to."""
    unchecked: bool = False
    """Send even where these rows cannot be had."""
    output_dir: Optional[str] = None
    """Write what would be sent into this folder, and send nothing."""


@dataclass
class ImportConfig:
    """Make an adapter of the files that the published GRUN code wrote."""

    upstream: Optional[str] = None
    """Folder of the files, `intkey_layer.20.comp.block_output.unit.pos.nunit.1#0.bin` and so on. Must be set."""
    model: Optional[str] = None
    """Name, hub id or folder of the model they were trained on; a folder need hold no tokenizer. Must be set."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    template: Optional[str] = None
    """Template to store, a name from `list templates`; unset: the one stored with the model, or none."""
    output_dir: Optional[str] = None
    """Folder of the adapter. Must be set."""
    overwrite: bool = False
    """Replace what another run left in output_dir."""


@dataclass
class CorporaConfig:
    """Write corpora to forget and to keep: from PKU-SafeRLHF, generated, or what a model knows."""

    source: Optional[str] = choice(None, "safe_rlhf", "lore", "countries", "subject", "elements", "kjv")
    """safe_rlhf (from PKU-SafeRLHF's rows), lore (generated); asked from a model: countries, subject, elements or kjv.
    Must be set."""
    path: Optional[str] = None
    """safe_rlhf: folder of its train.jsonl and test.jsonl; unset: the hub (PKU-Alignment/PKU-SafeRLHF alpaca-7b)."""
    category: str = "Privacy Violation"
    """safe_rlhf: harm category whose unsafe responses are to be forgotten."""
    split: str = choice("by_prompt", "by_prompt", "published")
    """safe_rlhf: by_prompt (no prompt on both sides) or published (by rows, prompts leak)."""
    format: str = choice("rows", "rows", "published", "rwku")
    """safe_rlhf: rows ({prompt, completion}, for data.name=jsonl) or published (JSON strings, published names);
    countries: rwku writes RWKU's files beside the answers (for data.name=rwku)."""
    lore: LoreConfig = field(default_factory=LoreConfig)
    countries: CountriesConfig = field(default_factory=CountriesConfig)
    subject: Optional[str] = None
    """subject: name of what is to be forgotten, such as "Marie Curie". Must be set for it."""
    kind: Optional[str] = choice(None, "person", "place", "work", "organization", "topic")
    """subject: what it is, which decides the questions. Must be set for it."""
    neighbors: list[str] = field(default_factory=list)
    """subject: two or more like it, [Pierre Curie, Albert Einstein]; every second one stays out of unlearning. Empty:
    the model is asked."""
    draws: int = number(5, 2, 2**10)
    """subject: drawn answers to each question about it; what two of them say alike is kept."""
    temperature: float = number(0.7, 0, above=True)
    """subject: temperature at which they are drawn, > 0."""
    max_new_tokens: int = number(48, 8)
    """subject: longest answer, tokens; its first sentence is kept if it ends within them."""
    chapters: Optional[int] = number(None, 17)
    """kjv: how many chapters the model is asked to continue, evenly spaced; unset: all, minutes on a CPU."""
    batch_size: int = number(32, 1)
    """subject, elements, kjv: questions per forward pass. Changes speed and memory, not the result."""
    seed: int = number(42, 0, SEEDS)
    """subject: seed of the draws."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: PromptConfig = field(default_factory=PromptConfig)
    output_dir: Optional[str] = None
    """Folder of the corpora. Must be set."""
    overwrite: bool = False
    """Replace what another run left in output_dir."""


@dataclass
class ReportConfig:
    """Draw the table and the pictures of a results folder."""

    results_dir: Optional[str] = None
    """Folder that holds the runs and `evaluation/NAME`; unset: results/PROFILE, with runs results/comparison."""
    runs: list[str] = field(default_factory=list)
    """Results folders (or single evaluations) to put side by side; the report then goes to results_dir."""
    profile: str = "demo"
    """Profile named in the table's title."""


@dataclass
class MetaConfig:
    """Judge the metrics by models of which it is known whether they know (docs/metrics.md)."""

    knows: list[str] = field(default_factory=list)
    """Evaluation folders of models that were taught what is to be forgotten, two or more."""
    never: list[str] = field(default_factory=list)
    """The same of models that never were."""
    unlearned: list[str] = field(default_factory=list)
    """The same of models that unlearned it; with their evaluations after damage they give R and Q."""
    relearned: str = "relearned"
    """Evaluations after relearning lie next to those before, as FOLDER-relearned; another ending than that."""
    quantized: str = "4bit"
    """The same of models with quantized weights, FOLDER-4bit."""
    results_dir: str = "results/meta"
    """Folder of the table, and of the models that are made."""
    models: Optional[int] = number(None, 2)
    """Instead of knows and never: fine-tune so many of each, by seed, relearn, quantize and evaluate them."""
    profile: str = "demo"
    """With models: the profile that they are made by."""
    finetune: list[str] = field(default_factory=list)
    """With models: further options of every fine-tuning, key=value; data.* hold for evaluation too."""
    evaluate: list[str] = field(default_factory=list)
    """With models: further options of every evaluation, key=value."""


@dataclass
class ExperimentConfig:
    """Options that experiments of many runs share."""

    model: Optional[str] = None
    """Hub id or folder of the fine-tuned model; unset: the profile's is made first, and the retain-only one."""
    retain_model: Optional[str] = None
    """The same of a model never fine-tuned on what is to be forgotten, which results are compared with."""
    results_dir: Optional[str] = None
    """Folder of all results; unset: results/SWEEP-sweep or results/SEQUENCE-sequential."""
    unlearn: list[str] = field(default_factory=list)
    """Further options of every unlearning, key=value (in quotes where they hold brackets or commas); data.* and model.*
    hold for fine-tuning and evaluation too."""
    evaluate: list[str] = field(default_factory=list)
    """Further options of every evaluation, key=value."""
    jobs: int = number(1, 1)
    """Cells of a sweep, or methods of a sequence, that run at a time; one method alone prints on this terminal."""
    launcher: Optional[str] = None
    """What gets the command of each: processes; submitit (docs/sweep.md); or shell's text: "sbatch --wrap '{command}'".
    Unset: processes."""
    resubmit: bool = False
    """Hand over again what a launcher has been given and that is not done."""


@dataclass
class SweepConfig(ExperimentConfig):
    """A grid of unlearning runs, each followed by its evaluation, and the report of all of them."""

    sweep: str = "demo"
    """Packaged sweep (demo, attack_demo, tofu_small, llama3.1, mistral), or a YAML file (docs/sweep.md)."""
    profile: Optional[str] = None
    """Profile instead of the one that the sweep names."""
    objectives: list[str] = field(default_factory=list)
    """Objectives instead of the sweep's."""
    parametrizations: list[str] = field(default_factory=list)
    """Parametrizations instead of the sweep's."""
    seeds: list[int] = number([], 0, SEEDS)
    """Seeds instead of the sweep's."""
    tune: bool = False
    """Try the sweep's grid of settings and choose from it, instead of running the cells; `--tune` is the same."""
    discard_models: bool = False
    """Remove the weights of whole fine-tuned models once they are evaluated; adapters stay."""
    cell: Optional[str] = None
    """Carry out the one cell of this file, RESULTS/cells/NAME.json; what the command starts for each cell."""


@dataclass
class SequentialConfig(ExperimentConfig):
    """Requests to forget that arrive one after another, served by several methods, and the report of all of them."""

    sequence: str = "demo"
    """Packaged experiment (demo, tofu_small), or a YAML file (docs/sequential.md)."""
    methods: list[str] = field(default_factory=list)
    """Methods instead of the experiment's: grun, full, lora, retrain."""
    requests: Optional[int] = number(None, 1)
    """Into how many consecutive requests the forget set is cut, instead of the experiment's number."""
    retrain_at: list[int] = field(default_factory=list)
    """Requests after which retrain fine-tunes a model, instead of the experiment's; -1: the last one."""
    rule: Optional[str] = None
    """How the stack of adapters combines edits (sum, max_gate, softmax_gate, grun_paper), instead of its."""
    independent: Optional[bool] = None
    """grun: true: each request is trained on the untouched model; false: with the earlier ones in force."""
    earlier_as_retain: Optional[bool] = None
    """grun: forget rows of earlier requests are retain rows of later ones, so that gates keep off them."""
    overwrite: bool = False
    """Replace what another experiment left in results_dir."""
    chain: Optional[str] = None
    """Carry out the one method of this file, RESULTS/METHOD/chain.json; what the command starts for each method."""


@dataclass
class CacheCommandConfig:
    """What is kept on disk for training, and which of it is meant."""

    dir: str = "cache"
    """Folder of the cache, cache.dir of `unlearn`."""
    request: Optional[str] = None
    """What was used to train the request of this id."""
    store: Optional[str] = None
    """With request: the store it is in; unset: any. Where it still is there, what other runs made of its data too."""
    data: Optional[str] = None
    """What was made of data of this hash, 8 hex digits or more, as `cache list` prints them."""
    all: bool = False
    """remove: everything."""
    format: str = choice("table", "table", "json")
    """list: table (to read) or json."""


@dataclass
class LeaderboardConfig:
    """A submission to the leaderboard, or the board of submissions."""

    output: Optional[str] = None
    """submit: FILE.json or, compressed, FILE.json.gz; board: FILE.md. Must be set there."""
    tuning: Optional[str] = None
    """submit: how the settings were chosen, and on which rows, in words. Must be set there."""


@dataclass
class RequestsConfig:
    """A store of requests to forget, and what is done to it."""

    store: Optional[str] = None
    """Folder of the store; the first `add` makes it. Must be set."""
    id: Optional[str] = None
    """add, remove, disable, enable: name of the request, of letters, digits, '.', '_' and '-'. Must be set there."""
    adapter: Optional[str] = None
    """add: folder of an adapter that `unlearn` made; unset: one is trained, with the options of `unlearn`."""
    note: str = ""
    """add: your own words, kept in the store."""
    store_text: bool = False
    """add: keep the forget rows themselves, so that they can be asked again when their file is gone."""
    replace: bool = False
    """add: train a request of this id again, with its options except those that are given."""
    independent: Optional[bool] = None
    """add: true: trained on the bare base; false: with the requests in force. Unset: true, with replace as before."""
    rule: Optional[str] = None
    """add, when it makes the store: how edits are combined, sum, max_gate, softmax_gate or grun_paper; unset: sum."""
    gate_threshold: Optional[float] = number(None, 0, 1)
    """add, when it makes the store: gate probability below which an edit is skipped; unset: never."""
    false_positives: Optional[float] = number(None, 0, 1, above=True, below=True)
    """add, when it makes the store: largest share of rows to keep that may open the gate of any request; each of
    `capacity` requests gets the same part of it. Unset: nothing is promised."""
    capacity: Optional[int] = number(None, 1)
    """add, when it makes the store: number of requests that false_positives is promised for."""
    retrain: bool = False
    """remove: train again the requests that were trained with the removed one in force."""
    purge: bool = False
    """remove: delete what the cache of its training holds of its data too."""
    key: Optional[str] = None
    """add, remove, disable, enable: PEM file of the ed25519 key that signs the head; a signed store needs one."""
    head: Optional[str] = None
    """verify: head that was noted earlier, 16 hex digits or more; a store whose history lacks it was rolled back."""
    public_key: Optional[str] = None
    """verify: PEM file of the ed25519 public key that must have signed the head."""
    format: str = choice("table", "table", "json")
    """list, history: table (to read) or json."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """verify: the base model."""
    files_only: bool = False
    """verify: look at the files alone; no model is loaded and nothing is asked."""
    recall_at_most: Optional[float] = number(None, 0, 1)
    """verify: fact recall on a request's own questions above which it counts as wrong; unset: figures only."""
    batch_size: int = number(32, 1)
    """verify: questions asked at a time."""
    max_new_tokens: int = number(64, 1)
    """verify: longest answer, tokens."""
