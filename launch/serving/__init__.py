"""A trained run behind HTTP: `m6 serve`.

What arrives passes `connections` (slow clients), `guard` (who, how much, how many), `asked` (what it says) and waits at
the `desk`, where requests of one task go through the model together.
"""
