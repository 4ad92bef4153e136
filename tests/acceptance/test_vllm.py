"""The service before a real vLLM on a CPU: arms, losslessness, an engine that dies, and what goes wrong at start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from isthmus.edge_agent import LanguageAgent, LanguageConfig
from isthmus.edge_agent.language.request import Summary
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.language.checkpoint.tokenizer import Message
from isthmus.models.vision.bundle import Bundle
from tests.acceptance.engine_parts import PROMPTS, chat, check, photo_route, tokens_of, wait_line
from tests.bench.engine_process import EngineProcess, wait_described
from tests.bench.processes import CloudProcess, free_port
from tests.bench.tiny_llama import write_tiny_llama

KEY, WRONG = "sk-acceptance-0123456789abcdef", "sk-wrong-fedcba9876543210"
KEY_NAME = "ISTHMUS_CLOUD_ENGINE_KEY"
TOKENS = 32


@pytest.fixture(scope="module")
def vllm(smollm2: Path) -> Iterator[EngineProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        engine = EngineProcess(f"tests/acceptance/vllm.sh {smollm2} {{port}} --dtype float32", free_port())
        with engine:
            yield engine


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text(f"{KEY}\n")
    return path


def service(
    url: str, tokenizer: Path, *arguments: str, bundle: Bundle | None = None, check_tokens: int = 100
) -> CloudProcess:
    """A service before the engine at `url`."""
    engine = ("--engine-url", url, "--engine-tokenizer", str(tokenizer), "--engine-check-tokens", str(check_tokens))
    bundles = () if bundle is None else (bundle.folder,)
    return CloudProcess(*bundles, arguments=("--threads", "1", *engine, *arguments))


@pytest.fixture(scope="module")
def cloud(vllm: EngineProcess, smollm2: Path, key_file: Path) -> Iterator[CloudProcess]:
    """With the key from a file."""
    with service(vllm.url, smollm2, "--engine-key-file", str(key_file)) as process:
        wait_described(process.target)
        yield process
    assert KEY not in process.log_text


def test_the_check_says_what_is_served(cloud: CloudProcess) -> None:
    status, text = check(cloud)
    assert (status, text.splitlines()[0]) == (0, "SERVING")
    assert "engine: smollm2, context 2048, cloud, verify; 0 of " in text


@pytest.mark.parametrize(
    ("arguments", "arm", "made"),
    [
        (("--arm", "cloud"), "cloud", {"cloud"}),
        ((), "cloud", {"cloud"}),
        (("--arm", "verify", "--draft", "lookup"), "verify", {"cloud", "draft"}),
        (("--model", "smollm2", "--arm", "cloud"), "cloud", {"cloud"}),
        (("--model", "smollm2", "--arm", "verify"), "verify", {"cloud", "draft"}),
        (("--model", "smollm2", "--arm", "edge"), "edge", {"edge"}),
        (("--model", "smollm2", "--arm", "auto"), "auto", {"cloud", "draft", "edge"}),
    ],
)
def test_arms_in_a_chat(cloud: CloudProcess, arguments: tuple[str, ...], arm: str, made: set[str]) -> None:
    status, answer, _ = chat(cloud, "--max-tokens", "16", *arguments, question=PROMPTS[2])
    assert status == 0
    assert (answer["arm"], answer["degraded"]) == (arm, False)
    assert answer["tokens"] == sum(answer["made"].values()) > 0
    assert {name for name, count in answer["made"].items() if count} <= made


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--arm", "handoff"), "arm handoff needs a bundle of exits, and none is configured"),
        (("--arm", "verify"), "arm verify needs drafts: a model on the device, or --draft lookup"),
        (("--model", "smollm2", "--arm", "verify", "--temperature", "0.7"), "temperature"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_in_a_line(
    cloud: CloudProcess, arguments: tuple[str, ...], error: str
) -> None:
    status, answer, stderr = chat(cloud, "--max-tokens", "4", *arguments)
    said = answer.get("error") or stderr
    print(f"{' '.join(arguments)}: {said}")
    assert status != 0
    assert error in said
    assert len(said.splitlines()) == 1


def test_cloud_and_verify_commit_the_same_tokens(cloud: CloudProcess) -> None:
    """Drafts of the 8-bit model, against the engine's float32."""
    config = LanguageConfig("smollm2", (cloud.target,), threads=1, on_loss="wait", connect_s=10.0)
    with LanguageAgent(config) as agent:
        for text in PROMPTS:
            prompt = tuple(agent.tokenizer.chat([Message("user", text)]))
            answers = {arm: tokens_of(agent, prompt, arm, TOKENS)[0] for arm in ("cloud", "verify")}
            assert answers["verify"] == answers["cloud"]


