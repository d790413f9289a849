"""Measures what the project promises. Called by scripts/bench and scripts/bench-peers, which build first and start PostgreSQL.

A part gives figures, and promises that it can judge: {"name", "promise", "unit", "bound", "limit", "figure", "met"}.
Figures are never a reason to fail; a part that does not run is.
"""

import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "target" / "bench"
PROFILE = os.environ.get("ARTEL_BENCH_PROFILE", "release")

VERSION_RUNS, VERSION_LIMIT_MS = 30, 30
IDLE_RUNS, IDLE_SETTLES_S, IDLE_LIMIT_MB, DAEMON_LIMIT_MB = 3, 5, 60, 30
DEMO_LIMIT_S, DEMO_PATIENCE_S = 60, 600
BENCH_PATIENCE_S = 1800

# Whatever configures the program; the benches run it with nothing but their own settings.
OURS = re.compile(
    r"(ARTEL|TELEGRAM|OPENAI|ANTHROPIC|GITHUB|CLOUDFLARE|SOPS|SPAWNER|WORKER|OTEL|SENTRY|POSTHOG)_.*"
    r"|DATABASE_URL|REDIS_URL|ADMIN_CHAT_IDS|ALLOWED_USERS|DOCKER_HOST|RUST_LOG"
)


class DoesNotRun(Exception):
    """Something that has to run does not; the text says what."""


def environment(**settings):
    kept = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
    return kept | settings


def cargo_executables(*arguments):
    """Where cargo has put what scripts/bench has built, by name."""
    command = ["cargo", "build", "--locked", "--profile", PROFILE, "--message-format=json-render-diagnostics", *arguments]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    messages = [json.loads(line) for line in lines.splitlines()]
    return {m["target"]["name"]: m["executable"] for m in messages if m.get("executable")}


def promise(name, text, unit, limit, figure):
    return {"name": name, "promise": text, "unit": unit, "bound": "at most", "limit": limit, "figure": figure, "met": figure <= limit}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def version(program):
    """`artel --version`, from fork to exit."""
    runs = []
    for _ in range(VERSION_RUNS):
        begun = time.perf_counter()
        run = subprocess.run([program, "--version"], env=environment(), stdout=subprocess.PIPE, text=True, timeout=60)
        runs.append((time.perf_counter() - begun) * 1000)
        if run.returncode != 0 or not run.stdout.startswith("artel "):
            raise DoesNotRun(f"`artel --version` ended with {run.returncode} and said {run.stdout!r}")
    median = round(statistics.median(runs), 2)
    name = "program.version"
    return {
        "figures": [{"name": name, "unit": "ms", "value": median, "runs": len(runs), "slowest": round(max(runs), 2)}],
        "promises": [promise(name, "`artel --version`, median of 30 runs", "ms", VERSION_LIMIT_MS, median)],
    }


