"""`m6 data import`: a stranger's pictures and texts, of several forms, as a corpus like the fetched one.

`sources` says of which form a file or folder is, `lines`, `columnar`, `folder` and `shards` (by `tars`) read them,
`reading` checks a row, `families` gives it a split, and `build` does it all.
"""
