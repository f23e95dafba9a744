#!/usr/bin/env bash
# Fetch and unpack retrieval data into a folder: scripts/download_retrieval.sh DIR [cub] [sop] [inat] [cars] [inshop]
# Downloads continue where they stopped, are checked, and are skipped when their data is there. Without names: cub and sop.
#   cub     1.1 GiB, data.caltech.edu
#   sop     2.9 GiB, Stanford; another address of the same file: SOP_URL=...
#   inat   42 GiB, then every image is made 288 pixels on its shorter side, which takes hours and may be stopped
#   cars    the addresses of Stanford are gone: CARS_URL=... (car_ims.tgz) and CARS_ANNOS_URL=... (cars_annos.mat) of a copy
#   inshop  by hand from the DeepFashion drive, on request: img.zip (not img_highres.zip) and list_eval_partition.txt
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,9s/^# //p' "$0" >&2; exit 2; }
mkdir -p "$1" && data=$(cd "$1" && pwd)
shift
source "$(dirname "$0")/sweep_lib.sh"
[ $# -ge 1 ] || set -- cub sop

fetch() { # URL FILE [CHECKSUM]
  [ -f "$2" ] || python - "$@" <<'PY'
import sys
from pathlib import Path
from gfml.program.cli import run_main
from gfml.data.download import download

url, target, *checksum = sys.argv[1:]
sys.exit(run_main(lambda _: download(url, Path(target), *checksum), []))
PY
}

cub() {
  [ -f "$data/CUB_200_2011/images.txt" ] && return
  fetch https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz "$data/CUB_200_2011.tgz" md5:97eceeb196236b17998738112f37df78
  tar -xzf "$data/CUB_200_2011.tgz" -C "$data" CUB_200_2011
}

sop() {
  [ -f "$data/Stanford_Online_Products/Ebay_test.txt" ] && return
  fetch "${SOP_URL:-http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip}" "$data/Stanford_Online_Products.zip" md5:7f73d41a2f44250d4779881525aea32e
  python -m zipfile -e "$data/Stanford_Online_Products.zip" "$data"
}

cars() {
  if [ -z "${CARS_URL:-}" ] || [ -z "${CARS_ANNOS_URL:-}" ]; then
    echo "cars: Stanford no longer offers this data; give CARS_URL and CARS_ANNOS_URL of a copy of car_ims.tgz and cars_annos.mat" >&2
    return 2
  fi
  mkdir -p "$data/car196"
  fetch "$CARS_ANNOS_URL" "$data/car196/cars_annos.mat"
  [ -d "$data/car196/car_ims" ] && return
  fetch "$CARS_URL" "$data/car_ims.tgz"
  tar -xzf "$data/car_ims.tgz" -C "$data/car196"
}

inat() {
  if [ ! -d "$data/train_mini" ]; then
    fetch https://ml-inat-competition-datasets.s3.amazonaws.com/2021/train_mini.tar.gz "$data/train_mini.tar.gz" md5:db6ed8330e634445efc8fec83ae81442
    tar -xzf "$data/train_mini.tar.gz" -C "$data"
  fi
  python - "$data/train_mini" "$data/train_mini_resized" <<'PY'
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image
from gfml.base.files import atomic_open

source, target = Path(sys.argv[1]), Path(sys.argv[2])

def shrink(path):
    place = target / path.relative_to(source)
    if place.exists():
        return
    with Image.open(path) as image:
        factor = 288 / min(image.size)
        small = image.convert("RGB").resize([max(288, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)
    with atomic_open(place, "wb") as stream:
        small.save(stream, format="JPEG", quality=95)

with ThreadPoolExecutor() as pool:
    for number, _ in enumerate(pool.map(shrink, sorted(source.glob("*/*.jpg"))), 1):
        if number % 10_000 == 0:
            print(f"{number} images", file=sys.stderr)
PY
}

inshop() {
  if [ ! -f "$data/inshop/list_eval_partition.txt" ] || [ ! -d "$data/inshop/img" ]; then
    echo "inshop: ask for DeepFashion's In-Shop benchmark, unpack img.zip and put list_eval_partition.txt into $data/inshop" >&2
    return 2
  fi
}

for name in "$@"; do
  case $name in
    cub | sop | cars | inat | inshop)
      "$name"
      echo "$name is in $data"
      ;;
    *) echo "unknown data $name: choose cub, sop, cars, inat or inshop" >&2; exit 2 ;;
  esac
done
