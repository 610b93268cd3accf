"""Where records come from: LLaVA JSON, jsonl, parquet, Hugging Face data sets on disk, webdataset shards.

A reader knows one file (or one saved data set). `scan` walks over it and says where each record lies without keeping
any; `read` fetches a single record from there. So a source may be larger than memory, and a list of locations is enough
to train on it in any order.

| kind | files | a record | its images |
| --- | --- | --- | --- |
| json | `*.json` | an element of the list | names relative to the image folder |
| jsonl | `*.jsonl` | a line | likewise |
| parquet | `*.parquet` | a row | names, or a column of bytes (`{bytes, path}`, as Hugging Face writes it) |
| hf | a folder of `Dataset.save_to_disk` | a row | likewise |
| tar | `*.tar` (webdataset) | neighbouring members with one key: `KEY.json` or `KEY.txt` (a caption) | `KEY.jpg`, ... |

Every error names the file and the record. Rows and members may call the turns `messages` and the images `images`, and
need no `id`: they have one from the place where they lie.
"""

from llava_moe.data.sources.base import SOURCES, EmbeddedImage, Locator, Reader, Record, RecordError
from llava_moe.data.sources.files import kind_of, open_files
from llava_moe.data.sources.json_list import JsonList
from llava_moe.data.sources.ranges import JsonLines, TarShard
from llava_moe.data.sources.tables import ParquetFile, SavedDataset

__all__ = [
    "SOURCES",
    "EmbeddedImage",
    "JsonLines",
    "JsonList",
    "Locator",
    "ParquetFile",
    "Reader",
    "Record",
    "RecordError",
    "SavedDataset",
    "TarShard",
    "kind_of",
    "open_files",
]
