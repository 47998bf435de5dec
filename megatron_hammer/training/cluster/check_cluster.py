"""The check of a cluster, stage by stage, on every rank; rank 0 judges and reports.

Each stage measures one thing on all ranks and ends with a roll call (roll_call.py), so a rank that hangs is named and
the others end. `judgements.py` turns the values into findings. Left out on purpose: anything that changes a GPU's
state, and anything that needs more rights than training has.
"""

import dataclasses
import datetime
import functools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.errors import ConfigError, OutputError
from megatron_hammer.platforms import device_check
from megatron_hammer.platforms.device import read_device_name
from megatron_hammer.platforms.gpu_health import read_gpu_health
from megatron_hammer.platforms.gpu_peaks import find_dense_peak_tflops
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.hardware.catalogue import find_gpu_by_device_name, select_cluster, select_default_cluster
from megatron_hammer.training.cluster import clocks, judgements, links, shared_folder, software
from megatron_hammer.training.cluster.cluster_table import build_cluster, write_cluster
from megatron_hammer.training.cluster.findings import Finding, list_names
from megatron_hammer.training.cluster.rank_groups import (
    list_groups,
    list_machine_groups,
    list_ranks_of_hosts,
    list_rounds,
    name_hosts,
)
from megatron_hammer.training.cluster.report import Report, print_report
from megatron_hammer.training.cluster.roll_call import (
    EXIT_PROBLEM,
    REPORT_GRACE_S,
    MissingRanksError,
    RollCall,
    Watch,
    open_store,
    read_place,
)
from megatron_hammer.training.cluster.traffic import MACHINE_BYTES, LinkFit, list_product_shapes, list_traffic

# Every pair of so many hosts is tried; of more, each host meets this many others.
MOST_ROUNDS = 64
REMOVE_GRACE_S = 20.0  # for the files of the check; a folder that hangs must not keep the report
MOST_OF_AN_OPTION = 1e6  # seconds, GiB or MiB: more is a mistake, and a timedelta ends somewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOptions:
    """What the command line says beyond training's flags. shared_dir: None takes the run's --save."""

    command: str
    as_json: bool
    timeout_s: float  # of one stage
    memory_gib: float | None  # None: half of what is free on a GPU, 0.25 on a CPU
    file_mib: int
    shared_dir: Path | None
    most_skew_s: float
    cluster_path: Path | None
    cluster_name: str


