"""How well parts of a step hide behind one another: exponents of p-norms. Chosen by hand, for all devices alike."""

# ZeRO-3's gathers hide badly, as AZ and ZINF of the published rows tell: they are many, wait for one another, and
# compete with the products for memory. Megatron's later overlaps were built to hide.
GATHERS_OVERLAP, BUILT_OVERLAP = 1.1, 2.5
