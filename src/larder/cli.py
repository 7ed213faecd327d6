"""The `larder` command. Its imports are lazy, so that --help and an unchanged apply are quick."""

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from larder import log
from larder.bars import settings
from larder.errors import BusyError, ConfigError, LarderError, RefusedFileError, UnhealthyError
from larder.operations.credentials import Credentials
from larder.operations.pipeline import STAGES

EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed: a store cannot be reached, a stage broke
  2  a wrong option, credential or setting
  3  a file could not be understood; all else was done
  4  another one is running
  5  status: not healthy; explain: what is stored does not agree
  6  another host runs the pipeline: this one is a spare"""

INCOMING = Path("/var/lib/larder/incoming")
pass_credentials = click.make_pass_decorator(Credentials)


class _Group(click.Group):
    """Whatever happens, a sentence and an exit code; the traceback at debug level."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise LarderError(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")) from error
            raise
        except Exception as error:
            log.logger.debug("", exc_info=True)
            what = (str(error).splitlines() or [""])[0]
            raise LarderError(f"Unexpected {type(error).__name__}: {what} (--debug shows where)") from error


@click.group(
    cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.option(
    "--credentials",
    type=click.Path(path_type=Path),
    help="Directory with feature_store.yaml, load_url and pipeline_url.  [default: $CREDENTIALS_DIRECTORY]",
)
@click.option("--debug", is_flag=True, help="Log everything, as LARDER_LOG_LEVEL=debug does.")
@click.version_option(package_name="larder")
@click.pass_context
def main(context: click.Context, credentials: Path | None, *, debug: bool) -> None:
    """Load bars, compute trading features, keep a Feast feature store fresh."""
    level = "debug" if debug else os.environ.get("LARDER_LOG_LEVEL", "info").lower()
    if level not in log.LEVELS:
        raise click.UsageError(f"LARDER_LOG_LEVEL is {level!r}; it may be {', '.join(log.LEVELS)}.")
    log.configure(level)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a stopped run still reports
    context.obj = Credentials(credentials)


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help=f"What holds of files, as the inventory says it.  [default: {settings.PATH}]",
)


repo_option = click.option(
    "--repo",
    type=click.Path(path_type=Path),
    default=Path("/opt/feast/feature_repo"),
    show_default=True,
    help="The feature repository.",
)


def _rules(repo: Path) -> Any:
    """The rules of quality.yml. Names of features are judged where they are used."""
    from larder.quality import rules

    try:
        return rules.read(repo)
    except rules.RuleError as error:
        raise ConfigError(str(error)) from None


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a user may say of files; an option that is not given is left to the configuration and to the format."""
    options = [
        click.option("--format", help="Read them as this format; `larder formats` lists all."),
        click.option("--columns", metavar="FIELD=COLUMN,...", help="Which column is what, e.g. close=Price,date=Day."),
        click.option("--symbol", help="The symbol of files that have no column for it."),
        click.option("--zone", help="The market's time zone, e.g. America/New_York: times become days there."),
        click.option("--day-starts", metavar="HH:MM", help="A trading day begins then, on the evening before."),
        click.option("--decimal", metavar=". or ,", help="The decimal mark."),
        click.option("--dates", metavar="D/M/Y or M/D/Y", help="What comes first in a date such as 3/4/2025."),
        click.option("--encoding", help="E.g. utf-16 or cp1252."),
        click.option("--resample", metavar="1d", help="Make daily bars of intraday ones."),
        config_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, judged."""
    given = {name: value for name, value in options.items() if value is not None}
    if "columns" in given:
        given["columns"] = settings.columns(given["columns"])
    return {name: settings.check(name, value) for name, value in given.items()}


def _present(paths: tuple[Path, ...]) -> None:
    """Every path is there, as far as this user may look; what a file is and holds is judged later."""
    for path in paths:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            if not path.is_symlink():
                raise ConfigError(_missing(path)) from None
        except PermissionError:
            raise ConfigError(_no_look(path.absolute())) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be looked at: {error.strerror}.") from None


def _no_look(path: Path) -> str:
    from larder.bars.reader import user

    closed = next((p for p in reversed(path.parents) if not os.access(p, os.X_OK)), path.parent)
    return (
        f"The user {user()} may not look into {closed}, so {path} cannot be read: copy it to a place where everybody "
        f"may read it, such as /tmp, or to {INCOMING}."
    )


