"""What of the environment all machines of a run share: settings that are passed on, and those that files say."""

import re
from collections.abc import Mapping
from pathlib import Path

from training.errors import UserError

# What other machines are told of this one's environment, but for what is secret. Each reads environment files itself.
PASSED_ON = ("DS_", "GLOO_", "HF_", "M6_", "NCCL_", "OMP_", "PYTHON", "TORCH_", "WANDB_")
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")
ENVIRONMENT_FILE = ".deepspeed_env"  # here or at home, or DS_ENV_FILE names another


def passed_on(base: Mapping[str, str]) -> dict[str, str]:
    """What of an environment the other machines are told: settings of libraries, but no secrets."""
    return {key: value for key, value in base.items() if key.startswith(PASSED_ON) and not SECRET.search(key)}


def environment_files(base: Mapping[str, str]) -> dict[str, str]:
    """What DeepSpeed's environment files say, with KEY=VALUE a line: the one at home, and the one here.

    Raises UserError.
    """
    named = base.get("DS_ENV_FILE", ENVIRONMENT_FILE)
    found: dict[str, str] = {}
    for path in (Path.home() / named, Path(named)):
        if path.is_file():
            found |= _environment_file(path)
    return found


def _environment_file(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(lines(path, str(path)), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            key, equals, value = text.partition("=")
            if not (equals and re.fullmatch(r"\w+", key)):
                raise UserError(f"{path}, line {number}: {text!r} must be KEY=VALUE")
            found[key] = value
    return found


def lines(path: Path, named: str) -> list[str]:
    """Those of a text file that `named` stands for in messages. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise UserError(f"{named}: cannot be read ({reason})") from None
