"""Valid positions as rows of one tensor, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import grouped
from model.packing import Packing

LAW = settings(deadline=None, derandomize=True)
flags = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


@LAW
@given(flags, st.booleans())
def test_packing_keeps_valid_positions_in_order_and_zeroes_the_rest(valid, rounded):
    valid_BN = torch.tensor(valid)
    x_BND = torch.randn(*valid_BN.shape, 3, dtype=torch.float64, requires_grad=True)
    like = torch.empty(0, dtype=torch.bfloat16 if rounded else torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "multiplied_in_fp32", lambda factor: not rounded)
        packing = Packing.of(valid_BN, like)
    x_TD = packing.pack(x_BND)
    count = int(valid_BN.sum())
    assert len(x_TD) == (-(-max(count, 1) // 16) * 16 if rounded else max(count, 1))
    assert torch.equal(x_TD[:count], x_BND[valid_BN]) and not x_TD[count:].any()
    assert packing.valid_T.tolist() == [True] * count + [False] * (len(x_TD) - count)
    assert torch.equal(packing.unpack(x_TD), x_BND * valid_BN[:, :, None])
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x)), x_BND)


@LAW
@given(flags)
def test_flags_are_packed_with_their_positions(valid):
    valid_BN = torch.tensor(valid)
    flag_BN = torch.arange(valid_BN.numel()).view_as(valid_BN) % 2 == 0
    packing = Packing.of(valid_BN, torch.empty(0))
    found_T = packing.pack_flags(flag_BN)
    assert found_T[packing.valid_T].tolist() == flag_BN[valid_BN].tolist()
    assert not found_T[~packing.valid_T].any()
