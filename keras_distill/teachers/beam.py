"""A cache that a fleet of machines builds, as an Apache Beam transform."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keras_distill.teachers.cache import Cache


def build_cache(
    teacher: Callable[[], Any],
    dataset: Callable[[], Any],
    path: str | os.PathLike[str],
    parts: int,
    **options: Any,
) -> Any:
    """The building of a cache as a stage of a Beam pipeline.

    Each of `parts` elements is one `Cache.build(..., shard=(i, parts))`, and the last
    step is `Cache.join`. Which machine builds which part, and what is tried again when
    one fails, Beam decides; a part that is tried again goes on where it stopped.

    Needs the extra `beam`: `pip install '.[beam]'` in the project's folder.

    Args:
        teacher: Function without arguments that loads the teacher; it is called on
            the machines that do the work.
        dataset: Function without arguments that makes the data set, the same one, in
            the same order, on every machine.
        path: The cache's directory, on a file system that all machines share. The parts
            are built beside it, in `<path>.parts`, and can be deleted afterwards.
        parts: How many; several for each machine spread the work evenly.
        options: As for `Cache.build`, but for `shard`.

    Returns:
        A `beam.PTransform` to begin a pipeline with. Its output is one element: `path`,
        when the cache is finished.

    Raises:
        ImportError: If Apache Beam is not installed.
        TypeError: If `teacher` or `dataset` cannot be called, or `Cache.build` has no
            such option.
        ValueError: If `parts` is not an integer from 1.

    Example:

    ```python
    from keras_distill.teachers.beam import build_cache

    with beam.Pipeline(options=PipelineOptions(runner="DataflowRunner", ...)) as p:
        p | build_cache(load_teacher, make_rows, "/mnt/shared/cache", parts=256)
    cache = kd.teachers.Cache.open("/mnt/shared/cache")
    ```
    """
    try:
        import apache_beam as beam
    except ImportError as error:
        raise ImportError(
            "`build_cache` needs Apache Beam: pip install 'apache-beam', or the extra "
            "`beam` of this package."
        ) from error
    for name, value in (("teacher", teacher), ("dataset", dataset)):
        if not inspect.isfunction(value) and not isinstance(value, functools.partial):
            raise TypeError(
                f"`{name}` must be a function without arguments: it is called on the "
                f"machines that do the work. Received: {type(value).__name__}"
            )
    if parts != int(parts) or parts < 1:
        raise ValueError(f"`parts` must be an integer from 1. Received: {parts}")
    known = inspect.signature(Cache.build).parameters.keys()
    unknown = options.keys() - (known - {"teacher", "dataset", "path", "shard"})
    if unknown:
        raise TypeError(f"Options that Cache.build does not take: {sorted(unknown)}")
    target = os.fspath(path)
    part = functools.partial(
        _build_part,
        teacher=teacher,
        dataset=dataset,
        folder=f"{target}.parts",
        parts=int(parts),
        options=options,
    )
    return (
        "Parts" >> beam.Create(range(int(parts)))
        | "Spread" >> beam.Reshuffle()
        | "Build" >> beam.Map(part)
        | "Gather" >> beam.combiners.ToList()
        | "Join" >> beam.Map(_join, path=target)
    )


def _build_part(
    part: int,
    *,
    teacher: Callable[[], Any],
    dataset: Callable[[], Any],
    folder: str,
    parts: int,
    options: dict[str, Any],
) -> str:
    path = Path(folder) / f"{part:05d}"
    Cache.build(teacher(), dataset(), path, shard=(part, parts), **options)
    return os.fspath(path)


def _join(paths: Sequence[str], *, path: str) -> str:
    Cache.join(paths, path)
    return path
