"""The parts of a build on Apache Beam: on this machine, or Dataflow, Flink or Spark by option.

A worker of any runner reads the sources and images and writes its part by the paths that `build`
was given, so these have to be the same on every worker: a shared or mounted file system.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from echovlm_jax.data.dealing import Runner
from echovlm_jax.data.disk import writing
from echovlm_jax.errors import InputError


def beam_runner(options: Sequence[str]) -> Runner:
    """A runner for `build`.

    Args:
      options: Beam's own, each as "--NAME=VALUE", e.g. "--runner=DirectRunner".

    Raises:
      InputError: Apache Beam is not installed.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise InputError("Apache Beam is not installed: pip install 'echovlm-jax[beam]'")

    def run(job: Callable[[str, int], Any], work: str, numbers: Sequence[int]) -> Iterator[int]:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )

        try:
            with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
                _ = (
                    pipeline
                    | "Parts" >> beam.Create(list(numbers))
                    | "Spread" >> beam.Reshuffle()  # else one worker would get them all
                    | "Write" >> beam.Map(_call, job, work)
                )
        except InputError as error:  # in a runner that lets it through, words of its own follow
            raise InputError(str(error).split("\n")[0].split(" [while running")[0]) from None
        except Exception as error:  # a runner's own error quotes the worker's traceback
            found = re.search(r"\bInputError: ([^\n]+)", str(error))
            if found is None:
                raise
            raise InputError(found[1].split(" [while running")[0]) from None
        # Results stay with the workers: what they wrote says that it is done.
        yield from ()

    return run


def _call(number: int, job: Callable[[str, int], Any], work: str) -> None:
    with writing(Path(work)):  # whatever runner it is, an InputError's words are found again
        job(work, number)
