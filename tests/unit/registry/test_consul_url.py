"""Registry URLs of Consul: what they may say, and how a bad one is refused."""

from __future__ import annotations

import pytest

from tensorway.errors import InvalidRequest
from tensorway.registry import open_registry
from tensorway.registry.consul_url import Address, ConsulUrl, parse_consul_url


@pytest.mark.parametrize(("url", "parsed"), [
    ("consul://127.0.0.1:8500", ConsulUrl((Address("127.0.0.1", 8500),))),
    ("consul://consul.service", ConsulUrl((Address("consul.service", 8500),))),
    ("consul://a:1,b:2/mesh-2", ConsulUrl((Address("a", 1), Address("b", 2)), "mesh-2")),
    ("consul://[::1]:8501/m/", ConsulUrl((Address("::1", 8501),), "m")),
    (
        "consul://a:1/m?scheme=https&ca_file=/c/ca.pem&cert_file=/c/c.pem&key_file=/c/k.pem&token_file=/t%20t&dc=west&check=ttl",
        ConsulUrl((Address("a", 1),), "m", "https", "/c/ca.pem", "/c/c.pem", "/c/k.pem", "/t t", "west", "ttl"),
    ),
])
def test_what_a_url_says(url: str, parsed: ConsulUrl) -> None:
    assert parse_consul_url(url) == parsed


@pytest.mark.parametrize(("url", "parts"), [
    ("consul:a:1", ["must begin with consul://"]),
    ("consul://", ["the address '' must be HOST:PORT"]),
    ("consul://a:1,,b:2", ["the address '' must be HOST:PORT"]),
    ("consul://a:http", ["the address 'a:http' must be HOST:PORT"]),
    ("consul://a:70000", ["the port 70000 of 'a:70000'"]),
    ("consul://me@a:1", ["the address 'me@a:1'"]),
    ("consul://a:1/Mesh_1", ["the prefix 'Mesh_1' must be"]),
    ("consul://a:1/a/b", ["the prefix 'a/b' must be"]),
    ("consul://a:1?token=secret", ["a token does not belong into a URL"]),
    ("consul://a:1?colour=red", ["the option 'colour' is unknown (there are scheme,"]),
    ("consul://a:1?dc", ["must be OPTION=VALUE"]),
    ("consul://a:1?dc=", ["the option 'dc' has no value"]),
    ("consul://a:1?dc=a&dc=b", ["the option 'dc' is given twice"]),
    ("consul://a:1?cert_file=/c&scheme=https", ["cert_file and key_file go together"]),
    ("consul://a:1?ca_file=/c", ["ca_file needs scheme=https"]),
    ("consul://:x/-?scheme=ftp&check=http&a=b", [
        "the address ':x'", "the prefix '-'", "the option 'a' is unknown", "the scheme 'ftp' must be", "the check 'http' must be",
    ]),
])
def test_a_bad_url_is_refused_with_everything_that_is_wrong(url: str, parts: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        open_registry(url)
    assert refused.value.field == "registry"
    for part in parts:
        assert part in str(refused.value)


def test_another_scheme_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"expected directory:PATH or consul://HOST:PORT"):
        open_registry("zookeeper:somewhere")


def test_addresses_are_dialable() -> None:
    assert [str(Address(host, 1)) for host in ("a", "::1")] == ["a:1", "[::1]:1"]
