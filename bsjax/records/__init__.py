"""Trial directories: write, read, lock. Standard library and numpy only."""

from bsjax.records.folder import RecordError, lock_folder, open_folder, write_atomically, write_json
from bsjax.records.read import Record, read_record, read_records
from bsjax.records.write import append_rows, create_trial, cut_rows, set_status, trial_id

__all__ = [
  "Record",
  "RecordError",
  "append_rows",
  "create_trial",
  "cut_rows",
  "lock_folder",
  "open_folder",
  "read_record",
  "read_records",
  "set_status",
  "trial_id",
  "write_atomically",
  "write_json",
]
