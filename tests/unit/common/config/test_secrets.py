"""Secrets are checked when they are read, and nothing that is shown holds one."""

import json
import logging
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.asyncio.connection import parse_url

from penstock.config import Config
from penstock.config.load import build_config, load_config
from penstock.config.secrets import MASK, check_password, check_queue_url, check_token, hide, shown_url, url_secrets
from penstock.config.shown import secret_values, without_secrets
from penstock.errors import ConfigError
from penstock.runtime.logs import JsonFormatter
from penstock.runtime.requests import auth_headers

DOCUMENT = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}}
VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=4, max_size=12)
SECRET = "s3cr3t"


def refused(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config({**DOCUMENT}, [], environ)
    return str(caught.value)


@pytest.mark.parametrize(
    ("token", "seen"),
    [
        (f"{SECRET}\n{SECRET}", "character 7 of 13 is a line break"),
        (f"{SECRET}\n", "character 7 of 7 is a line break"),
        (f"{SECRET} {SECRET}", "character 7 of 13 is a space"),
        (f"{SECRET}\u00e9", "character 7 of 7 is a character beyond ASCII"),
        (f"{SECRET}\x01", "character 7 of 7 is a control character"),
    ],
)
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token: str, seen: str) -> None:
    message = refused({"PENSTOCK_TOKEN": token})
    assert message.startswith(f"token: saw a secret; {seen}")
    assert "visible ASCII" in message
    assert SECRET not in message


def test_a_token_of_bytes_that_are_no_text_is_refused_and_not_shown() -> None:
    message = refused({"PENSTOCK_TOKEN": f"{SECRET}\udcff"})
    assert "PENSTOCK_TOKEN: saw bytes that are not UTF-8" in message
    assert SECRET not in message


@pytest.mark.parametrize("value", ["", 5, True, [SECRET], {"a": SECRET}])
def test_a_token_that_is_none_is_refused_and_not_shown(value: object) -> None:
    with pytest.raises(ConfigError, match="token: saw a secret") as caught:
        build_config({**DOCUMENT, "token": value}, [], {})
    assert SECRET not in str(caught.value)


@given(VISIBLE)
def test_any_visible_ascii_is_a_token(token: str) -> None:
    check_token(token)
    assert auth_headers(SecretStr(token))["Authorization"].encode("ascii")


@pytest.mark.parametrize("password", [f"{SECRET}\0", f"{SECRET}\n", f"{SECRET}\ud800", f"{SECRET}\x7f"])
def test_a_password_that_cannot_be_passed_on_is_refused_and_not_shown(password: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.password: saw a secret; character 7 of 7") as caught:
        build_config({**DOCUMENT, "redis": {"password": password}}, {}, {})
    assert SECRET not in str(caught.value)
    check_password("any text of one line: \u00e9 \u2603 '\"")


@pytest.mark.parametrize("environ", [{"PENSTOCK_REDIS": SECRET}, {"PENSTOCK_REDIS": f'["{SECRET}"]'}])
def test_a_section_that_is_none_is_not_shown(environ: dict[str, str]) -> None:
    assert SECRET not in refused(environ)


def test_a_fault_in_a_file_is_shown_without_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f'actor: {{path: m}}\nredis:\n  password: "{SECRET}\n  url: [\n')
    with pytest.raises(ConfigError, match=r"not YAML: line \d+, column \d+: ") as caught:
        load_config(["--config", str(path)], {})
    assert SECRET not in str(caught.value)


READ_AS_MEANT = [
    "redis://h",
    "redis://h:6379/3",
    "redis://h?db=1",
    "redis://:s3cr3t@h:1/0",
    "redis://me:s3%40cr3t@[::1]:6379/0",
    "redis://:s3@cr3t@h",
    "redis://h?username=me&password=s3cr3t",
    "rediss://:s3cr3t@h:1/0?ssl_cert_reqs=required&ssl_ca_certs=/etc/ca.pem",
    "unix:///run/valkey.sock",
    "unix://:s3cr3t@/run/valkey.sock?db=2",
]


