"""Pairs of answers, and single labelled ones, from their files to the documents of rows."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.config import DataConfig
from engine.data.conversation import Conversation
from engine.data.formats.unpaired_preference import next_prompts
from engine.data.loader import DataloaderConfig, train_batches
from engine.data.preferences import read_labelled, read_pair
from engine.data.rows import RowSource, TokenRows
from engine.data.tokenizer import Tokenizer
from tests.engine.data.test_chat_templates import turns

Record = dict[str, Any]
ASKED = turns("Question?", "Answer.", "And?")
GOOD, BAD = turns("", "Good.")[1:], turns("", "Bad, and much longer.")[1:]
SETTINGS = {"packing": "best_fit", "long_document": "drop", "chat_template": "chatml"}


def pair(number: int) -> Record:
    asked = turns(f"Question {number}?", "An answer.", f"And {number}?")[: 3 if number % 3 else 1]
    good = f"Good {number}. " * (1 + number % 4)
    return {"prompt": asked, "chosen": turns("", good)[1:], "rejected": f"Bad {number}."}


@pytest.fixture
def pair_rows(
    rows_of: Callable[..., RowSource], chat_tokenizer: Tokenizer, tmp_path: Path
) -> Callable[..., TokenRows]:
    def pair_rows(records: list[Record], **settings: object) -> TokenRows:
        path = tmp_path / f"pairs{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        defaults = {"format": "preference", "tokenizer": chat_tokenizer, **SETTINGS}
        rows = rows_of("jsonl", path, **{**defaults, **settings})
        assert isinstance(rows, TokenRows)
        return rows

    return pair_rows


def texts(row: Row, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The text of each document of a row, and the text of its labels."""
    found: list[tuple[str, str]] = []
    for document in range(1, int(row.documents_T.max()) + 1):
        here = row.documents_T == document
        labels = [label for label in row.labels_T[here].tolist() if label != IGNORED_LABEL]
        ids = row.tokens_T[here].tolist()
        found.append((tokenizer.decode(ids, skip_special_tokens=False), tokenizer.decode(labels)))
    return found


def said(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_every_shape_of_a_pair_reads_as_two_conversations_with_one_prompt():
    shapes: list[Record] = [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": "Good.", "rejected": BAD[0]},
        {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
        {"prompt": "unread", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
    ]
    for shape in shapes:
        chosen, rejected = read_pair(shape)
        assert said(chosen) == ["Question?", "Answer.", "And?", "Good."]
        assert said(rejected) == ["Question?", "Answer.", "And?", "Bad, and much longer."]
    single = {"prompt": "Question?", "system": "Be kind.", "chosen": "Good.", "rejected": "Bad."}
    assert said(read_pair(single)[0]) == ["Be kind.", "Question?", "Good."]
    answered, is_desirable = read_labelled({"messages": [*ASKED, *GOOD], "label": False})
    assert said(answered) == ["Question?", "Answer.", "And?", "Good."] and not is_desirable


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "an answer without a 'prompt'"),
        ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same answer"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "ends with an empty answer"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' is int"),
        ({"chosen": [*ASKED, *GOOD], "rejected": [*ASKED[:1], *BAD]}, "different prompts"),
        ({"chosen": ASKED, "rejected": ASKED}, "ends with a turn of the user"),
    ],
)
def test_a_record_that_is_no_pair_is_refused_with_its_place_and_reason(
    record: Record, reason: str, pair_rows: Callable[..., TokenRows]
):
    with pytest.raises(ValueError, match=rf"line 2: .*{reason}.*on_bad_record = 'skip'"):
        pair_rows([pair(1), record])
    assert pair_rows([pair(1), record], on_bad_record="skip", seq_len=128).file.facts.num_bad == 1


