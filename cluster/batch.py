"""`python -m cluster.batch`: a file of prompts through engines on Ray, into a folder or a bucket with a manifest.

Ray Data runs a pool of actors with an engine each and hands them blocks of rows. What has come of a row stands in the
manifest as soon as its pictures are stored, so the same command goes on wherever an earlier run was ended.
"""

import hashlib
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
from rich.console import Console

from app import deployment, settings
from app.config_option import CONFIG, Config
from app.settings import ModelSettings
from cluster.actor import Actor, Work
from cluster.beginnings import Beginnings
from cluster.manifest import Manifest
from cluster.place import S3
from cluster.progress import Telling
from cluster.table import check, rows
from models.errors import HeliographError, InvalidRequest

CALLS = 4  # blocks that an actor works on at a time
MOST_TASKS = 4096  # that Ray Data is given: beyond, each has several blocks, which an actor takes one after another
# Without a task done, for each of its blocks, after which a job ends: Ray starts an actor that dies again without end.
STILL_S = 1800.0

# What pictures depend on: a job that goes on with others of these would be two jobs.
_OF_PICTURES = {
    *("name", "family", "source", "revision", "config", "dtype", "fp8"),
    *("adapters", "controlnets", "preprocessors", "defaults"),
}


class Stopped(HeliographError):
    """The job ended before it was done. The same command goes on from here."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The actors: how many, what each takes of its node (with `gpus` 0, as many torch threads), and rows in a block."""

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    block: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InvalidRequest("actors", f"must be from 1 to max-actors, {self.most}, not {self.least}")
        if not (self.cpus > 0 and self.gpus >= 0 and self.block >= 1):
            raise InvalidRequest("pool", "needs some of a CPU, 0 or more GPUs, and blocks of 1 row or more")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A job: its input, what draws it, where it goes; `console` hears how far it is."""

    input: Path
    work: Work
    pool: Pool
    address: str = "local"
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def run(self) -> tuple[int, int]:
        """Does what is missing, and gives the numbers of pictures and of errors in the whole manifest.

        Raises InvalidRequest, StoreUnavailable, Stopped.
        """
        check(self.input)
        place = self.work.place()
        manifest = Manifest(place)
        recorded = manifest.recorded()
        missing = [] if manifest.whole else [r.columns() for r in rows(self.input) if r.number not in recorded]
        manifest.begin(self._identity())  # only now: an input that is refused claims no place
        if missing:
            with Telling(len(recorded) + len(missing), len(recorded), self.console) as telling:
                self._draw(missing, telling)
                self.console.print(telling.line(), highlight=False, soft_wrap=True)
        left = manifest.finish(recorded.union(row["number"] for row in missing))
        if left:  # another run had other blocks, and wrote its part over one of this run
            raise Stopped(
                f"{len(left)} rows are not in the manifest, by another run at the same time. The same command goes on"
            )
        Beginnings(place).forget()
        return manifest.counts()

    def _identity(self) -> dict[str, Any]:
        """What makes this job this one."""
        with self.input.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        model = self.work.model.model_dump(mode="json", include=_OF_PICTURES)
        return {"version": 1, "input": digest, "model": model}

    def _draw(self, missing: list[dict[str, Any]], telling: Telling) -> None:
        """Runs the rows through the pool of actors."""
        settings.set_ray_environment()
        import ray
        from ray.data.exceptions import ExecutionTimeoutError
        from ray.exceptions import RayError

        pool = self.pool
        local = {"num_cpus": math.ceil(pool.most * pool.cpus) + 1, "include_dashboard": False}
        local |= {"num_gpus": math.ceil(pool.most * pool.gpus)} if pool.gpus else {}
        options = local if self.address == "local" else {}
        ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **options)
        try:
            for told in self._told(missing):
                telling.add(*(sum(told[name]) for name in ("rows", "pictures", "errors")))
        except (RayError, ExecutionTimeoutError) as fault:
            raise Stopped(f"the job ended before it was done: {_reason(fault)}. The same command goes on") from fault
        finally:
            ray.shutdown()

    def _told(self, missing: list[dict[str, Any]]) -> Iterator[dict[str, list[int]]]:
        """What the actors tell of blocks that are done, as it comes."""
        import ray.data

        pool = self.pool
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.raise_original_map_exception = True
        together = math.ceil(len(missing) / pool.block / MOST_TASKS)  # blocks of a task, which tells of none before all
        context.execution_no_progress_timeout_s = STILL_S * together
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        size = pool.block * together
        table = pa.Table.from_pylist(missing)
        tables = [table.slice(at, size) for at in range(0, len(missing), size)]
        dataset = ray.data.from_arrow(tables).map_batches(
            Actor,
            fn_constructor_args=(self.work,),
            batch_size=pool.block,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.least,
                max_size=pool.most,
                max_concurrent_calls_per_actor=CALLS,
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
        blocks: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for told in blocks:
            yield told.to_pydict()


def _reason(fault: Exception) -> str:
    """The last line of what Ray says, which is the error itself after its traceback."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return lines[-1] if lines else type(fault).__name__


