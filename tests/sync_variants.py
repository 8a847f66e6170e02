"""Carries what changed in a script into its variants: `python tests/sync_variants.py`, before the change is committed.

Each variant is merged with (its parent as committed, its parent now), parents first, by `git merge-file`. If a change touches
the line next to one that the variant has changed, git's conflict markers stand in the variant; resolve them and run it again.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
from variants import difference, variants  # noqa: E402


def git(root, *command):
    return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", default="HEAD", help="the commit at which variants and parents were in step (HEAD)")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    args = parser.parse_args(argv)
    folder, failed, stale = args.root / "single_files", [], set()
    for name, parent in variants(folder).items():
        path, now = folder / f"{name}.py", folder / f"{parent}.py"
        before = git(args.root, "show", f"{args.since}:single_files/{parent}.py")
        if parent in stale:
            print(f"{path.name}: waits for {now.name}")
            stale.add(name)
        elif before.returncode:
            print(f"{path.name}: {now.name} is not in {args.since}")
        elif before.stdout != now.read_text(encoding="utf-8"):
            with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as base:
                base.write(before.stdout)
                base.flush()
                merged = git(args.root, "merge-file", str(path), base.name, str(now))
            conflicts = merged.returncode
            print(f"{path.name}: merged with {now.name}" + (f", {conflicts} conflicts to resolve" if conflicts else ""))
            stale |= {name} if conflicts else set()
        if name not in stale and (found := difference(path)):
            failed.append(found)
    print(*failed, sep="\n", end="\n" if failed else "")
    return 1 if failed or stale else 0


if __name__ == "__main__":
    sys.exit(main())
