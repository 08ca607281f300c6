"""The command line: one folder or file for each family of commands, imported when its command is called."""