def _missing(path: Path) -> str:
    """Where a relative name was typed in a folder that this user may not enter, it is not looked for there."""
    typed_in = os.environ.get("LARDER_TYPED_IN", "")
    if typed_in and not path.is_absolute() and not os.access(typed_in, os.X_OK):
        return _no_look(Path(typed_in, path))
    return f"{path} does not exist."


@main.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, required=True, metavar="FILE|DIR...", type=click.Path(path_type=Path))
@file_options
@repo_option
@pass_credentials
def load(credentials: Credentials, /, paths: tuple[Path, ...], config: Path | None, repo: Path, **options: Any) -> None:
    """Load daily bars from files: CSV of many kinds, Parquet, also compressed.

    Of a directory each new or changed file is loaded once; a FILE is loaded whenever it is named. `larder inspect` says
    what a load would do. Impossible bars go into market_data.rejected_bars, with the reason, and what the rules of
    quality.yml doubt into quarantine.
    """
    given = _given(options)
    _present(paths)
    held = settings.read(config)
    from larder.bars.load import load as load_files

    loaded = load_files(credentials.load_url, paths, held, given, _rules(repo))
    if loaded.refused:
        raise RefusedFileError(
            f"{loaded.refused} of the files could not be understood (see above); the others were loaded."
        )


@main.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@file_options
@click.option("--json", "as_json", is_flag=True, help="As a JSON list with an object for each file.")
@pass_credentials
def inspect(
    credentials: Credentials, /, paths: tuple[Path, ...], config: Path | None, *, as_json: bool, **options: Any
) -> None:
    """Say what a load of files would do, and change nothing.

    Where there are credentials, it also says which bars are stored already with other values, so that a load would
    replace them; it needs neither them nor a database. Of a directory, it inspects each file. Ends with 3 if a file
    would be refused, and says of each why.
    """
    given = _given(options)
    _present(paths)
    chosen = settings.read(config).options(given)
    from larder.bars import candidates
    from larder.bars.load import inspect as inspect_files
    from larder.bars.report import as_text

    refused = 0
    found: list[dict[str, Any]] = []
    files = (p for given_path in paths for p in (candidates(given_path) if given_path.is_dir() else [given_path]))
    for inspection in inspect_files(files, chosen, credentials.load_url if credentials.given else None):
        refused += inspection.refusal is not None
        if as_json:
            found.append(inspection.as_dict())
        else:
            click.echo(as_text(inspection) + "\n")
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
    if refused:
        raise RefusedFileError(f"{refused} of the files would be refused (see above).")


@main.command(epilog=EXIT_CODES)
@click.option(
    "--check", type=click.Path(path_type=Path), help="Only judge this file of settings, as --config reads it."
)
@config_option
def formats(check: Path | None, config: Path | None) -> None:
    """List the formats that files may have: those of the inventory, then those that Larder brings."""
    held = settings.read(check or config)
    if check:
        return
    from larder.bars import catalogue

    listed = catalogue.load(held.formats).formats
    width = max(len(entry.name) for entry in listed) + 2
    for entry in listed:
        click.echo(f"{entry.name:<{width}}{entry.title}".rstrip())


@main.command(epilog=EXIT_CODES)
@click.option("--full", is_flag=True, help="Recompute every symbol, not only those whose bars changed.")
@repo_option
@pass_credentials
def compute(credentials: Credentials, repo: Path, *, full: bool) -> None:
    """Compute the features of the symbols whose bars changed."""
    from larder.features.compute import compute as compute_features
    from larder.features.formulas import Formulas

    compute_features(credentials.pipeline_url, Formulas(repo), full=full)


@main.command(epilog=EXIT_CODES)
@repo_option
def features(repo: Path) -> None:
    """List the features of the computed views: type, formula, description."""
    from larder.features import definitions

    try:
        views = definitions.read(repo).views
    except definitions.DefinitionError as error:
        raise ConfigError(str(error)) from None
    rows = [(f"{view.name}:{f.name}", f.type, f.formula, f.description) for view in views for f in view.features]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


days_option = click.option(
    "--days", type=click.IntRange(min=1), default=7, show_default=True, help="Length of the window that ends now."
)


@main.command(epilog=EXIT_CODES)
@days_option
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d"]),
    help="Start of the window instead of --days, e.g. after the online store was lost.",
)
@pass_credentials
def materialize(credentials: Credentials, days: int, since: datetime | None) -> None:
    """Write the newest feature values to the online store, late and corrected ones too."""
    from larder.operations.materialize import materialize as materialize_views

    materialize_views(credentials, days=days, since=since.replace(tzinfo=UTC) if since else None)


