"""Work for worker processes that goes wrong; in a file of its own, which those processes can import."""

import os
import signal


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(item):
    raise ValueError(f"item {item}")


def make_dying():
    return die


def make_failing():
    return fail
