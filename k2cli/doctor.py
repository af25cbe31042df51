"""What this machine offers for rendering, and what is in the way."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from k2cli import models
from k2cli.console import aligned
from k2cli.project import Project
from k2cli.workers import core_count
from model import library, safety
from model.errors import K2Error, pluralise
from model.plan import BYTES, OFFLOADS, PACKED_BYTES, USABLE_SHARE, ModelSize

PACKAGES = ("k2", "torch", "tokenizers", "safetensors", "pillow", "numpy", "typer", "rich")


def examine(folder: Path | None = None) -> dict[str, Any]:
    """Everything `k2 doctor` reports, on a project too. `problems` keep k2 from working, `notes` say what is slow."""
    import torch

    from model.fast import measure_speed
    from model.parts import DTYPES, has_kernels, pick_device

    gpus = [(torch.cuda.get_device_properties(i), has_kernels(i)) for i in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "device": str(pick_device(None)),
        "gpus": [
            {"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1), "usable": usable} for gpu, usable in gpus
        ],
        "cpu": {
            "name": cpu_name(),
            "cores": core_count(),
            "threads": torch.get_num_threads(),
            "kernels": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_gb": memory(),
        "gflops": {name: round(measure_speed(dtype), 1) for name, dtype in DTYPES.items()},
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        "models": [],
        "plans": [],
        "notes": [],
        "problems": [],
    }
    problems: list[str] = report["problems"]
    for name in library.bundled_models():
        with collect_errors(problems):
            report["models"] += [
                {key: each[key] for key in ("file", "megabytes", "sha256")} for each in models.describe_files(name)
            ]
    if not library.bundled_models():
        problems.append(f"There are no weights in {library.BUNDLED}: the bundled model cannot render.")
    with collect_errors(problems):
        if project := Project.open(folder) if folder else Project.find_or_none(Path.cwd()):
            report["project"] = {
                "name": project.name,
                "folder": str(project.root),
                "prompts": len(project.prompts),
                "styles": list(project.styles.names),
            }
    with collect_errors(problems):
        safety.installed_filters()
    report["plans"] = plans(report["device"])
    report["notes"] = notes(report)
    return report


@contextmanager
def collect_errors(problems: list[str]) -> Iterator[None]:
    """Collect errors that users can fix in `problems`, and continue."""
    try:
        yield
    except K2Error as error:
        problems.append(str(error))


def plans(device: str) -> list[dict[str, Any]]:
    """How each installed model would be held, and the open 12.9B weights even if absent; and what fits."""
    from model import parts
    from model.plan import (
        bytes_needed,
        default_dtype,
        fast_8_bit_precision,
        free_memory,
        plan_on,
        plan_options,
        supported_precisions,
    )

    candidates = {"krea-2 (12.9B)": parts.release_size(device)}
    for model in library.list_models():
        try:
            candidates = {model.name: parts.count_numbers(library.find_parts(model), device)} | candidates
        except K2Error:
            continue  # `k2 models` reports what is wrong with it
    free, eight, known = free_memory(device), fast_8_bit_precision(device), supported_precisions(device)
    found = []
    for name, numbers in candidates.items():
        dtype = default_dtype(device, numbers.width)
        chosen = plan_on(device, numbers, dtype=dtype)
        by_hand = [("int4", offload) for offload in OFFLOADS]  # never chosen automatically
        open_ways = dict.fromkeys([*plan_options(numbers, eight, supported=known), *by_hand])
        alternatives = {f"{p}, offload {o}": round(bytes_needed(numbers, dtype, p, o) / 1e9, 1) for p, o in open_ways}
        alternatives = dict(sorted(alternatives.items(), key=lambda way: -way[1]))
        on_disk = PACKED_BYTES.get(numbers.stored or "", BYTES["bfloat16"])
        found.append(
            {
                "model": name,
                "dtype": dtype,
                "precision": chosen.precision,
                "offload": chosen.offload,
                "needs_gb": round(chosen.bytes_needed / 1e9, 1),
                "free_gb": round(free / 1e9, 1),
                "fits": chosen.fits(free),
                "ways_gb": alternatives,
                "step_gflop": round(flop_per_step(numbers) / 1e9),
                "blocks_gb": round(numbers.inside * on_disk / 1e9, 1),
            }
        )
    return found


def flop_per_step(numbers: ModelSize) -> int:
    """FLOP of a step at the model's native size: its blocks' matrix products, for the picture's tokens alone."""
    return 2 * numbers.inside * (numbers.native // 16) ** 2


def notes(report: Mapping[str, Any]) -> list[str]:
    """What will be slow, and why."""
    from model.parts import INSTALL_OTHER_BUILD

    cpu, gflops, memory_gb = report["cpu"], report["gflops"], report["memory_gb"]
    lines = [
        f"{gpu['name']} is not used: this PyTorch has no kernels for it. {INSTALL_OTHER_BUILD}"
        for gpu in report["gpus"]
        if not gpu["usable"]
    ]
    if report["device"] == "cpu":
        none = "No GPU is used" if report["gpus"] else why_no_gpu()
        rate = f"{gflops['float32']:g} GFLOP/s"
        lines.append(
            f"{none}: everything runs on the processor, at {rate}. Mini is made for that; the open weights are not."
        )
        if gflops["bfloat16"] < gflops["float32"]:
            ratio = gflops["float32"] / max(gflops["bfloat16"], 0.1)
            lines.append(
                f"bfloat16 is {ratio:.1f} times slower than float32: the processor has no instructions for it."
            )
    if cpu["threads"] < cpu["cores"]:
        used = f"{cpu['threads']} of {cpu['cores']} cores {'is' if cpu['threads'] == 1 else 'are'} used"
        lines.append(f"{used}: OMP_NUM_THREADS or the system limits them.")
    for plan in report["plans"]:
        if not plan["fits"]:
            lines.append(
                f"{plan['model']} does not fit: it needs {plan['needs_gb']:g} GB, and k2 uses at most nine tenths of "
                f"the {estimate_prefix(memory_gb)}{plan['free_gb']:g} GB free."
            )
        elif plan["offload"] == "all":
            four = plan["ways_gb"]["int4, offload text"]
            why = (
                "it fits in memory only in 4 bits (--precision int4)" if four <= USABLE_SHARE * plan["free_gb"] else ""
            )
            line = f"{plan['model']} is read from disk for every step: {why or 'it does not fit in memory'}."
            if report["device"] == "cpu" and plan["step_gflop"]:
                rate = 1000 * plan["blocks_gb"] * gflops[plan["dtype"]] / plan["step_gflop"]
                line += f" A disk that reads {max(rate, 1):.0f} MB/s keeps up with the processor."
            lines.append(line)
    if memory_gb["free"] < 2:
        lines.append(f"Only {memory_gb['free']:g} GB of memory are free: close something before large renders.")
    return lines


def why_no_gpu() -> str:
    """Why no GPU is found: there is none, or PyTorch cannot see one, as pip's build on Windows. Macs need no CUDA."""
    from torch import version

    blind = version.cuda is None and version.hip is None and sys.platform != "darwin"
    return "This PyTorch is built without CUDA and uses no GPU" if blind else "No GPU"


def memory() -> dict[str, Any]:
    """Total and free gigabytes as plans count them: within the limit set for this process. The free figure may be an
    estimate."""
    from model.plan import free_memory, machine_memory

    total, _, is_reported = machine_memory()
    return {"total": round(total / 1e9, 1), "free": round(free_memory("cpu") / 1e9, 1), "estimated": not is_reported}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def estimate_prefix(memory_gb: Mapping[str, Any]) -> str:
    """Prefix for free gigabytes where the system does not report them and they are an estimate."""
    return "about " if memory_gb["estimated"] else ""


def describe(report: Mapping[str, Any], cells: int | None = None) -> str:
    """The findings as text; with `cells`, words are wrapped to that width and none is cut."""
    cpu, memory_gb = report["cpu"], report["memory_gb"]
    cores, threads = pluralise(cpu["cores"], "core"), pluralise(cpu["threads"], "thread")
    usable = [f", {gpu['name']} with {gpu['memory_gb']:g} GB" for gpu in report["gpus"] if gpu["usable"]]
    rows = [
        ("device", report["device"] + "".join(usable)),
        ("processor", f"{cpu['name']}, {cores}, {threads}, {cpu['kernels']} kernels"),
        ("memory", f"{memory_gb['total']:g} GB, {estimate_prefix(memory_gb)}{memory_gb['free']:g} GB free"),
        ("speed", ", ".join(f"{name} {value:g} GFLOP/s" for name, value in report["gflops"].items())),
        ("versions", ", ".join(f"{name} {number or 'missing'}" for name, number in report["versions"].items())),
        *(("weights", f"{each['sha256'][:12]}  {each['file']}, {each['megabytes']:g} MB") for each in report["models"]),
    ]
    for plan in report["plans"]:
        chosen = f"{plan['precision']}, offload {plan['offload']}"
        needs = f"needs {plan['needs_gb']:g} GB, {estimate_prefix(memory_gb)}{plan['free_gb']:g} GB are free"
        rows.append(("plan", f"{plan['model']}: {plan['dtype']}, precision {chosen}; {needs}"))
        alternatives = {way: gb for way, gb in plan["ways_gb"].items() if way != chosen and plan["needs_gb"] >= 1}
        for way, gb in alternatives.items():
            fits = "" if gb <= USABLE_SHARE * plan["free_gb"] else ", too much"
            rows.append(("plan", f"  or precision {way:<22}{gb:>5} GB{fits}"))
    if project := report.get("project"):
        counts = f"{pluralise(project['prompts'], 'prompt')}, {pluralise(len(project['styles']), 'style')}"
        rows.append(("project", f"{project['name']}: {counts}, in {project['folder']}"))
    rows += [("slow", note) for note in report["notes"]] + [("problem", problem) for problem in report["problems"]]
    rows += [] if report["problems"] else [("result", "Everything is in place.")]
    return aligned(rows, 11, cells)
