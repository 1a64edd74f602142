"""The verbs of the `m6` command, a file a group of them. Each imports what it needs when it runs."""
