"""Options that several verbs have."""

from pathlib import Path

import click

PATH = click.Path(path_type=Path)

HOSTFILE = click.option("--hostfile", type=PATH, help="On these machines, a line each: NAME slots=RANKS; over ssh.")
NODE_RANK = click.option(
    "--node-rank", type=click.IntRange(min=0), help="Be this one of the hostfile's, from 0; the others start elsewhere."
)
MASTER_PORT = click.option(
    "--master-port", type=click.IntRange(1, 65535), help="With --hostfile: where its first machine is met; 29500."
)
RUN = click.option("--run", help="A name under runs/, a run's folder or an export's; the run that saved last if none.")
DATA = click.option("--data", type=PATH, help="The data's home; that of the run's recipe if not given.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
