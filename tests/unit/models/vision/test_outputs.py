from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.messages import OutputBounds
from isthmus.models.vision.outputs import bounds_of, check, finish, from_runs, most_bytes, to_runs, usual_bytes
from isthmus.models.vision.tasks import AnyTask, ClassifyTask, DetectTask, EmbedTask, SegmentTask

SIZE = (32, 48)
DETECT = DetectTask(name="things", labels=("dog", "cat"), max_boxes=5, min_score=0.25, nms_iou=0.5)
SEGMENT = SegmentTask(name="ground", labels=("road", "grass", "sky"), shape=(6, 8))
EMBED = EmbedTask(name="likeness", size=16)
TASKS: list[AnyTask] = [DETECT, SEGMENT, EMBED]


def raw(task: AnyTask, seed: int = 0) -> dict[str, np.ndarray]:
    """A graph's outputs of one input."""
    rng = np.random.default_rng(seed)
    match task:
        case DetectTask():
            corners_N2 = rng.uniform(-9, 50, (40, 2))
            boxes_N4 = np.concatenate([corners_N2, corners_N2 + rng.uniform(0, 20, (40, 2))], 1)
            return {"boxes": boxes_N4.astype(np.float32), "scores": rng.uniform(-0.1, 1.1, (40, 2)).astype(np.float32)}
        case SegmentTask():
            return {"scores": rng.normal(size=(3, *task.shape)).astype(np.float32)}
    return {"embedding": rng.normal(size=task.channels).astype(np.float32)}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_finished_is_within_its_bounds(task: AnyTask, seed: int) -> None:
    arrays, bounds = finish(task, raw(task, seed), SIZE), bounds_of(task, SIZE)
    assert isinstance(bounds, OutputBounds)
    for array, bound in zip(arrays, bounds.tensors, strict=True):
        assert array.dtype == np.dtype(bound.dtype) and array.shape[1:] == bound.shape[1:]
        assert len(array) <= bound.shape[0] and (bound.at_most or len(array) == bound.shape[0])
    bounds.check(arrays)
    assert sum(array.nbytes for array in arrays) <= most_bytes(task)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_no_answer(task: AnyTask, bad: float) -> None:
    outputs = raw(task)
    next(iter(outputs.values())).flat[3] = bad
    with pytest.raises(ValueError, match="not finite"):
        finish(task, outputs, SIZE)


def test_outputs_that_contradict_each_other_are_no_answer() -> None:
    with pytest.raises(ValueError, match="40 boxes and 39 rows"):
        finish(DETECT, {**raw(DETECT), "scores": np.zeros((39, 2), np.float32)}, SIZE)


def test_a_vector_beyond_float16_is_no_answer() -> None:
    task = EmbedTask(name="e", size=2, normalised=False)
    with pytest.raises(ValueError, match="float16"):
        finish(task, {"embedding": np.array([1e6, 0], np.float32)}, SIZE)
    (found_D,) = finish(task, {"embedding": np.array([300, -2], np.float32)}, SIZE)
    check(task, SIZE, [found_D])
    assert found_D.tolist() == [300, -2]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1 << 20), st.integers(1, 4))
def test_runs_say_the_whole_map(height: int, width: int, seed: int, classes: int) -> None:
    map_HW = np.random.default_rng(seed).integers(0, classes, (height, width))
    classes_R, lengths_R = to_runs(map_HW)
    assert (np.diff(classes_R.astype(int)) != 0).all() and lengths_R.sum() == map_HW.size
    np.testing.assert_array_equal(from_runs(classes_R, lengths_R, (height, width)), map_HW)


def test_a_classification_is_a_number_of_probabilities() -> None:
    task = ClassifyTask(name="defect", labels=("good", "bad"))
    assert bounds_of(task, SIZE) == 2 and usual_bytes(task) == most_bytes(task) == 8
    with pytest.raises(ValueError, match="kind classify"):
        finish(task, {"logits": np.zeros(2, np.float32)}, SIZE)