class ClusterCheck:
    """One rank's part in the check. On rank 0 the report grows with each stage."""

    def __init__(self, plan: RunPlan, options: CheckOptions) -> None:
        machine = plan.machine
        self.plan, self.options, self.rank = plan, options, machine.rank
        self.report = Report(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=options.command,
            platform=machine.platform,
            layout=describe_layout(plan),
        )
        store = open_store(rank=self.rank, world_size=machine.world_size, timeout_s=options.timeout_s)
        self.roll = RollCall(store=store, rank=self.rank, world_size=machine.world_size, timeout_s=options.timeout_s)
        self.folder: Path | None = None  # on rank 0, while the shared folder is checked
        self.watch = Watch(self.end_early)
        self.hosts: list[str] = []
        self.device = torch.device("cpu")
        self.fits: dict[tuple[str, str], LinkFit] = {}

    # --- stages ------------------------------------------------------------------------------------------------------

    def stage(self, name: str, work: Callable[[], Any]) -> dict[int, Any]:
        """Run `work` on every rank. On rank 0: what it returned, by rank, for the ranks on which it did not fail."""
        with self.watch.limit(name, self.options.timeout_s):
            self.roll.enter(name)
            try:
                answer = {"value": work()}
            # Whatever a rank's device or folder raises is what this tool is to find.
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers = self.roll.gather(name, answer) or []
        for rank, given in enumerate(answers):
            if "error" in given:
                self.find(name, "problem", f"failed: {given['error']}", host=self.hosts[rank], rank=rank)
        return {rank: given["value"] for rank, given in enumerate(answers) if "value" in given}

    def find(self, check: str, status: Any, text: str, *, host: str | None = None, rank: int | None = None) -> None:
        self.report.findings.append(Finding(check=check, status=status, text=text, host=host, rank=rank))

    def keep(self, judged: tuple[list[Finding], list[Any]]) -> None:
        self.report.findings += judged[0]
        self.report.measurements += judged[1]

    def end_early(self, is_launchers_end: bool) -> None:
        """From the watching thread, where the main thread hangs: report what is known, and end this process."""
        if self.rank == 0:
            text, ranks = self.roll.find_missing(self.watch.stage)
            cause = "the launcher ended the run, as it does when a process has failed; " if is_launchers_end else ""
            self.report_missing(cause + text, ranks)
            self.remove_folder()
        elif not is_launchers_end:
            # Rank 0 reports; the launcher would end it as soon as this process ends.
            time.sleep(self.options.timeout_s + REPORT_GRACE_S)
        os._exit(EXIT_PROBLEM)

    def report_missing(self, text: str, ranks: Sequence[int]) -> None:
        """The report, with the ranks that are the cause that it is not complete."""
        names = [self.roll.hosts[rank] for rank in ranks if rank in self.roll.hosts]
        rank = ranks[0] if len(ranks) == 1 else None
        self.find(self.watch.stage, "problem", text, host=list_names(names) or None, rank=rank)
        print_report(self.report, sys.stdout, as_json=self.options.as_json)

    # --- the checks --------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Who is here, on which host."""
        self.watch.stage = "hello"
        answers = self.roll.gather(self.watch.stage, read_place())
        if answers is not None:
            self.roll.hosts.update(enumerate(name_hosts(answers)))
        self.hosts = self.roll.share("hosts", [self.roll.hosts.get(rank) for rank in range(self.roll.world_size)])
        self.report.hosts = self.hosts

    def _select_device(self) -> None:
        self.device = device_check.select_device(self.plan.machine.platform, self.plan.machine.local_rank)

    def check_software(self) -> None:
        """Versions, environment variables and data files are equal everywhere, and the GPUs are healthy."""
        read = self.stage("versions", self._read_software)
        if self.rank != 0:
            return
        versions, variables, data = (
            {rank: value[name] for rank, value in read.items() if value[name] is not None}
            for name in ("versions", "variables", "data")
        )
        self.report.findings += judgements.judge_equality(versions, variables, data, self.hosts)
        if self.device.type == "cpu":
            self.find("GPU health", "not applicable", "the cpu platform has no GPU")
        else:
            health_of = {rank: value["health"] for rank, value in read.items()}
            self.report.findings += judgements.judge_health(health_of, self.hosts)

    def _read_software(self) -> dict[str, Any]:
        uuid = device_check.read_uuid(self.device)
        health = None if uuid is None else read_gpu_health(uuid)
        # One rank of a host reads the data files for all.
        is_first = self.rank == self.first_ranks[self.hosts[self.rank]]
        return {
            "versions": software.read_versions(None if health is None else health.driver),
            "variables": software.read_variables(),
            "data": software.identify_data(self.plan.data.sources) if is_first else None,
            "health": None if health is None else dataclasses.asdict(health),
        }

    def check_devices(self) -> None:
        """Speed of products at the model's shapes, and memory."""
        dtype = torch.float32 if self.device.type == "cpu" or self.plan.precision == "fp32" else torch.bfloat16
        shapes = list_product_shapes(self.plan, self.device.type)
        speeds = self.stage("matrix products", lambda: device_check.time_products(self.device, dtype, shapes) / 1e12)
        memory = self.stage("memory", self._test_memory)
        if self.rank != 0:
            return
        peak = find_dense_peak_tflops(read_device_name(self.plan.machine.platform))
        if speeds:
            # The peak of the data sheet is that of 16-bit products.
            peak = peak if dtype == torch.bfloat16 else None
            check = f"matrix products, {str(dtype).removeprefix('torch.')}"
            self.keep(judgements.judge_speed(check, speeds, self.hosts, "TFLOP/s", peak=peak))
            if peak is None:
                text = "no data sheet's peak to compare with: the ranks were compared with one another only"
                self.find("share of the peak", "unknown" if self.device.type == "cuda" else "not applicable", text)
        if memory:
            self.report.findings += judgements.judge_memory(memory, self.hosts)

    def _test_memory(self) -> dict[str, int]:
        free_bytes, total_bytes = device_check.read_memory_bytes(self.device)
        asked = self.options.memory_gib
        default_bytes = free_bytes // 2 if self.device.type == "cuda" else 1 << 28
        num_bytes = default_bytes if asked is None else int(asked * 2**30)
        wrong = device_check.find_wrong_words(self.device, num_bytes)
        return {
            "wrong_words": wrong,
            "tested_bytes": num_bytes,
            "free_bytes": free_bytes,
            "total_bytes": total_bytes,
        }

    def check_clocks(self) -> None:
        """The clock of each host against that of rank 0's."""
        others = [rank for host, rank in self.first_ranks.items() if host != self.hosts[0]]

        def exchange() -> dict[str, Any]:
            if self.rank == 0:
                return {self.hosts[rank]: skew for rank, skew in clocks.ask_clocks(self.roll.store, others).items()}
            if self.rank in others:
                clocks.answer_clock(self.roll.store, self.rank)
            return {}

        skews = self.stage("clocks", exchange)
        if self.rank == 0 and 0 in skews:
            self.report.findings += judgements.judge_clocks(skews[0], self.options.most_skew_s)

    def check_folder(self) -> None:
        """All ranks see one folder, a rename in it is one step, and every host writes and reads at one speed."""
        chosen = self.options.shared_dir or self.plan.checkpoints.save
        if chosen is None:
            if self.rank == 0:
                self.find("shared folder", "unknown", "not checked: neither --save nor --shared-dir is given")
            return
        token = self.roll.share("token", f"{os.getpid()}-{time.time_ns()}")
        folder = Path(chosen) / f".check-cluster-{token}"
        self.folder = folder if self.rank == 0 else None
        try:
            self._check_folder(folder, token)
        finally:
            self.remove_folder()

    def remove_folder(self) -> None:
        """Remove the files of the check, in a thread that is left behind if the folder hangs."""
        if self.folder is not None:
            remover = threading.Thread(target=shutil.rmtree, args=(self.folder, True), daemon=True)
            remover.start()
            remover.join(REMOVE_GRACE_S)
            self.folder = None

    def _check_folder(self, folder: Path, token: str) -> None:
        made = self.stage("making a folder", lambda: self._make_folder(folder, token) if self.rank == 0 else None)
        if not self.roll.share("folder made", 0 in made):
            return
        within_s = self.options.timeout_s / 4
        seen = self.stage("seeing a new file", lambda: shared_folder.wait_for_text(folder / "token", token, within_s))
        if self.rank == 0:
            finding = judgements.judge_visibility("shared folder", seen, self.hosts, within_s)
            self.report.findings.append(finding)
        is_shared = self.roll.share("is shared", all(value is not None for value in seen.values()))
        if not is_shared:
            return
        self._check_renames(folder, within_s)
        self._check_file_speed(folder)

    def _make_folder(self, folder: Path, token: str) -> None:
        folder.mkdir(parents=True)
        (folder / "token").write_text(token, encoding="utf-8")
        shared_folder.write_version(folder / "version", 0)

    def _check_renames(self, folder: Path, within_s: float) -> None:
        is_reader = self.rank in self.first_ranks.values() and self.rank != 0

        def work() -> Any:
            if self.rank == 0:
                shared_folder.write_versions(folder / "version")
                return time.time()
            return shared_folder.watch_versions(folder / "version", within_s) if is_reader else None

        answers = self.stage("rename in the shared folder", work)
        if self.rank != 0:
            return
        read = {rank: value for rank, value in answers.items() if rank != 0 and value is not None}
        if not read:
            self.find("rename in the shared folder", "not applicable", "there is one host: nobody else reads")
            return
        problems = {rank: value[0] for rank, value in read.items()}
        moments = {rank: value[1] for rank, value in read.items()}
        self.report.findings += judgements.judge_renames(problems, moments, self.hosts)

    def _check_file_speed(self, folder: Path) -> None:
        is_first = self.rank in self.first_ranks.values()
        num_bytes = self.options.file_mib << 20

        def work() -> Any:
            return shared_folder.time_file(folder / f"{self.rank}.bin", num_bytes, self.rank) if is_first else None

        answers = self.stage("file speed", work)
        speeds = {rank: value for rank, value in answers.items() if value is not None}
        for index, name in enumerate(("write and sync", "read")):
            if speeds:
                values = {rank: value[index] / 1e6 for rank, value in speeds.items()}
                self.keep(judgements.judge_speed(f"shared folder, {name}", values, self.hosts, "MB/s"))
        for rank, value in speeds.items():
            if not value[2]:
                text = "what was read is not what was written. Do not keep checkpoints there."
                self.find("shared folder", "problem", text, host=self.hosts[rank], rank=rank)

    def check_links(self) -> None:
        """Latency and bandwidth of all groups of the layout, of hosts and of the network; then of pairs."""
        if self.roll.world_size == 1:
            self.find("links", "not applicable", "there is one rank")
            return
        kinds = list_groups(self.plan.layout) | list_machine_groups(self.hosts)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        own: dict[str, Any] = {}

        def connect() -> None:
            # The watching thread ends a hang before the groups' own timeout, which could not name the rank.
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("groups", self.roll.store),
                rank=self.rank,
                world_size=self.roll.world_size,
                timeout=timedelta(seconds=4 * self.options.timeout_s),
            )
            own.update(links.build_groups(kinds, self.rank))

        self.stage(f"connecting ({backend})", connect)
        traffic = list_traffic(self.plan)
        for kind in kinds:
            for collective in traffic[kind].collectives:
                self._time_kind(kind, collective, kinds[kind], own.get(kind))
        self._time_pairs()

    def _time_kind(self, kind: str, collective: str, groups: Sequence[tuple[int, ...]], own: Any) -> None:
        traffic = list_traffic(self.plan)[kind]

        def work() -> Any:
            if own is None:
                return None
            times_s = links.time_group(traffic, collective, own[0], own[1], self.device)
            return list(times_s.items())  # keys of JSON are strings

        answers = self.stage(f"{kind} groups, {collective}", work)
        if self.rank != 0:
            return
        times = judgements.slowest_of_groups(groups, {rank: dict(value) for rank, value in answers.items() if value})
        if times:
            findings, measurements, fit = judgements.judge_groups(kind, collective, times, self.hosts)
            self.keep((findings, measurements))
            self.fits[kind, collective] = fit

    def _time_pairs(self) -> None:
        """Pairs of hosts by their first ranks, and pairs of ranks inside each host, all hosts at once."""
        inside = [list_rounds(ranks) for ranks in self.ranks_of_hosts.values()]
        across = list_rounds(list(self.first_ranks.values()))
        num_rounds, num_bytes = max(map(len, inside)), MACHINE_BYTES[self.plan.machine.platform]
        together = [
            [pair for rounds in inside if index < len(rounds) for pair in rounds[index]] for index in range(num_rounds)
        ]
        for check, rounds in (("links inside a host", together), ("links between hosts", across)):
            if not any(rounds):
                if self.rank == 0:
                    self.find(check, "not applicable", "there is no pair")
                continue
            answers = self.stage(
                check, functools.partial(links.time_pairs, rounds[:MOST_ROUNDS], num_bytes, self.device)
            )
            if self.rank != 0:
                continue
            found = {(left, right): rate for pairs in answers.values() for left, right, rate in pairs if left < right}
            if found:
                self.keep(judgements.judge_pairs(check, found, self.hosts))
            if len(rounds) > MOST_ROUNDS:
                text = f"not all pairs were tried: {MOST_ROUNDS} rounds of {len(rounds)}"
                self.find(check, "unknown", text)

    def write_table(self) -> None:
        """The measured cluster, for scaling studies."""
        path = self.options.cluster_path
        if path is None or self.rank != 0:
            return
        device_name = read_device_name(self.plan.machine.platform)
        sizes = {len(ranks) for ranks in self.ranks_of_hosts.values()}
        gpu = find_gpu_by_device_name(device_name)
        if not self.fits or len(sizes) > 1 or (gpu is None and self.device.type == "cuda"):
            text = "not written: it needs measured links, hosts of equal size and a GPU of gpus.toml"
            self.find("cluster table", "unknown", f"{text}, got {device_name}, ranks of a host {sorted(sizes)}")
            return
        base = select_cluster("cpu-host") if gpu is None else select_default_cluster(gpu.name)
        cluster = build_cluster(
            self.options.cluster_name,
            f"{self.report.date[:10]}, {self.options.command}",
            base,
            load_coefficients(),
            ranks_per_host=sizes.pop(),
            num_hosts=len(self.ranks_of_hosts),
            fits=self.fits,
        )
        try:
            write_cluster(path, cluster)
        except OutputError as error:
            # The report of a long check must not be lost with it.
            self.find("cluster table", "problem", str(error))
            return
        self.find("cluster table", "fine", f"[{cluster.name}] in {path}, for --clusters-file of a scaling study")

    # --- who is where ------------------------------------------------------------------------------------------------

    @property
    def ranks_of_hosts(self) -> dict[str, list[int]]:
        return list_ranks_of_hosts(self.hosts)

    @property
    def first_ranks(self) -> dict[str, int]:
        return {host: ranks[0] for host, ranks in self.ranks_of_hosts.items()}

    def run(self) -> int:
        """All checks; returns the exit code."""
        try:
            self.meet()
            self.stage("device", self._select_device)
            self.check_software()
            self.check_devices()
            self.check_clocks()
            self.check_folder()
            self.check_links()
            self.write_table()
        except MissingRanksError as error:
            if self.rank == 0:
                self.report_missing(str(error), error.ranks)
            # A group with a missing rank would wait for it while it is taken down.
            os._exit(EXIT_PROBLEM)
        if self.rank == 0:
            print_report(self.report, sys.stdout, as_json=self.options.as_json)
        # The others wait for the report: the launcher ends all as soon as one has ended with 1.
        code = EXIT_PROBLEM if self.roll.share("exit", bool(self.report.problems)) else 0
        with self.watch.limit("end", self.options.timeout_s):
            if dist.is_initialized():
                dist.destroy_process_group()
        return code


