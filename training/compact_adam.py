"""AdamW on the CPU with 5 bytes a parameter for weights and moments, where fp32 masters and their copies have 14.

- A weight has 24 bits: the bf16 working copy that layers compute with (its nearest bf16), and 8 bits below that.
  16 bits alone, though rounded at random, would add to each weight a noise that no lower learning rate takes away.
- A moment has 8 bits: a small float of three mantissa bits. Eight steps an octave are one grid for all numbers, and a
  block of 256 elements keeps where its largest lies on the grid. The codes of a first moment, which have a sign and a
  zero, reach down to 2^-16 of that, and those of a second to 2^-32. What is smaller becomes 0 in the first and the
  smallest code in the second: an update is never divided by a second moment of 0 that was none.
- All three are rounded at random, so that changes smaller than a step of the grid count as they should: to the nearest,
  a second moment that changes by a thousandth a step would stand still. The random bits are a function of (seed, step,
  tensor, element), the same on any layout.

Sources: block-wise 8-bit optimizers, arXiv 2110.02861; second moments that become 0, 2309.01507; random rounding of
16-bit weights, 2010.06192. The grid in place of a scale a block is ours: a value that was decoded, and saved as fp32,
has the same code wherever it is read back.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.errors import UserError
from training.extensions import extension_root
from training.machine import cpu_flags

if TYPE_CHECKING:
    from training.states import Partition

BLOCK = 256
SOURCE = Path(__file__).with_suffix(".cpp")
# Contraction would round fewer times on some machines than on others.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_CODES = (_POINTER, _POINTER, _COUNT, _COUNT, _POINTER)  # codes, tops, offset, numel, values
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "read_weights": (_POINTER, _POINTER, _COUNT, _POINTER),
    "write_weights": (_POINTER, _POINTER, _COUNT, _POINTER),
    **dict.fromkeys(("read_first", "write_first", "read_second", "write_second"), _CODES),
    "step": (_POINTER,) * 7 + (_COUNT, _COUNT, ctypes.c_uint64) + (_FLOAT,) * 6,
}
_MOMENTS = {"exp_avg": "first", "exp_avg_sq": "second"}


class CompactAdamW:
    """What ZeRO-3 steps in place of DeepSpeedCPUAdam, with its parameter groups: flat bf16 weights and gradients.

    `state` has for each flat tensor [N]: the number of steps; `low` [N], the bits below bf16; `exp_avg` and
    `exp_avg_sq` [N], codes; and `tops` of both, a place on the grid for each block.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        flats: Sequence[Tensor],
        partitions: Mapping[int, list[Partition]],
        seed: int,
    ):
        """`partitions`: those of each flat tensor, by its number. Raises UserError if the update does not compile."""
        self.param_groups, self.seed = groups, seed
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._shares: dict[Tensor, list[tuple[Partition, int]]] = {}  # with the number of its first block
        self._library = library()
        for number, flat in enumerate(flats):
            self._shares[flat], blocks = [], 0
            for partition in partitions.get(number, ()):
                self._shares[flat].append((partition, blocks))
                blocks += -(-(partition.offset % BLOCK + partition.numel) // BLOCK)
            self.state[flat] = {"step": 0, "low": torch.zeros_like(flat, dtype=torch.int8, requires_grad=False)}
            for kind in _MOMENTS:
                self.state[flat][kind] = torch.zeros(flat.numel(), dtype=torch.uint8)
                self.state[flat][f"{kind} tops"] = torch.zeros(blocks, dtype=torch.int16)

    def step(self) -> None:
        """Update what the parameter groups hold, by its gradients: bf16 tensors of equal lengths."""
        for group in self.param_groups:
            for flat in group["params"]:
                self.state[flat]["step"] += 1
                self._update(flat, group)

    def _update(self, flat: Tensor, group: Mapping[str, Any]) -> None:
        state, (beta1, beta2), lr = self.state[flat], group["betas"], group["lr"]
        step = state["step"]
        kept, unbias = 1 - lr * group["weight_decay"], (1 - beta2**step) ** -0.5
        rule = lr / (1 - beta1**step), kept, beta1, beta2, unbias, group["eps"]
        assert flat.grad is not None
        for partition, block in self._shares[flat]:
            own = slice(partition.start, partition.start + partition.numel)
            moments = (p for kind in _MOMENTS for p in (state[kind][own], state[f"{kind} tops"][block:]))
            tensors = flat.detach()[own], state["low"][own], flat.grad[own], *moments
            places = (tensor.data_ptr() for tensor in tensors)
            key = _key(self.seed, step, partition.name)
            self._library.step(*places, partition.offset, partition.numel, key, *rule)

    def read(self, flat: Tensor, partition: Partition, kind: str, first: int, count: int) -> Tensor:
        """Elements [first, first + count) of a partition, fp32; `kind`: master, exp_avg or exp_avg_sq."""
        values = torch.empty(count)
        self._pass("read", flat, partition, kind, first, values)
        return values

    def write(self, flat: Tensor, partition: Partition, kind: str, values: Tensor) -> None:
        """Set the whole partition to the nearest of fp32 `values`; what `read` returned is set exactly."""
        self._pass("write", flat, partition, kind, 0, values)

    def _pass(self, way: str, flat: Tensor, partition: Partition, kind: str, first: int, values: Tensor) -> None:
        state, start, count = self.state[flat], partition.start + first, values.numel()
        if kind not in _MOMENTS:
            weights = flat.detach()[start:], state["low"][start:]
            getattr(self._library, f"{way}_weights")(*(w.data_ptr() for w in weights), count, values.data_ptr())
            return
        block = next(block for share, block in self._shares[flat] if share == partition)
        block += (partition.offset % BLOCK + first) // BLOCK
        codes, tops = state[kind][start:], state[f"{kind} tops"][block:]
        work = getattr(self._library, f"{way}_{_MOMENTS[kind]}")
        work(codes.data_ptr(), tops.data_ptr(), partition.offset + first, count, values.data_ptr())


def _key(seed: int, step: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest(), "little")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled update: a second's work where this machine has none yet. Raises UserError."""
    made_of = [SOURCE.read_text(encoding="utf-8"), *FLAGS, *sorted(cpu_flags())]
    name = hashlib.blake2b("\n".join(made_of).encode(), digest_size=8).hexdigest()
    path = extension_root() / SOURCE.stem / f"{name}.so"
    if not path.exists():
        _compile(path)
    loaded = ctypes.CDLL(str(path))
    for function, arguments in _SIGNATURES.items():
        getattr(loaded, function).argtypes, getattr(loaded, function).restype = arguments, None
    return loaded


def _compile(path: Path) -> None:
    """Several ranks may, at once: the last one's file stays, and all are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run(["g++", *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
            raise UserError(
                f"m6.optimizer_states=8-bit: {SOURCE.name} does not compile ({reason}): mend g++, or use fp32"
            )
        os.replace(made, path)
