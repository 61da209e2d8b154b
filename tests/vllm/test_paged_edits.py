"""Edits of many sequences side by side, on pages, are those of GrunModel and GrunStack of each alone."""

import functools
from collections.abc import Iterator

import pytest
import torch
from edited_models import DESIGNS, PUBLISHED, Member, member
from paged_engine import PAGE, PagedEngine, in_force
from tiny import random_rows, tiny
from torch import Tensor, nn

from grun import GrunModel, GrunStack
from grun_vllm.adapters import InForce

TURN = (7, 9)
"""Tokens that begin a user's turn."""
NEW = 5
SEVERAL = ("every_token", "running_max", "every_token")
POOLED = [("last_prompt", "none", "last_prompt"), ("last_prompt", "none", "sticky"), ("every_token", "none", "sticky")]
POOLED += [("every_token", "none", "every_token")]


def agree(got: Tensor, wanted: Tensor) -> None:
    """Both are float32 and sum in other orders; edits as strong as these make of that up to 2e-4, and tokens differ."""
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-4)


def strong(of: Member) -> Member:
    """With edits that change tokens, and gates that differ between tokens."""
    config, weights = of
    torch.manual_seed(17)
    for name, values in weights.items():
        if name.endswith("source.weight"):
            nn.init.normal_(values, std=2.0)
        elif "gate" in name and values.dim() == 2:
            values.mul_(3)
        elif "follow_up" in name:
            values.fill_(9.0)  # a turn is about those before it too
    return config, weights


def made(seed: int, rule: tuple[str, str, str], **options: object) -> Member:
    return strong(member(seed, rule, **{"blocks": (1, 3), "reset_ids": TURN, **options}))


def pooled(seed: int, rule: tuple[str, str, str], pool: str = "maxmin", **options: object) -> Member:
    return made(seed, rule, gate_blocks=(0, 1), gate_pool=pool, **options)


def refusing() -> Member:
    return made(
        8, POOLED[1], blocks=(), gate_blocks=(0, 2), gate_pool="mean", action="refuse", answer_ids=(5, 6, 7, 2),
        gate_bias=0.0,
    )  # fmt: skip


def with_threshold(of: Member, threshold: float) -> Member:
    config, weights = of
    config.gate_threshold = threshold
    return config, weights


SINGLE = {
    **{f"own gates {'/'.join(rule)}": functools.partial(made, 3, rule) for rule in DESIGNS},
    **{f"pooled {'/'.join(rule)}": functools.partial(pooled, 4, rule) for rule in POOLED},
    **{f"pool {pool} {rule[0]}": functools.partial(pooled, 5, rule, pool)
       for pool in ("last", "max", "mean") for rule in (POOLED[1], POOLED[3])},
    **{f"pool windows {rule[2]}": functools.partial(pooled, 5, rule, "windows") for rule in POOLED[:2]},
    "wide gate": lambda: made(6, SEVERAL, gate="noisy_mlp_3"),
    "activation": lambda: made(6, PUBLISHED, activation="relu"),
    "threshold": lambda: with_threshold(made(7, SEVERAL), 0.6),
    "pooled threshold": lambda: with_threshold(pooled(7, POOLED[1]), 0.8),
    "refuse": refusing,
}  # fmt: skip
MIXED = {
    "published": lambda: made(11, PUBLISHED, gate="mlp_3"),
    "robust": lambda: made(12, SEVERAL, gate="noisy_mlp_3", blocks=(2, 3)),
    "other robust": lambda: made(13, SEVERAL, gate="noisy_mlp_3", blocks=(1, 2)),
    "sticky": lambda: made(14, DESIGNS[1], blocks=(0, 3), rank=2),
    "pooled": lambda: pooled(15, POOLED[1], blocks=(2, 3)),
    "other pooled": lambda: pooled(16, POOLED[1], blocks=(1, 2)),
    "pooled at each": lambda: pooled(17, POOLED[3]),
    "windows": lambda: pooled(19, POOLED[1], "windows", blocks=(2, 3)),
    "other windows": lambda: pooled(20, POOLED[1], "windows", blocks=(1, 2)),
    "thresholded": lambda: with_threshold(pooled(18, POOLED[1], "mean", gate="mlp_3"), 0.5),
}
STORES = {
    "all of one kind": (["robust", "other robust"], "sum", None),
    "pooled of one kind": (["pooled", "other pooled"], "sum", None),
    "mixed": (list(MIXED), "sum", None),
    "mixed, threshold": (list(MIXED), "sum", 0.5),
    **{rule: (["robust", "sticky", "pooled"], rule, None) for rule in ("max_gate", "softmax_gate", "grun_paper")},
}
PROMPTS = random_rows([9, 4, 22, 1, 13], seed=5)
PROMPTS[2] += random_rows([25], seed=9)[0]
PROMPTS[2][6:8] = PROMPTS[2][15:17] = PROMPTS[2][31:33] = PROMPTS[0][3:5] = TURN


def single(name: str) -> tuple[InForce, dict[str, list[int]], dict[str, Tensor]]:
    config, weights = SINGLE[name]()
    model = GrunModel(tiny(dtype=torch.float32), config)
    model.load_state_dict(weights)
    return in_force({"a": (config, weights)}), *_wanted(model.eval())


def stacked(name: str) -> tuple[InForce, dict[str, list[int]], dict[str, Tensor]]:
    names, rule, threshold = STORES[name]
    members = {one: MIXED[one]() for one in names}
    model = GrunStack(tiny(dtype=torch.float32), rule=rule, gate_threshold=threshold)
    model.add_weights(members)
    return in_force(members, store=True, rule=rule, threshold=threshold), *_wanted(model.eval())


