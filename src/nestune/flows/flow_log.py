"""What stands in the log of a flow run: an error once, and without traceback where it says what to do."""

import logging

from prefect.exceptions import CancelledRun

from nestune.errors import NestuneError

OF_PREFECT = ("prefect.flow_runs", "prefect.task_runs")


def tell_errors_once() -> None:
    """Have Prefect log an error of nestune once, by its message alone, and no traceback of a state Cancelled."""
    for name in OF_PREFECT:
        # Of a filter that is there already, it takes no second one.
        logging.getLogger(name).addFilter(_told_once)
        logging.getLogger(name).addFilter(_is_no_cancelled_run)


def leave_errors_to_the_command() -> None:
    """Have Prefect not log what the command itself prints when it ends."""
    for name in OF_PREFECT:
        logging.getLogger(name).addFilter(_is_no_error_of_a_user)


def _is_no_cancelled_run(record: logging.LogRecord) -> bool:
    """False where Prefect would log the traceback of a state that says Cancelled, as the log has said before."""
    return not (record.exc_info and isinstance(record.exc_info[1], CancelledRun))


def _is_no_error_of_a_user(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], NestuneError))


class _ToldOnce(logging.Filter):
    """Has an error that says what to do stand in the log once, by itself, without traceback."""

    _told: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, NestuneError):
            if error is self._told:
                return False
            self._told = error
            record.msg, record.args, record.exc_info = str(error), (), None
        elif "Failed(" in record.getMessage():
            if self._told is not None:
                return False
            # Prefect shows the exception as Python writes it, its line breaks escaped.
            record.msg, record.args = record.getMessage().partition("\\n")[0], ()
        return True


_told_once = _ToldOnce()
