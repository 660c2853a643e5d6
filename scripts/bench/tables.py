"""Records side by side: what a change did to each row, and the tables of README.md.

A table of a Markdown file stands between two comments, of which the first names the records that
it is made of; so the text and the records cannot drift apart.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.bench.measure import ROOT

LOSS_THAT_FAILS = 0.02
"""Share of the speed that a row may not lose from one record to the next."""

BLOCK = re.compile(
    r"(?P<head><!-- python -m scripts\.bench table (?P<records>[^\n]*?) -->\n)"
    r".*?(?P<tail><!-- end of table -->)",
    re.DOTALL,
)
RECORDS = ROOT / "scripts" / "bench" / "records"

Record = Mapping[str, Any]


def load_record(path: Path) -> Record:
    """Read a record, by its path or by its file name in `records/`."""
    found = path if path.is_file() else RECORDS / path.name
    if not found.is_file():
        raise ValueError(f"{path} is no file, here or in {RECORDS}; give a record's path or name")
    return json.loads(found.read_text())


def speeds(record: Record) -> dict[str, Record]:
    """Return the rows of a record by name, those that were trained and ended well."""
    found = {row["row"]: row for row in record.get("rows", []) if _outcome(row) == "ok"}
    return {name: row for name, row in found.items() if "tokens_per_second_per_gpu" in row}


def _outcome(row: Record) -> str:
    """Return how a row ended; records of before that was written hold what ended well."""
    return row.get("outcome", "ok" if "tokens_per_second_per_gpu" in row else "failed")


def compare(before: Record, after: Record) -> tuple[list[str], bool]:
    """Return a line for each row of both records, and whether none lost too much or failed."""
    old, new = speeds(before), speeds(after)
    named = {row["row"] for row in after.get("rows", [])}
    lines, is_good = [], True
    for name, was in old.items():
        if name not in named:
            lines.append(f"{name}: not in the second record")
            continue
        if name not in new:
            lines.append(f"{name}: trained before, failed in the second record: LOST")
            is_good = False
            continue
        ratio = new[name]["tokens_per_second_per_gpu"] / was["tokens_per_second_per_gpu"]
        is_lost = ratio <= 1 - LOSS_THAT_FAILS
        is_good = is_good and not is_lost
        lines.append(
            f"{name}: {was['tokens_per_second_per_gpu']:,.0f} -> "
            f"{new[name]['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, x {ratio:.3f}; "
            f"{was['peak_memory_gib']:.1f} -> {new[name]['peak_memory_gib']:.1f} GiB"
            f"{': LOST' if is_lost else ''}"
        )
    lines += [f"{name}: only in the second record" for name in new if name not in old]
    return lines, is_good and bool(old.keys() & named)


def table(records: Sequence[Record]) -> str:
    """Return a Markdown table of the rows of all records, and the machines they were taken on.

    Of rows of one name the last record's is taken. A row's floor and the fastest peer of a kind
    stand beside it, the peer from the row's own record, else from whichever has one.
    """
    floors = {row["row"]: row for record in records for row in record.get("floors", [])}
    peers = [row for record in records for row in record.get("peers", [])]
    kinds = list(dict.fromkeys(_engine(row) for row in peers if "tokens_per_second_per_gpu" in row))
    titles = ["work", "GPUs", "rows x tokens", "tokens/s/GPU", "MFU", "peak reserved GiB", "taken"]
    titles += [*(["of the floor"] if floors else []), *kinds]
    lines = [titles, ["---"] * len(titles)]
    rows = {row["row"]: (record, row) for record in records for row in record.get("rows", [])}
    for name, (record, row) in rows.items():
        cells = [name, str(row["gpus"]), _batch(row), *_figures(row)]
        cells.append(record["machine"]["date"])
        if floors:
            cells.append(_share_of_floor(row, floors.get(name)))
        for kind in kinds:
            near = _peer_cell(record.get("peers", []), name, kind)
            cells.append(near if near != "-" else _peer_cell(peers, name, kind))
        lines.append(cells)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\n{_machines(records)}\n"


def _engine(row: Record) -> str:
    """Return a peer and its version, without the attention that makes it several of a kind."""
    name = str(row["peer"]).removesuffix(" sdpa").removesuffix(" flex").removesuffix(" varlen")
    return f"{name} {row.get('version', '')}".strip()


def _batch(row: Record) -> str:
    """Return rows and tokens of a microbatch on one GPU, as the last options of the row say."""
    keys = ("local_batch_size", "seq_len")
    found = [re.findall(rf"--training\.{key}=(\d+)", row["command"])[-1] for key in keys]
    return f"{found[0]} x {int(found[1]):,}"


def _figures(row: Record) -> list[str]:
    ended = _outcome(row)
    if "tokens_per_second_per_gpu" not in row:
        return [ended, "-", "-"]
    return [
        f"{row['tokens_per_second_per_gpu']:,.0f}{'' if ended == 'ok' else f' ({ended})'}",
        f"{row['mfu']:.1%}",
        f"{row['peak_memory_gib']:.1f}",
    ]


def _share_of_floor(row: Record, floor: Record | None) -> str:
    if floor is None or "tokens_per_second_per_gpu" not in row:
        return "-"
    share = row["tokens_per_second_per_gpu"] / floor["floor_tokens_per_second_per_gpu"]
    return f"{share:.1%} of {floor['floor_tokens_per_second_per_gpu']:,.0f}"


def _peer_cell(peers: Iterable[Record], name: str, kind: str) -> str:
    found = [
        peer
        for peer in peers
        if (peer["row"], _engine(peer)) == (name, kind) and "tokens_per_second_per_gpu" in peer
    ]
    if not found:
        return "-"
    best = max(found, key=lambda row: row["tokens_per_second_per_gpu"])
    memory = best.get("peak_memory_gib")
    gib = f" ({memory:.1f} GiB)" if memory is not None else ""
    return f"{best['tokens_per_second_per_gpu']:,.0f}{gib}"


def _machines(records: Sequence[Record]) -> str:
    """Say what the records were taken on, each kind of machine once."""
    said: list[str] = []
    for record in records:
        machine = record["machine"]
        gpu = str(machine.get("gpus", "")).partition(" x ")[2] or machine.get("gpu", "no GPU")
        text = f"{gpu}, torch {machine['torch'].partition('+')[0]}"
        if (probes := record.get("probes", {})).get("matmul_8192_bf16_tflops"):
            text += f", bf16 product of 8192 at {probes['matmul_8192_bf16_tflops']:.0f} TFLOP/s"
        said.append(text)
    return "; ".join(dict.fromkeys(said)) + "."


def rewritten(text: str) -> str:
    """Return Markdown with each of its tables made anew from the records that it names."""

    def fresh(match: re.Match[str]) -> str:
        records = [load_record(Path(name)) for name in match["records"].split()]
        return f"{match['head']}{table(records)}{match['tail']}"

    return BLOCK.sub(fresh, text)
