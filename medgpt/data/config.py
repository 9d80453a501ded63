"""What to curate and how: one YAML or TOML file, every entry checked."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

KINDS = ("captions", "llava", "studies", "rows")
VIEWS = ("single", "multi", "longitudinal")
FILTERS = ("single_panel", "screenshot", "overlaid_text", "caption")
DEFAULT_FILTERS = {"captions": FILTERS, "llava": (), "studies": ("caption",), "rows": ()}
ACTIONS = ("drop", "flag", "off")


def _refuse(expected: str, got) -> None:
    raise ValueError(f"curate: expected {expected}, got {got}")


def _of(name: str, value, choices) -> None:
    if value not in choices:
        _refuse(f"{name} one of {', '.join(map(str, choices))}", repr(value))


@dataclass
class Source:
    """One set of images and texts.

    Args:
        name: in every row's id and `source`.
        kind: captions (CSV, JSON lines or parquet with an image and a caption column), llava (JSON
            or JSON lines), studies (folders of patients, of studies, of images), rows (parquet).
        path: the file, or a folder of such files; of studies the folder.
        images: folder that image names start from; default the file's own.
        license: in every row.
        image_column, caption_column, id_column: of captions.
        prompt: of captions and studies: what the user asks.
        views: of studies: single, multi, longitudinal.
        metadata: of studies: a CSV with dicom_id, ViewPosition, StudyDate, StudyTime.
        hash_ids: of studies: ids are digests of the folder names, which may be numbers of patients.
        filters: among FILTERS; default by kind.
        burned_in: drop, flag or off: pictures with letters in them; default drop for studies.
    """

    name: str
    kind: str
    path: str
    images: str | None = None
    license: str = ""
    image_column: str = "image"
    caption_column: str = "caption"
    id_column: str = "id"
    prompt: str | None = None
    views: list = field(default_factory=lambda: list(VIEWS))
    metadata: str | None = None
    hash_ids: bool = True
    filters: list | None = None
    burned_in: str | None = None

    def __post_init__(self):
        _of("kind", self.kind, KINDS)
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            _refuse("a source's name of letters, digits, - _ .", repr(self.name))
        self.filters = list(DEFAULT_FILTERS[self.kind] if self.filters is None else self.filters)
        for name in self.filters:
            _of("filters", name, FILTERS)
        for view in self.views:
            _of("views", view, VIEWS)
        if self.burned_in is None:
            self.burned_in = "drop" if self.kind == "studies" else "flag"
        _of("burned_in", self.burned_in, ACTIONS)


@dataclass
class Benchmark:
    """An evaluation set: rows as parquet, or JSON lines of {id, question, options, images}."""

    name: str
    path: str
    images: str | None = None


@dataclass
class Curation:
    """A whole run.

    Args:
        output: folder of rows-*.parquet, report.json, report.html, dropped.jsonl.
        sources, benchmarks: see Source, Benchmark.
        max_pixels: of an image; larger ones are left out without being decoded.
        min_side: pixels; smaller images are left out.
        deidentify: identifiers in texts are replaced, image files cleaned.
        near_text: Jaccard similarity of near duplicates, 0: only exact ones.
        near_image: of 256 bits of a perceptual hash so many may differ in near duplicates.
        duplicates: "joint": a row is one if texts and images both are; "image": if the images are.
        tokenizer: "harmony", a folder of a tokenizer, or "none" (no token counts).
        shard_rows: rows of an output file.
        chunk_rows: rows that a worker takes at once, and that a killed run loses at most.
        examples: how many dropped texts of each reason the report shows: texts of patients.
    """

    output: str
    sources: list
    benchmarks: list = field(default_factory=list)
    max_pixels: int = 100_000_000
    min_side: int = 28
    deidentify: bool = True
    near_text: float = 0.8
    near_image: int = 16
    duplicates: str = "joint"
    tokenizer: str = "harmony"
    shard_rows: int = 20_000
    chunk_rows: int = 256
    examples: int = 0

    def __post_init__(self):
        self.sources = [_made(Source, source) for source in self.sources]
        self.benchmarks = [_made(Benchmark, benchmark) for benchmark in self.benchmarks]
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            _refuse("sources with names of their own", names or "none")
        _of("duplicates", self.duplicates, ("joint", "image", "off"))
        if not 0 <= self.near_text < 1:
            _refuse("near_text from 0 to below 1", self.near_text)
        for name in ("max_pixels", "min_side", "shard_rows", "chunk_rows"):
            if getattr(self, name) < 1:
                _refuse(f"{name} >= 1", getattr(self, name))

    def fingerprint(self) -> str:
        """Of all that decides the output, and of the input files' sizes."""
        said = asdict(self)
        said.pop("output")
        paths = [Path(entry.path) for entry in (*self.sources, *self.benchmarks)]
        sizes = [path.stat().st_size if path.is_file() else None for path in paths]
        return hashlib.sha256(json.dumps([said, sizes], sort_keys=True).encode()).hexdigest()


def _made(kind, given):
    if isinstance(given, kind):
        return given
    if not isinstance(given, dict):
        _refuse(f"a table of {kind.__name__}", type(given).__name__)
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        _refuse(f"entries among {', '.join(known)}", ", ".join(unknown))
    try:
        return kind(**given)
    except TypeError:
        _refuse(f"{kind.__name__} with its name, kind and path", ", ".join(sorted(given)) or "none")


def read_config(path) -> Curation:
    """A .yaml, .yml or .toml file; relative paths start from its folder."""
    path = Path(path)
    if path.suffix == ".toml":
        try:
            import tomllib
        except ImportError:
            _refuse("Python 3.11 for TOML, or YAML", path.name)
        given = tomllib.loads(path.read_text("utf-8"))
    elif path.suffix in (".yaml", ".yml"):
        import yaml

        given = yaml.safe_load(path.read_text("utf-8"))
    else:
        _refuse("a .yaml or .toml file", path.name)
    config = _made(Curation, given)
    folder = path.resolve().parent
    config.output = str(folder / config.output)
    for entry in (*config.sources, *config.benchmarks):
        for name in ("path", "images", "metadata"):
            if getattr(entry, name, None) is not None:
                setattr(entry, name, str(folder / getattr(entry, name)))
    return config
