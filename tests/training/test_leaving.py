"""How a rank's process ends: all that is registered is done, and the interpreter is not taken apart under gloo."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

_SCRIPT = """
import atexit, sys, threading, time
from llava_moe.training import distributed

class Torn:
    def __del__(self):
        print("torn")

kept = Torn()
atexit.register(lambda: print("registered"))
threading.Thread(target=lambda: (time.sleep(0.5), print("joined"))).start()
sys.stdout.write("buffered ")
{end}
"""


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("distributed.leave(75)", 75, ["buffered joined", "registered"]),
        ("", 0, ["buffered joined", "registered", "torn"]),  # what the interpreter itself does
    ],
)
def test_a_rank_leaves_in_order_and_keeps_the_interpreter_whole(end: str, code: int, told: list[str]) -> None:
    script = _SCRIPT.format(end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()) == (code, told), done.stderr
