"""What vLLM's configuration may be, what is changed in it, and what the owner's routes say; without vLLM."""

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edited_models import member
from paged_engine import PAGE, PAGES, PagedEngine, in_force
from tiny import DEPTH, VOCABULARY, WIDTH, tiny

from grun import GrunModel
from grun.data.rows import Row
from grun.errors import AdapterError, ConfigError, ModelError
from grun.requests.store import RequestStore
from grun_vllm import held, worker
from grun_vllm.adapters import read_in_force
from grun_vllm.edits import Edits
from grun_vllm.endpoint import Endpoint
from grun_vllm.engine import EXTENSION, SALT, V2, check_engine, options_of
from grun_vllm.runner import make_room, pages_of
from grun_vllm.step import Step

SHAPE = (WIDTH, DEPTH, VOCABULARY)
EVERYWHERE = ("every_token", "none", "every_token")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (V2, SALT, "GRUN_OWNER_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    held.HELD.clear()


def saved(folder: Path, seed: int = 1, **options: Any) -> Path:
    config, weights = member(seed, **options)
    model = GrunModel(tiny(), config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return folder


def stored(folder: Path, **adapters: Path) -> RequestStore:
    store = RequestStore.create(folder)
    for name, adapter in adapters.items():
        store.add(name, adapter, forget_rows=[Row("q?", "a")], config={})
    return store


def config(adapter: Path | str, **changes: Any) -> Any:
    """What is read of a VllmConfig; `changes`: model.dtype and the like, with _ for the point."""
    text = SimpleNamespace(hidden_size=WIDTH, num_hidden_layers=DEPTH, vocab_size=VOCABULARY)
    model = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]), hf_text_config=text, dtype=torch.float32,
        quantization=None, runner_type="generate", enable_prompt_embeds=False, enable_sleep_mode=False,
    )  # fmt: skip
    parallel = SimpleNamespace(
        pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1,
        enable_dbo=False, ubatch_size=0, worker_extension_cls="",
    )  # fmt: skip
    cache = SimpleNamespace(prefix_match_unit=None, kv_offloading_size=None)
    found = SimpleNamespace(
        model_config=model, parallel_config=parallel, cache_config=cache, speculative_config=None, lora_config=None,
        kv_transfer_config=None, ec_transfer_config=None, watermark_config=None, additional_config={},
        load_config=SimpleNamespace(model_loader_extra_config={"adapter": str(adapter)}),
    )  # fmt: skip
    for name, value in changes.items():
        of, _, field = name.partition("__")
        setattr(getattr(found, of) if field else found, field or of, value)
    return found


REFUSED = {
    "model_config__dtype": (torch.float16, "dtype float16 was not tried; set --dtype to float32 or bfloat16"),
    "model_config__quantization": ("awq", "quantized by awq"),
    "model_config__runner_type": ("pooling", "the runner is pooling"),
    "model_config__hf_config": (SimpleNamespace(architectures=["OtherForCausalLM"]), "the model is OtherForCausalLM"),
    "model_config__enable_prompt_embeds": (True, "enable_prompt_embeds"),
    "model_config__enable_sleep_mode": (True, "enable_sleep_mode"),
    "parallel_config__pipeline_parallel_size": (2, "pipeline_parallel_size 2"),
    "parallel_config__data_parallel_size": (2, "data_parallel_size 2"),
    "parallel_config__decode_context_parallel_size": (2, "decode_context_parallel_size 2"),
    "parallel_config__enable_dbo": (True, "micro-batches"),
    "parallel_config__worker_extension_cls": ("other.Worker", "other.Worker"),
    "cache_config__prefix_match_unit": (8, "prefix_match_unit"),
    "cache_config__kv_offloading_size": (1.0, "kv_offloading_size"),
    "speculative_config": (object(), "speculative_config was not tried"),
    "lora_config": (object(), "lora_config was not tried"),
    "kv_transfer_config": (object(), "kv_transfer_config was not tried"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_tried_is_refused_before_the_model_loads(name: str, tmp_path: Path) -> None:
    value, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said) as error:
        check_engine(config(saved(tmp_path / "a"), **{name: value}), "0.32.0")
    assert "\n" not in str(error.value)


def test_another_vllm_and_model_runner_v2_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="made for vLLM 0.32.x, this is 0.33.1"):
        check_engine(config(adapter), "0.33.1")
    monkeypatch.setenv(V2, "1")
    with pytest.raises(ConfigError, match="model runner V2 is not served"):
        check_engine(config(adapter), "0.32.0")


