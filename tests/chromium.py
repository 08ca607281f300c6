"""The browser of the tests: the system's Chromium, which no test may let talk to anyone."""

import shutil

CHROMIUM = shutil.which("chromium")


def start(playwright):
    """A browser; the sandbox needs rights that containers do not have."""
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    return playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
