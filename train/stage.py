"""Code and a run's YAML onto hosts that share no disk: `python -m train stage`, over ssh or srun.

In:  a hostfile, this folder of code, a YAML; a shell and tar on every host, nothing else.
Out: a line of `ok` or `FAIL` per host; exit code 0 where every host has the code. A host that sees this very folder
keeps it as it is, and code that was not put there by this command stays. The store and the run folder are not copied.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path

from prep.settings import ConfigError
from train import config, hostfile
from train.allocation import DEFAULT_PATH
from train.doctor_checks import Line
from train.doctor_probe import code_digest
from train.hostfile import Host
from train.launch import all_here
from train.on_hosts import Answer, Words, ask_all, words_for

PARTS = ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "prep", "train",
         "ds_configs", "hostfiles")  # fmt: skip
SEND_S, INSTALL_S = 120.0, 1800.0
NEXT = (
    "Next: make doctor STORE=… OUT=…: the store must lie at the same path on every host (a copy, or s3://…), and the "
    "run folder on a disk that all of them share"
)
MARK = "brainloom-stage "  # before the answer: a login shell may print lines of its own
# On the host; its arguments are MARK, the folder, the YAML ("": none), the marker, Python, and the names of the parts.
UNPACK = r"""
set -eu
mark=$1 root=$2 config=$3 marker=$4 python=$5; shift 5
token=$(basename "$marker")
say() { if [ -x "$python" ]; then echo "$mark$1 python"; else echo "$mark$1 none"; fi; }
if [ -e "$marker" ] || [ "$(cat "$root/.staged" 2> /dev/null)" = "$token" ]; then
  cat > /dev/null; say shared; exit 0
fi
mkdir -p "$root"
if [ ! -e "$root/.staged" ]; then
  for part in "$@"; do if [ -e "$root/$part" ]; then cat > /dev/null; say "own $part"; exit 0; fi; done
fi
new=$root/.staging; rm -rf "$new"; mkdir "$new"
tar -xzf - -C "$new"
echo "$token" > "$root/.staged"
for part in "$new"/code/*; do rm -rf "$root/${part##*/}"; mv "$part" "$root/"; done
if [ -n "$config" ] && ! cmp -s "$new/config" "$config"; then
  mkdir -p "$(dirname "$config")"
  if [ -e "$config" ]; then mv "$config" "$config.before"; fi
  mv "$new/config" "$config"
fi
rm -rf "$new"
say staged
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--hostfile", type=Path, default=DEFAULT_PATH, help="made by `make hostfile` (%(default)s)")
    parser.add_argument("--config", type=Path, help="the run's YAML, where it lies outside of this folder")
    parser.add_argument("--install", action="store_true", help="run `make install` there afterwards (minutes)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent where, and stop")


def main(args: argparse.Namespace) -> int:
    """Send, and say what became of it."""
    hosts, root = hostfile.read_for_run(args.hostfile, os.environ), Path.cwd()
    if all_here(hosts):
        print("this machine alone: nothing to stage")
        return 0
    if missing := [part for part in PARTS if not (root / part).exists()]:
        raise ConfigError(f"{root} lacks {', '.join(missing)}. Start this in the folder of the code.")
    yaml = outside(args.config, root)
    content = packed(root, yaml)
    what = f"{len(content) / 1e6:.1f} MB of code, digest {code_digest(root)[:12]}" + (f", and {yaml}" if yaml else "")
    if args.dry_run:
        print("\n".join(f"{host.name}: {root}: {what}" for host in hosts))
        return 0
    print(f"to {len(hosts)} host(s), into {root}: {what}", file=sys.stderr)
    words, lines = words_for(hosts, os.environ, folder="/"), list[Line]()
    with tempfile.NamedTemporaryFile(prefix=".stage-", dir=root) as marker:
        command = ["sh", "-c", UNPACK, "sh", MARK, str(root), str(yaml or ""), marker.name, sys.executable, *PARTS]
        for host in hosts:  # one after the other: some may share a folder that this machine does not see
            [answer] = ask_all([words(host, command)], [content], SEND_S)
            lines.append(told(host, answer, root))
            if args.install and lines[-1].check == "python":
                lines[-1] = installed(host, words_for(hosts, os.environ, folder=str(root)))
            print(lines[-1], flush=True)
    bad = sum(bool(line.fix) for line in lines)
    print(f"{len(hosts)} host(s), {bad} FAIL. {NEXT}", file=sys.stderr)
    return 1 if bad else 0


def outside(path: Path | None, root: Path) -> Path | None:
    """A YAML that does not travel with the code. Raises ConfigError where it is no run's."""
    if path is None:
        return None
    config.load(path)
    return None if path.resolve().is_relative_to(root.resolve()) else path.resolve()


def packed(root: Path, yaml: Path | None) -> bytes:
    """The code as `code/…`, without what Python compiled, and the YAML as `config`: a tar file."""

    def keep(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if Path(info.name).name == "__pycache__" else info

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for part in PARTS:
            tar.add(root / part, f"code/{part}", filter=keep)
        if yaml is not None:
            tar.add(yaml, "config")
    return file.getvalue()


def told(host: Host, answer: Answer, root: Path) -> Line:
    """What a host answered."""
    said = next((line.removeprefix(MARK) for line in answer.out.splitlines() if line.startswith(MARK)), None)
    if said is None:
        text = f"no answer in {SEND_S:g} s" if answer.code is None else answer.last_line
        return Line(host.name, "code", text, f"make `{shlex.join(hostfile.ssh_check(host))}` work, and {root} writable")
    word, *part, python = said.split()
    if word == "own":
        fix = f"check out the same revision there, or remove {' '.join(PARTS)} from {root}"
        return Line(host.name, "code", f"{root}/{part[0]} is there, and was not put there by this command", fix)
    text = "sees this folder" if word == "shared" else "staged"
    if python == "none":
        fix = "make it there: make stage ARGS=--install"
        return Line(host.name, "python", f"{text}, but {sys.executable} is not there", fix)
    return Line(host.name, "code", text)


def installed(host: Host, words: Words) -> Line:
    """`make install` there."""
    [answer] = ask_all([words(host, ["make", "-s", "install"])], [b""], INSTALL_S)
    if answer.code == 0:
        return Line(host.name, "code", "staged and installed")
    return Line(host.name, "install", answer.last_line, "look at `make install` in that folder there")
