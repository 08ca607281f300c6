"""`python -m yuanmoe` is the `yuanmoe` command."""

from yuanmoe.cli.main import main

main()
