"""A program that ends while its weights are still being read ahead: it ends at once, and in order."""

import subprocess
import sys

import pytest

from small_models import random_model, small_config
from yuanmoe.checkpoint.write.save import save_native

# Pages one by one, and slow ones: a big file on a slow disk.
PROGRAM = """
import sys, time, torch
from yuanmoe.checkpoint.files import mapped
from yuanmoe.checkpoint.load import load_model

mapped._PAGES_AT_ONCE = 1
total = torch.Tensor.sum

def slow_total(pages):
    torch.ones(20_000_000).cumsum(0)
    return total(pages)

torch.Tensor.sum = slow_total
load_model(sys.argv[1])
time.sleep(0.2)
print("loaded", flush=True)
{ending}
"""


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise KeyboardInterrupt", -2)])
def test_reading_ahead_ends_with_the_program(tmp_path, ending, code):
    config = small_config(vocab_size=20_000)
    save_native(random_model(config).state_dict(), config, tmp_path)
    line = [sys.executable, "-c", PROGRAM.format(ending=ending), str(tmp_path)]
    ended = subprocess.run(line, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (code, b"loaded\n"), ended.stderr.decode()