def idle(command, settings):
    """Starts a program that goes on, on a fresh folder, lets it settle, reads its resident memory; in MB (10^6 bytes)."""
    called = f"`{' '.join([pathlib.Path(command[0]).name, *command[1:]])}`"
    with tempfile.TemporaryDirectory(prefix="artel-bench.") as home:
        log = pathlib.Path(home) / "up.log"
        env = environment(ARTEL_HOME=f"{home}/data", ARTEL_HTTP_ADDR="127.0.0.1:0", **settings)
        with log.open("w") as out:
            up = subprocess.Popen(command, cwd=home, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while " is up on " not in log.read_text():
                if up.poll() is not None or time.monotonic() > deadline:
                    raise DoesNotRun(f"{called} did not come up: {log.read_text()}")
                time.sleep(0.05)
            time.sleep(IDLE_SETTLES_S)
            if up.poll() is not None:
                raise DoesNotRun(f"{called} ended by itself: {log.read_text()}")
            status = pathlib.Path(f"/proc/{up.pid}/status").read_text()
        finally:
            up.terminate()
            try:
                up.wait(20)
            except subprocess.TimeoutExpired:
                up.kill()
                up.wait()
                raise DoesNotRun(f"{called} did not end within 20 s of SIGTERM") from None
        fields = dict(line.split(":", 1) for line in status.splitlines())
        megabytes = {name: round(int(fields[name].split()[0]) * 1024 / 1e6, 1) for name in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}
        return megabytes | {"threads": int(fields["Threads"])}


def memory(program):
    dead = {"TELEGRAM_BOT_TOKEN": "123456:bench-token-of-nobody-0123456789abc", "TELEGRAM_API_URL": f"http://127.0.0.1:{free_port()}"}
    part = {"figures": [], "promises": []}
    for what, settings, text in [
        ("alone", {}, "idle `artel up`, resident, without Telegram"),
        ("telegram", dead, "idle `artel up`, resident, with a Telegram that does not answer"),
    ]:
        runs = [idle([program, "up"], settings) for _ in range(IDLE_RUNS)]
        median = statistics.median(run["VmRSS"] for run in runs)
        name = f"program.idle_memory.{what}"
        part["figures"].append({"name": name, "unit": "MB", "value": median, "settled_s": IDLE_SETTLES_S, "runs": runs})
        part["promises"].append(promise(name, text, "MB", IDLE_LIMIT_MB, median))
    return part


def daemon(program):
    """The idle daemon `spawner`, on a Redis of its own and the tape that ships, so that it needs no model."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="artel-bench.") as folder:
        redis = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen(redis, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            settings = {"REDIS_URL": f"redis://127.0.0.1:{port}", "ARTEL_TAPE": "demo", "SPAWNER_RUNTIME": "bubblewrap"}
            runs = [idle([program], settings) for _ in range(IDLE_RUNS)]
        finally:
            server.terminate()
            server.wait(20)
    median = statistics.median(run["VmRSS"] for run in runs)
    name = "spawner.idle_memory"
    return {
        "figures": [{"name": name, "unit": "MB", "value": median, "settled_s": IDLE_SETTLES_S, "runs": runs}],
        "promises": [promise(name, "idle `spawner`, resident", "MB", DAEMON_LIMIT_MB, median)],
    }


def rust_bench(executable, name, *inside):
    """A bench that writes its own figures and promises, and prints its own table; inside of a command that starts what it needs."""
    written = OUT / f"{name}.json"
    written.unlink(missing_ok=True)
    run = subprocess.run([*inside, executable], cwd=ROOT, env=os.environ | {"ARTEL_BENCH_JSON": str(written)}, timeout=BENCH_PATIENCE_S)
    if run.returncode != 0:
        raise DoesNotRun(f"the bench {name} ended with {run.returncode}")
    return json.loads(written.read_text())


def demo(program):
    """`artel demo` on a fresh folder, from start to the line that says where it answers."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="artel-bench."))
    env = environment(ARTEL_HOME=str(home / "data"))
    log = OUT / "demo.log"
    with log.open("w") as out:
        begun = time.perf_counter()
        run = subprocess.run([program, "demo"], cwd=home, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=DEMO_PATIENCE_S)
        took = round(time.perf_counter() - begun, 2)
    said = log.read_text()
    slug = re.search(r"^stop it with: .* stop (\S+)$", said, re.MULTILINE)
    if slug:
        subprocess.run([program, "stop", slug[1]], cwd=home, env=env, check=True, stdout=subprocess.DEVNULL, timeout=60)
    if run.returncode != 0 or not slug or not re.search(r"^deployed http://127\.0\.0\.1:\d+/", said, re.MULTILINE):
        raise DoesNotRun(f"`artel demo` ended with {run.returncode} without a service that answers; see {log} and {home}")
    shutil.rmtree(home)
    name = "program.demo"
    return {
        "figures": [{"name": name, "unit": "s", "value": took}],
        "promises": [promise(name, "`artel demo`, the change included", "s", DEMO_LIMIT_S, took)],
    }


def bench(target):
    return lambda _, benches: rust_bench(benches[target], target)


PARTS = {
    "version": lambda program, _: version(program),
    "memory": lambda program, _: memory(program),
    "daemon": lambda program, _: daemon(pathlib.Path(program).with_name("spawner")),
    "start": lambda _, benches: rust_bench(benches["start"], "start", ROOT / "scripts" / "with-docker"),
    "crew": bench("overhead"),
    "engine": bench("chain"),
    "growth": bench("growth"),
    "shapes": bench("shapes"),
    "sleepers": bench("sleepers"),
    "wake": bench("wake"),
    "demo": lambda program, _: demo(program),
}
# The benches that scripts/bench builds.
BENCHES = ("start", "overhead", "chain", "growth", "shapes", "sleepers", "wake")
# What needs more than this repository: only scripts/bench-peers has it.
PEERS = "peers"


def output(*command):
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def machine():
    cpu = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    total = re.search(r"^MemTotal:\s*(\d+) kB", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": round(int(total[1]) * 1024 / 1e6),
        "kernel": platform.release(),
        "file_system_of_databases": output("stat", "--file-system", "--format=%T", tempfile.gettempdir()),
        "rustc": output("rustc", "--version"),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def main(chosen):
    if chosen == [PEERS]:
        found = cargo_executables("-p", "graph", "--bench", PEERS)
        return measure({PEERS: lambda: rust_bench(found[PEERS], PEERS)}, "summary-peers.json")
    only_check = chosen[:1] == ["--check"]
    chosen = chosen[only_check:]
    unknown = set(chosen) - set(PARTS)
    if unknown:
        sys.exit(f"bench: there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if only_check:
        return 0
    program = cargo_executables("-p", "artel")["artel"]
    benches = cargo_executables("-p", "artel", "-p", "graph", "-p", "nodes", "-p", "spawner", *(word for name in BENCHES for word in ("--bench", name)))
    parts = {name: (lambda part=part: part(program, benches)) for name, part in PARTS.items() if not chosen or name in chosen}
    return measure(parts, "summary.json")


def measure(parts, file):
    """Runs the parts, shows what they found and writes it."""
    OUT.mkdir(parents=True, exist_ok=True)
    summary = {
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(output("git", "status", "--porcelain")),
        "profile": PROFILE,
        "machine": machine(),
        "figures": [],
        "promises": [],
        "did_not_run": [],
    }
    for name, part in parts.items():
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        try:
            found = part()
        except (DoesNotRun, OSError, subprocess.SubprocessError) as error:
            summary["did_not_run"].append({"part": name, "why": str(error)})
            continue
        summary["figures"] += found["figures"]
        summary["promises"] += found["promises"]
        summary["machine"] |= {about: found[about] for about in ("postgres", "langgraph") if about in found}
    summary["machine"]["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    path = OUT / file
    path.write_text(json.dumps(summary, indent=2) + "\n")
    show(summary)
    print(f"\nwritten: {path.relative_to(ROOT)}")
    return 1 if summary["did_not_run"] else 0


def spread(figure):
    rounds = figure.get("rounds", [])
    return f" (rounds from {min(rounds):,.10g} to {max(rounds):,.10g})" if len(rounds) > 1 else ""


def show(summary):
    about = summary["machine"]
    print(f"\n{about['cpu']}, {about['cores']} cores, {about['memory_mb']} MB, kernel {about['kernel']}; commit {summary['commit'][:12]}, {summary['profile']}")
    if about["load_average_before"][0] > about["cores"] / 2:
        print("  the machine was not at rest (load average {0} before): figures are worse than they would be otherwise, single threads most of all".format(about["load_average_before"][0]))
    width = max([len(figure["name"]) for figure in summary["figures"]] or [0])
    for figure in summary["figures"]:
        print(f"  {figure['name']:<{width}} {figure['value']:>12,.10g} {figure['unit']}{spread(figure)}")
    print("\npromises")
    for kept in summary["promises"]:
        word = "met    " if kept["met"] else "NOT MET"
        print(f"  {word} {kept['promise']}: {kept['figure']:g} {kept['unit']} ({kept['bound']} {kept['limit']:g})")
    for failed in summary["did_not_run"]:
        print(f"  DID NOT RUN {failed['part']}: {failed['why']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
