"""How well parts of a step hide behind one another: the exponent of a p-norm. Chosen by hand, for all devices alike."""

# Of what was built to hide, such as Megatron's overlaps from 2023 on and FSDP's. DeepSpeed's gathers under ZeRO-3 add
# up, as AZ and ZINF of the published rows tell: they are many, wait for one another, and compete for memory.
BUILT_OVERLAP = 2.5
