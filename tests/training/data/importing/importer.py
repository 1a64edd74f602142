"""Imports that may be killed: for each line on its input (a source) a process of its own, whose number it prints.

python importer.py TO BASE
"""

import os
import sys
from pathlib import Path

from training.data.importing.build import import_corpus

to, base = map(Path, sys.argv[1:])
while line := sys.stdin.readline():
    process = os.fork()
    if not process:
        import_corpus([Path(line.strip())], to, base)
        os._exit(0)
    print(process, flush=True)
    sys.stdin.readline()
    os.waitpid(process, 0)
    print("ended", flush=True)
