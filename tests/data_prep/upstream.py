"""Both mixtures in upstream's exact layout, with a handful of pictures of eight pixels."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from data_prep.manifest import load_manifest

PIXEL = bytes.fromhex("47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002024401003b")
PAGE = b"<!DOCTYPE html><html><title>404 - Document Not Found</title></html>"


def picture(kind: str = "JPEG", shade: int = 0) -> bytes:
    """An image file."""
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 80, 160)).save(sink, kind)
    return sink.getvalue()


def noise(kind: str) -> bytes:
    """An image file of a few kilobytes, to be cut off in the middle of its pixels."""
    sink = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(sink, kind)
    return sink.getvalue()


def record(name: str, image: str | None) -> dict[str, Any]:
    """A record as upstream writes it."""
    question = "What is this?" if image is None else "<image>\nWhat is this?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {name}."}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def zipped(members: dict[str, bytes]) -> bytes:
    """A zip with folder entries and what macOS adds, as some of upstream's have."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for folder in sorted({name.rsplit("/", 1)[0] + "/" for name in members if "/" in name}):
            archive.writestr(folder, b"")
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("__MACOSX/._x.jpg", b"junk")
    return sink.getvalue()


def mix_archives() -> dict[str, dict[str, bytes]]:
    """Members of each image archive of mix665k by the name of its file in the manifest."""
    ocr = {
        "0001.jpg": picture(shade=1),
        "0002.gif": picture("GIF"),  # as OCR-VQA's own script names it
        "0003.jpg": picture("PNG"),  # another format under the name of the records
        "0004.jpg": PAGE,
        "0005.jpg": PIXEL,
        "0006.jpg": noise("JPEG")[:1500],
        "0008.jpg": b"",
    }  # 0007 is missing
    return {
        "coco-train2017": {f"train2017/{i:012d}.jpg": picture(shade=i) for i in (9, 25, 30)},
        "gqa": {f"images/{i}.jpg": picture(shade=i) for i in (11, 12)},
        "ocr-vqa": {f"images/{name}": content for name, content in ocr.items()},
        "textvqa": {"train_images/0a1b.jpg": picture(shade=40)},
        "visual-genome-part1": {"VG_100K/50.jpg": picture(shade=50), "VG_100K/51.jpg": picture(shade=51)},
        "visual-genome-part2": {"VG_100K_2/60.jpg": picture(shade=60)},
    }


def mix_records() -> list[dict[str, Any]]:
    """14 with an image that is there, 5 of OCR-VQA whose image is dead, 2 of text."""
    images = [f"coco/train2017/{i:012d}.jpg" for i in (9, 25, 30, 9)]
    images += [f"gqa/images/{i}.jpg" for i in (11, 12)]
    images += [f"ocr_vqa/images/{i:04d}.jpg" for i in range(1, 9)]
    images += ["textvqa/train_images/0a1b.jpg", "vg/VG_100K/50.jpg", "vg/VG_100K/51.jpg", "vg/VG_100K_2/60.jpg"]
    images += ["ocr_vqa/images/0002.jpg"]
    return [*(record(image.rsplit("/", 1)[1][:-4], image) for image in images), record("a", None), record("b", None)]


DEAD = {f"ocr_vqa/images/{i:04d}.jpg" for i in (4, 5, 6, 7, 8)}


def mix_files() -> dict[str, bytes]:
    """Content of every upstream file of mix665k by its name in the manifest."""
    files = {name: zipped(members) for name, members in mix_archives().items()}
    return {"mix665k-records": json.dumps(mix_records(), indent=2).encode(), **files}


def pretrain_files() -> dict[str, bytes]:
    """The same for LLaVA-Pretrain: the archive has no folder above those of five digits."""
    names = ["00453/004539375.jpg", "00223/002239345.jpg", "00000/000000010.jpg"]
    archive = zipped({name: picture(shade=i) for i, name in enumerate(names)})
    records = [record(name[6:-4], name) for name in names]
    return {"pretrain-records": json.dumps(records).encode(), "pretrain-images": archive}


def write_manifest(path: Path, contents: dict[str, bytes], addresses: dict[str, str], **changes: Any) -> Path:
    """The shipped manifest with sizes, checksums, counts and addresses of the small files.

    Args:
        path: where to write it.
        contents: by file name.
        addresses: URL by file name; others keep the published one.
        changes: keys of single files to overwrite: `gqa={"sha256": "unknown"}` with `-` as `_` in the name.
    """
    raw = yaml.safe_load((Path(__file__).parents[2] / "data_prep/manifest.yaml").read_text())
    counts = {"llava_pretrain": (3, 0), "llava_mix665k": (len(mix_records()), 2)}
    for name, mixture in raw.items():
        mixture["records"], mixture["text_only"] = counts[name]
        for file in mixture["files"]:
            content = contents.get(file["name"], b"")
            file["size"], file["sha256"] = len(content), hashlib.sha256(content).hexdigest()
            if file["name"] in addresses:
                file["url"] = addresses[file["name"]]
                file.pop("hub", None)
            if "unpack" in file and content:
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    file["unpack"]["images"] = sum("_x" not in n and not n.endswith("/") for n in archive.namelist())
            file.update(changes.get(file["name"].replace("-", "_"), {}))
    path.write_text(yaml.safe_dump(raw))
    load_manifest(path)
    return path