@pytest.mark.parametrize("url", READ_AS_MEANT)
def test_a_url_that_the_client_reads_as_it_was_meant_is_taken(url: str) -> None:
    check_queue_url(url)
    arguments: dict[str, object] = {**parse_url(url)}
    known = {"host", "port", "db", "path", "username", "password", "ssl_cert_reqs", "ssl_ca_certs", "connection_class"}
    assert arguments.keys() <= known
    assert arguments.keys() & {"host", "path"}
    if (password := arguments.get("password")) is not None:
        assert password in list(url_secrets(url))
    assert "cr3t" not in shown_url(url)
    assert "cr3t" not in shown_url(url, mask="")
    check_queue_url(shown_url(url, mask=""))  # as config.yaml holds it


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3/cr3t@h:1/0",
        "redis://:s3#cr3t@h:1/0",
        "redis://:s3?cr3t@h:1/0",
        "redis://me:12?s3cr3t@h",
        "redis://me:12/s3cr3t@h",
        "redis://me:12#s3cr3t@h",
        "redis://:s3[cr3t@h:1/0",
        "redis://:s3 cr3t@h:1/0",
        "redis://:s3\ncr3t@h:1/0",
        "redis://:s3cr3t\u00e9@h",
        "redis://:s3cr3t@h:port",
        "redis://:s3cr3t@h:0",
        "redis://:s3cr3t@",
        "redis://:s3cr3t@h/zero",
        "redis://:s3cr3t@h/0/1",
        "redis:h?password=s3cr3t",
        "s3cr3t@h:6379",
        "http://:s3cr3t@h",
        "unix://:s3cr3t@",
        "redis://:s3cr3t@h?db=x",
        "redis://:s3cr3t@h?decode_responses=true",
        "redis://:s3cr3t@h?socket_timeout=1",
        "redis://:s3cr3t@h?protocol=3",
        "redis://:s3cr3t@h?s3cr3t",
        "redis://:s3cr3t@h?ssl_cert_reqs=none",
    ],
)
def test_any_other_url_is_refused_and_not_shown(url: str) -> None:
    message = refused({"PENSTOCK_REDIS__URL": url})
    assert message.startswith("redis.url: saw '")
    assert "expected" in message
    assert "cr3t" not in message
    assert "cr3t" not in shown_url(url)


def test_an_option_that_changes_how_answers_are_read_is_named() -> None:
    message = refused({"PENSTOCK_REDIS__URL": "redis://h/0?decode_responses=true"})
    assert "the option decode_responses is not supported: expected only db, password, username" in message


@given(password=VISIBLE, user=st.sampled_from(["", "me"]), where=st.sampled_from(["{}@h:1/0", "h:1/0?password={}"]))
def test_no_form_of_a_url_shows_its_password(password: str, user: str, where: str) -> None:
    """Written as it is, where it may be no URL at all, and encoded."""
    secret = f"<{password}>"  # neither is part of anything else that is shown
    for written in (secret, quote(secret, safe="")):
        for scheme in ("redis", "rediss", "http", "unix"):
            url = f"{scheme}://" + where.format(f"{user}:{written}" if where.startswith("{}") else written)
            shown = shown_url(url) + shown_url(url, mask="")
            assert written not in shown


def test_a_url_shows_everything_else() -> None:
    assert shown_url("redis://me:s3cr3t@h:1/0?db=2") == f"redis://me:{MASK}@h:1/0?db=2"
    assert shown_url("redis://s3cr3t@h:1/0") == f"redis://{MASK}@h:1/0", "its colon was forgotten"
    assert shown_url("redis://me:s3cr3t@h:1?password=s3cr3t&db=2", mask="") == "redis://me@h:1?db=2"
    assert shown_url("http://127.0.0.1:30000") == "http://127.0.0.1:30000"
    assert shown_url("") == ""


def test_no_line_of_the_log_holds_a_secret(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            **DOCUMENT,
            "token": 't"oken',
            "redis": {"url": "redis://:p%40ssw@h", "password": "0ther"},
            "rollout": {"engine": {"extra_args": ["--api-key", "k3y1", "--admin-api-key=k3y2", "--page-size", "16"]}},
        }
    )
    formatter = JsonFormatter("trainer", "r", secret_values(config))
    try:
        raise ValueError("""Illegal header value b'Bearer t"oken'""")
    except ValueError as error:
        record = logging.makeLogRecord(
            {
                "msg": "p%40ssw p@ssw 0ther k3y1 k3y2",
                "why": str(error),
                "exc_info": (ValueError, error, error.__traceback__),
            }
        )
    line = formatter.format(record)
    assert json.loads(line)["event"] == " ".join([MASK] * 5)
    assert "oken" not in line
    assert "p@ssw" not in json.dumps(without_secrets(config))


def test_short_secrets_garble_nothing() -> None:
    assert hide("a battery", ["a", ""]) == "a battery"
