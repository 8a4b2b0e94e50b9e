"""Commands of the command line, called in this process."""

from helpers import SMALL

from lmeraser_jax.cli.main import main

TINY = ["--config=configs/digits.py:smoke"] + [
    f"--config.{group}.{name}={value}" for group, values in SMALL.items() for name, value in values.items()
]


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def refused(capsys, *arguments) -> str:
    """The message of a command that must be refused."""
    code, _, err = call(capsys, *arguments)
    assert code == 2 and err.strip() and "Traceback" not in err, (arguments, code, err)
    return err
