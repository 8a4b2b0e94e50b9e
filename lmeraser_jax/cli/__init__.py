"""The command line: one thin module a command, which parses flags and calls a function."""
