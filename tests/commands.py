"""The command line, in this process."""

from dataclasses import dataclass

from click.testing import CliRunner

from reidnb.__main__ import main


@dataclass
class Called:
    "How a command ended, and what it said."

    status: int
    stdout: str
    stderr: str


def reidnb(*words):
    "Call `reidnb WORDS`; what is no error of a user is raised."
    done = CliRunner().invoke(main, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Called(done.exit_code, done.stdout, done.stderr)
