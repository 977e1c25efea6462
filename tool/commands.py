"""Scripts of this repository that another one starts, one after the other. Needs no torch."""
import os
import shlex
import signal
import subprocess

from tool.cli import HANG_UP, BadInput

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_child(command, advice='the same command with --resume goes on'):
    """Runs a command to its end; what it prints stays visible. SIGTERM and SIGHUP go on to it, so that a training saves
    its checkpoint; one that is ignored, as with nohup, stays so. Raises BadInput where the command fails, with the
    advice where the command has not said itself what to do (exit code 2)."""
    print('+', shlex.join(command), flush=True)
    child = subprocess.Popen(command)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number))
              for number in (signal.SIGTERM, *HANG_UP) if signal.getsignal(number) != signal.SIG_IGN}
    try:
        code = child.wait()
    except KeyboardInterrupt:       # the child got it too, and saves its checkpoint
        child.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise BadInput(f'{os.path.basename(command[1])} ended with exit code {code}, see above'
                       + (f'; {advice}' if code != 2 else ''))
