"""Checks that the wheel in dist/ holds every file of the package, and nothing else."""

import pathlib
import sys
import zipfile

[wheel] = pathlib.Path("dist").glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    inside = {name for name in archive.namelist() if ".dist-info/" not in name}
files = (path for path in pathlib.Path("ddim_jax").rglob("*") if path.is_file())
wanted = {path.as_posix() for path in files if "__pycache__" not in path.parts}
if inside != wanted:
    sys.exit(f"{wheel}: missing {sorted(wanted - inside)}, left over {sorted(inside - wanted)}")
for path in sorted(pathlib.Path("dist").iterdir()):
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
print(f"the wheel holds all {len(wanted)} files")
