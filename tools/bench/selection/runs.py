"""The runs that a command asks for, and those of them that are not done, done side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from slap_stream import SlapConfig
from slap_stream.core.processes import run_jobs, usable_cores
from slap_stream.errors import ConfigError
from slap_stream.selection.policies.registry import make_policy
from tools.bench.selection.corpora import Workshop
from tools.bench.selection.results import RESULTS, Row, append_row, key_of, read_rows
from tools.bench.selection.schedule import Arm, Preset, RunKey, arms, config_of
from tools.bench.selection.tasks import Condition
from tools.bench.selection.training import run

Job = tuple[argparse.Namespace, Preset, RunKey]


def keys(arguments: argparse.Namespace, preset: Preset) -> list[RunKey]:
    """Every run asked for, seed by seed, so that what is done first can be compared.

    Raises:
        ConfigError: If an arm, a condition or a setting is unknown or out of range.
    """
    known = arms()
    unknown = set(arguments.arms or ()) - set(known)
    if unknown:
        raise ConfigError(f"arms must be of {', '.join(known)}, got {sorted(unknown)}.")
    names = arguments.conditions or preset.conditions
    first, result = arguments.first_seed, []
    for seed in range(first, first + (arguments.seeds or preset.seeds)):
        for name in names:
            for arm in arguments.arms or preset.arms:
                keep = known[arm].config.get("keep", arguments.keep)
                make_policy(config_of(overridden(known[arm], arguments.set), keep, seed))
                rate_keep = 1.0 if isinstance(keep, str) else keep
                result.append(
                    RunKey(
                        preset=preset.name,
                        condition=Condition.of(name).name,
                        arm=arm,
                        keep=keep,
                        seed=seed,
                        learning_rate=arguments.learning_rate or preset.rate_for(rate_keep),
                        overrides=" ".join(sorted(arguments.set)),
                    )
                )
    return result


def overridden(arm: Arm, settings: Sequence[str]) -> Arm:
    """An arm with settings of the command line.

    Raises:
        ConfigError: If one is not NAME=VALUE, or there is no such setting.
    """
    names = list(SlapConfig().to_dict())
    extra = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names:
            raise ConfigError(f"set must be NAME=VALUE of {', '.join(names)}, got {setting!r}.")
        try:
            extra[name] = json.loads(value)
        except ValueError:
            extra[name] = value
    return replace(arm, config=dict(arm.config) | extra)


def as_many_as(arm: str, key: RunKey, rows: Sequence[Row]) -> float | None:
    """The share of the candidates that another arm trained on, where it has run."""
    wanted = {**key.to_dict(), "arm": arm}
    for row in rows:
        if all(row[n] == wanted[n] for n in ("preset", "condition", "arm", "seed", "overrides")):
            return float(row["samples"] / row["candidates"])
    return None


def run_all(arguments: argparse.Namespace, preset: Preset) -> None:
    """Do what is not done, in as many processes as jobs."""
    known = arms()
    # First what stands alone, then the arms that train on as many samples as another did.
    for alone in (True, False):
        done = [key_of(row) for row in read_rows(arguments.out / RESULTS)]
        jobs = [
            (arguments, preset, key)
            for key in keys(arguments, preset)
            if (known[key.arm].keeps_as is None) == alone and key.to_dict() not in done
        ]
        with tqdm(total=len(jobs), unit="run", disable=None) as bar:
            run_jobs(_work, jobs, [1] * len(jobs), num_workers=arguments.jobs, bar=bar)


def _work(job: Job, advance: Callable[[int], None]) -> None:
    arguments, preset, key = job
    # A small model gains nothing from a second thread; results stay comparable.
    small = preset.model is None
    torch.set_num_threads(1 if small else max(1, usable_cores() // arguments.jobs))
    results, name = arguments.out / RESULTS, f"{key.condition} {key.arm} seed {key.seed}"
    arm = overridden(arms()[key.arm], arguments.set)
    if arm.keeps_as is not None:
        share = as_many_as(arm.keeps_as, key, read_rows(results))
        if share is None:
            print(f"{name}: {arm.keeps_as} has not run")
            return
        arm = replace(arm, config=dict(arm.config) | {"keep": share})
    row = run(Workshop(arguments.data, arguments.out, preset), key, arm)
    append_row(results, row)
    print(
        f"{name}: {row['loss']:.4f} on {row['samples']} samples, {row['seconds']}",
        flush=True,
    )
