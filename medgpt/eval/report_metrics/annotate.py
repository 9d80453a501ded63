"""Fills the annotation cache with the packages that hold the encoders, where they are present.

Packages and weights are looked for on this machine; nothing is fetched unless `download` is asked
for. Reports that have their annotation are skipped, so a stopped run goes on where it was.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

from medgpt.eval.report_metrics import cache as store
from medgpt.eval.report_metrics.radcliq import BERTSCORE_PARAMS
from medgpt.eval.report_metrics.reports import Reports
from medgpt.eval.report_metrics.values import encode_embedding

CLASSES = (None, 1, 0, -1)


class Source(NamedTuple):
    """Where annotations of a kind come from.

    Attributes:
        package, module: names to install and to import.
        model: default model, the annotator's name too.
        weights: what must be there, for the message.
    """

    package: str
    module: str
    model: str
    weights: str


SOURCES = {
    "radgraph": Source("radgraph", "radgraph", "radgraph", "StanfordAIMI/RRG_scorers: {}.tar.gz"),
    "chexbert": Source(
        "f1chexbert",
        "f1chexbert",
        "f1chexbert",
        "StanfordAIMI/RRG_scorers: chexbert.pth, and bert-base-uncased's tokenizer",
    ),
    "bertscore": Source("bert-score", "bert_score", "distilroberta-base", "{}"),
    "ratescore_entities": Source(
        "RaTEScore",
        "RaTEScore",
        "long",
        "Angelakeke/RaTE-NER-Deberta and FremyCompany/BioLORD-2023-C",
    ),
}


class NotAvailable(RuntimeError):
    """A package or its weights are not on this machine; the message says what and how to get it."""


def lacks(kind: str, model: str | None = None) -> str | None:
    """What is absent for `kind`, None where its package and weights are here."""
    source = SOURCES[kind]
    model = model or source.model
    if importlib.util.find_spec(source.module) is None:
        return (
            f"{kind}: expected the package {source.package}, got none; pip install {source.package}"
        )
    if _weights_here(kind, model):
        return None
    weights = source.weights.format(model)
    return (
        f"{kind}: expected weights on this machine ({weights}), got none; --download fetches them"
    )


def _weights_here(kind: str, model: str) -> bool:
    if kind == "bertscore":
        return Path(model).is_dir() or _in_hub_cache(model)
    if kind == "ratescore_entities":
        return all(map(_in_hub_cache, SOURCES[kind].weights.split(" and ")))
    from appdirs import user_cache_dir

    if kind == "chexbert":
        return _chexbert_weights().is_file() and _in_hub_cache("bert-base-uncased")
    version = importlib.metadata.version("radgraph")
    return os.path.isdir(os.path.join(user_cache_dir("radgraph"), version, model))


def _chexbert_weights() -> Path:
    from appdirs import user_cache_dir

    return Path(user_cache_dir("chexbert")) / "chexbert.pth"


def _fetch_chexbert() -> None:
    """f1chexbert 0.0.2 asks for them with an argument that huggingface_hub no longer has."""
    from huggingface_hub import hf_hub_download

    path = _chexbert_weights()
    if not path.is_file():
        hf_hub_download("StanfordAIMI/RRG_scorers", path.name, local_dir=path.parent)


def _in_hub_cache(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "config.json"), str)


@contextlib.contextmanager
def network(allowed: bool):
    """The hub's client online or offline, whatever the process was before."""
    import huggingface_hub.constants as constants

    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "0" if allowed else "1"))
    was, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def radgraph_value(output: dict) -> dict:
    """A cached graph of one output of the package: entities alone, without the report's text."""
    kept = ("tokens", "label", "relations")
    entities = output["entities"].items()
    return {"entities": {str(at): {name: entity[name] for name in kept} for at, entity in entities}}


def chexbert_value(classes, embedding) -> dict:
    """Of the 14 heads' classes (0 blank, 1 positive, 2 negative, 3 uncertain) and [CLS] [D]."""
    return {"labels": [CLASSES[at] for at in classes], "embedding": encode_embedding(embedding)}


def _radgraph(texts, model: str, device: str):
    from radgraph import RadGraph

    encoder = RadGraph(model_type=model, cuda=-1 if device == "cpu" else 0)
    for text in texts:
        output = encoder([text]).get("0")
        if output is not None:
            yield store.text_key(text), radgraph_value(output)


