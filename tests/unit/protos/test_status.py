from __future__ import annotations

import grpc
import pytest

from isthmus.models import errors
from isthmus.models.errors import IsthmusError
from isthmus.protos import status
from isthmus.protos.limits import MAX_ERROR_CHARACTERS

OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, IsthmusError)]
SECRET = "/srv/models/secret.onnx: token=hunter2"


@pytest.mark.parametrize("kind", OURS)
def test_every_error_has_a_code_of_its_own_class(kind: type[IsthmusError]) -> None:
    assert kind in status.CODES
    assert status.of_error(kind("x"))[0] is status.CODES[kind]


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_every_code_is_an_error_that_says_so(code: grpc.StatusCode) -> None:
    assert code in status.ERRORS or code is grpc.StatusCode.OK
    error = status.to_error(code, "text")
    assert isinstance(error, IsthmusError)
    assert str(error) == f"cloud: {code.name}: text"


@pytest.mark.parametrize("kind", OURS)
def test_fault_stays_on_the_side_it_was(kind: type[IsthmusError]) -> None:
    """What a caller did wrong must not come back as worth trying again, nor the other way round."""
    back = type(status.to_error(*status.of_error(kind("x"))))
    if kind is errors.BundleError:  # on the wire it is the service's own bundle
        assert issubclass(back, errors.ServiceError)
    elif issubclass(kind, errors.CallerError):
        assert issubclass(back, errors.CallerError)
    else:
        assert not issubclass(back, errors.CallerError)


@pytest.mark.parametrize(
    "error",
    [ValueError(SECRET), KeyError(SECRET), OSError(2, SECRET), RuntimeError(SECRET), errors.BundleError(SECRET)],
)
def test_nothing_of_a_foreign_error_leaves_the_service(error: Exception) -> None:
    code, text = status.of_error(error)
    assert code is grpc.StatusCode.INTERNAL
    assert text == "the service failed on this input"


def test_a_subclass_takes_the_code_of_its_nearest_class() -> None:
    class Sharper(errors.PayloadTooLarge):
        pass

    assert status.of_error(Sharper("x"))[0] is grpc.StatusCode.OUT_OF_RANGE


def test_texts_are_cut_both_ways() -> None:
    assert status.of_error(errors.InvalidInput("x" * 10_000))[1] == "x" * MAX_ERROR_CHARACTERS
    long = str(status.to_error(grpc.StatusCode.INVALID_ARGUMENT, "x" * 10_000))
    assert long == "cloud: INVALID_ARGUMENT: " + "x" * MAX_ERROR_CHARACTERS


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_numbers_on_the_wire_name_codes(code: grpc.StatusCode) -> None:
    assert status.code_of(code.value[0]) is code


@pytest.mark.parametrize("number", [17, 1 << 31])
def test_a_number_that_names_no_code_is_unknown(number: int) -> None:
    assert status.code_of(number) is grpc.StatusCode.UNKNOWN
