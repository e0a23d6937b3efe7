"""What can be saved of a damaged folder of shards: intact samples in a sound folder, the rest set aside.

A sample is saved where the bytes of all its parts are those that were written, by the CRC-32 of its row of
the index or the SHA-256 of its shard. Where neither is there to say so, its parts are looked for in the tar
itself and must be complete and right in themselves; such samples are named, since a flipped byte of a tensor
is not seen that way.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import write_atomic
from ..staging import Staging
from .contents import manifest_fault, row_fault
from .salvage import Salvage, salvage
from .shards import (
    FORMAT,
    TEXTS,
    ShardError,
    compact_json,
    histogram,
    is_shard_file,
    manifest_bytes,
    read_index,
    read_manifest,
    read_part,
)
from .store import LocalStore, is_url
from .stored_prompts import ROUTER_PROMPTS
from .tar_file import TarFile
from .verify import ShardCheck, check_shard, folder_faults, prompt_faults

Row = dict[str, Any]


@dataclass
class RepairReport:
    """What `repair` saves of a folder, and what not."""

    root: Path
    needed: bool = False
    """Whether there is anything to repair."""
    kept: dict[str, int] = field(default_factory=dict)
    """Samples per split."""
    lost: dict[str, str] = field(default_factory=dict)
    """Why, by the key of the sample or text."""
    unnamed: dict[str, int] = field(default_factory=dict)
    """How many more each shard held, by the manifest, whose keys nothing tells."""
    not_verifiable: list[str] = field(default_factory=list)
    """Keys of what is kept although no checksum says that it is unaltered."""
    rewritten: list[str] = field(default_factory=list)
    """Shards that are written anew with what is kept of them."""
    dropped: list[str] = field(default_factory=list)
    """Tars of which nothing is kept."""
    notes: list[str] = field(default_factory=list)
    quarantine: Path | None = None
    """Where everything damaged lies now; None where nothing was changed."""

    def __str__(self) -> str:
        if not self.needed:
            return f"{self.root}: nothing to repair"
        kept = ", ".join(f"{count} {split}" for split, count in sorted(self.kept.items()))
        count = len(self.lost) + sum(self.unnamed.values())
        lines = [f"{self.root}: {kept} samples kept, {count} samples or texts lost"]
        lines += [f"lost {key}: {reason}" for key, reason in self.lost.items()]
        lines += [f"lost {n} more of shard {name}, keys unknown" for name, n in self.unnamed.items()]
        lines += [f"kept, but not verifiable against an index: {key}" for key in self.not_verifiable]
        lines += [f"shard {name}: written anew" for name in self.rewritten]
        lines += [f"shard {name}: nothing of it is kept" for name in self.dropped]
        lines += [f"note: {note}" for note in self.notes]
        if self.quarantine is None:
            lines.append("nothing was changed; --apply does this, and deletes nothing")
        else:
            lines.append(f"what was damaged lies in {self.quarantine}")
        return "\n".join(lines)


@dataclass
class _Survey:
    """What a folder still says of itself, and what of it is sound."""

    store: LocalStore
    manifest: dict[str, Any]
    """The old one; where that is lost, what the samples tell."""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """What each shard should hold, by the index or by the tar itself."""
    checks: dict[str, ShardCheck] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    """Place in the old index, by key."""
    kept: list[Row] = field(default_factory=list)
    """Rows of the samples and texts that are kept, where they lie now."""


def repair(root: str | Path, *, apply: bool = False) -> RepairReport:
    """Save what is intact of a folder of shards; without `apply` only say what would be done.

    Sound shards stay as they are; of a damaged one the intact samples are written anew, under its name. The
    repaired folder takes the place of the old one by rename; what was damaged, and the old manifest and
    index, lie in `<root>.quarantine-<n>` beside it afterwards. The manifest's "repaired" says what was lost.
    Where the index is damaged each shard is held in memory once. Raises `WanmoeError` where no sample can be
    saved, on a URL, and where the folder cannot be written.
    """
    if is_url(root):
        raise WanmoeError(f"{root}: a folder is repaired where it lies; copy it to this machine first")
    folder = Path(root).resolve()
    if not folder.is_dir():
        raise WanmoeError(f"{root}: no such folder; a folder of shards is made by `wanmoe prepare`")
    report = RepairReport(folder)
    survey = _survey(folder, report)
    _select(survey, report)
    if not report.kept:
        raise WanmoeError(f"{root}: no sample can be saved; prepare the clips again")
    using = Counter(row["shard"] for row in survey.kept)
    whole = [
        name
        for name, check in survey.checks.items()
        if not check.faults and len(check.rows) == len(survey.rows[name]) == using[name]
    ]
    report.rewritten = [name for name in survey.checks if name in using and name not in whole]
    report.dropped = sorted({path.name for path in folder.glob("*.tar")} - using.keys())
    report.needed = bool(survey.faults or report.rewritten or report.dropped)
    if apply and report.needed:
        _replace(survey, report, whole)
    return report


def _survey(folder: Path, report: RepairReport) -> _Survey:
    store = LocalStore(folder)
    manifest, problem = _old_manifest(store)
    rows, trusted = _old_rows(store, manifest)
    survey = _Survey(store, manifest, order={row["key"]: place for place, row in enumerate(rows)})
    survey.faults = [problem] if problem else folder_faults(manifest, rows) if trusted else ["the index"]
    shards = {shard["name"]: shard for shard in manifest.get("shards", ())}
    there = {path.name: path.stat().st_size for path in sorted(folder.glob("*.tar"))}
    survey.rows = {name: [] for name in shards or there}
    by_shard: dict[str, list[Row]] = {}
    for row in rows:
        by_shard.setdefault(row["shard"], []).append(row)
    if trusted:
        survey.rows |= by_shard
    else:
        shards = _salvage(survey, by_shard, shards, report)
    if problem:
        report.notes.append(f"{problem}; the settings that it held are lost")
    if faults := prompt_faults(store, survey.manifest):
        survey.faults += faults
        survey.manifest.pop("router_prompts", None)
        report.notes.append(f"the router prompts are lost: {faults[0]}")
    total = sum(there.get(name, 0) for name in survey.rows)
    with tqdm(total=total, unit="B", unit_scale=True, desc="repair", disable=None, delay=1) as bar:
        for name, own in survey.rows.items():
            facts = shards.get(name, {"name": name, "bytes": there.get(name, 0), "sha256": ""})
            check = check_shard(store, facts, own, survey.manifest, bar.update)
            survey.checks[name] = check
            survey.faults += [str(fault) for fault in check.faults]
            _note_lost(own, check, report)
    return survey


def _old_manifest(store: LocalStore) -> tuple[dict[str, Any], str]:
    """The manifest; or {} and what is wrong with it."""
    try:
        manifest, _ = read_manifest(store)
    except ShardError as error:
        return {}, str(error)
    fault = manifest_fault(manifest)
    return ({}, f"manifest.json: {fault}") if fault else (manifest, "")


def _old_rows(store: LocalStore, manifest: Mapping[str, Any]) -> tuple[list[Row], bool]:
    """The rows of the index that can be read, and whether they are the ones that the manifest vouches for."""
    if manifest:
        try:
            return [row for row in read_index(store, manifest) if not row_fault(row)], True
        except ShardError:
            pass  # those of its rows that are unaltered are read below
    rows = []
    try:
        lines = store.read("index.jsonl").splitlines()
    except OSError:
        return [], False
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not row_fault(row):
            rows.append(row)
    return rows, False


def _salvage(
    survey: _Survey,
    known: Mapping[str, Sequence[Row]],
    shards: Mapping[str, Mapping[str, Any]],
    report: RepairReport,
) -> dict[str, Mapping[str, Any]]:
    """Find out from the tars themselves what they hold; returns the facts of the shards."""
    found: list[Salvage] = []
    facts = dict(shards)
    for name in survey.rows:
        own = known.get(name, ())
        try:
            data = survey.store.read(name)
        except OSError as error:
            report.lost |= {row["key"]: f"shard {name}: {error.strerror or error}" for row in own}
            _note_unnamed(name, len(own), facts, report)
            continue
        digest = hashlib.sha256(data).hexdigest()
        facts.setdefault(name, {"name": name, "bytes": len(data), "sha256": digest})
        unaltered = name in shards and digest == shards[name]["sha256"]
        saved = salvage(name, data, own, unaltered)
        found.append(saved)
        survey.rows[name] = saved.rows
        report.lost |= saved.lost
        report.not_verifiable += saved.not_verifiable
        _note_unnamed(name, len(saved.rows) + len(saved.lost), facts, report)
    if not survey.manifest:
        survey.manifest = _manifest_of(survey.store.root, found)
    return facts


def _manifest_of(folder: Path, found: Sequence[Salvage]) -> dict[str, Any]:
    """What the samples tell of a lost manifest."""
    codecs = sum((saved.codecs for saved in found), Counter[str]())
    dims = sum((saved.text_dims for saved in found), Counter[int]())
    images = sum((saved.image_latents for saved in found), Counter[bool]())
    if not codecs or not dims:
        raise WanmoeError(f"{folder}: no whole sample is in any of its tars; prepare the clips again")
    if len(codecs) > 1:
        raise WanmoeError(
            f"{folder}: the manifest is lost, and the samples are of {len(codecs)} codecs or text encoders; "
            f"move the shards of all but one away: {'; '.join(codecs)}"
        )
    codec, text_encoder = json.loads(next(iter(codecs)))
    return {
        "format": FORMAT,
        "codec": codec,
        "text_encoder": text_encoder,
        "normalised": True,
        "text_dim": dims.most_common(1)[0][0],
        "image_latents": images.most_common(1)[0][0],
    }


def _note_unnamed(
    name: str, named: int, facts: Mapping[str, Mapping[str, Any]], report: RepairReport
) -> None:
    missing = facts.get(name, {}).get("n_samples", 0) - named
    if missing > 0:
        report.unnamed[name] = missing


def _note_lost(own: Sequence[Row], check: ShardCheck, report: RepairReport) -> None:
    """Say why each row of a shard is lost that the check did not find sound."""
    sound = {id(row) for row in check.rows}
    reasons: dict[str | None, str] = {}
    for fault in check.faults:
        where = f"{fault.part}: " if fault.part else ""
        reasons.setdefault(fault.key, where + fault.reason)
    for row in own:
        if id(row) not in sound:
            reason = reasons.get(row["key"]) or f"shard {row['shard']}: {reasons.get(None, 'damaged')}"
            report.lost[row["key"]] = reason


def _select(survey: _Survey, report: RepairReport) -> None:
    """Keep the sound samples whose text is sound too, each key once, and the texts that they use."""
    manifest = survey.manifest
    sound = [row for check in survey.checks.values() for row in check.rows]
    texts = {row["key"] for row in sound if row["split"] == TEXTS}
    keys: set[str] = set()
    for row in sound:
        if row["split"] == TEXTS:
            continue
        if row["text"] not in texts:
            report.lost[row["key"]] = f"its text {row['text']} is lost"
        elif row["key"] in keys:
            report.notes.append(f"sample {row['key']} is there twice: the first is kept")
        else:
            keys.add(row["key"])
            survey.kept.append(row)
    used = {row["text"] for row in survey.kept}
    unused = sorted(texts - used)
    null, derived = manifest.get("null_text"), "shards" not in manifest
    if derived and len(unused) == 1:
        null = manifest["null_text"] = unused[0]  # the writer stores no other text that no sample uses
    if null not in texts:
        manifest.pop("null_text", None)
        if null is not None or derived:
            report.notes.append(
                "the text of no caption is lost: prepare again to train with dropped captions"
            )
    for row in sound:
        if row["split"] == TEXTS and row["key"] in used | {null} and row["key"] not in keys:
            keys.add(row["key"])
            survey.kept.append(row)
    report.kept = dict(Counter(row["split"] for row in survey.kept if row["split"] != TEXTS))
    report.not_verifiable = [key for key in report.not_verifiable if key in keys]
    report.lost = {key: reason for key, reason in report.lost.items() if key not in keys}


def _replace(survey: _Survey, report: RepairReport, whole: Sequence[str]) -> None:
    """Write the repaired folder beside the old one and put it in its place."""
    folder = report.root
    staging = Staging(folder, lambda name: True)
    quarantine = next(
        path
        for n in range(1, 10**6)
        if not (path := folder.with_name(f"{folder.name}.quarantine-{n}")).exists()
    )
    try:
        _write(survey, report, whole, staging.path, quarantine.name)
        os.rename(folder, quarantine)
        os.rename(staging.path, folder)
    except OSError as error:
        if not folder.exists() and quarantine.exists():
            os.rename(quarantine, folder)
        raise WanmoeError(f"{folder}: not repaired, it is as it was: {error.strerror or error}") from error
    finally:
        staging.discard()
    for name in [*whole, *([ROUTER_PROMPTS] if "router_prompts" in survey.manifest else [])]:
        (quarantine / name).unlink()  # the same file is in the repaired folder
    for entry in quarantine.iterdir():
        if not is_shard_file(entry.name):
            os.rename(entry, folder / entry.name)
    report.quarantine = quarantine


def _write(
    survey: _Survey, report: RepairReport, whole: Sequence[str], target: Path, quarantine: str
) -> None:
    """All files of the repaired folder."""
    rows: list[Row] = []
    shards: list[dict[str, Any]] = []
    for name in sorted({row["shard"] for row in survey.kept}):
        own = [row for row in survey.kept if row["shard"] == name]
        facts = {"name": name, "split": own[0]["split"], "bucket": own[0].get("bucket", "")}
        if name in whole:
            _link(survey.store.root / name, target / name)
            check = survey.checks[name]
            facts |= {"n_samples": len(own), "bytes": check.bytes, "sha256": check.sha256}
        else:
            own = [{**row} for row in own]
            facts |= _rewrite(survey.store, own, target / name)
        rows += own
        shards.append(facts)
    if "router_prompts" in survey.manifest:
        _link(survey.store.root / ROUTER_PROMPTS, target / ROUTER_PROMPTS)
    rows.sort(key=lambda row: survey.order.get(row["key"], len(survey.order)))
    samples = [row for row in rows if row["split"] != TEXTS]
    index = b"".join(compact_json(row) + b"\n" for row in rows)
    record = {
        "lost": dict(sorted(report.lost.items())),
        "n_lost": len(report.lost) + sum(report.unnamed.values()),
        "not_verifiable": sorted(report.not_verifiable),
        "quarantine": quarantine,
    }
    manifest = {
        **survey.manifest,
        "n_samples": dict(sorted(Counter(row["split"] for row in samples).items())),
        "n_texts": len(rows) - len(samples),
        "histogram": histogram(samples),
        "index": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        "shards": shards,
        "repaired": [*survey.manifest.get("repaired", ()), record],
    }
    write_atomic(target / "index.jsonl", lambda path: path.write_bytes(index))
    write_atomic(target / "manifest.json", lambda path: path.write_bytes(manifest_bytes(manifest)))


def _rewrite(store: LocalStore, rows: Sequence[Row], path: Path) -> dict[str, Any]:
    """Write the samples of a damaged shard to a new one; their rows then say where they lie in it."""
    tar = TarFile(path)
    try:
        for row in rows:
            parts = {}
            for part, place in sorted(row["parts"].items(), key=lambda item: item[1]["offset"]):
                parts[part] = place | {
                    "offset": tar.append(f"{row['key']}.{part}", read_part(store, row, part))
                }
            row["parts"] = parts
        digest = tar.close()
    finally:
        tar.abandon()
    return {"n_samples": len(rows), "bytes": tar.size, "sha256": digest}


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