def _chexbert(texts, model: str, device: str):
    import torch
    from f1chexbert import F1CheXbert

    scorer = F1CheXbert(device=device)
    labeler = scorer.model.eval()
    for text in texts:
        tokens = scorer.tokenizer(
            " ".join(text.split()), truncation=True, max_length=512, return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            hidden = labeler.bert(tokens.input_ids, attention_mask=tokens.attention_mask)[0][:, 0]
            classes = [int(head(hidden).argmax(-1)) for head in labeler.linear_heads]
        yield store.text_key(text), chexbert_value(classes, hidden[0].float().cpu().numpy())


def _bertscore(pairs, model: str, device: str, batch: int = 64):
    from bert_score import BERTScorer

    known = model == BERTSCORE_PARAMS["model"]
    scorer = BERTScorer(
        model_type=model,
        num_layers=_layers(model),
        rescale_with_baseline=known,
        lang="en",
        device=device,
    )
    pairs = list(pairs)
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        meant, said = (
            [re.sub(" +", " ", text) for text in side] for side in zip(*part, strict=True)
        )
        found = zip(*(values.tolist() for values in scorer.score(said, meant)), strict=True)
        for pair, values in zip(part, found, strict=True):
            names = ("precision", "recall", "f1")
            yield store.pair_key(*pair), dict(zip(names, values, strict=True))


def _layers(model: str) -> int:
    """RadCliQ's layer for its model; the last one of a local directory's."""
    if model == BERTSCORE_PARAMS["model"]:
        return BERTSCORE_PARAMS["num_layers"]
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).num_hidden_layers


def _ratescore_entities(texts, model: str, device: str):
    from RaTEScore import RaTEScore
    from RaTEScore.score import process_embedding, run_ner

    scorer = RaTEScore(use_gpu=device != "cpu", affinity_matrix=model)
    for text in texts:
        ner = (scorer.idx2label, scorer.tokenizer, scorer.model, scorer.device, 1)
        entities = next(iter(run_ner([text], *ner)), [])
        vectors, _ = process_embedding(
            entities, scorer.eval_tokenizer, scorer.eval_model, scorer.device
        )
        value = {
            "entities": [list(entity) for entity in entities],
            "embeddings": [encode_embedding(vector) for vector in vectors.cpu().numpy()],
        }
        yield store.text_key(text), value


ENCODERS = {
    "radgraph": _radgraph,
    "chexbert": _chexbert,
    "bertscore": _bertscore,
    "ratescore_entities": _ratescore_entities,
}


def params_of(kind: str, model: str) -> dict:
    """What the values depend on, as the cache's header keeps it."""
    source = SOURCES[kind]
    params = {"package": source.package, "model": model}
    params["package_version"] = importlib.metadata.version(source.package)
    if kind == "bertscore":
        known = model == BERTSCORE_PARAMS["model"]
        params |= {"num_layers": _layers(model), "rescale_with_baseline": known, "idf": False}
    if kind == "ratescore_entities":
        from RaTEScore import scorer

        params["affinity"] = getattr(scorer, f"DEFAULT_MATRIX_{model.upper()}")
    return params


def to_annotate(reports: Reports, kind: str, have=()) -> list:
    """Distinct texts, or pairs (reference, generated), without an annotation in `have`."""
    pairs = list(zip(reports.references, reports.generated, strict=True))
    if kind in store.PAIR_KINDS:
        wanted = {store.pair_key(*pair): pair for pair in pairs if pair[1]}
    else:
        wanted = {store.text_key(text): text for pair in pairs for text in pair if text}
    return [item for key, item in wanted.items() if key not in have]


def annotate(reports, folder, kind, *, model=None, name=None, device="cpu", download=False) -> dict:
    """Adds the annotations of `kind` that the cache lacks.

    Args:
        reports: of reports.py; empty generations need none.
        folder, kind: of the cache.
        model, name: default the source's, and the model's name as annotator.
        device: "cpu" or "cuda".
        download: whether weights may be fetched.

    Returns:
        {"kind", "annotator", "had", "added", "failed"}: counts of texts or pairs.

    Raises:
        NotAvailable: the package or its weights are absent.
    """
    if kind not in SOURCES:
        raise ValueError(f"annotate: expected one of {', '.join(SOURCES)}, got {kind!r}")
    model = model or SOURCES[kind].model
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "-", Path(model).name)
    why = lacks(kind, model)
    if why and not (download and importlib.util.find_spec(SOURCES[kind].module)):
        raise NotAvailable(why)
    try:
        have = store.read(folder, kind, name)
    except FileNotFoundError:
        have = {}
    work = to_annotate(reports, kind, have)
    done = 0
    if work:
        with network(download):
            if download and kind == "chexbert":
                _fetch_chexbert()
            entries = ENCODERS[kind](work, model, device)
            done = store.append(folder, kind, name, params_of(kind, model), entries)
    total = len(to_annotate(reports, kind))
    return {
        "kind": kind,
        "annotator": name,
        "had": total - len(work),
        "added": done,
        "failed": len(work) - done,
    }
