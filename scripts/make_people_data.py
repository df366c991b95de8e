"""Writes the data set of ``+experiment=grpo_quick``: a sentence about a person, and the JSON object that it means.

    python scripts/make_people_data.py [folder]

Writes ``train.jsonl`` and ``heldout.jsonl`` into ``data/people`` or ``folder``. No held-out name is in a training row.
"""

import json
import sys
from itertools import islice, product
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "data" / "people"
TRAIN_NAMES = "Anna Ben Carla David Elena Felix Greta Hugo Iris Jonas Klara Leo Mona Nils Olga Paul"
HELDOUT_NAMES = "Quinn Rosa Sven Tara Udo Vera Willa Yann"
NAMES = {"train": TRAIN_NAMES.split(), "heldout": HELDOUT_NAMES.split()}
AGES = range(18, 90)
STRIDE = 37
"""Ages between neighbouring rows; with one more a round, a name has another age every time."""

ROWS = {"train": 256, "heldout": 64}
SYSTEM = "You answer in JSON."


def rows(split: str) -> list[dict[str, str]]:
    """Returns the rows of a split: names in turn, each with another age every time."""
    rounds = product(range(ROWS[split]), NAMES[split])
    made = []
    for number, (turn, name) in enumerate(islice(rounds, ROWS[split])):
        age = AGES[(number * STRIDE + turn) % len(AGES)]
        made.append(
            {
                "system": SYSTEM,
                "prompt": f"{name} is {age} years old. Give the keys name and age.",
                "reference": json.dumps({"name": name, "age": age}),
            }
        )
    return made


def main(folder: Path) -> None:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        text = "".join(json.dumps(row) + "\n" for row in rows(split))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
