"""The output folder: ours or refused, held by one process at a time, every file written whole or not at all."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
MARKER = "bsjax.json"
LOCK = ".lock"


class RecordError(ValueError):
  """A folder or file of records that cannot be used; the message is one line and says how to go on."""


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes a file so that a reader, or a kill at any moment, sees the old content or the new, never a part."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_bytes(content.encode() if isinstance(content, str) else content)
  os.replace(temporary, path)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
  """Writes strict JSON atomically; a non-finite float is an error (rows turn it into null before)."""
  write_atomically(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
  """Reads JSON; a missing, truncated or garbled file raises `RecordError` naming it and the way out."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise RecordError(f"{path} is missing: delete the folder {path.parent} and run again to compute it anew") from error
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise RecordError(
      f"{path} is not whole JSON ({error.__class__.__name__} in {path.stat().st_size} bytes): "
      f"delete the folder {path.parent} and run again to compute it anew"
    ) from error


def open_folder(out: Path, settings: dict[str, Any]) -> None:
  """Claims `out` for one study, or finds it claimed by the same study.

  Args:
    out: created with its parents where missing. An empty folder is taken; a folder with other things in it and no
      marker is refused, so that nobody's files are mixed with results.
    settings: what decides the results (JSON). A folder that was started with other settings is refused: mixed
      settings would be averaged together.

  Raises:
    RecordError: unwritable, foreign, or started with other settings.
  """
  if out.exists() and not out.is_dir():
    raise RecordError(f"--out={out} is a file, wanted a folder: choose another --out")
  try:
    out.mkdir(parents=True, exist_ok=True)
    probe = out / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise RecordError(f"--out={out} cannot be written ({error.strerror}): choose a folder you may write to") from error
  marker = out / MARKER
  if not marker.exists():
    strangers = sorted(entry.name for entry in out.iterdir() if entry.name != LOCK)
    if strangers:
      raise RecordError(
        f"--out={out} holds files that are not this laboratory's (such as {strangers[0]!r}): choose a new or empty folder"
      )
    write_json(marker, {"schema_version": SCHEMA_VERSION, "settings": settings})
    return
  found = read_json(marker)
  if found.get("schema_version") != SCHEMA_VERSION:
    raise RecordError(
      f"--out={out} was written with schema version {found.get('schema_version')}, this is {SCHEMA_VERSION}: choose another --out"
    )
  settings = json.loads(json.dumps(settings))
  changed = [
    f"{name} was {found['settings'].get(name)!r} and is now {settings.get(name)!r}"
    for name in sorted(found["settings"].keys() | settings.keys())
    if found["settings"].get(name) != settings.get(name)
  ]
  if changed:
    raise RecordError(f"--out={out} was started with other settings ({'; '.join(changed)}): choose another --out")


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
  """Holds `out` for this process; the kernel frees it however the process ends.

  Raises:
    RecordError: another process holds it; the message names its host and process.
  """
  out.mkdir(parents=True, exist_ok=True)
  with open(out / LOCK, "a+") as handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      handle.seek(0)
      raise RecordError(
        f"--out={out} is in use by {handle.read().strip() or 'another process'}: wait for it, or choose another --out"
      ) from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    yield
