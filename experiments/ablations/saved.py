"""Measurements as they are saved while a run grows: one line for each choice and batch of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "measured.jsonl"


class Saved:
    """Values of each choice and text, kept in a file that a stopped run goes on with."""

    def __init__(self, path: Path) -> None:
        """Read what there is; the line at which a run was stopped is left out, and written anew."""
        self.values: dict[str, dict[str, dict[str, Any]]] = {}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        for line in lines:
            self._take(json.loads(line))
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self._path = path

    def missing(self, key: str, texts: list[str]) -> bool:
        """Whether a choice has not been measured on all of these texts."""
        return any(text not in self.values.get(key, {}) for text in texts)

    def add(self, key: str, values: dict[str, dict[str, Any]]) -> None:
        """Save the values of a choice, by text and name."""
        entry = {"key": key, "values": values}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        self.values.setdefault(entry["key"], {}).update(entry["values"])
