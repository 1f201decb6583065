"""The synchronous client, made by `tools/unasync.py` from `_async`."""
