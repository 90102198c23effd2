"""Files of runs and models: where they are, whole writes, one lock, digests.

`layout` names the files, `files` writes them whole, `lock` lets one process write, `digests` finds
every changed bit, `verify` reads everything.
"""
