"""Mutated model, prior and prompt-cache files, and the check that each is refused or loads right.

`seeds` and `gguf_seeds` make small valid files. The modules `*_mutations` change them. `cases`
numbers the mutated files, `checks` opens one and judges what happens, and `watch` runs the checks
in processes that may hang or crash.
"""
