from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import nanodet
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.images import open_image, preprocess
from isthmus.models.vision.tail import open_tail

GOLDEN = Path("tests/golden/objects")


def write_graph(folder: Path, net: nanodet.NanoDet, order: list[int]) -> Path:
    """A network's weights as TensorFlow.js stores them: float16, (H, W, I, O), BGR; nodes in another order."""
    weights, nodes, data = [], [], b""
    for index, conv in enumerate(nanodet.convolutions(net)):
        kernel = conv.weight.detach().flip(1) if index == 0 else conv.weight.detach()
        assert conv.bias is not None
        for name, array in ((f"kernel{index}", kernel.permute(2, 3, 1, 0)), (f"bias{index}", conv.bias.detach())):
            half = array.half().numpy()
            weights.append(
                {"name": name, "shape": half.shape, "dtype": "float32", "quantization": {"dtype": "float16"}}
            )
            data += half.tobytes()
        name = "net/convolution" + (f"_{index}" if index else "")
        nodes.append({"op": "Conv2D", "name": name, "input": ["x", f"kernel{index}"]})
        nodes.append({"op": "Add", "name": f"net/Add_{index}", "input": [name, f"bias{index}"]})
    pairs = [nodes[2 * index : 2 * index + 2] for index in order]
    description = {
        "modelTopology": {"node": [node for pair in pairs for node in pair]},
        "weightsManifest": [{"paths": ["nanodet.bin"], "weights": weights}],
    }
    (folder / "nanodet.bin").write_bytes(data)
    (folder / "nanodet.json").write_text(json.dumps(description))
    return folder / "nanodet.json"


def test_weights_are_read_by_the_number_of_their_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = nanodet.NanoDet()
    found = nanodet.load(write_graph(tmp_path, wanted, list(reversed(range(34)))))
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor.half().float(), msg=name)


def test_a_graph_of_another_network_is_refused(tmp_path: Path) -> None:
    graph = write_graph(tmp_path, nanodet.NanoDet(), list(range(34)))
    changed = json.loads(graph.read_text())
    changed["weightsManifest"][0]["weights"][0]["shape"] = [3, 3, 32, 3]
    graph.write_text(json.dumps(changed))
    with pytest.raises(InvalidInput, match=r"a convolution is \(3, 32, 3, 3\), expected \(32, 3, 3, 3\)"):
        nanodet.load(graph)


def test_candidates_are_as_far_from_their_cells_as_the_distributions_say() -> None:
    distances_1N4D = torch.full((1, 3549, 4, nanodet.BINS), -100.0)
    distances_1N4D[..., 2] = 100.0  # two strides to every side
    boxes_1N4, scores_1NC = nanodet.candidates(torch.zeros(1, 3549, 80), distances_1N4D)
    assert boxes_1N4[0, 0].tolist() == [4 - 16, 4 - 16, 4 + 16, 4 + 16]
    assert boxes_1N4[0, 53].tolist() == [12 - 16, 12 - 16, 12 + 16, 12 + 16]  # second row, second column
    assert boxes_1N4[0, -1].tolist() == [400 - 64, 400 - 64, 400 + 64, 400 + 64]
    assert bool((scores_1NC == 0.5).all())


@pytest.mark.parametrize("photo", ["astronaut.jpg", "chelsea.jpg"])
def test_the_shipped_network_answers_as_the_original_graph(photo: str) -> None:
    """The original was run by TensorFlow.js on the same pixels."""
    rows = json.loads((GOLDEN / "tfjs.json").read_text())["photos"][photo]
    shipped = Bundle.open("models/zoo/objects")
    image_3HW = preprocess(open_image((GOLDEN / photo).read_bytes()), shipped.manifest.preprocessing)
    answer = open_tail(shipped).images_to_tasks([image_3HW], (0,))[0]
    assert not isinstance(answer, np.ndarray)
    distances_1N4D = torch.zeros(1, 3549, 4, nanodet.BINS)
    for row in rows:
        distances_1N4D[0, row["cell"]] = torch.tensor(row["distances"]).view(4, nanodet.BINS)
    boxes_N4 = nanodet.candidates(torch.zeros(1, 3549, 80), distances_1N4D)[0][0].numpy()
    for row in rows:
        scores_C = answer["scores"][0, row["cell"]]
        assert int(scores_C.argmax()) == row["class"]
        assert float(scores_C.max()) == pytest.approx(row["score"], abs=1e-3)
        np.testing.assert_allclose(answer["boxes"][0, row["cell"]], boxes_N4[row["cell"]], atol=0.1)
