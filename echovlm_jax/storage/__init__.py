"""Files of runs and models: where they are, whole writes, one lock, digests.

What is stored is what is loaded: `layout` names the files, `files` writes them whole, `lock` lets
one process write, `digests` finds every changed bit, `verify` reads it all.
"""