def describe_layout(plan: RunPlan) -> str:
    """'hammer-1b4: tp 2, pp 1, cp 1, ep 1, dp 4'."""
    layout = plan.layout
    sizes = {
        "tp": layout.tensor_model_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
        "cp": layout.context_parallel_size,
        "ep": layout.expert_model_parallel_size,
        "dp": layout.data_parallel_size,
    }
    return f"{plan.model_name}: {', '.join(f'{name} {size}' for name, size in sizes.items())}"


def check_options(options: CheckOptions) -> None:
    """Raises ConfigError for numbers that leave nothing to check, and for a name that TOML would read differently."""
    problems = [
        f"{flag}: must be more than 0 and at most {MOST_OF_AN_OPTION:g}, got {value:g}. Correct it."
        for flag, value in (
            ("timeout-s", options.timeout_s),
            ("memory-gib", 1.0 if options.memory_gib is None else options.memory_gib),
            ("file-mib", options.file_mib),
            ("max-clock-skew-s", options.most_skew_s),
        )
        if not 0 < value <= MOST_OF_AN_OPTION  # also of nan
    ]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", options.cluster_name):
        problems.append(
            f"cluster-name: must be of letters, digits, '-' and '_', got {options.cluster_name!r}. Choose such a name."
        )
    if problems:
        raise ConfigError(*problems)
