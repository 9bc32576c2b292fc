"""The command line: options, verbs, screens and exit codes. The only room that prints.

`terminal` writes; `options` are what several verbs share; `verbs` has a file for a verb or a few that belong together; `screens` says how
their results are shown. Verbs import what they need when they run, because torch and transformers take seconds to load.
"""

from moebit.cli.entry import app, main

__all__ = ["app", "main"]
