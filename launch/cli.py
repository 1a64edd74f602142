"""The `m6` command: its verbs are in `launch/commands`; each imports what it needs when it runs, so help is instant."""

import os
import sys
import traceback
from typing import NoReturn

import click

from launch.commands import checkpoints, data, plan, serve, train, use
from training.errors import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def m6() -> None:
    """Train and use M6, a Chinese multimodal mixture-of-experts transformer.

    Set M6_DEBUG=1 for tracebacks and the launcher's own messages.
    """


VERBS: tuple[click.Command, ...] = (
    data.data,
    *(train.train, train.image_tokenizer, train.watch, train.report),
    *(checkpoints.verify, checkpoints.export, checkpoints.delink),
    *(use.caption, use.ask, use.write, use.draw, use.edit, use.search, use.evaluate),
    serve.serve,
    *(plan.models, plan.doctor, plan.plan, plan.rehearse),
)
for verb in VERBS:
    m6.add_command(verb)


def main() -> None:
    """Run the command; every expected failure is one line on stderr.

    Exit codes: 0 done, 1 a failure of ours, 2 a mistake that the user can mend, 75 a training that was asked to stop,
    and saved, 130 anything else that Ctrl-C stopped.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail("the current folder is gone: change to another", 2)
    try:
        code = m6.main(prog_name="m6", standalone_mode=False)
    except click.Abort:
        _fail("stopped", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "m6"
        _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", 2)
    except UserError as error:
        _fail(str(error), 2)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get("M6_DEBUG"):
        traceback.print_exc()
    print(f"m6: {message}", file=sys.stderr)
    sys.exit(code)
