"""Starts scripts of this repository from another one. Needs no torch."""
import os
import shlex
import signal
import subprocess

from tool.cli import HANG_UP, BadInput

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_child(command, advice='run the same command with --resume to continue'):
    """Prints a command and runs it to its end, with its output on the terminal. Passes SIGTERM and SIGHUP on to it, so
    that a training saves its checkpoint, except signals that are ignored, as with nohup. Raises BadInput if the command
    fails, with the advice unless the command has already said what to do (exit code 2)."""
    print('+', shlex.join(command), flush=True)
    child = subprocess.Popen(command)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number))
              for number in (signal.SIGTERM, *HANG_UP) if signal.getsignal(number) != signal.SIG_IGN}
    try:
        code = child.wait()
    except KeyboardInterrupt:       # the child got Ctrl-C too, and saves its checkpoint
        child.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise BadInput(f'{os.path.basename(command[1])} ended with exit code {code}, see above'
                       + (f'; {advice}' if code != 2 else ''))
