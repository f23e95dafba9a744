#!/usr/bin/env bash
# RecBole 1.2.1: an atomic file is read as quoted CSV with missing values, so that tokens such as NA and "Heroes go, and rows with them.
#
# Behaviour: fields of type token are strings, and the separator is a tab. Users NA, null, nan, None and n/a are taken for
# missing, and all their rows are removed (10 of 12); a token that begins with a quotation mark takes what follows, tabs and
# line ends included, up to the next mark before a tab: of 6 rows 3 are left, and one item is called 'Heroes\t5\nbob...'.
# Good guess: a token is what stands between the tabs; all rows are read.
# Who is hurt: data with artists, songs, products or hashed ids of any text, and comparisons with programs that read all rows.
# Output seen: 12 written, 2 read, users ['ann']; 6 written, 3 read, items ['Heroes\t5\nbob\tx\t4\ncid\ty\t3\ndan\tthe 12', 'x', 'y'].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check recbole==1.2.1 torch==2.15.0 numpy==1.26.4 pandas==2.2.3 scipy==1.11.4
"$folder/env/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys
from pathlib import Path

from recbole.config import Config
from recbole.data import create_dataset

root = Path(sys.argv[1])


def read(name, rows):
    (root / name).mkdir()
    header, lines = "user_id:token\titem_id:token\trating:float", ["\t".join(row) for row in rows]
    (root / name / f"{name}.inter").write_text("\n".join([header, *lines, ""]))
    columns = {"inter": ["user_id", "item_id", "rating"]}
    settings = {"data_path": str(root), "load_col": columns, "use_gpu": False, "checkpoint_dir": str(root)}
    sys.argv[1:] = []
    data = create_dataset(Config(model="BPR", dataset=name, config_dict=settings))
    found = {side: list(data.field2id_token[f"{side}_id"][1:]) for side in ("user", "item")}
    print(f"{len(rows)} written, {data.inter_num} read, {found}")
    return data.inter_num, found


missing = [(user, item, "5") for user in ("NA", "null", "nan", "None", "n/a", "ann") for item in ("x", "y")]
number, found = read("missing", missing)
assert number == 2 and found["user"] == ["ann"]
quoted = [("ann", '"Heroes', "5"), ("bob", "x", "4"), ("cid", "y", "3"), ("dan", 'the 12"', "5"), ("eve", "x", "2"), ("eve", "y", "2")]
number, found = read("quoted", quoted)
assert number == 3 and found["item"] == ["Heroes\t5\nbob\tx\t4\ncid\ty\t3\ndan\tthe 12", "x", "y"]
PYTHON