def _model(config: Path, name: str | None) -> tuple[ModelSettings, deployment.Deployment]:
    described, _ = deployment.read(config)
    wanted = name or described.catalogue.default_model
    for model in described.catalogue.models:
        if model.name == wanted:
            return model, described
    names = ", ".join(model.name for model in described.catalogue.models)
    raise InvalidRequest("model", f"there is no {wanted!r} in {config}; one of: {names}")


def batch(
    input: Annotated[Path, typer.Option("--input", "-i", help="Rows to draw: .jsonl, .csv or .parquet.")],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder, or s3://bucket/prefix.")],
    config: Config = CONFIG,
    model: Annotated[str | None, typer.Option(help="One of the configuration's; the default one unless said.")] = None,
    address: Annotated[
        str, typer.Option("--address", "-a", envvar="RAY_ADDRESS", help="A Ray cluster; one of its own unless said.")
    ] = "local",
    actors: Annotated[int, typer.Option(help="Engines, at least.")] = 1,
    max_actors: Annotated[int | None, typer.Option(help="Engines at most; as many as --actors unless said.")] = None,
    num_cpus: Annotated[
        float | None, typer.Option(help="Of each engine; a share of this machine unless said, 1 beside a GPU.")
    ] = None,
    num_gpus: Annotated[float, typer.Option(help="Of each engine.")] = 0.0,
    block: Annotated[int, typer.Option(help=f"Rows in a block; an engine has {CALLS} blocks at a time.")] = 16,
    s3_endpoint: Annotated[str | None, typer.Option(help="An S3 server other than Amazon's.")] = None,
    s3_region: Annotated[str | None, typer.Option(help="The region of the bucket.")] = None,
) -> None:
    """Draw every row of a file, and write a manifest. The same command, said again, does only what is missing."""
    chosen, described = _model(config, model)
    most = actors if max_actors is None else max_actors
    share = 1.0 if num_gpus else max(1.0, settings.cores() // max(most, 1))
    pool = Pool(least=actors, most=most, cpus=share if num_cpus is None else num_cpus, gpus=num_gpus, block=block)
    threads = chosen.threads or max(1, int(pool.cpus))
    work = Work(
        model=chosen.model_copy(update={"threads": threads}),
        folder=input.absolute().parent,
        fetch=described.gateway.fetch,
        output=output if output.startswith(S3) else str(Path(output).absolute()),
        endpoint=s3_endpoint,
        region=s3_region,
    )
    began = time.monotonic()
    pictures, errors = Batch(input=input, work=work, pool=pool, address=address).run()
    print(f"{pictures} pictures and {errors} errors in {output} after {time.monotonic() - began:.0f} s")


def main() -> None:
    """Runs the command; an error of ours is one line that says what to do."""
    try:
        typer.run(batch)
    except HeliographError as error:
        Console(stderr=True).print("error", error, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
