"""`docs/tutorials/own-model.md` followed to the letter, with a network and photos that are not in the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.models.recipes.vision.elpv_data import load
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.manifest import Preprocessing
from tests.bench.processes import ROOT, free_port
from tests.bench.proxy import LinkProxy, LinkSpec
from tests.contract.test_readme import environment

PAGE = (ROOT / "docs" / "tutorials" / "own-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CODES = [block for kind, block in BLOCKS if kind == "python"]  # a classifier, a transformer, a detector
ALL = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS, VIT, DETECTOR = ALL[:6], ALL[6], ALL[7:]
SIDE, PHOTOS = 64, 240
# As `split` does by default.
SEEN = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225))

pytestmark = pytest.mark.timeout(1200)  # it trains


def folder_of(label: int) -> str:
    return "1_defective" if label else "0_functional"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page asks for: `mynet.py` as it stands there, its trained weights, `cells`, and a photo."""
    root, cells = tmp_path_factory.mktemp("own"), load("train")
    code, *_ = CODES
    (root / "mynet.py").write_text(code, encoding="utf-8")
    for name, path, label in zip(range(PHOTOS), cells.paths, cells.labels_N, strict=False):
        target = root / "cells" / folder_of(label)
        target.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.resize((SIDE, SIDE)).save(target / f"{name}.png")
    shutil.copy(load("calibration").paths[0], root / "photo.png")
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    net, written = (
        names["network"](),
        [root / "cells" / folder_of(cells.labels_N[n]) / f"{n}.png" for n in range(PHOTOS)],
    )
    images_N3HW = torch.from_numpy(np.stack([preprocess(Image.open(path).convert("RGB"), SEEN) for path in written]))
    optimizer, labels_N = torch.optim.AdamW(net.parameters(), 1e-3), torch.from_numpy(cells.labels_N[:PHOTOS])
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images_N3HW), labels_N).backward()
        optimizer.step()
    torch.save(net.state_dict(), root / "mynet.pt")
    return root


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With one thread: the other core is the other tests'."""
    alone = {**environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=alone, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The cloud of the page behind an emulated link, once the commands before it have run."""
    table, split, inspect = (run(command, folder) for command in COMMANDS[:3])
    assert table.returncode == 0 and re.search(r"^> \w", table.stdout, re.MULTILINE), table.stderr[-2000:]
    assert split.returncode == 0 and "training takes about" in split.stderr, split.stderr[-2000:]
    assert "a whole image as AVIF of quality 60: " in split.stdout and "wrote my-bundle" in split.stdout
    assert "0_functional, 1_defective" in inspect.stdout
    shutil.rmtree(folder / "cells")
    (folder / "mynet.py").unlink()  # neither side needs the code, nor the photographs
    port = free_port()
    arguments = COMMANDS[3].replace("127.0.0.1:50051", f"127.0.0.1:{port}").split()
    with subprocess.Popen([*arguments, "--metrics", ""], cwd=folder, env=environment()) as server:
        with LinkProxy(port, LinkSpec()) as link:
            yield f"127.0.0.1:{link.port}"
        server.terminate()


def test_the_page_has_the_commands_in_their_order() -> None:
    starts = ["python -m isthmus.models.recipes split"] * 2 + [
        "python -m isthmus.models.bundle inspect",
        "cloud-service",
    ]
    starts += ["edge-agent infer"] * 2 + ["python -m isthmus.models.recipes split"] * 2
    for command, start in zip(ALL, [*starts, "cloud-service", "edge-agent infer"], strict=True):
        assert command.startswith(start)


@pytest.mark.parametrize("command", COMMANDS[4:], ids=["as it chooses", "split, int8"])
def test_device_and_cloud_run_the_bundle(address: str, folder: Path, command: str) -> None:
    for _ in range(20):  # the cloud may not be up yet; the agent then answers alone and says so
        found = run(command.replace("127.0.0.1:50051", address), folder)
        if "DEGRADED" not in found.stdout and "no cloud" not in found.stdout:
            break
    assert found.returncode == 0, found.stderr[-2000:]
    assert re.match(r"photo\.png: [01]_(functional|defective) \(", found.stdout)
    if "--mode split" in command:
        assert "tap bottleneck" in found.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("mynet:trained", "mynet:missing"), "error: --model mynet:missing: AttributeError"),
        (("--data cells", "--data empty"), "error: empty holds no image"),
        (("--data cells", "--data nowhere"), "error: nowhere is not a folder"),
        (("--size 64", "--size 64 --cut middle"), "error: there is no cut 'middle', there are "),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    code, *_ = CODES
    (tmp_path / "mynet.py").write_text(code.replace("net.load_state_dict", "# net.load_state_dict"), encoding="utf-8")
    for folder in ("empty", "cells"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "cells" / "one.png")
    found = run(COMMANDS[1].replace(*change), tmp_path)
    assert found.returncode == 1 and found.stdout == "" and not (tmp_path / "my-bundle").exists()
    assert found.stderr.splitlines()[-1].startswith(words)
    assert "Traceback" not in found.stderr and sys.executable not in found.stderr


def photo_of_things(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray[Any, Any]]:
    """A red square on grey, and the cells of 8 pixels whose middle it covers."""
    pixels = np.clip(rng.normal(110, 10, (SIDE, SIDE, 3)), 0, 255)
    top, left = rng.integers(0, SIDE - 24, 2)
    pixels[top : top + 24, left : left + 24] = (220, 40, 40)
    middles = 8 * np.arange(SIDE // 8) + 4
    covered = [(edge <= middles) & (middles < edge + 24) for edge in (top, left)]
    return Image.fromarray(pixels.astype(np.uint8)), np.outer(*covered).reshape(-1)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mydet.py` and `myvit.py` as they stand on the page, a trained detector of red squares, and photos."""
    root, rng = tmp_path_factory.mktemp("things"), np.random.default_rng(0)
    (root / "things").mkdir()
    (root / "cells").mkdir()
    _, vit, code = CODES
    (root / "myvit.py").write_text(vit, encoding="utf-8")
    (root / "mydet.py").write_text(code, encoding="utf-8")
    (root / "things.txt").write_text("square\nnothing\n", encoding="utf-8")
    images, covered = zip(*(photo_of_things(rng) for _ in range(170)), strict=True)
    for index, image in enumerate(images):
        image.save(root / "things" / f"{index}.png")
    images[0].save(root / "thing.png")
    images[0].save(root / "cells" / "0.png")
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    net = names["Detector"]()
    images_N3HW = torch.from_numpy(np.stack([preprocess(image, SEEN) for image in images]))
    wanted_NM = torch.from_numpy(np.stack(covered)).float()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(80):
        scores_NM2 = net(images_N3HW)[1]
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy(scores_NM2, torch.stack([wanted_NM, 0 * wanted_NM], 2)).backward()
        optimizer.step()
    torch.save(net.state_dict(), root / "mydet.pt")
    return root


def test_a_transformer_is_cut_where_tokens_cross(things: Path) -> None:
    table = run(VIT, things)
    assert table.returncode == 0, table.stderr[-2000:]
    assert re.search(r"^> layers\.\d +48x8x8 ", table.stdout, re.MULTILINE), table.stdout


def test_a_detector_s_boxes_come_through_its_bottleneck(things: Path) -> None:
    split, serve, infer = DETECTOR
    made = run(f"{split} --threads 1", things)
    assert made.returncode == 0, made.stderr[-2000:]
    assert "task objects (detect): square, nothing" in made.stdout
    (things / "mydet.py").unlink()
    port = free_port()
    arguments = serve.replace("127.0.0.1:50052", f"127.0.0.1:{port}").split()
    with subprocess.Popen([*arguments, "--metrics", ""], cwd=things, env=environment()) as server:
        for _ in range(20):  # the cloud may not be up yet
            found = run(infer.replace("127.0.0.1:50052", f"127.0.0.1:{port}"), things)
            if found.returncode == 0 and "DEGRADED" not in found.stdout and "no cloud" not in found.stdout:
                break
        server.terminate()
    assert found.returncode == 0, found.stderr[-2000:]
    assert "square" in found.stdout and "tap bottleneck" in found.stdout
