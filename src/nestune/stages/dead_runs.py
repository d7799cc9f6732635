"""Runs whose process died: what they have left open elsewhere is ended by whoever starts next."""

import logging
from collections.abc import Callable

from nestune.errors import RunError
from nestune.registry.catching_up import mark_killed
from nestune.run_state import RunState, crashed_runs, ending

log = logging.getLogger(__name__)


def end_dead_runs(end_flow_run: Callable[[RunState], None] | None = None) -> None:
    """Let nothing show a run below the current folder as running whose process has died.

    MLflow shows it as killed, and its folder tells for good that it crashed. `end_flow_run` ends its Prefect flow run,
    and raises RunError when it cannot; without it, a run that is part of one is left to the next flow. What does not
    answer is warned of, and told at the next start.
    """
    for run, state in crashed_runs().items():
        try:
            if state.flow_run is None or end_flow_run is not None:
                with ending(run, state):
                    if state.flow_run is not None and end_flow_run is not None:
                        end_flow_run(state)
                    mark_killed(run)
        except RunError as error:
            log.warning("%s That run %s crashed is told at the next start.", error, run.root.name)
