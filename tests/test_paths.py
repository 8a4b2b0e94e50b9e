"""Paths: wherever a user writes one, ~ and relative paths mean the same place, and never a folder named ~."""

import importlib
import os
import pwd
import subprocess
import sys
from types import SimpleNamespace

import pytest

import lmeraser_jax as lm
from lmeraser_jax.cli import common, main
from lmeraser_jax.config import Backbone, Config, Data, Public, paths, settings_of
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import weight_files

PATH_FLAGS = {"workdir", "json", "profile", "out", "source", "labels", "records_file", "like", "weights", "data_dir"}
PATH_FLAGS |= {"merge", "path", "queries", "edits", "tokens", "tls_certificate", "tls_key"}
PATH_FLAGS |= {"signing_key", "public_key", "receipt"}
PATH_SETTINGS = {"data.path", "data.labels", "public.path", "backbone.weights"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_every_path_flag_of_every_command_is_expanded_and_no_other(home, capsys):
    (home / "x").mkdir(parents=True)
    checked = set()
    for command in main.COMMANDS:
        module = importlib.import_module(f"lmeraser_jax.cli.{command}")
        for flag in (*common.COMMON, *getattr(module, "FLAGS", ())):
            if flag.choices or type(flag.default) in (bool, int, float) or flag.default in (int, float):
                continue
            values = {}
            for given in ("~/x/y", "y"):
                arguments = common.parse(module, ["lmeraser", f"--{flag.name}={given}"])
                assert arguments is not None
                value = arguments[flag.name]
                values[given] = value[0] if isinstance(value, list) else value
            is_path = flag.name in PATH_FLAGS and (command, flag.name) != ("compare", "edits")  # kinds of edits
            expected = {"~/x/y": f"{home}/x/y", "y": f"{home.parent}/here/y"} if is_path else {g: g for g in values}
            assert values == expected, (command, flag.name)
            checked.add(flag.name)
    assert PATH_FLAGS <= checked and not list(home.parent.glob("here/~*"))


def test_every_path_setting_is_expanded_and_no_other(home):
    texts = {name: value for name, value, _ in settings_of(Config()) if isinstance(value, str)}
    for group in (Data, Backbone, Public):
        for field in group.__dataclass_fields__:
            name = f"{group.__name__.lower()}.{field}"
            if name in texts:
                values = [getattr(group(**{field: text}), field) for text in ("~/a", "b/../a/", "")]
                absolute = [f"{home}/a", f"{home.parent}/here/a", ""]
                assert values == (absolute if name in PATH_SETTINGS else ["~/a", "b/../a/", ""]), name
    for hub in ("hub", "hub:google/vit"):
        assert Backbone(weights=hub).weights == hub


def test_python_and_file_arguments_are_expanded(home):
    with pytest.raises(UserError, match=f"--workdir={home}/run does not exist"):
        lm.evaluate("~/run")
    arguments = common.parse(importlib.import_module("lmeraser_jax.cli.predict"), ["lmeraser", "~/a.png", "b.png"])
    assert arguments is not None and arguments.files == [f"{home}/a.png", "b.png"]
    (home / "e").mkdir(parents=True)
    (home / "e" / "x.py").write_text("from lmeraser_jax.config import default_config as get_config\n")
    for words in (["--config=~/e/x.py"], ["--config", "~/e/x.py"]):
        arguments = common.parse(importlib.import_module("lmeraser_jax.cli.evaluate"), ["lmeraser", *words])
        assert arguments is not None and common.config_of(arguments) == Config()


def test_homes_of_others_and_no_home(home, monkeypatch):
    user = pwd.getpwuid(os.getuid())
    assert paths.absolute(f"~{user.pw_name}/x") == f"{user.pw_dir}/x" and paths.absolute("~") == str(home)
    for text in ("~nobody-here/x", "~\0/x"):
        with pytest.raises(UserError, match="there is no user"):
            paths.absolute(text)
    for own in ("", "relative", None):
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=""))
        monkeypatch.delenv("HOME") if own is None else monkeypatch.setenv("HOME", own)
        with pytest.raises(UserError, match="no home folder is known, set HOME"):
            paths.absolute("~/x")
        if own is None and not {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"} & os.environ.keys():
            with pytest.raises(UserError, match="no home folder is known to keep a/b in; set HF_HOME"):
                weight_files.read("hub:a/b")
        monkeypatch.setenv("HOME", str(home))
    assert not os.listdir()


def test_without_a_home_compiled_programs_are_not_kept_and_a_line_says_so(home):
    """Not in ./~, and not in a home folder that would have to be made."""
    inherited = {name: value for name, value in os.environ.items() if name not in (main.CACHE, "XDG_CACHE_HOME")}
    code = (
        "import os; from lmeraser_jax.cli import main; main.keep_compiled_programs(); print(os.environ.get(main.CACHE))"
    )
    for changes, folder in (
        ({"HOME": str(home)}, None),
        ({"HOME": "relative"}, None),
        ({"HOME": str(home), "XDG_CACHE_HOME": str(home.parent / "cache")}, f"{home.parent}/cache/lmeraser_jax"),
        ({"HOME": str(home.parent)}, f"{home.parent}/.cache/lmeraser_jax"),
        ({"HOME": str(home), main.CACHE: "~/c"}, f"{home}/c"),
    ):
        code_ = code if "relative" not in changes.values() else f"import pwd; pwd.getpwuid = {{}}.__getitem__; {code}"
        result = subprocess.run([sys.executable, "-c", code_], env=inherited | changes, capture_output=True, text=True)
        assert result.stdout == f"{folder}\n", result.stderr
        assert result.stderr.count("\n") == (folder is None) == ("compiled programs are not kept" in result.stderr)
    assert not os.listdir() and not home.exists()
