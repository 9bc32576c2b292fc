"""`python -m moebit`: the command line."""

from moebit.cli import main

main()
