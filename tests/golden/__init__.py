"""Small outputs made by two revisions of moebit on one machine, compared byte for byte: `make golden BASE=REV`.

A change that claims to change no numbers shows it here. Bytes depend on the processor, so no checksums are kept in the repository: both
revisions make the outputs again, each in a process of its own with one thread. `cases` lists the outputs, `inputs` builds the models and
texts, `making` runs in the process of a revision, `records` says what an output is made of, `__main__` runs it all.

Only the public API and the command line of moebit are used, because everything else may have moved between the two revisions.
"""