def _wanted(model: GrunModel | GrunStack) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Of each prompt by itself the prompt and new tokens, and the logits of these."""
    tokens, logits = {}, {}
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        answer = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tokens[str(number)], logits[str(number)] = answer.sequences[0].tolist(), torch.stack(answer.logits, dim=1)[0]
    return tokens, logits


@functools.cache
def wanted(name: str) -> tuple[InForce, dict[str, list[int]], dict[str, Tensor]]:
    return single(name) if name in SINGLE else stacked(name)


@pytest.fixture(params=[*SINGLE, *STORES])
def design(request: pytest.FixtureRequest) -> Iterator[tuple[InForce, dict[str, list[int]], dict[str, Tensor]]]:
    yield wanted(request.param)


def engine_of(found: InForce) -> PagedEngine:
    return PagedEngine(tiny(dtype=torch.float32, attn_implementation="eager"), found)


def test_prompts_in_chunks_beside_answers(design: tuple[InForce, dict[str, list[int]], dict[str, Tensor]]) -> None:
    """Chunks that end anywhere on a page, sequences that come later, others that end, order that changes."""
    found, tokens, logits = design
    engine = engine_of(found)
    for number, prompt in enumerate(PROMPTS):
        engine.add(str(number), prompt)
    given: dict[str, list[Tensor]] = {name: [] for name in engine.sequences}
    chunks = {"0": 3, "1": 4, "2": 7, "3": 1, "4": 5}
    turn = 0
    while any(len(kept) < NEW for kept in given.values()):
        left = [name for name, kept in given.items() if len(kept) < NEW and (name != "4" or turn > 1)]
        counts = {}
        for name in left if turn % 2 else reversed(left):
            one = engine.sequences[name]
            counts[name] = min(chunks[name] + turn % 3, len(one.ids) - one.past)
        for name, row in engine.run(**counts).items():
            if engine.sequences[name].past >= len(PROMPTS[int(name)]):
                given[name].append(row)
        turn += 1
    for name in given:
        agree(torch.stack(given[name]), logits[name])
        assert engine.sequences[name].ids == tokens[name]


def test_a_sequence_whose_pages_were_taken_away_goes_on(
    design: tuple[InForce, dict[str, list[int]], dict[str, Tensor]],
) -> None:
    found, tokens, logits = design
    engine = engine_of(found)
    engine.add("2", PROMPTS[2])
    engine.add("0", PROMPTS[0])
    engine.run(**{"2": len(PROMPTS[2]), "0": 2})
    engine.run(**{"2": 1, "0": 5})
    engine.preempt("2")
    engine.add("4", PROMPTS[4])
    given = engine.run(**{"4": len(PROMPTS[4]), "0": 2})  # both end
    agree(torch.stack([given["0"], given["4"]]), torch.stack([logits["0"][0], logits["4"][0]]))
    agree(engine.run(**{"2": 6, "0": 1})["0"], logits["0"][1])
    last = engine.run(**{"0": 1, "2": len(PROMPTS[2]) + 2 - 6})
    agree(last["2"], logits["2"][2])
    agree(last["0"], logits["0"][2])
    assert engine.sequences["2"].ids == tokens["2"][: len(PROMPTS[2]) + 3]
    engine.preempt("2")
    engine.add("twin", engine.sequences["2"].ids, shares=("2", 12))  # which have part of the answer
    engine.sequences["twin"].prompt = len(PROMPTS[2])
    agree(engine.run(**{"2": len(PROMPTS[2]) + 3, "twin": len(PROMPTS[2]) + 3 - 12 * PAGE})["twin"], logits["2"][3])


@pytest.mark.parametrize("together", [False, True])
def test_pages_of_a_prompt_begin_another_one(
    design: tuple[InForce, dict[str, list[int]], dict[str, Tensor]], together: bool
) -> None:
    """As prefix caching has it: pages of a prompt that end before its last token go to a prompt that begins alike.

    Also in the pass that fills them: the scheduler counts pages as cached when it hands them out.
    """
    found, tokens, logits = design
    engine = engine_of(found)
    longer = PROMPTS[2][: 5 * PAGE] + random_rows([5], seed=8)[0]
    engine.add("other", longer)
    engine.run(other=3 * PAGE + 1)
    left = len(longer) - 3 * PAGE - 1
    if not together:
        engine.run(other=left)
    engine.add("2", PROMPTS[2], shares=("other", 5))
    given = [engine.run(**{"other": left if together else 1, "2": len(PROMPTS[2]) - 5 * PAGE})["2"]]
    given.append(engine.run(**{"2": 1})["2"])
    agree(torch.stack(given), logits["2"][:2])
    assert engine.sequences["2"].ids == tokens["2"][: len(PROMPTS[2]) + 2]


@pytest.mark.parametrize("name", ["refuse", "pooled threshold", "mixed", "own gates last_prompt/none/sticky"])
def test_the_cases_are_no_empty_ones(name: str) -> None:
    """Edits change some answer, and where a gate is hard it is open for one prompt and shut for another."""
    found, tokens, _ = wanted(name)
    bare = engine_of(in_force({}, store=True))
    changed = []
    for number, prompt in enumerate(PROMPTS):
        bare.add(str(number), prompt)
        bare.run(**{str(number): len(prompt)})
        for _ in range(NEW - 1):
            bare.run(**{str(number): 1})
        changed.append(bare.sequences[str(number)].ids != tokens[str(number)])
    assert any(changed)
    if name in ("refuse", "pooled threshold"):
        assert not all(changed)
