"""The training step of the peers: a Mixtral model of the same shape under plain torch, ZeRO-3 or DeepSpeed's AutoEP.

Mixtral's experts are gated and drop no token, as ours with `gated_experts` and capacity "none". On CPUs only.
`pip install -r benchmarks/requirements.txt` gives the transformers library that this needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_presets import base as auto_ep
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from model.config import ModelConfig

CLIP = 1.0
ADAM: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}

Step = Callable[[Tensor], float]


@dataclass(frozen=True)
class Peer:
    library: Literal["torch", "ZeRO-3", "AutoEP"]
    experts: Literal["eager", "grouped_mm"]  # a loop over the experts, or torch's grouped matrix product
    offload: bool  # parameters and optimizer, to the CPU

    def __post_init__(self) -> None:
        if self.library == "torch" and self.offload:
            raise ValueError("plain torch has nothing to offload with")


def build(peer: Peer, config: ModelConfig, bf16: bool, lr: float) -> Step:
    """One optimizer step on this rank's token ids [B, N], which returns their mean loss. Collective.

    Weights are the same for every peer and number of ranks; bf16 has fp32 masters. AutoEP divides the experts among
    all ranks.
    """
    torch.manual_seed(0)
    model = MixtralForCausalLM(_shape(config, peer.experts)).train()
    return _torch_step(model, bf16, lr) if peer.library == "torch" else _deepspeed_step(model, peer, bf16, lr)


def _shape(config: ModelConfig, experts: str) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        num_local_experts=config.experts,
        num_experts_per_tok=config.k,
        tie_word_embeddings=True,
        use_cache=False,
        experts_implementation=experts,
    )


def _torch_step(model: MixtralForCausalLM, bf16: bool, lr: float) -> Step:
    if dist.get_world_size() > 1:
        raise ValueError("plain torch runs on one rank")
    weights = list(model.parameters())
    masters = [weight.detach() for weight in weights] if bf16 else weights
    if bf16:  # by hand: under autocast, torch's grouped product would multiply in fp32
        for weight in weights:  # and no buffer, as DeepSpeed
            weight.data = weight.data.bfloat16()
    optimizer = torch.optim.AdamW(masters, lr, **ADAM)

    def step(ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if bf16:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if bf16:
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master)
        return loss.item()

    return step


def _deepspeed_step(model: MixtralForCausalLM, peer: Peer, bf16: bool, lr: float) -> Step:
    # AutoEP redirects transformers' recording of router logits, which nobody records here. DeepSpeed 0.19.8 crashes
    # in it with transformers 5.23, whose registry of recorders has a `get` without default.
    auto_ep._retarget_transformers_output_recorders_for_modules = lambda **_: 0
    engine, *_ = deepspeed.initialize(model=model, config=_settings(peer, bf16, lr))

    def step(ids: Tensor) -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def _settings(peer: Peer, bf16: bool, lr: float) -> dict[str, Any]:
    offload = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, without effect on a step
        "gradient_clipping": CLIP,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            # As ours.
            "contiguous_gradients": False,
            "stage3_param_persistence_threshold": 10_000,
            **({"offload_param": offload, "offload_optimizer": offload} if peer.offload else {}),
        },
        # Without offload torch's own AdamW, as plain torch; with it DeepSpeed's CPU Adam.
        "optimizer": {"type": "AdamW", "params": {"lr": lr, **ADAM, "torch_adam": not peer.offload}},
        "expert_parallel": {
            "enabled": peer.library == "AutoEP",
            "preset_model": "mixtral",
            "autoep_size": dist.get_world_size(),
            "use_grouped_mm": peer.experts == "grouped_mm",
        },
        "steps_per_print": 2**31,
    }
