"""The check of Lua scripts finds faults that would otherwise fail only when a script reaches that line."""

from penstock.broker.scripts import Script
from tests.check_lua import faults, unused


def test_a_script_without_a_fault_has_none() -> None:
    assert faults("local live = KEYS[1]\nreturn redis.call('GET', live)") == []


def test_what_lua_5_1_does_not_compile_is_named_with_its_line() -> None:
    [fault] = faults("local half = 7\nreturn half // 2")
    assert "line:2" in fault
    assert "return half // 2" in fault


def test_a_misspelt_name_is_found_wherever_it_is() -> None:
    text = "local live = KEYS[1]\nreturn function(flag)\n  if flag then return redis.call('GET', lvie) end\nend"
    assert faults(text) == ["lvie is no name here: if flag then return redis.call('GET', lvie) end"]


def test_a_global_variable_is_found() -> None:
    assert faults("count = 2.5\nreturn nil") == ["count is no name here: count = 2.5"]


def test_a_name_that_is_only_in_the_header_is_found() -> None:
    script = Script("trainer/discard")
    assert unused(script) == []
    script.body = script.body.replace("redis.call('XACK', scored, group, entry)", "-- group")
    assert unused(script) == ["group is never used"]