@pytest.mark.parametrize(
    ("flags", "key", "problem"),
    [
        ((), WRONG, "the engine refuses the key of this service (HTTP 401)"),
        ((), "", "the engine asks for a key (HTTP 401)"),
        (("--engine-model", "llama-70b"), KEY, "the engine does not hold the model llama-70b, it holds smollm2"),
        (("other tokenizer",), KEY, "the engine has another tokenizer than --engine-tokenizer"),
    ],
)
def test_what_is_wrong_at_start_is_one_line_and_photos_are_served(
    vllm: EngineProcess, smollm2: Path, tiny_bundle: Bundle, photo: Image.Image, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], key: str, problem: str,
) -> None:  # fmt: skip
    if key:
        monkeypatch.setenv(KEY_NAME, key)
    tokenizer = smollm2
    if flags == ("other tokenizer",):
        tokenizer, flags = write_tiny_llama(tmp_path / "tiny"), ()
    with service(vllm.url, tokenizer, *flags, bundle=tiny_bundle) as cloud:
        line = wait_line(cloud, "cannot be used")
        print(f"log: {line}")
        assert problem in line
        assert photo_route(cloud, tiny_bundle, photo) == "split"
        status, text = check(cloud)
        print(f"--check, exit status {status}: {text}")
        assert (status, text.splitlines()[0]) == (1, "SERVING")
        assert problem in text
        status, answer, stderr = chat(cloud, "--arm", "cloud", "--connect-s", "1")
        said = answer.get("error") or stderr
        print(f"chat: {said}")
        assert status != 0
        assert problem in said
        assert len(said.splitlines()) == 1
    for secret in (KEY, WRONG):
        assert secret not in cloud.log_text + text + said


def test_a_key_from_the_environment(vllm: EngineProcess, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_NAME, KEY)
    with service(vllm.url, smollm2, check_tokens=0) as cloud:
        wait_described(cloud.target)
    assert KEY not in cloud.log_text


def test_an_engine_killed_in_mid_answer_loses_nothing_and_a_service_without_one_waits(
    vllm: EngineProcess, cloud: CloudProcess, smollm2: Path, key_file: Path, tiny_bundle: Bundle, photo: Image.Image
) -> None:
    """An answer of each arm; while the engine is away, another service starts, which uses it when it is back."""
    config = LanguageConfig("smollm2", (cloud.target,), threads=1, on_loss="wait", wait_s=600.0, connect_s=10.0)
    arms: tuple[Arm, ...] = ("cloud", "verify")
    found: dict[Arm, tuple[list[int], Summary]] = {}
    begun = threading.Barrier(len(arms) + 1)
    with LanguageAgent(config) as agent:
        prompt = tuple(agent.tokenizer.chat([Message("user", PROMPTS[0])]))
        expected, _ = tokens_of(agent, prompt, "cloud", 64)

        def answer(arm: Arm) -> None:
            found[arm] = tokens_of(agent, prompt, arm, 64, lambda: [begun.wait(60), begun.wait(60)])  # type: ignore[arg-type,return-value]

        threads = [threading.Thread(target=answer, args=(arm,)) for arm in arms]
        for thread in threads:
            thread.start()
        begun.wait(60)
        vllm.kill()
        begun.wait(60)
        with service(vllm.url, smollm2, "--engine-key-file", str(key_file), bundle=tiny_bundle) as late:
            print(f"log: {wait_line(late, 'cannot be used')}")
            print(f"--check: {check(late)}")
            assert photo_route(late, tiny_bundle, photo) == "split"
            vllm.start()
            wait_described(late.target)
            print(f"log: {wait_line(late, 'is used')}")
        for thread in threads:
            thread.join()
    for arm in arms:
        assert found[arm][0] == expected
        assert not found[arm][1].degraded
