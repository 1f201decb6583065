"""The asynchronous client, written by hand; `tools/unasync.py` makes `_sync` from it."""
