from __future__ import annotations

import logging

import pytest

from isthmus.edge_agent.http.openai.errors import ApiError, translate
from isthmus.edge_agent.http.uploads import UploadRefused
from isthmus.models.errors import ContextExceeded, DeadlineExceeded, InvalidInput, LinkDown, Overloaded


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidInput("the prompt has no tokens"), 400, None),
        (ContextExceeded("the prompt has too many tokens"), 400, "context_length_exceeded"),
        (UploadRefused(408, "request_timeout", "the body is late"), 408, "request_timeout"),
        (LinkDown("the cloud is gone"), 503, "cloud_unavailable"),
        (DeadlineExceeded("too late"), 504, "deadline_exceeded"),
        (Overloaded("the queue is full"), 503, "overloaded"),
    ],
)
def test_our_errors_keep_their_message(error: Exception, status: int, code: str | None) -> None:
    translated = translate(error)
    assert (translated.status, translated.error["code"]) == (status, code)
    assert translated.error["message"] == str(translated) == str(error)


def test_an_api_error_stays_as_it_is() -> None:
    error = ApiError(418, "short and stout", param="pot")
    assert translate(error) is error
    assert error.error["param"] == "pot"


def test_an_unexpected_error_is_logged_and_not_revealed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "isthmus.edge"):
        translated = translate(ZeroDivisionError("/secret/path"))
    assert translated.status == 500
    assert "secret" not in str(translated.error)
    assert caplog.records[0].exc_info and caplog.records[0].exc_info[0] is ZeroDivisionError
