"""A flow on a terminal: errors that say what to do, once and without traceback, and a Ctrl-C that ends all soon."""

import logging
import os
import signal
import sys
import threading

from nestune.errors import NestuneError

LEAVE_AFTER_S = 5.0


def behave_on_a_terminal() -> None:
    """Have Prefect log an error that says what to do once and without traceback, and let Ctrl-C end all soon."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_OneLineOfAFailure())
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


class _OneLineOfAFailure(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], NestuneError):
            return False
        if "Failed(" in record.getMessage():
            # Prefect shows the exception as Python writes it, its line breaks escaped.
            record.msg, record.args = record.getMessage().partition("\\n")[0], ()
        return True