@pytest.mark.parametrize(
    ("extra", "said"),
    [({}, "must name"), ({"adapter": 3}, "adapter"), ({"adapter": "a", "strikt": True}, "strikt"), (None, "must name")],
)
def test_options_that_do_not_exist_are_refused(extra: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options_of(extra)


def test_what_cannot_be_put_in_force_is_refused(tmp_path: Path) -> None:
    other = config(saved(tmp_path / "a"))
    other.model_config.hf_text_config.hidden_size = 2 * WIDTH
    with pytest.raises(AdapterError, match="made for hidden size 32"):
        check_engine(other, "0.32.0")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match="adapter of LORA"):
        check_engine(config(tmp_path / "lora"), "0.32.0")
    with pytest.raises(AdapterError, match="no gate"):
        check_engine(config(saved(tmp_path / "bare", gate="none")), "0.32.0")
    stored(tmp_path / "store", one=tmp_path / "a")
    (tmp_path / "store/requests/one/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match="was changed"):
        check_engine(config(tmp_path / "store"), "0.32.0")


def test_what_edits_need_is_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model runner V1, the workers' methods, a key of its own for compiled code, pages hashed with prompts' ends."""
    every = config(saved(tmp_path / "every", rule=EVERYWHERE), additional_config={"mine": 1})
    check_engine(every, "0.32.0")
    assert every.parallel_config.worker_extension_cls == EXTENSION
    assert os.environ[V2] == "0"
    assert SALT not in os.environ
    check_engine(every, "0.32.0")  # vLLM makes its configuration more than once
    at_end = config(saved(tmp_path / "end", blocks=(1, 2)))
    check_engine(at_end, "0.32.0")
    assert os.environ[SALT] == "1"
    keys = [every.additional_config, at_end.additional_config]
    stored(tmp_path / "store", one=tmp_path / "every")
    of_store = config(tmp_path / "store")
    check_engine(of_store, "0.32.0")
    keys.append(of_store.additional_config)
    assert keys[0]["mine"] == 1
    assert len({json.dumps(key["grun"]) for key in keys}) == 3
    monkeypatch.delenv(SALT)
    check_engine(config(tmp_path / "store"), "0.32.0")  # to which a request may come that writes at prompts' ends
    assert os.environ[SALT] == "1"


def test_a_pass_that_says_nothing_of_its_tokens_is_refused() -> None:
    engine = PagedEngine(tiny(dtype=torch.float32), in_force({"a": member(1)}))
    states = torch.zeros(3, WIDTH)
    with pytest.raises(ModelError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        engine.held.apply(states, None, 1)
    with engine.held.resting():  # as passes that warm up do
        engine.held.apply(states, None, 1)
    assert not bool(states.any())


def test_states_stay_bit_for_bit_where_nothing_is_written() -> None:
    """Tokens before the last one of a prompt, and those of a prompt whose gate is below its threshold."""
    at_end, hard = member(1, gate_bias=9.0), member(1, gate_bias=-9.0)
    hard[0].gate_threshold = 0.5
    torch.manual_seed(0)
    for of, changed in ((at_end, [4]), (hard, [])):
        engine = PagedEngine(tiny(dtype=torch.float32), in_force({"a": of}))
        hidden, residual = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
        before = hidden.clone(), residual.clone()
        one = SimpleNamespace(
            starts=[0, 5], past=[0], prompt=[5], table=[[1, 2]], page_size=PAGE, device=torch.device("cpu"), ids=None
        )
        step = Step(**{key: torch.tensor(v).numpy() if isinstance(v, list) else v for key, v in vars(one).items()})
        with engine.held.edits.passing(step):
            engine.held.apply(hidden, residual, 1)
        same = [bool((h == b).all() and (r == s).all()) for h, r, b, s in zip(hidden, residual, *before, strict=True)]
        assert same == [row not in changed for row in range(5)]
        assert not bool(residual[changed].any())


def test_memory_of_a_page_is_counted() -> None:
    """Accumulated gates: a number for each edit; pools: the states' width, twice for maxmin, and the gate's logit.

    Windows: the states of two blocks at each token, in the type of the model's.
    """
    robust = member(1, ("every_token", "running_max", "every_token"))
    pooled = member(2, ("last_prompt", "none", "sticky"), gate_blocks=(0, 1), gate_pool="maxmin")
    assert PagedEngine(tiny(), in_force({"a": member(1)})).held.edits.page_bytes(PAGE) == 0
    assert PagedEngine(tiny(), in_force({"a": robust})).held.edits.page_bytes(PAGE) == 4 * 2
    assert PagedEngine(tiny(), in_force({"a": pooled})).held.edits.page_bytes(PAGE) == 4 * (2 * 2 * WIDTH + 1)
    windows = member(3, ("last_prompt", "none", "last_prompt"), gate_blocks=(0, 1), gate_pool="windows")
    edits = Edits(in_force({"a": windows}), torch.device("cpu"), torch.bfloat16)
    assert edits.page_bytes(PAGE) == PAGE * 2 * 2 * WIDTH


def test_the_cache_leaves_room_for_what_gates_remember() -> None:
    """Of 1,000,000 bytes and pages of 2 x 96 + 8 bytes 4 % are the gates'; of another model's worker all is its own."""

    class Worker:
        def __init__(self, load_format: str) -> None:
            self.vllm_config = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
            specs = {name: SimpleNamespace(page_size_bytes=96, block_size=PAGE) for name in ("one", "two")}
            self.model_runner = SimpleNamespace(get_kv_cache_spec=lambda: specs)

        def determine_available_memory(self) -> int:
            return 1_000_000

    robust = member(1, ("every_token", "running_max", "every_token"))
    held.HELD[:] = [PagedEngine(tiny(), in_force({"a": robust})).held]
    make_room(Worker)
    make_room(Worker)  # once in a process
    assert Worker("grun").determine_available_memory() == 960_000
    assert Worker("auto").determine_available_memory() == 1_000_000


def test_pages_are_counted_as_block_tables_number_them() -> None:
    runner = SimpleNamespace(input_batch=SimpleNamespace(block_table=[SimpleNamespace(block_size=16)]))
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=64))
    assert pages_of(runner, SimpleNamespace(num_blocks=10, kv_cache_groups=[group])) == 40
    with pytest.raises(ModelError, match="2 groups"):
        pages_of(runner, SimpleNamespace(num_blocks=10, kv_cache_groups=[group, group]))


class Workers:
    """What an endpoint reaches of vLLM: a worker of this process, and what was done in which order."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def collective_rpc(self, method: str) -> list[Any]:
        self.done.append(method)
        return [getattr(worker.GrunWorker(), method)()]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert clear_cache
        self.done.append(f"pause {mode}")

    async def resume_generation(self) -> None:
        self.done.append("resume")


def serving(adapter: Path) -> tuple[Endpoint, Workers]:
    found = read_in_force(str(adapter), SHAPE)
    held.HELD[:] = [held.Held(held.Edits(found, torch.device("cpu")), str(adapter), SHAPE)]
    held.HELD[0].open(PAGES, PAGE)
    endpoint, workers = Endpoint(), Workers()
    asyncio.run(endpoint.init_state(workers, None, SimpleNamespace(load_format="grun", model="base")))
    return endpoint, workers


def test_a_store_is_read_anew_while_it_is_served(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", one=saved(tmp_path / "a"))
    endpoint, workers = serving(tmp_path / "store")
    store.add("two", saved(tmp_path / "b", 2), forget_rows=[Row("q?", "a")], config={})
    told = asyncio.run(endpoint.requests())
    assert (told["model"], told["kind"]) == ("base", "store")
    assert [one["name"] for one in told["requests"]] == ["one"]
    workers.done.clear()
    told = asyncio.run(endpoint.reload(wait=False))
    assert [(one["name"], one["active"], one["added"] is None) for one in told["requests"]] == [
        ("one", True, False),
        ("two", True, False),
    ]
    assert workers.done == ["grun_requests", "grun_prepare", "pause keep", "grun_switch", "resume", "grun_requests"]
    store.set_state("one", "disabled")
    told = asyncio.run(endpoint.reload(wait=True))
    assert [(one["name"], one["active"]) for one in told["requests"]] == [("one", False), ("two", True)]
    assert "pause wait" in workers.done


def test_a_store_that_is_damaged_changes_nothing(tmp_path: Path) -> None:
    stored(tmp_path / "store", one=saved(tmp_path / "a"))
    endpoint, workers = serving(tmp_path / "store")
    before = held.HELD[0].edits
    shutil.rmtree(tmp_path / "store/requests/one")
    answer = asyncio.run(endpoint.reload(wait=False))
    assert answer.status_code == 409
    assert "what was in force stays so" in json.loads(answer.body)["error"]["message"]
    assert held.HELD[0].edits is before
    assert "resume" not in workers.done


def test_one_adapter_is_not_read_anew(tmp_path: Path) -> None:
    endpoint, _ = serving(saved(tmp_path / "a"))
    told = asyncio.run(endpoint.requests())
    assert (told["kind"], [one["name"] for one in told["requests"]]) == ("adapter", ["a"])
    assert asyncio.run(endpoint.reload(wait=False)).status_code == 409


def test_routes_are_the_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastapi = pytest.importorskip("fastapi")
    testing = pytest.importorskip("fastapi.testclient")
    bare = fastapi.FastAPI()
    Endpoint().attach_router(bare)
    assert not [route for route in bare.routes if "/grun" in str(getattr(route, "path", ""))]
    monkeypatch.setenv("GRUN_OWNER_KEY", "secret")
    endpoint, _ = serving(saved(tmp_path / "a"))
    app = fastapi.FastAPI()
    endpoint.attach_router(app)
    client = testing.TestClient(app)
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
        assert client.get("/grun/requests", headers=header).status_code == 401
        assert client.post("/grun/reload", headers=header).status_code == 401
    told = client.get("/grun/requests", headers={"Authorization": "Bearer secret"})
    assert (told.status_code, told.json()["requests"][0]["name"]) == (200, "a")
    other = Endpoint()
    app = fastapi.FastAPI()
    other.attach_router(app)  # on a server without --load-format grun
    answer = testing.TestClient(app).get("/grun/requests", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 409
