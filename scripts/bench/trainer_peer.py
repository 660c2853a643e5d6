"""transformers' Trainer on a row of ours: `python -m scripts.bench.trainer_peer FOLDER`.

On one GPU: bf16 autocast over fp32 weights, SDPA, fused AdamW; Liger's kernels where it is told so.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class StoredRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens; the model shifts labels itself."""

    def __init__(self, folder: Path) -> None:
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens_T = torch.from_numpy(np.array(self.tokens[number]))
        return {"input_ids": tokens_T, "labels": tokens_T}


class Clock(TrainerCallback):
    """Notes when the device has finished each step, without waiting for it."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.marks: list[Any] = []

    def on_step_end(self, *arguments: object, **more: object) -> None:
        """Let the device note the time once it is here, or note it on the CPU."""
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the time from each step's end to the next one's; waits for the device."""
        pairs = list(itertools.pairwise(self.marks))
        if not self.on_gpu:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def train(folder: Path) -> dict[str, Any]:
    """Train, and return what is recorded."""
    told = json.loads((folder / "trainer.json").read_text())
    hf = {key: value for key, value in told["model"].items() if key != "architectures"}
    config = AutoConfig.for_model(**hf)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.float()
    clock, rows = Clock(on_gpu), StoredRows(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        bf16=True,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        per_device_train_batch_size=told["local_batch_size"],
        max_steps=told["steps"],
        learning_rate=told["lr"],
        logging_steps=told["steps"],
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_liger_kernel=told["uses_liger"],
        use_cpu=not on_gpu,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock])
    result = trainer.train()
    seconds = clock.seconds()[told["warmup_steps"] - 1 :]
    tokens = told["local_batch_size"] * rows.tokens.shape[1]
    speeds = [tokens / one for one in seconds]
    return {
        "steps_measured": len(speeds),
        "tokens_per_second_per_gpu": round(statistics.median(speeds), 1),
        "slowest_and_fastest": [round(min(speeds), 1), round(max(speeds), 1)],
        "peak_memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1) if on_gpu else None,
        "mean_loss": result.training_loss,
    }


def main() -> int:
    """Train the row of a folder, and write the result into it."""
    folder = Path(sys.argv[1])
    (folder / "result.json").write_text(json.dumps(train(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
