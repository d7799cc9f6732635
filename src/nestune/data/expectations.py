"""What must hold for every dataset, as a Great Expectations suite over its profile, with Data Docs."""

import logging
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestune.data.profile import KINDS
from nestune.errors import DataError, Fault

if TYPE_CHECKING:
    import pandas

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
NO_TIME = datetime(2000, 1, 1, tzinfo=UTC)
LOGO_ON_THE_WEB = re.compile(r"https://great-expectations-web-assets[^\"']*/logo-long\.png[^\"']*")


def check_profile(
    profile: "pandas.DataFrame",
    sets: Sequence[str],
    written: int,
    max_length: int,
    allow_duplicates: bool,
    docs: Path,
) -> list[dict[str, Any]]:
    """Hold the profile of a dataset against the suite and write Data Docs; returns a summary of each expectation.

    `written`: lines in the dataset's files. Raises DataError that names every expectation not met, and its rows.
    """
    import great_expectations

    # It tells of each temporary folder, and sets that level itself when it is imported.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    from great_expectations.checkpoint import UpdateDataDocsAction
    from great_expectations.core.run_identifier import RunIdentifier

    context = great_expectations.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    _write_docs_to(context, docs)
    asset = context.data_sources.add_pandas("nestune").add_dataframe_asset("profile")
    suite = great_expectations.ExpectationSuite(
        name="dataset", expectations=_expectations(sets, written, max_length, allow_duplicates)
    )
    definition = great_expectations.ValidationDefinition(
        name="dataset",
        data=asset.add_batch_definition_whole_dataframe("records"),
        suite=context.suites.add(suite),
    )
    checkpoint = great_expectations.Checkpoint(
        name="dataset",
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["set", "file", "line"]},
        actions=[UpdateDataDocsAction(name="data_docs")],
    )
    # The time of day would make two runs on the same data differ.
    run_id = RunIdentifier(run_name="validate", run_time=NO_TIME)
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": profile}, run_id=run_id)
    results = [result for run in outcome.run_results.values() for result in run.results]
    faults = [fault for result in results if not result.success for fault in _faults(result)]
    if faults or not outcome.success:
        names = sorted({result.expectation_config.type for result in results if not result.success})
        raise DataError(f"the dataset does not meet {', '.join(names)}; nothing was written", faults)
    _make_reproducible(docs)
    return sorted((_summary(result) for result in results), key=lambda summary: str(summary))


def _expectations(sets: Sequence[str], written: int, max_length: int, allow_duplicates: bool) -> list[Any]:
    """The suite; each expectation carries its reason, which Data Docs show."""
    from great_expectations import expectations as expect

    suite = [
        *(
            expect.ExpectColumnValuesToNotBeNull(column=column, notes="other expectations pass over missing values")
            for column in ("set", "file", "line", "kind", "tokens", "supervised", "digest")
        ),
        expect.ExpectColumnDistinctValuesToEqualSet(
            column="set", value_set=list(sets), notes="an empty set would pass every expectation on its rows"
        ),
        expect.ExpectTableRowCountToEqual(
            value=written, notes="a record counted but not written is lost, one written but not counted is unchecked"
        ),
        expect.ExpectCompoundColumnsToBeUnique(
            column_list=["set", "file", "line"], notes="a file named twice in one set would be learned twice"
        ),
        expect.ExpectColumnValuesToBeBetween(
            column="line", min_value=1, notes="error messages and rejected.jsonl count lines from 1"
        ),
        expect.ExpectColumnValuesToBeInSet(
            column="kind", value_set=list(KINDS), notes="for no other format is it settled what is learned"
        ),
        expect.ExpectColumnValuesToBeBetween(
            column="tokens",
            min_value=2,
            max_value=max_length,
            notes="one token alone has nothing before it to be predicted from; longer records were to be cut",
        ),
        expect.ExpectColumnValuesToBeBetween(
            column="supervised", min_value=1, notes="a batch of records with nothing to learn would have no loss"
        ),
        expect.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A="tokens", column_B="supervised", notes="the first token is never predicted, so never supervised"
        ),
    ]
    if not allow_duplicates:
        suite.append(
            expect.ExpectCompoundColumnsToBeUnique(
                column_list=["set", "digest"], notes="a repeated record counts double in the loss"
            )
        )
    return suite


def _write_docs_to(context: Any, docs: Path) -> None:
    for site in list(context.variables.data_docs_sites):
        context.delete_data_docs_site(site)
    context.add_data_docs_site(
        site_name="nestune",
        site_config={
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.absolute())},
        },
    )


def _faults(result: Any) -> list[Fault]:
    config = result.expectation_config
    expected = {key: value for key, value in config.kwargs.items() if key != "batch_id"}
    remedy = f"It must hold because: {config.notes}. Report this, it is not your data's fault"
    problem = f"{config.type}: {expected}"
    field = str(expected.get("column", ""))
    # Keyed by the metric that could not be computed; flat when all could.
    errors = [info["exception_message"] for info in result.exception_info.values() if isinstance(info, dict)]
    if errors:
        return [Fault("profile", 0, field, f"{problem}, could not be checked: {errors[0]}", remedy)]
    rows = result.result.get("unexpected_index_list") or []
    if not rows:
        return [Fault("profile", 0, field, f"{problem}, seen {result.result.get('observed_value')}", remedy)]
    return [Fault(row["file"], row["line"], field, f"{problem}, seen {row}", remedy) for row in rows]


def _summary(result: Any) -> dict[str, Any]:
    config = result.expectation_config
    return {
        "expectation": config.type,
        "arguments": {key: value for key, value in sorted(config.kwargs.items()) if key != "batch_id"},
        "reason": config.notes,
        "met": bool(result.success),
    }


def _make_reproducible(docs: Path) -> None:
    """Number the random ids of the pages, blank their times, and take their logo from the folder, not the web."""
    for page in sorted(docs.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        for number, random_id in enumerate(dict.fromkeys(UUID.findall(text))):
            text = text.replace(random_id, f"id-{number}")
        text = TIME.sub(NO_TIME.strftime("%Y%m%dT%H%M%S.%fZ"), text)
        up = "../" * (len(page.relative_to(docs).parts) - 1)
        page.write_text(LOGO_ON_THE_WEB.sub(f"{up}static/images/logo-long.png", text), encoding="utf-8")
    # Help for users of its own command line: animations that this page never shows.
    for animation in docs.glob("static/images/*.gif"):
        animation.unlink()
