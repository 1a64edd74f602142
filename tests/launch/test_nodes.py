"""Hostfiles, and what the machines in them are told."""

from pathlib import Path

import pytest

from launch.environment import environment_files, passed_on
from launch.nodes import Nodes, Place, read_hostfile
from training.errors import UserError


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# the rack\nnode0 slots=8\n\n10.0.0.2  slots=4  # older\nm6-2.m6 slots=2\n")
    assert read_hostfile(path) == {"node0": 8, "10.0.0.2": 4, "m6-2.m6": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node0\n", "line 1: 'node0' must be NAME slots=RANKS"),
        ("node0 slots=0\n", "line 1: 'node0 slots=0' must be"),
        ("node0 slots=2\n$(reboot) slots=2\n", "line 2: '$(reboot) slots=2' must be"),
        ("node0 slots=2\nnode0 slots=2\n", "line 2: node0 was there before"),
        ("# nobody\n", "names no machine"),
    ],
)
def test_a_wrong_hostfile_is_told_by_its_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_hostfile(hostfile(tmp_path, text))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "hosts")


def test_ranks_are_numbered_through_the_machines(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "a slots=3\nb slots=1\nc slots=2\n")
    placed = [Place(hostfile=path, node_rank=number).nodes(9) for number in range(3)]
    assert [list(nodes.ranks) for nodes in placed] == [[0, 1, 2], [3], [4, 5]]
    assert {nodes.world for nodes in placed} == {6} and placed[1].port == 29500


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place(node_rank=1), "--node-rank and --master-port are of the machines of a --hostfile"),
        (Place(ranks=2, hostfile=Path("hosts")), "--ranks 2: on the machines of a hostfile its slots say how many"),
    ],
)
def test_options_that_do_not_go_together(place: Place, words: str) -> None:
    with pytest.raises(UserError, match=words):
        place.nodes(2)


def test_a_machine_beyond_the_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--node-rank 2: .* has machines 0 to 1"):
        Place(hostfile=hostfile(tmp_path, "a slots=1\nb slots=1\n"), node_rank=2).nodes(1)


def test_who_refuses_a_connection_is_there_and_who_is_not_known_is_silent() -> None:
    """Nothing listens here at ssh's port of this address of the machine's own."""
    assert Nodes({"localhost": 1, "127.0.0.9": 1, "no-such-host.invalid": 1}).silent() == ["no-such-host.invalid"]


def test_settings_are_passed_on_and_secrets_are_not() -> None:
    base = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "s", "HF_TOKEN": "s", "WANDB_MODE": "offline", "EDITOR": "vi"}
    assert passed_on(base) == {"NCCL_DEBUG": "INFO", "WANDB_MODE": "offline"}


def test_the_environment_file_here_says_more_than_the_one_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\nB=2\n"), (here, "# links\nNCCL_IB_HCA=mlx5\nB=a b\n\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    assert environment_files({}) == {"A": "1", "NCCL_IB_HCA": "mlx5", "B": "a b"}


def test_a_wrong_line_of_an_environment_file(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A=1\nexport B\n")
    with pytest.raises(UserError, match="env, line 2: 'export B' must be KEY=VALUE"):
        environment_files({"DS_ENV_FILE": str(tmp_path / "env")})
