from __future__ import annotations

import pytest

from isthmus.cloud_service.config import CloudConfig
from isthmus.edge_agent.config import HttpConfig, LanguageConfig
from isthmus.models.address import Address, parse_address
from isthmus.models.errors import InvalidInput

WRONG = [
    ("http://cloud:50051", "leave out 'http://'"),
    ("grpcs://cloud:50051/", "leave out 'grpcs://'"),
    ("cloud:50051/v1", "leave out the path '/v1'"),
    ("cloud", "the port is missing"),
    ("cloud:", "the port is missing"),
    ("8080", "the port is missing"),
    ("[::1]", "written in brackets, with a port"),
    ("::1", "written in brackets, with a port"),
    ("::1:50051", "written in brackets"),
    ("fe80::1:2:3:4:5:6:50051", "written in brackets"),
    (":50051", "the host is missing"),
    ("", "the port is missing"),
    ("cloud:http", "the port 'http' is no number"),
    ("cloud:-1", "the port '-1' is no number"),
    ("cloud:+1", "the port '+1' is no number"),
    ("cloud:1_0", "is no number"),
    ("cloud:٥٠", "is no number"),
    ("cloud:65536", "the port is above 65535"),
    ("cloud:115587", "the port is above 65535"),  # 50051 modulo 65536
    ("cloud:" + "9" * 5000, "the port is above 65535"),
    ("user@cloud:50051", "'user@cloud' is neither a name nor an IP address"),
    ("a b:50051", "'a b' is neither"),
    ("[cloud]:50051", "'[cloud]' is neither"),
    ("clo\nud:50051", "is neither"),
]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("cloud:50051", Address("cloud", 50051)),
        (" cloud.example.org:1 ", Address("cloud.example.org", 1)),
        ("0.0.0.0:0", Address("0.0.0.0", 0)),
        ("my_service-1:65535", Address("my_service-1", 65535)),
        ("[::1]:50051", Address("::1", 50051)),
        ("[::]:0", Address("::", 0)),
        ("[fe80::1%eth0]:50051", Address("fe80::1%eth0", 50051)),
    ],
)
def test_an_address_is_read_and_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text.strip()


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_a_wrong_address_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_address(text)
    message = str(caught.value)
    assert words in message and "not HOST:PORT" in message
    assert len(message) < 250 and len(message.splitlines()) == 1


@pytest.mark.parametrize(("text", "words"), WRONG[:-1])
def test_settings_refuse_it_and_name_the_field(text: str, words: str) -> None:
    for make, field in (
        (lambda: HttpConfig(listen=text), "listen is "),
        (lambda: CloudConfig(listen=text), "listen is "),
        (lambda: CloudConfig(metrics=text), "metrics is "),
        (lambda: LanguageConfig(model="m", clouds=("cloud:1", text)), "clouds.1 is "),
    ):
        with pytest.raises(InvalidInput) as caught:
            make()
        assert str(caught.value).startswith(field) and words in str(caught.value)


def test_nobody_is_reached_at_port_zero_but_one_can_listen_there() -> None:
    assert HttpConfig(listen="127.0.0.1:0").listen == "127.0.0.1:0"
    with pytest.raises(InvalidInput, match="port 0"):
        LanguageConfig(model="m", clouds=("cloud:0",))
