"""The command line: one small file for each family of commands, imported when its command is called."""
