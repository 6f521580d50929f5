"""What the source says of a name: refused only if the import is certain to fail, and never run."""

from pathlib import Path

import pytest

from penstock.workers.source_names import functions_in, nearest, why_absent

RUNS = "raise AssertionError('it was imported')\n"
FUNCTION = "def strict(prompt, completion, answer, metadata): ...\n"


@pytest.mark.parametrize(
    "source",
    [
        FUNCTION,
        "async " + FUNCTION,
        "class strict: ...\n",
        "from math import sqrt as strict\n",
        "import strict\n",
        "strict = print\n",
        "strict: object = print\n",
        "(strict := print)\n",
        "for strict in (print,): ...\n",
        "with open('x') as strict: ...\n",
        "match print:\n    case strict: ...\n",
        "if True:\n    try:\n        strict = 1\n    except KeyError:\n        raise\n",
        "def make():\n    global strict\n    strict = 1\nmake()\n",
        "from math import *\n",
        "globals()['strict'] = print\n",
        "def __getattr__(name): ...\n",
        "import sys\nsetattr(sys.modules[__name__], 'strict', print)\n",
    ],
)
def test_a_name_that_may_be_there_is_none_to_refuse(tmp_path: Path, source: str) -> None:
    (tmp_path / "own.py").write_text(RUNS + source)
    assert why_absent("own:strict", str(tmp_path)) == ""
    assert why_absent("own:strict.of.it", str(tmp_path)) == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own:stirct", "AttributeError: module 'own' has no attribute 'stirct'; did you mean 'own:strict'?"),
        ("own:inner", "AttributeError: module 'own' has no attribute 'inner'"),
        ("owm:strict", "ModuleNotFoundError: No module named 'owm'; did you mean 'own:strict'?"),
        ("own.py:strict", "ModuleNotFoundError: No module named 'own.py'; did you mean 'own:strict'?"),
        ("elsewhere:judge", "ModuleNotFoundError: No module named 'elsewhere'"),
        ("broken:f", "SyntaxError: invalid syntax (broken.py:1)"),
        ("package.mine:f", ""),
        ("package.none:f", "ModuleNotFoundError: No module named 'package.none'"),
        ("package:g", "AttributeError: module 'package' has no attribute 'g'"),
        ("spaces.mine:anything", "ModuleNotFoundError: No module named 'spaces.mine'"),
        ("math:sqrt", ""),
        ("json:dumps", ""),
    ],
)
def test_what_is_certain_to_fail_has_the_reason_of_its_import(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "own.py").write_text(RUNS + FUNCTION + "def outer():\n    inner = 1\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(RUNS)
    (tmp_path / "package" / "mine.py").write_text("def f(): ...\n")
    (tmp_path / "spaces").mkdir()
    assert why_absent(name, str(tmp_path)) == reason


def test_a_name_without_its_module_is_found_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FUNCTION + "def _hidden(): ...\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    assert functions_in(str(tmp_path)) == ["own:strict"]
    assert nearest("strict", functions_in(str(tmp_path))) == "own:strict"
    assert nearest("nothing_like_it", functions_in(str(tmp_path))) == ""
    assert functions_in(str(tmp_path / "nowhere")) == []
