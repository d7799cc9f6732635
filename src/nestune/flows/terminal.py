"""A flow on a terminal: errors that say what to do, once and without traceback, and a Ctrl-C that ends all soon."""

import logging
import os
import signal
import sys
import threading

from nestune.flows.flow_log import leave_errors_to_the_command

LEAVE_AFTER_S = 5.0


def behave_on_a_terminal() -> None:
    """Have Prefect log an error that says what to do once and without traceback, and let Ctrl-C end all soon."""
    leave_errors_to_the_command()
    signal.signal(signal.SIGINT, _leave_soon)


def _leave_soon(*_: object) -> None:
    """Interrupt the flow, and end the process when Prefect does not.

    A terminal's Ctrl-C ends Prefect's temporary server too, which Prefect would then ask for minutes what to do.
    """
    logging.disable()
    print("interrupted", file=sys.stderr)
    timer = threading.Timer(LEAVE_AFTER_S, os._exit, [130])
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt
