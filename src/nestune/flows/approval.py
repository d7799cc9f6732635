"""A person's word before a promotion: the flow run pauses with a form."""

from typing import Any

from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from nestune.config import RunConfig
from nestune.files import read_json
from nestune.flows.flow_state import has_server
from nestune.flows.tasks import decide
from nestune.runs import RunPaths

# Whoever is to approve a promotion may be away for two weeks.
APPROVAL_S = 14 * 24 * 3600


class Approval(RunInput):
    """What a person says of a candidate that passed the gate: the form in which the flow run pauses."""

    approve: bool = Field(False, description="on: the version becomes champion; off: it stays what it is")
    reason: str = Field("", description="why; it is kept with the version")


def asked(config: RunConfig, registered: dict[str, Any]) -> dict[str, Any]:
    """What became of a version once a person has said in Prefect whether it is promoted; as it is, where none waits.

    A flow run whose process ends before that asks again when it is started again.
    """
    from nestune.stages.register import as_markdown

    if not (registered.get("waits") and has_server()):
        return registered
    form = Approval.with_initial_data(description=as_markdown(RunPaths.of(config.name), registered))
    said = pause_flow_run(wait_for_input=form, timeout=APPROVAL_S, key="approval")
    now: dict[str, Any] = read_json(RunPaths.of(config.name).registration, "Run nestune register again.")
    if not now["waits"]:  # another flow run has asked, too, and has had its answer
        return now
    decided: dict[str, Any] = decide(config, said.approve, said.reason)
    return decided