def test_a_template_that_writes_other_prompts_for_other_answers_is_refused(
    pair_rows: Callable[..., TokenRows], tmp_path: Path
):
    template = tmp_path / "odd.jinja"
    template.write_text(
        "{{ messages[-1]['content'] | length }}{% for m in messages %}<|{{ m['role'] }}|>"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="'chosen' and 'rejected' become different tokens"):
        pair_rows([pair(1)], chat_template=str(template))
    template.write_text(
        "{% for m in messages %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
        "{% endfor %}"
    )
    same = {"prompt": "q?", "chosen": "good.", "rejected": "good. "}
    with pytest.raises(ValueError, match="'chosen' and 'rejected' become the same tokens"):
        pair_rows([same], chat_template=str(template))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_pair_is_two_documents_of_one_row_and_only_its_answers_are_labels(
    packing: str, pair_rows: Callable[..., TokenRows], chat_tokenizer: Tokenizer
):
    rows = pair_rows([pair(n) for n in range(30)], packing=packing, seq_len=120)
    seen: list[tuple[str, str]] = []
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        found = texts(row, chat_tokenizer)
        assert row.desirable_P is not None and row.desirable_P.tolist() == [1] * (len(found) // 2)
        for (good, chosen), (bad, rejected) in zip(found[::2], found[1::2], strict=True):
            assert chosen.startswith("Good") and rejected.startswith("Bad")
            assert good.split(chosen.strip()[:5])[0] == bad.split(rejected.strip()[:4])[0]
            seen.append((chosen.strip().split(".")[0], rejected.strip()))
        begins = (row.documents_T.diff(prepend=torch.tensor([PADDING_DOCUMENT])) > 0).nonzero()
        assert not row.positions_T[begins].any(), "positions restart with each answer"
    assert sorted(seen) == sorted((f"Good {n}", f"Bad {n}.") for n in range(30))
    assert not rows.one_document_per_row


def test_a_pair_longer_than_a_row_is_left_out_or_refused_and_never_cut(
    pair_rows: Callable[..., TokenRows], caplog: pytest.LogCaptureFixture
):
    long = {"prompt": "Q?", "chosen": "good " * 100, "rejected": "bad"}
    caplog.set_level("INFO", logger="tessera")
    assert pair_rows([pair(1), long], seq_len=100).rows_per_epoch == 1
    assert "1 documents longer than a row are left out" in caplog.text
    with pytest.raises(ValueError, match="1 documents are longer than a row"):
        pair_rows([pair(1), long], seq_len=100, long_document="error")
    with pytest.raises(ValueError, match=r"fill no row of 100; raise training\.seq_len$"):
        pair_rows([long], seq_len=100)
    for settings in ({"packing": "concat"}, {"long_document": "truncate"}):
        with pytest.raises(ValueError, match=r"must not be cut.*set data\.packing = 'best_fit'"):
            DataConfig(**{"format": "preference", **SETTINGS, **settings})  # pyright: ignore
    with pytest.raises(ValueError, match=r"data\.streaming = true knows no pairs"):
        DataConfig(format="preference", packing="none", long_document="drop", streaming=True)


def test_a_labelled_answer_lies_beside_its_prompt_with_another_answer(
    pair_rows: Callable[..., TokenRows], chat_tokenizer: Tokenizer
):
    records = [
        {"prompt": f"Question {n // 2}?", "completion": f"Answer {n}.", "label": n % 3 == 0}
        for n in range(6)
    ]
    rows = pair_rows(records, format="unpaired_preference", seq_len=400)
    found: dict[str, tuple[str, int, str]] = {}
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        assert row.desirable_P is not None
        documents = texts(row, chat_tokenizer)
        for place, label in enumerate(row.desirable_P.tolist()):
            (own, answer), (beside, other) = documents[2 * place : 2 * place + 2]
            prompt = own.split("Question ")[1][0]
            assert beside.split("Question ")[1][0] == prompt
            found[answer.strip()] = (prompt, label, other.strip())
    assert found == {
        f"Answer {n}.": (str(n // 2), 1 if n % 3 == 0 else -1, f"Answer {(n // 2 * 2 + 2) % 6}.")
        for n in range(6)
    }
    for prompts in product("ab", repeat=5):
        chats = [
            Conversation(messages=turns(prompt, "x"), tools=None, is_trained=[True])
            for prompt in prompts
        ]
        ring = [*range(5), *range(5)]
        assert next_prompts(chats) == [
            next((m for m in ring[n:] if prompts[m] != prompts[n]), n) for n in range(5)
        ]
    with pytest.raises(ValueError, match="'label' is 'yes'"):
        pair_rows([{**records[0], "label": "yes"}], format="unpaired_preference")


def test_batches_have_the_pairs_of_their_rows_and_fillers_have_none(
    pair_rows: Callable[..., TokenRows], tmp_path: Path, rows_of: Callable[..., RowSource]
):
    rows = pair_rows([pair(n) for n in range(12)], seq_len=250, shuffle=False)
    rows.reference_logps = torch.arange(24.0).view(12, 2).numpy()
    counted = [len(rows.documents(index)) for index in range(rows.rows_per_epoch)]
    assert len(set(counted)) > 1, "rows hold unequally many pairs"
    step = {"local_batch_size": 2, "global_batch_size": 3, "batch_degree": 2, "start_row": 0}
    loader = DataloaderConfig()
    for rank in range(2):
        batch = next(train_batches(rows, batch_rank=rank, dataloader=loader, **step))
        numbers = batch.rows_B.tolist()
        wanted = [[1] * counted[n] if n >= 0 else [] for n in numbers]
        assert batch.desirable_BP is not None and batch.reference_logps_BP2 is not None
        assert [[v for v in row if v] for row in batch.desirable_BP.tolist()] == wanted
        for place, number in enumerate(n for n in numbers if n >= 0):
            pairs = rows.documents(number)
            expected = torch.from_numpy(rows.reference_logps[pairs])
            assert torch.equal(batch.reference_logps_BP2[place, : len(pairs)], expected)
    parquet = tmp_path / "pairs.parquet"
    table = pa.Table.from_pylist([{**pair(n), "rejected": turns("", "No.")[1:]} for n in range(3)])
    pq.write_table(table, parquet)
    found = rows_of("parquet", parquet, seq_len=400, format="preference", **SETTINGS)
    assert found.row(0).desirable_P is not None
