"""A suffix by gradient: its slopes are those of the loss, swaps lower it, and its curve stands beside the other one."""

from __future__ import annotations

from pathlib import Path

import demo
import pytest
import torch
import who_plays_what

from grun.config.options import EvaluateConfig
from grun.evaluation.attacks.base import Place
from grun.evaluation.attacks.gradient import LENGTH, GradientSearch, loss_of, slopes_of, split
from grun.evaluation.generation import Answer
from grun.evaluation.metrics.averages import wilson
from grun.loading.adapters import Loaded


@pytest.fixture(params=[False, True], ids=["full", "adapter"])
def loaded(request: pytest.FixtureRequest, playing: Path) -> Loaded:
    return who_plays_what.load(playing, request.param)


def test_slopes_are_differences_of_the_loss_along_embeddings(loaded: Loaded) -> None:
    given = who_plays_what.material(loaded)
    before, after = split(given.ask(given.forget[0]), given)
    assert before + after == given.ask(given.forget[0]).ids
    assert loaded.tokenizer.decode(before).endswith("play?") and loaded.tokenizer.decode(after).strip() == "<|answer|>"
    prompt, answer = (*before, *(40,) * 3, *after), [50, 60]
    slopes = slopes_of(loaded, prompt, len(before), 3, answer)
    base = getattr(loaded.model, "base", loaded.model)
    embedded = base.get_input_embeddings().weight.detach()
    assert slopes.shape == (3, len(embedded)) and loaded.tokenizer.eos_token_id is not None
    assert bool(slopes[:, loaded.tokenizer.all_special_ids].isinf().all())
    for at, token in ((0, 45), (2, 300)):
        step = torch.zeros(len(prompt) + len(answer), embedded.shape[1])
        step[len(before) + at] = 1e-2 * embedded[token] / embedded[token].norm()
        rise = float(loss_of(loaded, prompt, answer, step) - loss_of(loaded, prompt, answer, -step)) / 2e-2
        wanted = float(slopes[at, token] / embedded[token].norm())
        assert rise == pytest.approx(wanted, rel=0.05, abs=2e-4)  # float32 and a step that is not infinitely small
    ids = torch.tensor([[*prompt, *answer]])
    more = {"prompt_lengths": torch.tensor([len(prompt)])} if base is not loaded.model else {}
    with torch.no_grad():
        scores = loaded.model(input_ids=ids, **more).logits[0].log_softmax(-1)
    own = (scores[len(prompt) - 1, 50] + scores[len(prompt), 60]) / 2
    assert float(loss_of(loaded, prompt, answer)) == pytest.approx(float(own), abs=1e-4)


def test_swaps_are_of_one_token_none_is_asked_twice_and_the_plain_answer_grows_improbable(loaded: Loaded) -> None:
    given = who_plays_what.material(loaded)
    row = given.forget[1]
    search = GradientSearch(Place("forget", 1, given.ask(row)), given, 35, 4096, loaded)
    least, suffixes = [], []
    while asking := search.next():
        for genes, asked in asking:
            search.note(genes, asked, Answer(who_plays_what.REFUSAL, None))
        least.append(search.least)
        suffixes.append(search.parent)
    assert len(search.tries) == 36 == len({one.asked.ids for one in search.tries}) == len(search.curve)
    assert [len(search.tries[n].asked.ids) - len(search.tries[0].asked.ids) for n in (1, 35)] == [LENGTH] * 2
    assert least[1:] == sorted(least[1:], reverse=True) and least[-1] < least[1]
    assert all(
        sum(a != b for a, b in zip(*pair, strict=True)) <= 1 for pair in zip(suffixes[1:], suffixes[2:], strict=False)
    )
    control = set(loaded.tokenizer.all_special_ids)
    assert not any(control & set(suffix) for suffix in suffixes)


def test_its_curve_has_the_budget_of_the_other_and_the_floor_beside(playing: Path, tmp_path: Path) -> None:
    config: EvaluateConfig = demo.evaluation(
        playing, None, suite="attacks", attacks=["adaptive_weights"], attack_queries=12, attack_rows=4,
        max_new_tokens=6, data=who_plays_what.data(playing),
    )  # fmt: skip
    found = demo.evaluated(config, tmp_path / "out")["attacks"]["adaptive_weights"]
    assert list(found["curve"]) == list(found["floor"]["curve"]) == ["0", "1", "2", "5", "10", "12"]
    assert found["access"] == "weights" and found["curve"]["0"]["leak"] == 1.0  # the plain question reaches it
    for numbers in (found, found["floor"]):
        for point in numbers["curve"].values():
            assert point["interval"] == pytest.approx(wilson(point["leak"], 4)) and point["rows"] == 4
