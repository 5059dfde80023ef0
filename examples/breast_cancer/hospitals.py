"""Five hospitals and a server, each a process of its own, train under secure aggregation; one hospital is killed.

    python examples/breast_cancer/hospitals.py [FOLDER]

Makes everything that six parties would make for themselves (keys, a certificate, a signed roster), starts them, kills
one hospital in the middle of the run, and checks what the rounds recorded as an outsider could.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FEDVEIL = [sys.executable, "-c", "import sys; from simulations.app import main; sys.exit(main())"]
ROUNDS, HOSPITALS, KILLED = 8, 5, 4


def fedveil(*words: object) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run([*FEDVEIL, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"fedveil {words[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare(folder: Path) -> None:
    """Make the operator's key, the server's certificate, each hospital's keys and site.toml, and the signed roster."""
    operator = json.loads(fedveil("keys", "operator", folder / "operator", "--json").splitlines()[-1])["operator"]
    fedveil("keys", "server", folder / "tls", "--host", "127.0.0.1")
    for number in range(HOSPITALS):
        home = folder / f"hospital-{number}"
        fedveil("keys", "new", home)
        enrol = ("keys", "enrol", home / "site-public.json", "--name", f"hospital-{number}", "--id", number)
        fedveil(*enrol, "--roster", folder / "roster.json", "--operator", folder / "operator")
        (home / "site.toml").write_text(site(number, operator))


def site(number: int, operator: str) -> str:
    """Return a hospital's site.toml: its own data, and the least protection under which it takes part."""
    return f"""
id = {number}
name = "hospital-{number}"
task = "{(HERE / "task.py").as_posix()}"
memory = "memory"

[keys]
site = "site-keys.json"
authority = "../tls/ca.pem"

[secure_aggregation]
required = true
operator = "{operator}"
roster = "../roster.json"
minimum_cohort = 4
corrupt_share = 0.2

[data]
client = {number}
clients = {HOSPITALS}
partition = {{ name = "quantity-skew", alpha = 1.0 }}
holdout = 0.2
seed = 0
"""


def serve(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start the server and return it with its address."""
    words = ["server", HERE / "secure.toml", "--listen", "127.0.0.1:0", "--tls", folder / "tls", "--no-plots"]
    words += ["--roster", folder / "roster.json", "--out", folder / "run", "--rounds", ROUNDS]
    server = subprocess.Popen([*FEDVEIL, *map(str, words)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        print("server:", line, end="")
        if "listening on" in line:
            return server, line.split("listening on ")[1].split()[0].rstrip(",")
    sys.exit("the server did not start")


def rounds_done(folder: Path) -> int:
    """Return how many rounds the history holds."""
    history = folder / "run" / "history.jsonl"
    return len(history.read_text().splitlines()) if history.exists() else 0


def play(folder: Path) -> None:
    """Run the federation, and kill one hospital when a few rounds are done."""
    server, address = serve(folder)
    words = [*FEDVEIL, "client"]
    hospitals = [
        subprocess.Popen([*words, str(folder / f"hospital-{number}" / "site.toml"), "--server", address, "--quiet"])
        for number in range(HOSPITALS)
    ]
    try:
        while rounds_done(folder) < 3 and server.poll() is None:
            time.sleep(0.02)
        print(f"killing hospital {KILLED} while round {rounds_done(folder) + 1} is under way")
        hospitals[KILLED].kill()
        assert server.stderr is not None
        for line in server.stderr:
            print("server:", line, end="")
        if server.wait() != 0:
            sys.exit("the server failed")
        for number, hospital in enumerate(hospitals):
            if hospital.wait() != 0 and number != KILLED:
                sys.exit(f"hospital {number} failed")
    finally:
        for process in (server, *hospitals):
            process.kill()


def main() -> None:
    """Play it in a folder, by default out/hospitals."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/hospitals").resolve()
    if folder.exists():
        sys.exit(f"{folder} exists already; name another folder, or remove it")
    prepare(folder)
    play(folder)
    for line in (folder / "run" / "history.jsonl").read_text().splitlines():
        report = json.loads(line)
        accuracy = report["metrics"]["server"]["accuracy"]
        print(f"round {report['round']}: hospitals {report['participants']}, accuracy {accuracy:.3f}")
    print(fedveil("verify-transcript", folder / "run" / "secagg.jsonl", "--roster", folder / "roster.json"))


if __name__ == "__main__":
    main()