@main.command(epilog=EXIT_CODES)
@click.argument("entities", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.argument("features", nargs=-1, required=True, metavar="FEATURE...")
@click.option(
    "--feature-store",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=Path("feature_store.yaml"),
    show_default=True,
    help="Feast's configuration.",
)
@click.option(
    "--rows-at-once",
    type=click.IntRange(min=1),
    default=250_000,
    show_default=True,
    help="Rows of each part; more take more memory.",
)
def join(entities: Path, directory: Path, features: tuple[str, ...], feature_store: Path, rows_at_once: int) -> None:
    """Join features to many entity rows, for training, in bounded memory.

    ENTITIES is a Parquet file with the join keys and event_timestamp; FEATURE is view:feature, or one feature service.
    DIRECTORY gets a Parquet file for each part of the rows. The same command again goes on where it was ended.
    """
    from larder.operations.join import join as join_rows

    join_rows(feature_store, entities, directory, features, rows_at_once=rows_at_once)


def _stages(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names or set(names) - set(STAGES):
        raise click.BadParameter(f"{value!r}; it may hold {', '.join(STAGES)}, with commas between them.")
    return names


@main.command(epilog=EXIT_CODES)
@click.option("--stages", default=",".join(STAGES), show_default=True, callback=_stages, help="Which stages to run.")
@click.option(
    "--incoming",
    type=click.Path(path_type=Path),
    multiple=True,
    default=[INCOMING],
    show_default=True,
    help="Where load finds files; may be given again.",
)
@days_option
@click.option(
    "--metrics-dir",
    type=click.Path(path_type=Path),
    help="Write pipeline.prom, status.prom, quality.prom, drift.prom and drift.html here.",
)
@config_option
@repo_option
@pass_credentials
def run(
    credentials: Credentials,
    stages: list[str],
    incoming: tuple[Path, ...],
    repo: Path,
    days: int,
    metrics_dir: Path | None,
    config: Path | None,
) -> None:
    """Run the pipeline: load, compute, materialize, check. Only one runs at a time, on whichever host."""
    from larder.operations.pipeline import run as run_stages

    try:
        run_stages(credentials, stages, incoming, repo, days=days, metrics_dir=metrics_dir, files=settings.read(config))
    except BusyError:
        raise
    except LarderError as error:  # systemd says only that the unit failed: the journal's last line says what to type
        error.hint = "Next: sudo larder status"
        raise


@main.command(epilog=EXIT_CODES)
@repo_option
@click.option("--force", is_flag=True, help="Apply although nothing changed since the last time.")
@pass_credentials
def apply(credentials: Credentials, repo: Path, *, force: bool) -> None:
    """Bring the feature repository into the registry; prints `changed` or `unchanged`."""
    from larder.operations.apply import apply as apply_repo

    click.echo("changed" if apply_repo(credentials, repo.resolve(), force=force) else "unchanged")


@main.command(epilog=EXIT_CODES)
@click.argument("host", required=False)
@click.option("--if-none", is_flag=True, help="Only if no host runs the pipeline yet.")
@pass_credentials
def active(credentials: Credentials, host: str | None, *, if_none: bool) -> None:
    """Say which host runs the pipeline; with HOST, make it that one, unless a run is under way.

    ansible/move_pipeline.yml does this, and sees to the schedules of both hosts.
    """
    from larder.operations import active as operation

    if host and if_none:
        click.echo(operation.claim(credentials, host))
        return
    if host:
        operation.move(credentials, host)
    click.echo(operation.active(credentials) or "")


@main.command(epilog=EXIT_CODES)
@repo_option
@pass_credentials
def due(credentials: Credentials, repo: Path) -> None:
    """Say whether the repository, or a definition, changed since the pipeline last ran: `due` or `not due`."""
    from larder.operations.apply import due as run_is_due

    click.echo("due" if run_is_due(credentials, repo) else "not due")


@main.command(epilog=EXIT_CODES)
def probe() -> None:
    """Try credentials before they replace those in use.

    Reads a JSON list of {purpose, name, content} from standard input, the name being feature_store.yaml, load_url or
    pipeline_url. Each logs in, uses a right of its purpose, and is refused one that it must not have.
    """
    from larder.operations.probe import probe as probe_credentials

    probe_credentials(sys.stdin)


@main.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--max-age",
    type=float,
    default=26,
    show_default=True,
    help="Hours that a materialization stays fresh, and that the rows of a day may take to come.",
)
@click.option("--metrics-dir", type=click.Path(path_type=Path), help="Write status.prom here, for node_exporter.")
@pass_credentials
def status(credentials: Credentials, max_age: float, metrics_dir: Path | None, *, as_json: bool) -> None:
    """Say what is wrong, and what is well: runs, files, freshness, completeness, evictions, standbys, certificates."""
    from larder.operations import metrics
    from larder.operations.status import as_text
    from larder.operations.status import status as get_status

    result = get_status(credentials, max_age_hours=max_age)
    if metrics_dir:
        metrics.write_facts(metrics_dir, result.facts)
    click.echo(json.dumps(result.as_dict(), indent=2, default=str) if as_json else as_text(result))
    if not result.healthy:
        raise UnhealthyError("Not healthy, for the reasons above.")


@main.command(epilog=EXIT_CODES)
@click.argument("symbol")
@click.argument("feature", metavar="VIEW:FEATURE")
@click.option(
    "--at",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S"]),
    help="Explain what a training set has at this time, in UTC, instead of what is served.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with each bar.")
@repo_option
@pass_credentials
def explain(
    credentials: Credentials, symbol: str, feature: str, at: datetime | None, repo: Path, *, as_json: bool
) -> None:
    """Say where a value comes from: its row, run and definition, the bars that give it, and the file of each."""
    from larder.operations import explain as operation

    told = operation.explain(credentials, repo, symbol, feature, at.replace(tzinfo=UTC) if at else None)
    click.echo(json.dumps(told.as_dict(), indent=2, default=str) if as_json else operation.as_text(told))
    if told.problems:
        raise UnhealthyError("What is stored does not agree, for the reasons above.")


@main.group(epilog=EXIT_CODES)
def quarantine() -> None:
    """List, release or drop the bars that a rule of quality.yml holds back."""


def which_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--symbol", help="Those of one symbol."),
        click.option("--day", type=click.DateTime(["%Y-%m-%d"]), help="Those of one day."),
        click.option("--rule", help="Those that one rule holds, such as split or jump."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _which(symbol: str | None, day: datetime | None, rule: str | None) -> Any:
    from larder.operations.quarantine import Which

    return Which(symbol, day.date() if day else None, rule)


@quarantine.command("list", epilog=EXIT_CODES)
@which_options
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
@pass_credentials
def quarantine_list(
    credentials: Credentials, symbol: str | None, day: datetime | None, rule: str | None, *, as_json: bool
) -> None:
    """List the bars in quarantine, each with the reason and its file."""
    from larder.operations import quarantine as operation

    bars = operation.listed(credentials, _which(symbol, day, rule))
    click.echo(
        json.dumps([bar.as_dict() for bar in bars], indent=2, default=str) if as_json else operation.as_text(bars)
    )


def _decide(
    credentials: Credentials, symbol: str | None, day: datetime | None, rule: str | None, *, every: bool, release: bool
) -> None:
    from larder.operations import quarantine as operation

    if every == any((symbol, day, rule)):
        raise click.UsageError("Say which bars: --symbol, --day, --rule, or --all.")
    count = operation.decide(credentials, _which(symbol, day, rule), release=release)
    click.echo(f"{count} released: the next run computes with them." if release else f"{count} dropped.")


all_option = click.option("--all", "every", is_flag=True, help="All bars in quarantine.")


@quarantine.command("release", epilog=EXIT_CODES)
@which_options
@all_option
@pass_credentials
def quarantine_release(
    credentials: Credentials, symbol: str | None, day: datetime | None, rule: str | None, *, every: bool
) -> None:
    """Store bars as if they had been good: the next run computes with them."""
    _decide(credentials, symbol, day, rule, every=every, release=True)


@quarantine.command("drop", epilog=EXIT_CODES)
@which_options
@all_option
@pass_credentials
def quarantine_drop(
    credentials: Credentials, symbol: str | None, day: datetime | None, rule: str | None, *, every: bool
) -> None:
    """Leave bars out for good, also where they come again; a bar of the day with other values is judged anew."""
    _decide(credentials, symbol, day, rule, every=every, release=False)


@main.command(epilog=EXIT_CODES)
@click.argument("symbol", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@pass_credentials
def quality(credentials: Credentials, symbol: str | None, *, as_json: bool) -> None:
    """Say what the rules of quality.yml found: in all, or of SYMBOL, with its rejected and quarantined bars."""
    from larder.operations import quality as operation

    told = operation.page(credentials, symbol)
    click.echo(json.dumps(told.as_dict(), indent=2, default=str) if as_json else operation.as_text(told))


@main.command(epilog=EXIT_CODES)
@click.option("--metrics-dir", type=click.Path(path_type=Path), help="Write quality.prom, drift.prom, drift.html here.")
@click.option("--new-reference", is_flag=True, help="Make the references of drift anew, of the year before now.")
@repo_option
@pass_credentials
def check(credentials: Credentials, repo: Path, metrics_dir: Path | None, *, new_reference: bool) -> None:
    """Judge days, features and drift by quality.yml, as the last stage of a run does; ends with 5 if a rule fails."""
    from larder.operations import checks

    told = checks.run(credentials, repo, metrics_dir, new_reference=new_reference)
    failed = [found for found in told.findings if found.severity == "fail"]
    for found in told.findings[:20]:
        click.echo(f"{found.severity} {found.rule} {found.of or found.symbol}: {found.message}.")
    moved = sum(one.moved for one in told.drift)
    click.echo(f"{len(told.findings)} findings; {moved} of {len(told.drift)} features have moved.")
    if failed:
        raise UnhealthyError(f"{len(failed)} findings of rules that may not find anything.")


@main.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the report, with plots, here.")
@repo_option
@pass_credentials
def drift(credentials: Credentials, repo: Path, html: Path | None, *, as_json: bool) -> None:
    """Say how the newest values of each feature differ from their reference, as the last check found."""
    from larder.operations import checks, metrics
    from larder.operations import drift as operation

    judged = operation.read(credentials)
    if html:
        metrics.write_text(html, checks.report(credentials, repo))
    click.echo(json.dumps(operation.as_dicts(judged), indent=2, default=str) if as_json else operation.as_text(judged))


@main.command(epilog=EXIT_CODES)
@click.option("--sample", type=click.IntRange(min=1), default=50, show_default=True, help="How many symbols.")
@click.option("--symbol", "symbols", multiple=True, help="This symbol, instead of a sample; may be given again.")
@click.option("--metrics-dir", type=click.Path(path_type=Path), help="Write verify.prom here, for node_exporter.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@repo_option
@pass_credentials
def verify(
    credentials: Credentials,
    repo: Path,
    sample: int,
    symbols: tuple[str, ...],
    metrics_dir: Path | None,
    *,
    as_json: bool,
) -> None:
    """Compute again, from the bars, what clients are served of a sample of symbols; ends with 5 if a value is wrong."""
    from larder.operations import metrics
    from larder.operations import verify as operation

    told = operation.verify(credentials, repo, sample, symbols)
    if metrics_dir:
        metrics.write_verified(metrics_dir, told.symbols, told.values, len(told.wrong), told.skipped)
    click.echo(json.dumps(told.as_dict(), indent=2, default=str) if as_json else operation.as_text(told))
    if told.wrong:
        raise UnhealthyError(f"{len(told.wrong)} values that are served are not what the bars give.")


@main.command(epilog=EXIT_CODES)
@click.option("--samples", type=click.IntRange(min=1), default=5000, show_default=True, help="How many, at most.")
@click.option(
    "--from",
    "urls",
    multiple=True,
    metavar="URL",
    help="An instance that keeps samples; may be given again.  [default: $LARDER_SAMPLES]",
)
@click.option("--metrics-dir", type=click.Path(path_type=Path), help="Write skew.prom here, for node_exporter.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@pass_credentials
def skew(
    credentials: Credentials, samples: int, urls: tuple[str, ...], metrics_dir: Path | None, *, as_json: bool
) -> None:
    """Compare what clients were served with a point-in-time join; ends with 5 if a value differs for no known reason.

    `late` came after it was served, `corrected` was computed anew since, `expired` is older than the view's ttl, so
    that a training set has null.
    """
    from larder.operations import metrics
    from larder.operations import skew as operation

    told = operation.skew(credentials, urls or operation.urls(), samples)
    if metrics_dir:
        metrics.write_skew(metrics_dir, told)
    click.echo(json.dumps(told.as_dict(), indent=2, default=str) if as_json else operation.as_text(told))
    if told.different:
        raise UnhealthyError(f"{len(told.different)} values that were served are not what a training set has.")
