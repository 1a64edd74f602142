"""What the process that ranks are forked from has imported: all that takes seconds, and starts no thread."""

import training.engine
import training.loop  # noqa: F401
from training.start import spare_slow_starts

spare_slow_starts()
