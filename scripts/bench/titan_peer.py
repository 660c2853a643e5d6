"""torchtitan 0.2.2 on a row of ours, under torchrun: its trainer, model and settings, our tokens.

TESSERA_PEER_FOLDER names the folder that `peers.py` wrote. Only the model's sizes and the reading
of rows are ours: they are registered as a model of torchtitan's own under the name "bench".
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset


class StoredRows(IterableDataset[tuple[dict[str, Tensor], Tensor]]):
    """The rows of one data-parallel rank, in the order of its steps, over and over."""

    def __init__(self, folder: Path, *, rank: int, degree: int, local_batch_size: int) -> None:
        super().__init__()
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")
        every = local_batch_size * degree
        first = rank * local_batch_size
        starts = range(first, len(self.tokens), every)
        self.numbers = [start + i for start in starts for i in range(local_batch_size)]

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield inputs and labels, as torchtitan's own data sets do."""
        while True:
            for number in self.numbers:
                tokens, labels = (np.array(x[number]) for x in (self.tokens, self.labels))
                yield {"input": torch.from_numpy(tokens)}, torch.from_numpy(labels)


def stand_in_for_datasets() -> None:
    """Let torchtitan's text data sets be imported, which are not read, without that package."""
    if find_spec("datasets") is not None:
        return
    package, inner = ModuleType("datasets"), ModuleType("datasets.distributed")
    vars(package).update(Dataset=type("Dataset", (), {}), load_dataset=None, distributed=inner)
    vars(inner).update(split_dataset_by_node=None)
    sys.modules |= {"datasets": package, "datasets.distributed": inner}


def register(folder: Path) -> None:
    """Make the row's model known to torchtitan as "bench"."""
    llama = import_module("torchtitan.models.llama3")
    told = json.loads((folder / "model.json").read_text())

    def rows(dp_world_size: int, dp_rank: int, tokenizer: object, job_config: Any) -> Any:
        size = job_config.training.local_batch_size
        stored = StoredRows(folder, rank=dp_rank, degree=dp_world_size, local_batch_size=size)
        loader = import_module("torchtitan.components.dataloader").ParallelAwareDataloader
        return loader(stored, dp_rank, dp_world_size, batch_size=size)

    spec = replace(
        llama.get_train_spec(),
        model_args={"row": llama.TransformerModelArgs(**told["arguments"])},
        build_dataloader_fn=rows,
        build_tokenizer_fn=lambda job_config: SimpleNamespace(eos_id=told["eos_id"]),
        state_dict_adapter=None,
    )
    import_module("torchtitan.protocols.train_spec").register_train_spec("bench", spec)


def main() -> int:
    """Train as the command line says, which is torchtitan's."""
    stand_in_for_datasets()
    register(Path(os.environ["TESSERA_PEER_FOLDER"]))
    train = import_module("torchtitan.train")
    train.main(train.Trainer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
